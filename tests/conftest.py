"""What every test shares: no network, few threads, fresh and printed seeds, and no skip that nobody expects."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch

# The only reasons for which a test may be skipped: what the machine lacks, never what is unfinished.
EXPECTED_SKIPS = ("no CUDA device", "nvcc not found", "compute-sanitizer not found")


def pytest_configure(config: pytest.Config) -> None:
    """Processes of pytest-xdist have a core each: threads of several would wait for each other."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of programs that the tests start


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection that is not a local socket file fails the test."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family == socket.AF_UNIX:
            connect(self, address)  # type: ignore[arg-type]
            return
        raise AssertionError(f"a test tried to connect to {address!r}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def offline_environment() -> dict[str, str]:
    """Environment for child processes: Python ones among them cannot open a connection."""
    guard = str(Path(__file__).parent / "no_network")
    paths = [guard, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """A fresh seed, set for torch and Python and printed with a failing test; PISCES_TEST_SEED repeats it."""
    value = int(os.environ.get("PISCES_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"PISCES_TEST_SEED={value}")
    before = random.getstate()
    random.seed(value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(value)
        yield value
    random.setstate(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name skips that are not expected."""
    for report in _unexpected_skips(terminalreporter):
        terminalreporter.write_line(f"UNEXPECTED SKIP {report.nodeid}: {report.longrepr}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A skip for any other reason fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and reporter is not None and _unexpected_skips(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _unexpected_skips(reporter: pytest.TerminalReporter) -> list[pytest.TestReport]:
    skipped = reporter.stats.get("skipped", [])
    return [report for report in skipped if not any(reason in str(report.longrepr) for reason in EXPECTED_SKIPS)]


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The bindings of the extension with the CUDA kernels compiled for the CPU."""
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/include").exists():
        pytest.skip("nvcc not found: the emulator needs CUDA's headers")
    script = Path(__file__).parent / "emulator" / "emulate.py"
    done = subprocess.run([sys.executable, str(script), "--module"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = done.stdout.splitlines()[-1]
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where tensors of the CUDA kernels' tests are: "cuda", or "cpu" with the emulator in the place of the driver."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield "cuda"
        return
    from pisces_kernels import _dispatch

    module = request.getfixturevalue("emulated")
    monkeypatch.setattr(_dispatch, "extension", lambda: module)
    monkeypatch.setattr(_dispatch, "why_not", lambda backend: None)
    monkeypatch.setattr(_dispatch, "kind", lambda device: "cuda")
    monkeypatch.setattr(_dispatch, "cuda_place", lambda device: (0, 0))
    monkeypatch.setenv("PK_SEED", str(torch.randint(10**6, ()).item()))
    yield "cpu"


@pytest.fixture
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide and without colours, so that output can be searched."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small tensors: threads that wait for each other cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""What every test shares: no network, few threads, fresh and printed seeds, and no skip that nobody expects."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch

# The only reasons for which a test may be skipped: what the machine lacks, never what is unfinished.
EXPECTED_SKIPS = ("no CUDA device", "nvcc not found")


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


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> Iterator[int]:
    """A fresh seed, set for torch and printed with a failing test; PISCES_TEST_SEED repeats it."""
    value = int(os.environ.get("PISCES_TEST_SEED", random.randrange(2**31)))
    print(f"PISCES_TEST_SEED={value}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(value)
        yield value


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

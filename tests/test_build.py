"""What was built: the extension is there and used, CUDA code when nvcc is there, no framework headers, packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import torch

import pisces_kernels
from pisces_kernels import _dispatch

ROOT = Path(__file__).resolve().parents[1]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def test_cpu_extension_is_loaded_and_used(monkeypatch):
    """No silent fallback: the default on CPU tensors calls into the extension."""
    assert pisces_kernels.why_not("cpu") is None
    info = pisces_kernels.build_info()
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["instruction_sets"][0] == "baseline"
    assert _dispatch.resolve("test", None, torch.device("cpu"), torch.float32) == "cpu"
    module = _dispatch.extension()
    calls = []
    kernel = module.cpu_sinkhorn_f32
    monkeypatch.setattr(module, "cpu_sinkhorn_f32", lambda *args: (calls.append(1), kernel(*args)))
    pisces_kernels.sinkhorn(torch.rand(3, 4), epsilon=0.1)
    assert calls == [1]


def test_instruction_set_can_be_chosen_and_a_wrong_one_is_refused():
    module = _dispatch.extension()
    try:
        assert module.use_instruction_set("baseline") == "baseline"
        assert module.build_info()["instruction_set"] == "baseline"
        with pytest.raises(ValueError, match="no instruction set 'mmx'"):
            module.use_instruction_set("mmx")
    finally:
        module.use_instruction_set(None)


def test_without_the_extension_the_default_warns_and_a_wish_fails():
    """A broken build must be seen: checked in a child process where the extension cannot be imported."""
    code = """
import sys, warnings
sys.modules["pisces_kernels._C"] = None
import torch, pisces_kernels
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    pisces_kernels.sinkhorn(torch.rand(2, 3), epsilon=0.1)
assert any("compiled CPU back end is missing" in str(w.message) for w in seen), seen
try:
    pisces_kernels.sinkhorn(torch.rand(2, 3), epsilon=0.1, backend="cpu")
except ValueError as error:
    assert "the extension is not there" in str(error)
else:
    raise SystemExit("backend='cpu' fell back silently")
assert "extension is not there" in pisces_kernels.why_not("cpu")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(NVCC is None, reason="nvcc not found")
def test_cuda_kernels_are_compiled_when_nvcc_is_there():
    info = pisces_kernels.build_info()
    assert info["cuda"] is True
    assert "90-real" in info["cuda_architectures"]


def test_cuda_back_end_says_why_not():
    reason = pisces_kernels.why_not("cuda")
    if torch.cuda.is_available() and pisces_kernels.build_info()["cuda"]:
        assert reason is None
        return
    assert "no CUDA device" in reason or "built without CUDA" in reason
    with pytest.raises(ValueError, match="backend 'cuda' cannot run"):
        pisces_kernels.sinkhorn(torch.rand(2, 3), epsilon=0.1, backend="cuda")


def test_no_framework_headers_in_the_sources():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"}]
    assert len(sources) >= 8
    for path in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path
    linked = Path(_dispatch.extension().__file__).read_bytes()
    assert b"libtorch" not in linked
    assert b"libc10" not in linked


def test_environment_report():
    done = subprocess.run([sys.executable, "-m", "pisces_kernels"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for word in (
        pisces_kernels.__version__,
        torch.__version__,
        "back end reference: available",
        "back end cpu: available",
    ):
        assert word in done.stdout
    assert re.search(r"back end cuda: (available|not available: \S+)", done.stdout)


def test_source_distribution_holds_everything_that_the_build_reads(tmp_path):
    """The wheel built from it is CI's business (a compilation takes minutes)."""
    code = f"from setuptools.build_meta import build_sdist; build_sdist(r'{tmp_path}')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    tracked = [path for folder in ("csrc", "pisces_kernels") for path in (ROOT / folder).rglob("*")]
    wanted = {str(p.relative_to(ROOT)) for p in tracked if p.suffix in {".h", ".cuh", ".cpp", ".cu", ".py", ".typed"}}
    missing = (wanted | {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"}) - names
    assert not missing
    assert not [name for name in names if name.endswith(".so")]


def test_the_versions_that_were_tested_are_within_the_bounds():
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text().lower(), re.MULTILINE))
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(required), re.MULTILINE))
    assert bounds.keys() >= {"torch", "diffusers", "transformers", "peft", "accelerate"}
    for name, bound in bounds.items():
        assert version(tested[name]) >= version(bound), name


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def test_a_build_says_what_it_lacks(tmp_path):
    """setup.py with an empty PATH and no build packages names every missing tool."""
    shutil.copy(ROOT / "setup.py", tmp_path / "setup.py")
    code = """
import importlib.util, setuptools
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {"pybind11", "cmake", "ninja"} else found(name, *rest)
setuptools.setup = lambda **kwargs: None
setuptools.__version__ = "65.0.0"
source = open("setup.py").read()
scope = {"__name__": "setup", "__file__": "setup.py"}
exec(compile(source, "setup.py", "exec"), scope)
"""
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode != 0
    for word in ("setuptools >= 77 (this is 65.0.0)", "pybind11", "cmake >= 3.24", "ninja", "a C++ compiler"):
        assert word in done.stderr
    assert "first run: pip install" in done.stderr

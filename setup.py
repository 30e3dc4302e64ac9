"""Builds the extension pisces_kernels._C with CMake and ninja; everything else is in pyproject.toml.

PyTorch is not needed to build. Environment: CMAKE_ARGS (extra CMake arguments, e.g. -DCUDA=OFF), MAX_JOBS.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MIN_SETUPTOOLS = 77
ROOT = Path(__file__).resolve().parent


def version_of(command: list[str]) -> tuple[int, ...]:
    """Version that a tool prints, or () when it cannot run."""
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ()
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(int(part) for part in found.groups()) if found else ()


def tool(name: str) -> list[str]:
    """Command of a build tool: the pip package of this interpreter first, then PATH."""
    if importlib.util.find_spec(name) is not None:
        return [sys.executable, "-m", name]
    return [shutil.which(name) or name]


def setuptools_version() -> int:
    """Major version of setuptools."""
    return int(setuptools.__version__.split(".")[0])


def missing_requirements() -> list[str]:
    """What the build lacks, in words; empty when it can start."""
    lacks = []
    if setuptools_version() < MIN_SETUPTOOLS:
        lacks.append(f"setuptools >= {MIN_SETUPTOOLS} (this is {setuptools.__version__})")
    if importlib.util.find_spec("pybind11") is None:
        lacks.append("pybind11 >= 3.0")
    if version_of([*tool("cmake"), "--version"]) < (3, 24):
        lacks.append("cmake >= 3.24")
    if not version_of([*tool("ninja"), "--version"]):
        lacks.append("ninja >= 1.11")
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(command and shutil.which(shlex.split(command)[0]) for command in compilers):
        lacks.append("a C++ compiler (GCC >= 11 or Clang >= 14; on Debian: apt install g++)")
    return lacks


def refuse_without_requirements() -> None:
    """Stop with a list of what the build lacks."""
    lacks = missing_requirements()
    if lacks:
        tools = "pip install 'setuptools>=77' 'pybind11>=3.0' 'ninja>=1.11' 'cmake>=3.24'"
        raise SystemExit(
            "pisces-kernels cannot be built here. Missing: " + "; ".join(lacks) + ".\n"
            f"Without --no-build-isolation pip brings the Python tools itself; with it, first run: {tools}"
        )


class CMakeBuild(build_ext):
    """Runs CMake in build/ and leaves the extension where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build the one extension there is."""
        refuse_without_requirements()
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # A cache that points at tools of an earlier build environment (pip's isolation deletes it) must not be reused.
        if build_dir.exists():
            shutil.rmtree(build_dir)
        build_dir.mkdir(parents=True)
        ninja = tool("ninja")
        ninja_path = ninja[0] if len(ninja) == 1 else shutil.which("ninja", path=_scripts()) or shutil.which("ninja")
        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            "-DCMAKE_BUILD_TYPE=Release",
            *([f"-DCMAKE_MAKE_PROGRAM={ninja_path}"] if ninja_path else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS") or str(min(8, os.cpu_count() or 1))
        subprocess.check_call([*tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir), *arguments])
        subprocess.check_call([*tool("cmake"), "--build", str(build_dir), "-j", jobs])


def _scripts() -> str:
    """Folders where pip puts scripts, in front of PATH."""
    import ninja

    return os.pathsep.join([ninja.BIN_DIR, str(Path(sys.executable).parent), os.environ.get("PATH", "")])


if setuptools_version() < MIN_SETUPTOOLS:
    # an older one already fails to read pyproject.toml, with a message that helps nobody
    refuse_without_requirements()

setup(ext_modules=[Extension("pisces_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})

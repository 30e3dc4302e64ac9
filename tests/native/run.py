"""Builds tests/native/kernels_test without Python and runs it: under sanitizers here, and compiled for aarch64.

    python tests/native/run.py             # ThreadSanitizer, then AddressSanitizer with UndefinedBehaviorSanitizer
    python tests/native/run.py --aarch64   # the NEON code, cross-compiled by Clang; run where qemu-aarch64 is found

The gate may draw one of the sanitizers: see tests/verified.py.
The cross compiler is the `ziglang` package of pip unless AARCH64_CXX names another one.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verified import only_a_part, passed

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native"
SANITIZE_MEMORY = "-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover=all -g"
# wide: alignment that only AVX-512 machine code needs is checked everywhere. Nothing is optimized away with -O0, and
# -O1 takes four times as long to compile.
SANITIZERS = {
    "thread": ["-DCMAKE_CXX_FLAGS=-fsanitize=thread -g", "-DOPTIMIZATION=-O1", "-DWIDE_EMULATION=ON"],
    "address": [SANITIZE_MEMORY, "-DOPTIMIZATION=-O0", "-DWIDE_EMULATION=ON"],
}


def tool(name: str) -> str:
    """A build tool: beside this interpreter first, then on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} was not found. Install the project's dev extra: pip install -e '.[dev]'")
    return found


def build(name: str, *options: str) -> Path:
    """Configure and build one variant: its executable."""
    folder = BUILD / name
    arguments = ["-DKERNELS_ONLY=ON", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *options]
    subprocess.run(
        [tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run([tool("cmake"), "--build", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder / "kernels_test"


def execute(name: str, *command: str) -> None:
    """Run a test executable; show what failed, or how many checks passed."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    for line in [line for line in lines if line.startswith("FAIL")] + done.stderr.splitlines():
        print(line)
    passed = sum(line.startswith("ok") for line in lines)
    print(f"{name}: {passed} checks passed, exit {done.returncode}", flush=True)
    if done.returncode != 0 or passed == 0:
        raise SystemExit(1)


def aarch64_compiler() -> str:
    """Path of a C++ compiler for aarch64 that links statically."""
    given = os.environ.get("AARCH64_CXX")
    if given:
        return given
    if subprocess.run([sys.executable, "-c", "import ziglang"], capture_output=True).returncode != 0:
        raise SystemExit("No cross compiler: pip install -c constraints.txt ziglang, or set AARCH64_CXX.")
    BUILD.mkdir(parents=True, exist_ok=True)
    wrapper = BUILD / "aarch64-c++"  # CMake wants one command
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang c++ -target aarch64-linux-musl "$@"\n')
    wrapper.chmod(0o755)
    return str(wrapper)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aarch64", action="store_true", help="cross-compile for aarch64 instead of sanitizing")
    if not parser.parse_args().aarch64:
        drawn = [random.choice(list(SANITIZERS))] if only_a_part("native") else list(SANITIZERS)
        for name in drawn:
            execute(name, str(build(name, *SANITIZERS[name])))
        if len(drawn) == len(SANITIZERS):
            passed("native")
        return
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    program = build("aarch64", *options, f"-DCMAKE_CXX_COMPILER={aarch64_compiler()}")
    print(f"aarch64: compiled {program.relative_to(ROOT)}")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        print("aarch64: NOT EXECUTED, qemu-aarch64 was not found (Debian: apt install qemu-user-static)")
        return
    execute("aarch64, emulated", emulator, str(program))


if __name__ == "__main__":
    main()

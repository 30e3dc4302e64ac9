"""Builds the CUDA kernels for the CPU emulator and runs their tests, without a GPU.

    python tests/emulator/emulate.py           # random schedules, AddressSanitizer, ThreadSanitizer; then known bugs,
                                               # put in one at a time: each has to be found
    python tests/emulator/emulate.py --module  # the Python bindings over the emulated kernels: prints the path

The gate may draw a part of the first: see tests/verified.py.
ThreadSanitizer is the race detector: in shared, cluster and global memory, a missing barrier is reported with its line.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from mutations import MUTATIONS, Mutation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from verified import only_a_part, passed

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulator"
DEVICES = ("sm_90", "sm_80", "tiny", "tiny_80")
CPU = ["-DOPTIMIZATION=-O1"]  # the CPU kernels are only compared with
SANITIZERS = {
    "plain": [],
    "address": ["-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover=all"],
    "thread": ["-DCMAKE_CXX_FLAGS=-fsanitize=thread"],
}
LIMIT = 300  # seconds for one run of one program
DRAWN = 6  # mutations


@dataclass(frozen=True)
class Run:
    """What one run of a test program said."""

    status: int
    text: str

    def reason(self) -> str:
        """The line that tells why it failed."""
        for line in self.text.splitlines():
            if line.startswith(("FAIL", "EMULATOR", "SUMMARY")) or "runtime error" in line or "ERROR:" in line:
                return line.strip()[:140]
        return f"status {self.status}"


def tool(name: str) -> str:
    """A build tool: beside this interpreter first, then on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} was not found. Install the project's dev extra: pip install -e '.[dev]'")
    return found


def build(name: str, *options: str, target: str = "all", kernels: Path = ROOT / "csrc" / "cuda") -> Path:
    """Configure and build one variant: its folder. kernels: the folder of the .cu files.

    Who comes while another process builds it waits: tests may run in several.
    """
    folder = BUILD / name
    BUILD.mkdir(parents=True, exist_ok=True)
    arguments = ["-DEMULATOR=ON", f"-DCUDA_KERNELS={kernels}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *CPU, *options]
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *arguments],
            [tool("cmake"), "--build", str(folder), "--target", target],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return folder


def execute(program: Path, device: str, seed: int) -> Run:
    """Run a test program once, its data and its schedule drawn from the seed."""
    environment = os.environ | {
        "PK_DEVICE": device,
        "PK_SEED": str(seed),
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=67",
    }
    try:
        done = subprocess.run([str(program), str(seed)], capture_output=True, text=True, env=environment, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return Run(124, f"FAIL no end after {LIMIT} s")
    return Run(done.returncode, done.stdout + done.stderr)


def test(name: str, seeds: list[int], devices: tuple[str, ...]) -> None:
    """Build one variant and run all programs; stop at the first that fails."""
    folder = build(name, *SANITIZERS[name])
    programs = sorted(path for path in folder.glob("test_*") if path.is_file() and os.access(path, os.X_OK))
    jobs = [(program, device, seed) for program in programs for device in devices for seed in seeds]
    checks = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (program, device, seed), run in zip(jobs, pool.map(lambda job: execute(*job), jobs), strict=True):
            passed = sum(line.startswith("ok") for line in run.text.splitlines())
            if run.status != 0 or passed == 0:
                print(f"{name}: {program.name} {seed} with PK_DEVICE={device} PK_SEED={seed}: {run.reason()}")
                print(run.text[-3000:])
                raise SystemExit(1)
            checks += passed
    print(f"{name}: {len(jobs)} runs of {len(programs)} programs, {checks} checks passed", flush=True)


def mutated(mutation: Mutation) -> Path:
    """A copy of the sources with the bug in it; only what differs is written, so that only that is compiled again."""
    copy = BUILD / "mutated" / "csrc"
    texts = {path: path.read_text() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    changed = ROOT / "csrc" / "cuda" / mutation.file
    if texts[changed].count(mutation.old) != 1:
        times = texts[changed].count(mutation.old)
        raise SystemExit(f"mutation '{mutation.name}': its text is {times} times in {mutation.file}")
    texts[changed] = texts[changed].replace(mutation.old, mutation.new)
    for path, text in texts.items():
        target = copy / path.relative_to(ROOT / "csrc")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text() != text:
            target.write_text(text)
    return copy / "cuda"


def find_mutations(seeds: list[int], mutations: Sequence[Mutation] = MUTATIONS) -> None:
    """Every mutation must be found by one way of running at least, with one of the seeds."""
    missed = []
    for mutation in mutations:
        kernels = mutated(mutation)
        found = {}
        for name in mutation.found_by:
            if found:
                break
            # In the folder of the sound kernels, whose CPU objects are there already.
            folder = build(name, *SANITIZERS[name], target=mutation.program, kernels=kernels)
            for device, drawn in product(mutation.devices, seeds):
                run = execute(folder / mutation.program, device, drawn)
                if run.status != 0:
                    found[name] = run.reason()
                    break
        print(f"{'found ' if found else 'MISSED'} {mutation.name}", flush=True)
        for name, reason in found.items():
            print(f"         {name}: {reason}")
        if not found:
            missed.append(mutation.name)
    print(f"{len(mutations) - len(missed)} of {len(mutations)} mutations found (seeds {seeds})")
    if missed:
        raise SystemExit(f"not found: {', '.join(missed)}")


def build_module() -> Path:
    """The extension with the kernels compiled for the CPU, for the tests in Python."""
    command = [sys.executable, "-m", "pybind11", "--cmakedir"]
    cmake_dir = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    options = ["-DEMULATED_MODULE=ON", f"-Dpybind11_DIR={cmake_dir}", f"-DPython_EXECUTABLE={sys.executable}"]
    (path,) = build("module", *options, target="_emulated").glob("_emulated*.so")
    return path


def whole(seeds: list[int]) -> None:
    """Everything, and a note of what was verified."""
    test("plain", seeds, DEVICES)
    test("address", seeds[:1], DEVICES)
    test("thread", seeds[:1], ("tiny", "tiny_80"))
    find_mutations(seeds)
    passed("emulator")


def part(seeds: list[int]) -> None:
    """All programs on all devices once, one of them under one sanitizer, and some mutations, drawn by the seed."""
    draw = random.Random(seeds[0])
    sanitizer = draw.choice(("address", "thread"))
    test("plain", seeds[:1], DEVICES)
    test(sanitizer, seeds[:1], (draw.choice(DEVICES if sanitizer == "address" else ("tiny", "tiny_80")),))
    known = [mutation for mutation in MUTATIONS if {"plain", sanitizer} & set(mutation.found_by)]
    find_mutations(seeds, draw.sample(known, DRAWN))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", action="store_true", help="build the Python module and print its path")
    parser.add_argument("--seed", type=int, help="of data, schedules and what is drawn (default: a new one)")
    arguments = parser.parse_args()
    if arguments.module:
        print(build_module())
        return
    seed = arguments.seed if arguments.seed is not None else random.randrange(1, 10**6)
    seeds = [seed, seed + 1, seed + 2]  # a schedule may hide a bug: the mutations get as many as the sound kernels
    print(f"--seed {seed}", flush=True)
    (part if only_a_part("emulator") else whole)(seeds)


if __name__ == "__main__":
    main()

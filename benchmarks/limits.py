"""Measured limits of one core: multiply-adds, exponentials, and loads from each level of memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("limits.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-march=native", "-fno-trapping-math", "-fno-math-errno")
DEFAULT_CACHES = {"L1": 32 << 10, "L2": 512 << 10, "L3": 16 << 20}


def cache_sizes() -> dict[str, int]:
    """Bytes of the data caches of the first core, from Linux; typical ones elsewhere."""
    sizes = dict(DEFAULT_CACHES)
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    return sizes


def measure() -> dict[str, Any]:
    """Limits {"flops", "exps", "loads": {level: bytes/s}, "how", "caches"}, per second, float32."""
    caches = cache_sizes()
    # half of a cache, so that nothing else pushes the data out of it; a shared third level may be much larger than
    # what one core gets of it
    bytes_of = {
        "L1": caches["L1"] // 2,
        "L2": caches["L2"] // 2,
        "L3": min(caches["L3"] // 2, 8 << 20),
        "RAM": 256 << 20,
    }
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])), None)
    if compiler is not None:
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "limits")
            try:
                subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(program)], check=True, capture_output=True)
                sizes = [str(bytes_of[level]) for level in ("L1", "L2", "L3", "RAM")]
                out = subprocess.run([str(program), *sizes], check=True, capture_output=True, text=True).stdout
            except (OSError, subprocess.CalledProcessError) as error:
                reason = f"{SOURCE.name} does not compile or run here: {error}"
            else:
                how = f"compiled kernels ({SOURCE.name}, {Path(compiler).name} {' '.join(FLAGS)})"
                return {**json.loads(out), "how": how, "caches": caches}
    else:
        reason = "there is no C++ compiler"
    return {**estimate(bytes_of), "how": f"estimates by torch, because {reason}", "caches": caches}


def estimate(bytes_of: dict[str, int]) -> dict[str, Any]:
    """The same by torch on one thread: lower than what a core can do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        square, line = torch.rand(1024, 1024), torch.rand(2048)
        out = torch.empty_like(line)
        loads = {}
        for level, size in bytes_of.items():
            data = torch.rand(size // 4)
            loads[level] = data.numel() * 4 / _best(data.sum)
        return {
            "flops": 2 * 1024**3 / _best(lambda: square @ square),
            "exps": line.numel() / _best(lambda: torch.exp(line, out=out)),
            "loads": loads,
        }
    finally:
        torch.set_num_threads(threads)


def _best(work: Callable[[], Any]) -> float:
    """Seconds of one call, best of several turns of about 20 ms."""
    started = time.perf_counter()
    work()
    calls = max(1, int(0.02 / max(time.perf_counter() - started, 1e-7)))
    turns = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(calls):
            work()
        turns.append((time.perf_counter() - started) / calls)
    return min(turns)

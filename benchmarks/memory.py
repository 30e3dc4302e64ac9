"""Peak memory of one contender in a fresh process: `python -m benchmarks.memory WORKLOAD CONTENDER` prints JSON.

The resident set's high-water mark, from just before the call to its end, minus the resident set before it: it sees
scratch memory and other libraries' memory, which PyTorch's allocator does not. Inputs, imports and a first call on a
tiny problem (for contenders that compile for their shapes: on the real one) come before. What a call returns counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import sweeps
from .contender import Contender
from .workloads import BY_NAME, Workload

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
COMPILES = ("torch.compile", "OTT", "KeOps")


def resident(name: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (most since the last reset)."""
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found.group(1)) << 10


def peak(workload: Workload, contender: Contender, smoke: bool = False) -> int:
    """Bytes that one call needs beyond its inputs."""
    tiny = workload.make(True)
    held = contender.prepare(tiny)
    held.result(held.call())
    problem = workload.make(smoke)
    prepared = contender.prepare(problem)
    if any(word in contender.name for word in COMPILES):
        prepared.call()
    del held, tiny
    return peak_of(prepared.call)


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that a call needs beyond what is resident before it, its result included."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # the high-water mark starts again at what is resident now
    before = resident("VmRSS")
    value = call()
    most = resident("VmHWM")
    del value
    return most - before


def in_fresh_process(workload: str, contender: str, smoke: bool = False) -> tuple[int | None, str]:
    """(bytes or None, why not)."""
    if not CLEAR.exists():
        return None, "needs Linux's /proc/self/clear_refs"
    command = [sys.executable, "-m", "benchmarks.memory", workload, contender, *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no message"])[-1][:160]
    return json.loads(done.stdout.splitlines()[-1])["bytes"], ""


def main() -> None:
    """Print {"bytes": ...}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("contender")
    parser.add_argument("--smoke", action="store_true")
    arguments: Any = parser.parse_args()
    name = arguments.workload
    workload = BY_NAME[name] if name in BY_NAME else sweeps.point(*name.split("="))
    (contender,) = (c for c in workload.contenders if c.name == arguments.contender)
    print(json.dumps({"bytes": peak(workload, contender, arguments.smoke)}))


if __name__ == "__main__":
    main()

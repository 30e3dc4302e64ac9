"""Run the suite: `python -m benchmarks` writes results.json, benchmarks.md and plots.

One process times all workloads on one core (pytest-benchmark); others measure memory, two threads and the sweeps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import limits, memory
from .machine import machine, versions
from .report import write_report
from .workloads import BY_NAME, WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", "JAX_PLATFORMS": "cpu",
}  # fmt: skip
MEMORY = {  # workloads whose peak memory is measured, and for whom
    "official_100": (
        "ours",
        "torch.compile exp-free",
        "torch log domain",
        "POT stabilized",
        "OTT log",
        "official loop",
    ),
    "video_128": ("ours", "torch.compile exp-free", "torch exp-free, mv", "POT stabilized"),
    "cloud_16384": ("ours", "torch.compile, chunked", "POT lazy"),
    "cost": ("ours", "torch.compile", "official loop"),
    "attention_backward": ("ours", "torch.compile exp-free", "official function"),
    "backward_implicit": ("ours, implicit", "OTT implicit", "autograd, torch"),
    "backward_unrolled": ("ours, unrolled", "OTT unrolled"),
}
SWEPT_MEMORY = {"M": ("ours", "torch.compile exp-free", "official loop"), "frames": ("ours", "official function")}


def say(what: str, started: float) -> None:
    """Print what comes next and the minutes so far."""
    print(f"[{(time.monotonic() - started) / 60:4.1f} min] {what}", flush=True)


def environment(smoke: bool) -> dict[str, str]:
    """One thread for everybody; in smoke runs torch.compile does nothing, to save its time."""
    extra = {"BENCH_SMOKE": "1", "TORCHDYNAMO_DISABLE": "1"} if smoke else {}
    return {**os.environ, **ONE_THREAD, **extra}


def commit() -> str:
    """Git commit of this tree, marked when files differ from it; "unknown" outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def timed(names: list[str], smoke: bool, rounds: int) -> tuple[list[dict[str, Any]], int]:
    """Records of the workloads, and the exit code of pytest: not 0 if ours was wrong anywhere."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "benchmark.json")
        cases = [f"{ROOT / 'benchmarks' / 'bench_workloads.py'}::test_workload[{name}]" for name in names]
        command = [
            sys.executable, "-m", "pytest", *cases, "-q", "-p", "no:cacheprovider", "--benchmark-disable-gc",
            "--benchmark-columns=median,iqr,rounds", "--show-capture=no", f"--benchmark-json={out}",
        ]  # fmt: skip
        code = subprocess.run(command, cwd=ROOT, env=environment(smoke) | {"BENCH_ROUNDS": str(rounds)}).returncode
        if not out.exists():
            raise SystemExit("benchmarks: pytest wrote no results; see its output above.")
        cases_run = json.loads(out.read_text())["benchmarks"]
    return [case["extra_info"]["workload"] for case in cases_run if "workload" in case["extra_info"]], code


def child(module: str, *arguments: str, smoke: bool) -> dict[str, Any]:
    """JSON that another module of the suite prints in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, *(["--smoke"] if smoke else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment(smoke), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def add_memory(records: list[dict[str, Any]], smoke: bool) -> None:
    """Peak memory of the chosen contenders, each in a fresh process."""
    for record in records:
        for contender in record["contenders"]:
            if contender["status"] == "ok" and contender["name"] in MEMORY.get(record["name"], ()):
                contender["memory"], why = memory.in_fresh_process(record["name"], contender["name"], smoke)
                if why:
                    contender["memory_reason"] = why


def add_swept_memory(swept: dict[str, Any]) -> None:
    """Peak memory at the points of the sweeps."""
    for axis, names in SWEPT_MEMORY.items():
        for point in swept.get(axis, {"points": []})["points"]:
            for contender in point["contenders"]:
                if contender["status"] == "ok" and contender["name"] in names:
                    contender["memory"], _ = memory.in_fresh_process(f"{axis}={point['x']}", contender["name"])


def main() -> int:
    """Measure, write, and return 1 if ours was wrong anywhere."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of benchmarks.md and benchmarks/")
    parser.add_argument("--only", nargs="+", choices=sorted(BY_NAME), metavar="WORKLOAD", help="some workloads only")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of every workload instead of its own number")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: checks the suite, not the machine")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-threads", action="store_true")
    parser.add_argument("--no-sweeps", action="store_true")
    arguments = parser.parse_args()
    smoke, started = arguments.smoke, time.monotonic()
    names = arguments.only or [workload.name for workload in WORKLOADS]
    every_core = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    os.environ.update(environment(smoke))
    if every_core is not None:  # libraries that count cores to choose their threads see one
        os.sched_setaffinity(0, {max(every_core)})
    say("limits of the core", started)
    results: dict[str, Any] = {
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit(), "smoke": smoke, "machine": machine(), "versions": versions(), "limits": limits.measure(),
    }  # fmt: skip
    say(f"{len(names)} workloads on one core", started)
    results["workloads"], code = timed(names, smoke, arguments.rounds)
    if not arguments.no_memory:
        say("peak memory", started)
        add_memory(results["workloads"], smoke)
    if not arguments.no_sweeps:
        say("sweeps", started)
        results["sweeps"] = child("sweeps", smoke=smoke)
        if not arguments.no_memory and not smoke:
            say("peak memory of the sweeps", started)
            add_swept_memory(results["sweeps"])
    if every_core is not None:
        os.sched_setaffinity(0, every_core)
    if not arguments.no_threads and len(every_core or ()) >= 2:
        say("two threads", started)
        for name, speed in child("threads", *names, smoke=smoke).items():
            for record in results["workloads"]:
                if record["name"] == name and record["contenders"][0]["status"] == "ok":
                    record["threads"] = speed
    results["minutes"] = round((time.monotonic() - started) / 60, 1)
    write_report(results, arguments.output)
    say(f"wrote {arguments.output / 'benchmarks.md'}", started)
    return 1 if code else 0


if __name__ == "__main__":
    raise SystemExit(main())

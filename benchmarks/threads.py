"""One thread against two, ours: `python -m benchmarks.threads [WORKLOAD ...]` prints JSON.

Calibrated workloads are left out: what they run is fitted in the run that times them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from .workloads import WORKLOADS, Workload

ROUNDS = 7


def scaling(workload: Workload, smoke: bool, rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of a call with one and with two threads, in turns."""
    contender = workload.contenders[0]
    prepared = contender.prepare(workload.make(smoke))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(-1, rounds):
        for threads, times in seconds.items():
            torch.set_num_threads(threads)
            started = time.perf_counter()
            for _ in range(workload.calls):
                prepared.call()
            if turn >= 0:  # the first turn wakes the threads
                times.append((time.perf_counter() - started) / workload.calls)
    one, two = (statistics.median(times) for times in seconds.values())
    return {"one": one, "two": two, "speedup": one / two}


def main() -> None:
    """Print {workload: {"one", "two", "speedup"}}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workloads", nargs="*")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    chosen = [w for w in WORKLOADS if not w.calibrate and (not arguments.workloads or w.name in arguments.workloads)]
    rounds = 1 if arguments.smoke else ROUNDS
    print(json.dumps({w.name: scaling(w, arguments.smoke, rounds) for w in chosen}))


if __name__ == "__main__":
    main()

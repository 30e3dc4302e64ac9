"""pytest-benchmark cases, one a workload: `pytest benchmarks/bench_workloads.py -k official`.

pytest-benchmark's own statistics are those of ours; every round first gives each peer its turn (in `setup`).
`extra_info` holds the whole record, peers and errors included.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest

from .measure import Comparison
from .workloads import WORKLOADS, Workload

SMOKE = os.environ.get("BENCH_SMOKE") == "1"
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "0"))  # 0: what the workload says


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_workload(workload: Workload, benchmark: Any) -> None:
    """Time ours and the peers in turns; fail if ours is wrong."""
    comparison = Comparison(workload, smoke=SMOKE)
    ours = comparison.entries[0]
    rounds = 2 if SMOKE else ROUNDS or workload.rounds

    def peers() -> None:
        for entry in comparison.others():
            comparison.turn(entry)

    if ours.status == "ok":
        gc.collect()
        benchmark.pedantic(lambda: comparison.turn(ours), setup=peers, rounds=rounds)
    else:
        benchmark.pedantic(lambda: None)  # keeps the record of what went wrong; its time is not used
    record = comparison.finish()
    benchmark.extra_info["workload"] = record | least_work(comparison)
    wrong = [
        c["name"] + ": " + c["reason"] for c in record["contenders"] if c["family"] == "ours" and c["status"] != "ok"
    ]
    assert not wrong, wrong


def least_work(comparison: Comparison) -> dict[str, Any]:
    """Counted operations of a workload that has a fixed number of iterations."""
    count = comparison.workload.work
    if count is None:
        return {}
    return {"work": vars(count(comparison.problem, getattr(comparison.problem, "n_iters", 1)))}

"""The budget of the Triton kernels' machine code: that it holds what was aimed at, and that it can be exceeded.

`make test-triton` compiles every case for every target and compares with it; here one is enough.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_static, triton_static
from benchmarks.triton_static import CASES, TARGETS

pytest.importorskip("triton", reason="no CUDA device without triton")


@pytest.fixture(scope="module")
def budget() -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(triton_static.BUDGET.read_text())


def test_every_case_is_in_the_budget_for_every_target(budget):
    assert {name.partition(", ")[2] for name in budget} == set(CASES)
    assert all(sorted(archs) == sorted(TARGETS) for archs in budget.values())


def test_nothing_spills(budget):
    spilled = [(name, arch) for name, archs in budget.items() for arch, use in archs.items() if use["spills"] > 0]
    assert spilled == []


def test_the_loops_that_take_the_time_are_short(budget):
    def on_sm_90(name: str) -> float:
        return budget[name]["sm_90"]["instructions"]

    assert 5 < on_sm_90("sinkhorn_kernel, dense 40 x 2049") <= 17
    assert 4 < on_sm_90("solve_kernel, points bf16") <= 6
    assert 4 < on_sm_90("solve_kernel, points tf32") <= 6


def test_a_solve_is_one_launch_and_within_the_budget(budget):
    with triton_static.launches_compile("sm_90") as compiled:
        CASES["dense 40 x 2049, exact mass"].call()
    assert [kernel.metadata.name for kernel in compiled] == ["sinkhorn_kernel"]
    name = "sinkhorn_kernel, dense 40 x 2049, exact mass"
    measured = triton_static.usage(compiled[0])
    kept = {name: {"sm_90": budget[name]["sm_90"]}}
    assert gpu_static.violations({name: {"sm_90": measured}}, kept) == []
    more = replace(measured, spills=1, registers=measured.registers + 1)
    found = "\n".join(gpu_static.violations({name: {"sm_90": more}}, {name: {"sm_90": asdict(measured)}}))
    assert f"{name} on sm_90: spills 1, the budget is 0" in found
    assert f"{name} on sm_90: registers" in found

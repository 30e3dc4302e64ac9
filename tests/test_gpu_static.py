"""The budget of the compiled CUDA kernels, and that it can be exceeded."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_static
from pisces_kernels import build_info


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, gpu_static.Usage]]:
    info = build_info()
    if info is None or not info["cuda"]:
        pytest.skip("nvcc not found when the extension was built")
    return gpu_static.measure(gpu_static.extension())


def test_kernels_are_within_the_budget(measured):
    assert gpu_static.violations(measured, json.loads(gpu_static.BUDGET.read_text())) == []


def test_no_kernel_spills_and_the_solvers_loops_are_short(measured):
    for archs in measured.values():
        assert sorted(archs) == ["100", "120", "80", "90"]
        assert all(use.spills == use.stack == 0 for use in archs.values())
    assert measured["sinkhorn_kernel<40>"]["90"].instructions <= 4
    assert measured["attention_kernel<40>"]["90"].instructions <= 4


def test_the_loop_over_pairs_of_points_is_short_and_has_one_exponential(measured):
    loop = measured["points_kernel<(Precision)2, true>"]["90"]
    assert 4 < loop.instructions <= 6
    assert loop.special == 1


def test_what_exceeds_or_misses_the_budget_is_named(measured):
    budget = {kernel: {arch: asdict(use) for arch, use in archs.items()} for kernel, archs in measured.items()}
    budget["sinkhorn_kernel<40>"]["90"]["registers"] -= 1
    budget["sinkhorn_kernel<0>"]["80"]["instructions"] -= 0.01
    budget["sinkhorn_kernel<32>"]["90"]["blocks"] += 1
    budget["points_kernel<(Precision)0, false>"]["90"]["conflicts"] -= 1
    del budget["sinkhorn_kernel<16>"]
    budget["gone<1>"] = {"90": {"registers": 1}}
    found = "\n".join(gpu_static.violations(measured, budget))
    assert "sinkhorn_kernel<40> on sm_90: registers" in found
    assert "sinkhorn_kernel<0> on sm_80: instructions" in found
    assert "sinkhorn_kernel<32> on sm_90: blocks" in found
    assert "points_kernel<(Precision)0, false> on sm_90: conflicts" in found
    assert "sinkhorn_kernel<16> on sm_120: not in the budget" in found
    assert "gone<1> on sm_90: in the budget, but not compiled" in found


def test_loops_are_found_in_machine_code():
    code = [
        (0, "MOV", ""),
        (16, "FFMA", ""),
        (32, "MUFU.EX2", ""),
        (48, "BRA", " 0x10"),
        (64, "BRA", " 0x0"),
        (80, "EXIT", ""),
    ]
    (inner,) = gpu_static.innermost(gpu_static.spans(code))
    assert gpu_static.counted(code)(inner) == {"FFMA": 1, "MUFU": 1, "BRA": 1}

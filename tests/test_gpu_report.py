"""The predictions for GPUs: laws of the model, what is counted of peers, and the targets of our counts."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_report
from benchmarks.gpu_report import DEVICES, Counter, Work

A100, H100, _ = DEVICES


def test_a_bound_is_the_longest_resource_and_the_waiting():
    work = Work(launches=1, bytes=3.35e9, exps=1e6)
    seconds, bound = work.predicted(H100)
    assert bound == "memory"
    assert seconds == pytest.approx(1e-3 + gpu_report.LAUNCH)
    more, _ = replace(work, exps=1e13).predicted(H100)
    assert more > seconds
    waits, bound = replace(work, launches=10_000).predicted(H100)
    assert bound == "launches"
    assert waits == pytest.approx(1e-3 + 10_000 * gpu_report.LAUNCH)
    assert work.times(7).bytes == 7 * work.bytes


def test_operators_of_a_peer_are_counted():
    x, y = torch.rand(300, 40), torch.rand(40, 50)
    with Counter(l2=0) as counter:
        product = x @ y  # one launch
        product.T.view(50, 300).exp()  # views are none
        product.sum().item()  # a launch, and the host reads
    work = counter.work
    assert (work.launches, work.host_reads) == (4, 1)
    assert work.exps == 300 * 50
    assert work.flops == 2 * 300 * 40 * 50
    assert work.bytes == 4 * (300 * 40 + 40 * 50 + 3 * 300 * 50 + 300 * 50 + 1)
    with Counter(l2=1e9) as cached:
        x @ y
    assert cached.work.bytes == 0  # stays in the L2 cache


def test_the_counted_kernels_meet_their_targets():
    n_problems, n_rows, n_cols, n_iters = gpu_report.W1
    solve = gpu_report.dense(n_problems, n_rows, n_cols, n_iters, H100)
    assert (solve.launches, solve.host_reads) == (1, 0)
    assert solve.exps / (n_problems * n_rows * n_cols * n_iters) < 0.1  # none an element, two a column
    assert solve.predicted(H100)[0] / n_iters < 2e-6 * 1.05
    samples, heads, rows, cols, dim = gpu_report.LAYER
    layer = gpu_report.attention(gpu_report.LAYER, gpu_report.STOP, H100)
    needed = 4 * samples * ((rows + cols) * dim + 2 * heads * rows * cols)
    assert layer.launches == 2
    assert layer.bytes <= 1.2 * needed


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_fewer_digits_are_not_slower(precision):
    times = [gpu_report.points(*gpu_report.W4, name, A100).predicted(A100)[0] for name in (precision, "bf16")]
    assert times[1] <= times[0]


def test_the_triton_kernels_stand_beside_the_others():
    n_problems, n_rows, n_cols, n_iters = gpu_report.W1
    ours, triton = gpu_report.dense(*gpu_report.W1, H100), gpu_report.dense_triton(*gpu_report.W1, H100)
    assert triton.instructions / (n_problems * n_rows * n_cols * n_iters) <= 17
    assert triton.host_reads == 0
    assert triton.predicted(H100)[0] > ours.predicted(H100)[0]  # K is not on chip
    n_points, n_others, _, n_iters = gpu_report.W4
    for precision in ("tf32", "bf16"):
        streamed = gpu_report.points_triton(*gpu_report.W4, precision, H100)
        assert streamed.instructions / (2 * n_points * n_others * n_iters) <= 6
    assert "ours, Triton" in gpu_report.attention_rows(H100)

"""The compiled `sinkhorn` gives the same bits for any number of threads, whether they share problems or one problem."""

from __future__ import annotations

import pytest
import torch
from problems import random_costs, random_mask, random_weights

from pisces_kernels import _dispatch, sinkhorn

KINDS = {
    "balanced": {"epsilon": 0.05},
    "tau": {"epsilon": 0.05, "tau": 0.9},
    "semi": {"epsilon": 0.01, "tau": (1.0, 0.5)},
    "mass": {"epsilon": 0.05, "mass": 0.63},
    "scalings absorbed": {"epsilon": 0.005},
    "log domain": {"epsilon": 0.001, "tau": 0.5},
    "mass in the log domain": {"epsilon": 0.0005, "mass": 0.63},
    "anderson": {"epsilon": 0.02, "acceleration": "anderson"},
    "anderson, mass": {"epsilon": 0.02, "mass": 0.9, "acceleration": "anderson"},
}
# One problem is cut into chunks of 2^16 entries: pairs of panels, single panels, and rows longer than a chunk.
SHAPES = [(40, 4100), (300, 513), (2100, 70), (2, 150_001)]
THREADS = (1, 2, 3, 5)


def solve_with(threads: int, cost, *weights, **options):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return sinkhorn(cost, *weights, backend="cpu", max_iters=14, tol=0.0, **options)
    finally:
        torch.set_num_threads(before)


def same_bits(cost, *weights, **options):
    one = solve_with(1, cost, *weights, **options)
    assert torch.isfinite(one.f).all()
    for threads in THREADS[1:]:
        other = solve_with(threads, cost, *weights, **options)
        for name in ("f", "g", "residual", "n_iters"):
            assert torch.equal(getattr(one, name), getattr(other, name)), (name, threads, tuple(cost.shape))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_long_problem(kind, dtype):
    for shape in SHAPES:
        cost = random_costs(1, *shape, dtype=dtype)
        weights = [random_weights(1, size, dtype=dtype) for size in shape]
        same_bits(cost, *weights, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_problems_left_over(kind):
    """Five problems: of two threads each has two for itself and both share the last."""
    cost = random_costs(5, 40, 4100, dtype=torch.float32)
    same_bits(cost, row_mask=random_mask(5, 40), col_mask=random_mask(5, 4100), **KINDS[kind])


def test_warm_starts():
    cost = random_costs(1, 40, 4100, dtype=torch.float32)
    same_bits(cost, epsilon=0.01, f_init=torch.rand(1, 40), g_init=torch.rand(1, 4100))
    same_bits(cost, epsilon=0.01, f_init=torch.rand(1, 40))


def test_every_instruction_set():
    module = _dispatch.extension()
    cost = random_costs(1, 40, 4100, dtype=torch.float32)
    try:
        for instruction_set in module.build_info()["instruction_sets"]:
            module.use_instruction_set(instruction_set)
            for kind in KINDS.values():
                same_bits(cost, **kind)
    finally:
        module.use_instruction_set(None)


def test_another_order_of_summation_is_noticed():
    """Negative control: the columns in another order change the last bits."""
    cost = random_costs(1, 40, 4100, dtype=torch.float32)
    order = torch.randperm(4100)
    one, other = solve_with(1, cost, epsilon=0.05), solve_with(1, cost[..., order], epsilon=0.05)
    assert not torch.equal(one.f, other.f)
    assert torch.allclose(one.f, other.f, atol=2e-6)

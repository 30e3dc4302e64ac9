"""float32 against float64 on the CPU back end, for every epsilon from 1 to 0.001 on costs of range 1.

Potentials may differ by 2e-6 in units of the cost, plans by max(2e-6, 3e-7 / epsilon) of their largest entry: what
float32 can represent. Both solves see the same float32 numbers and run the same iterations.
"""

from __future__ import annotations

import pytest
import torch
from problems import random_costs, random_mask, random_weights, token_grid, token_problem

from pisces_kernels import _dispatch, sinkhorn, token_cost

POTENTIALS = 2e-6
EPSILONS = [1.0, 0.1, 0.05, 0.01, 0.005, 0.002, 0.001]
KINDS = {
    "balanced": {},
    "tau": {"tau": 0.9},
    "strongly damped": {"tau": 0.3},
    "semi": {"tau": (1.0, 0.5)},
    "mass": {"mass": 0.63},
    "most of the mass": {"mass": 0.95},
}
SMALL = [(1, 1), (1, 37), (29, 1), (7, 33), (40, 257), (65, 31)]
LARGE = [(1, 2049), (2049, 1), (40, 2049), (300, 513)]


def plan_tolerance(epsilon: float) -> float:
    return max(2e-6, 3e-7 / epsilon)


def compare(cost, epsilon, *weights, **options):
    """(largest difference of a potential, largest difference of a plan in units of its largest entry)"""
    narrow = sinkhorn(cost, *weights, epsilon=epsilon, backend="cpu", **options)
    wide = sinkhorn(cost.double(), *(w.double() for w in weights), epsilon=epsilon, backend="cpu", **options)
    assert narrow.f.dtype == torch.float32
    potentials = max((narrow.f - wide.f).abs().max().item(), (narrow.g - wide.g).abs().max().item())
    plan = wide.plan()
    gaps = (narrow.plan() - plan).abs().amax((-2, -1)) / plan.amax((-2, -1))
    return potentials, gaps.max().item()


def check(cost, epsilon, *weights, name, **options):
    potentials, plan = compare(cost, epsilon, *weights, **options)
    assert potentials < POTENTIALS, (name, tuple(cost.shape), epsilon, potentials)
    assert plan < plan_tolerance(epsilon), (name, tuple(cost.shape), epsilon, plan)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_every_kind_and_size(epsilon):
    for shape in SMALL + LARGE:
        cost = random_costs(2, *shape, dtype=torch.float32)
        weights = [random_weights(2, size, dtype=torch.float32) for size in shape]
        weights = [w / w.sum(-1, keepdim=True) for w in weights]
        for name, kind in KINDS.items():
            check(cost, epsilon, *weights, name=name, max_iters=50, tol=0.0, **kind)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_masks_and_long_runs(epsilon):
    cost = random_costs(3, 23, 70, dtype=torch.float32)
    masks = {"row_mask": random_mask(3, 23), "col_mask": random_mask(3, 70)}
    for name, kind in KINDS.items():
        check(cost, epsilon, name=name, max_iters=300, tol=0.0, **masks, **kind)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_cost_of_tokens(epsilon):
    """The official cost, 8 frames of 16 x 16 patches and a CLS token."""
    frame_index, positions = token_grid(8, 16, 16)
    text, video, attention = token_problem(1, 2, 40, 2049, dtype=torch.float32)
    cost = token_cost(text, video, attention, frame_index, positions)[0]
    for name, kind in KINDS.items():
        check(cost, epsilon, name=name, max_iters=50, tol=0.0, **kind)


def test_every_instruction_set():
    module = _dispatch.extension()
    try:
        for instruction_set in module.build_info()["instruction_sets"]:
            module.use_instruction_set(instruction_set)
            for epsilon in (1.0, 0.05, 0.001):
                for shape in ((7, 33), (40, 257)):
                    cost = random_costs(2, *shape, dtype=torch.float32)
                    for name, kind in KINDS.items():
                        check(cost, epsilon, name=f"{name} {instruction_set}", max_iters=50, tol=0.0, **kind)
    finally:
        module.use_instruction_set(None)


def test_a_cost_rounded_to_half_precision_is_noticed():
    """Negative control: an error of 2^-9 in the cost is far outside of the tolerances."""
    cost = random_costs(2, 40, 257, dtype=torch.float32)
    wide = sinkhorn(cost.double(), epsilon=0.05, max_iters=50, tol=0.0)
    rough = sinkhorn(cost.bfloat16(), epsilon=0.05, max_iters=50, tol=0.0)
    assert (rough.f - wide.f).abs().max() > 10 * POTENTIALS

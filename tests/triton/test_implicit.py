"""The gradient of the potentials in Triton against the formulas in float64, at given potentials."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import KINDS, random_costs, random_mask, random_weights, strided
from torch import Tensor

from pisces_kernels import _implicit, sinkhorn

# One entry, row and column; both sides the shorter one; several tiles of both sides, none whole; a split long side.
CASES = [
    *((shape, "") for shape in [(1, 1), (29, 1), (16, 128), (66, 70), (5, 600)]),
    *((shape, "masked") for shape in [(1, 37), (40, 140), (70, 31)]),
    *((shape, "weightless") for shape in [(7, 33), (33, 7), (40, 140)]),
]
SOLVED = {name: kind for name, kind in KINDS.items() if name != "mass"}


def solved(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, masks: Any = (None, None), **options: Any) -> list[Any]:
    """What the gradient of the potentials needs, in float64 but of numbers that float32 holds.

    Returns:
        [grad_f, grad_g, cost, a, b, epsilon, f, g, tau_a, tau_b, exact_mass, row_mask, col_mask].
    """
    cost, a, b = (value.float().double() for value in (cost, a, b))
    options = {"max_iters": 200, "tol": 1e-7, "row_mask": masks[0], "col_mask": masks[1], **options}
    result = sinkhorn(cost, a, b, epsilon=epsilon, backend="reference", **options)
    grads = torch.randn(a.shape).double(), torch.randn(b.shape).double()
    potentials = result.f.float().double(), result.g.float().double()
    return [*grads, cost, a, b, epsilon, *potentials, *result.tau, False, *masks]


def random_problem(shape: tuple[int, int], kind: str, special: str, epsilon: tuple[float, ...]) -> list[Any]:
    """Two random problems; special: "", "masked" (NaN where masked) or "weightless" (zero weights)."""
    n_rows, n_cols = shape
    cost, a, b = random_costs(2, *shape), random_weights(2, n_rows), random_weights(2, n_cols)
    rows = cols = None
    if special == "masked":
        rows, cols = random_mask(2, n_rows), random_mask(2, n_cols)
        a, b = torch.where(rows, a, 0.0), torch.where(cols, b, 0.0)
        cost = torch.where(rows.unsqueeze(-1) & cols.unsqueeze(-2), cost, torch.nan)
    elif special == "weightless":
        a[:, n_rows // 2 :: 5], b[:, n_cols // 2 :: 5] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    inputs = solved(cost, a, b, torch.tensor(epsilon).double(), (rows, cols), **SOLVED[kind])
    if rows is not None and cols is not None:
        inputs[0], inputs[1] = torch.where(rows, inputs[0], torch.nan), torch.where(cols, inputs[1], torch.nan)
        inputs[6], inputs[7] = torch.where(rows, inputs[6], torch.nan), torch.where(cols, inputs[7], torch.nan)
    return inputs


def by_triton(inputs: list[Any], device: str) -> list[Tensor]:
    """Gradients on the device, from float32 and a cost behind strides that the kernels do not want."""
    grad_f, grad_g, cost, a, b, epsilon, f, g, *options, rows, cols = inputs
    values = (grad_f, grad_g, strided(cost), a, b, epsilon, f, g)
    there = [value.to(device) if value is epsilon else value.float().to(device) for value in values]
    masks = (None if mask is None else mask.to(device) for mask in (rows, cols))
    found = _implicit.potentials_gradient(*there, *options, *masks, backend="triton")
    return [value.cpu() for value in found]


def by_formulas(inputs: list[Any]) -> list[Tensor]:
    """The same in float64."""
    values = [
        value.nan_to_num() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    ]
    return list(_implicit.formulas(*values))


def gaps(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Largest errors of the gradients of cost, a, b and epsilon relative to the largest entry, or to 1.

    epsilon's is a sum over the potentials' unknowns, which are those of a and b by epsilon: it is relative to them.
    """
    assert [value.shape for value in got] == [value.shape for value in want]
    assert all(torch.isfinite(value).all() for value in got)
    largest = [float(value.abs().max()) for value in want[:4]]
    largest[3] += max(largest[1:3])
    errors = [float((one.double() - two).abs().max()) for one, two in zip(got[:4], want[:4], strict=True)]
    return [error / (1 + size) for error, size in zip(errors, largest, strict=True)]


@pytest.mark.parametrize("kind", SOLVED)
@pytest.mark.parametrize(("shape", "special"), CASES)
def test_equals_the_formulas(device, shape, kind, special):
    inputs = random_problem(shape, kind, special, (0.05, 0.2))
    got, want = by_triton(inputs, device), by_formulas(inputs)
    assert got[3].dtype == torch.float64  # epsilon's
    assert max(gaps(got, want)) < 1e-5
    rows, cols = inputs[-2:]
    if rows is not None:
        assert (got[0][~(rows.unsqueeze(-1) & cols.unsqueeze(-2))] == 0).all()
        assert (got[1][~rows] == 0).all()
        assert (got[2][~cols] == 0).all()


@pytest.mark.parametrize("kind", SOLVED)
def test_small_epsilon(device, kind):
    inputs = random_problem((24, 150), kind, "", (0.01, 0.005))
    assert max(gaps(by_triton(inputs, device), by_formulas(inputs))) < 5e-5


@pytest.mark.parametrize("shape", [(12, 50), (50, 12)])
@pytest.mark.parametrize(("apart", "digits"), [(0.5, 1e-5), (1.0, 3e-4)])
def test_a_nearly_decoupled_problem(device, shape, apart, digits):
    """Two blocks that exchange exp(-12) or exp(-25) of their mass: the system has an eigenvalue of that size."""
    n_rows, n_cols = shape
    cost = 0.3 * random_costs(2, *shape)
    cost[:, : n_rows // 2, n_cols // 2 :] += apart
    cost[:, n_rows // 2 :, : n_cols // 2] += apart
    a, b = torch.full((2, n_rows), 1 / n_rows), torch.full((2, n_cols), 1 / n_cols)
    inputs = solved(cost, a, b, torch.tensor([0.04, 0.04]).double(), max_iters=5000, tol=1e-12)
    got, want = by_triton(inputs, device), by_formulas(inputs)
    assert float(want[1].abs().max()) > 100, "the control: the blocks are nearly apart"
    assert max(gaps(got, want)[:3]) < digits


def test_blocks_beyond_any_precision_leave_the_rest_alone(device):
    """exp(-500) between two blocks: within them the gradient is that of each block alone."""
    blocks = [solved(random_costs(1, 6, 20), *uniform(6, 20), torch.tensor([0.1]).double()) for _ in range(2)]
    cost = torch.full((1, 12, 40), 50.0).double()
    cost[:, :6, :20], cost[:, 6:, 20:] = blocks[0][2], blocks[1][2]
    # Only sums of f and g within a block are known, so the gradient has to sum to the same on both sides of each.
    for block in blocks:
        block[1] -= (block[1].sum() - block[0].sum()) / 20
    joined = [torch.cat([one, two], -1) for one, two in zip(blocks[0][:2], blocks[1][:2], strict=True)]
    potentials = [torch.cat([one, two], -1) for one, two in zip(blocks[0][6:8], blocks[1][6:8], strict=True)]
    # Half of each weight, so that potentials grow by epsilon log 2 for the plan to be half of the blocks' ones.
    weights = [0.5 * torch.cat([one, two], -1) for one, two in zip(blocks[0][3:5], blocks[1][3:5], strict=True)]
    potentials[0] += 0.1 * torch.log(torch.tensor(2.0)).double()
    inputs = [*joined, cost, *weights, blocks[0][5], *potentials, 1.0, 1.0, False, None, None]
    got = by_triton(inputs, device)
    assert all(torch.isfinite(value).all() for value in got)
    for block, found in zip(blocks, (got[0][:, :6, :20], got[0][:, 6:, 20:]), strict=True):
        torch.testing.assert_close(found.double(), by_formulas(block)[0], atol=2e-3, rtol=0)


def uniform(n_rows: int, n_cols: int) -> tuple[Tensor, Tensor]:
    """Weights of one problem."""
    return torch.full((1, n_rows), 1 / n_rows), torch.full((1, n_cols), 1 / n_cols)


@pytest.mark.parametrize("shape", [(9, 40), (40, 9)])
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_marginals_that_float32_cannot_hold(device, shape, spread):
    """Damped marginals of exp(-50) and of exp(-250)."""
    cost = random_costs(1, *shape)
    cost[:, 3:] += spread
    inputs = solved(cost, *uniform(*shape), torch.tensor([0.02]).double(), tau=0.9, max_iters=400)
    assert max(gaps(by_triton(inputs, device), by_formulas(inputs))) < 2e-5


@pytest.mark.parametrize("shape", [(6, 11), (11, 6)])
@pytest.mark.parametrize("kind", SOLVED)
def test_what_has_no_solution_has_no_gradient(device, shape, kind):
    """NaN stays in its problem; a problem without weight, or without any row, gives zeros."""
    cost, a, b = random_costs(4, *shape), random_weights(4, shape[0]), random_weights(4, shape[1])
    rows, cols = torch.ones(4, shape[0], dtype=torch.bool), torch.ones(4, shape[1], dtype=torch.bool)
    rows[1], a[1], b[2] = False, 0, 0
    inputs = solved(cost, a, b, torch.full((4,), 0.1).double(), (rows, cols), **SOLVED[kind])
    inputs[2][0, 2, 3] = torch.nan
    found = by_triton(inputs, device)
    assert found[0][0].isnan().any()
    for value in found:
        assert (value[1:3] == 0).all()
    last = [value[3:] if isinstance(value, Tensor) else value for value in inputs]
    assert max(gaps([value[3:] for value in found], by_formulas(last))) < 1e-5


def test_potentials_that_are_not_solutions_yet(device):
    """After one iteration at a small epsilon exponents are far from those of a plan: nothing overflows."""
    for kind in SOLVED.values():
        cost, (a, b) = random_costs(1, 12, 50), uniform(12, 50)
        inputs = solved(cost, a, b, torch.tensor([0.002]).double(), **{**kind, "max_iters": 1})
        assert all(torch.isfinite(value).all() for value in by_triton(inputs, device))


def test_same_bits_every_time(device):
    inputs = random_problem((9, 600), "balanced", "masked", (0.05, 0.1))
    for one, other in zip(by_triton(inputs, device), by_triton(inputs, device), strict=True):
        assert torch.equal(one, other)


def test_no_problems(device):
    shapes = ((3,), (4,), (3, 4), (3,), (4,), (), (3,), (4,))
    inputs: list[Any] = [torch.empty(0, *shape).to(device) for shape in shapes]
    found = _implicit.potentials_gradient(*inputs, 0.9, 1.0, False, None, None, backend="triton")
    assert [tuple(value.shape) for value in found] == [(0, 3, 4), (0, 3), (0, 4), (0,), (0,)]

"""The plan, its sums and their gradient in Triton against the formulas in float64, at given potentials."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import random_mask, random_weights, strided
from torch import Tensor

from pisces_kernels import _plan, sinkhorn

# One row, one column, one tile and several, none of them whole; several chunks of columns; more rows than columns.
SHAPES = [(1, 1), (1, 150), (37, 1), (7, 33), (16, 128), (41, 257), (70, 31), (3, 1100)]


def solved(shape: tuple[int, int], special: str, epsilon: tuple[float, float] = (0.05, 0.3)) -> list[Any]:
    """cost, f, g, a, b, epsilon and masks of two problems in float64; everything that is masked is NaN.

    special: "", "masked", or "weightless": zero weights, of which some have exponents beyond the bound.
    """
    n_rows, n_cols = shape
    cost = torch.rand(2, *shape).double()  # float32 and float64 hold the same numbers
    a, b = random_weights(2, n_rows).float().double(), random_weights(2, n_cols).float().double()
    rows = cols = None
    if special == "masked":
        rows, cols = random_mask(2, n_rows), random_mask(2, n_cols)
        a, b = torch.where(rows, a, 0.0), torch.where(cols, b, 0.0)
        cost = torch.where(rows.unsqueeze(-1) & cols.unsqueeze(-2), cost, torch.nan)
    elif special == "weightless":
        a[:, n_rows // 2], b[:, n_cols // 2] = 0, 0
    eps = torch.tensor(epsilon).double()
    options = {"tau": 0.9, "row_mask": rows, "col_mask": cols, "backend": "reference", "max_iters": 30}
    result = sinkhorn(cost, a, b, epsilon=eps, **options)
    f, g = result.f.float().double(), result.g.float().double()
    if special == "weightless":
        f[:, n_rows // 2] += 3.0
    return [cost, f, g, a, b, eps, rows, cols]


def to_device(inputs: list[Any], device: str) -> list[Any]:
    """The same problem as the kernels take it, behind strides that they do not want."""
    cost, f, g, a, b, eps, *masks = inputs
    values = [strided(cost.float()).to(device), *(value.float().to(device) for value in (f, g, a, b)), eps.to(device)]
    return values + [None if mask is None else mask.to(device) for mask in masks]


def close(got: Tensor, want: Tensor, digits: float = 3e-5) -> None:
    """Within rounding: of the exponents, whose relative error is that of what they lead to, at epsilon = .05."""
    assert got.shape == want.shape
    far = (got.cpu().double() - want).abs() > digits * (want.abs() + want.abs().mean())
    assert not far.any(), float((got.cpu().double() - want).abs().max())


@pytest.mark.parametrize("special", ["", "masked", "weightless"])
@pytest.mark.parametrize("shape", SHAPES)
def test_plan_and_sums(device, shape, special):
    inputs = solved(shape, special)
    cost, f, g, a, b, eps, rows, cols = inputs
    cost, keep = _plan.clean(cost, rows, cols)
    exponent = _plan.exponent(cost, f, g, a, b, eps)
    plan = torch.where(keep, exponent.exp() * a.unsqueeze(-1) * b.unsqueeze(-2), 0.0)
    here = to_device(inputs, device)
    got = _plan.plan(*here, False, "triton")
    close(got, plan)
    assert (got.cpu()[~keep] == 0).all()
    logarithm = _plan.plan(*here, True, "triton").cpu()
    assert logarithm.dtype == torch.float32
    assert torch.equal(logarithm == -torch.inf, plan == 0)
    torch.testing.assert_close(logarithm[plan > 0].double(), plan[plan > 0].log(), atol=5e-5, rtol=2e-6)
    for sums, want in zip(
        _plan.plan_sums(*here, "triton"), (plan.sum(-1), plan.sum(-2), (plan * cost).sum((-2, -1))), strict=True
    ):
        close(sums, want)


@pytest.mark.parametrize(
    ("shape", "given", "special"),
    [
        *((shape, "all", special) for shape in SHAPES for special in ("", "masked")),
        *(((19, 150), given, "weightless") for given in ("plan", "sums", "rows", "all")),
    ],
)
def test_gradient(device, shape, given, special):
    inputs = solved(shape, special)
    grads: list[Any] = [torch.randn(2, *shape), torch.randn(2, shape[0]), torch.randn(2, shape[1]), torch.randn(2)]
    if special == "masked":
        rows, cols = inputs[-2:]
        keep = rows.unsqueeze(-1) & cols.unsqueeze(-2)
        grads[0] = torch.where(keep, grads[0], torch.nan)
    if given == "plan":
        grads[1:] = [None] * 3
    elif given == "sums":
        grads[0] = None
    elif given == "rows":  # what the gradient of the value asks for, broadcast
        grads = [None, grads[3].unsqueeze(-1).expand(2, shape[0]), None, None]
    wide = [None if grad is None else grad.double() for grad in grads]
    want = _plan._gradients(*wide, *inputs)
    there = [None if grad is None else grad.to(device) for grad in grads]
    got = _plan.plan_gradients(*there, *to_device(inputs, device), "triton")
    assert got[-1].dtype == torch.float64  # epsilon's
    for one, other in zip(got, want, strict=True):
        close(one, other, 1e-4)


def test_the_bound_of_the_exponent_is_needed(device):
    """The control: without weight the exponents of these rows reach 60, beyond the bound of 40."""
    inputs = solved((9, 40), "weightless")
    cost, f, g, _, _, eps, _, _ = inputs
    free = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps[:, None, None]
    assert float(free.max()) > 50
    _, _, _, to_a, _, _ = _plan.plan_gradients(
        torch.ones(2, 9, 40).to(device), None, None, None, *to_device(inputs, device), "triton"
    )
    assert torch.isfinite(to_a).all()
    assert float(to_a.max()) <= 1.01 * torch.e**40


def test_a_problem_without_solution_leaves_the_others_alone(device):
    inputs = solved((20, 140), "")
    alone = _plan.plan(*to_device(inputs, device), False, "triton")
    inputs[1][0] = torch.nan
    here = to_device(inputs, device)
    plan, (rows, cols, energy) = _plan.plan(*here, False, "triton"), _plan.plan_sums(*here, "triton")
    assert plan[0].isnan().all()
    assert rows[0].isnan().all()
    assert cols[0].isnan().all()
    assert energy[0].isnan()
    assert torch.equal(plan[1], alone[1])
    assert torch.isfinite(rows[1]).all()


def test_same_bits_every_time(device):
    here = to_device(solved((33, 1500), "masked"), device)
    first, second = (_plan.plan_sums(*here, "triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_no_problems(device):
    inputs = [torch.empty(0, *shape).to(device) for shape in ((3, 4), (3,), (4,), (3,), (4,), ())]
    assert _plan.plan(*inputs, None, None, False, "triton").shape == (0, 3, 4)
    assert [tuple(value.shape) for value in _plan.plan_sums(*inputs, None, None, "triton")] == [(0, 3), (0, 4), (0,)]
    grads = _plan.plan_gradients(torch.empty(0, 3, 4).to(device), None, None, None, *inputs, None, None, "triton")
    assert [grad.shape for grad in grads] == [value.shape for value in inputs]

"""The dense solver in Triton against the float64 reference: in the interpreter everywhere, and on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pisces_kernels import sinkhorn


def close(got: Tensor, want: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got.detach().cpu().double(), want.detach(), atol=atol, rtol=0)


def compare(device: str, cost: Tensor, options: dict[str, Any], **tensors: Tensor) -> tuple[Any, Any]:
    """Solve on both back ends, compare potentials and iterations, and return both results."""
    moved = {name: value.to(device) for name, value in tensors.items()}
    wide = {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}
    got = sinkhorn(cost.to(device), **options, **moved, backend="triton")
    want = sinkhorn(cost.double(), **options, **wide, backend="reference")
    assert got.f.dtype == got.residual.dtype == torch.float32
    close(got.f, want.f)
    close(got.g, want.g)
    assert torch.equal(got.n_iters.cpu(), want.n_iters)
    return got, want


@pytest.mark.parametrize(
    ("dtype", "n_rows", "epsilon", "tau"),
    [
        (torch.float32, 3, 0.001, (1.0, 0.9)),
        (torch.float32, 40, 0.05, 0.9),
        (torch.float32, 71, 0.01, 1.0),
        (torch.float32, 71, 0.05, 0.9),
        (torch.bfloat16, 17, 0.001, (1.0, 0.9)),
        (torch.float16, 40, 0.01, 1.0),
    ],
)
def test_equals_the_reference(device, small_tiles, team, dtype, n_rows, epsilon, tau):
    n_cols = 40 + int(torch.randint(30, ()))
    cost = torch.rand(2, n_rows, n_cols).to(dtype)
    rows, cols = torch.rand(2, n_rows) < 0.8, torch.rand(2, n_cols) < 0.8
    rows[:, 0] = cols[:, 0] = True
    cost = torch.where(rows[..., None] & cols[:, None], cost, torch.nan)  # what is masked is not there
    options = {"epsilon": epsilon, "tau": tau, "max_iters": 6, "tol": 0.0}
    got, want = compare(device, cost, options, row_mask=rows, col_mask=cols)
    share, exact = (x / x.sum(-1, keepdim=True).clamp_min(1e-30) for x in (got.plan().cpu().double(), want.plan()))
    assert float((share - exact).abs().sum(-1).max()) / 2 < 2e-4  # total variation of the worst row


def test_problems_stop_one_by_one_on_the_device(device, small_tiles):
    """Close costs converge at once, the others take their time; each has its own number of iterations."""
    cost = torch.rand(3, 9, 40) * torch.tensor([0.01, 0.3, 1.0])[:, None, None]
    got, want = compare(device, cost, {"epsilon": 0.1, "tau": 0.9, "max_iters": 30, "tol": 1e-2})
    assert got.converged.all()
    assert len(set(got.n_iters.tolist())) == 3
    torch.testing.assert_close(got.residual.cpu().double(), want.residual, atol=1e-5, rtol=0)


@pytest.mark.parametrize("starts", ["f_init", "g_init", "both"])
@pytest.mark.parametrize("mass", [None, 0.7])
def test_starts(device, small_tiles, starts, mass):
    cost = torch.rand(2, 11, 30)
    tensors = {"f_init": torch.rand(2, 11) / 10, "g_init": torch.rand(2, 30) / 10}
    tensors = tensors if starts == "both" else {starts: tensors[starts]}
    compare(device, cost, {"epsilon": 0.05, "mass": mass, "max_iters": 4, "tol": 0.0}, **tensors)


def test_exact_mass(device, small_tiles, team):
    rows = torch.rand(2, 13) < 0.8
    rows[:, 0] = True
    mass = torch.tensor([0.4, 0.9])
    got, _ = compare(
        device, torch.rand(2, 13, 40), {"epsilon": 0.1, "max_iters": 8, "tol": 0.0}, mass=mass, row_mask=rows
    )
    close(got.plan().sum((-2, -1)), mass.double())


def test_a_mass_that_some_rows_hold_exactly_does_not_open_a_far_one(device):
    cost = torch.rand(1, 4, 12)
    cost[:, 3] += 50.0
    compare(device, cost, {"epsilon": 0.1, "mass": 0.75, "max_iters": 6, "tol": 0.0})


def test_damped_potentials_far_out_of_the_range_of_floats(device, small_tiles, team):
    """Damped marginals as small as exp(-100) cannot be scalings in float32: the log domain has to take over."""
    cost = torch.rand(2, 9, 40)
    cost[:, 3:] += 3.0
    _, want = compare(device, cost, {"epsilon": 0.004, "tau": 0.9, "max_iters": 7, "tol": 0.0})
    assert (want.f / 0.004).abs().max() > 80


def test_zero_weights_and_an_empty_side(device, small_tiles):
    a, b = torch.rand(3, 7), torch.rand(3, 33)
    a[0, 2], b[0, 5:20], a[1] = 0.0, 0.0, 0.0
    a, b = (x / x.sum(-1, keepdim=True).clamp_min(1e-9) for x in (a, b))
    got, _ = compare(device, torch.rand(3, 7, 33), {"epsilon": 0.05, "tau": 0.8, "max_iters": 9, "tol": 0.0}, a=a, b=b)
    assert got.n_iters.tolist() == [9, 0, 9]


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_reported(device, small_tiles, entry):
    cost = torch.rand(2, 5, 37)
    cost[1, 4, 36] = entry
    got = sinkhorn(cost.to(device), epsilon=0.1, max_iters=3, backend="triton")
    assert got.residual.isnan().tolist() == [False, True]
    assert got.f[1].isnan().all()
    assert got.g[0].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (20, 1), (65, 5)])
def test_extreme_shapes(device, small_tiles, shape):
    compare(device, torch.rand(2, *shape), {"epsilon": 0.1, "tau": 0.9, "max_iters": 3, "tol": 0.0})


def test_a_compiled_graph_holds_the_operators(device):
    """fullgraph: nothing of the launches is traced; the plan and the gradient are operators, too."""

    def loss(cost: Tensor) -> Tensor:
        result = sinkhorn(cost, epsilon=0.1, tau=0.9, max_iters=20, tol=1e-6, backend="triton")
        return result.plan().square().sum() + result.f.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = torch.linspace(0, 1, 2 * 4 * 9).sin().view(2, 4, 9).to(device).requires_grad_()
        results.append(torch.autograd.grad(function(leaf), leaf)[0].cpu())
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_no_problems_and_strides(device):
    assert sinkhorn(torch.rand(0, 3, 4, device=device), epsilon=0.1, backend="triton").f.shape == (0, 3)
    cost = torch.rand(2, 30, 11).mT  # not contiguous
    compare(device, cost, {"epsilon": 0.05, "max_iters": 3, "tol": 0.0})

"""Point clouds on CUDA against the float64 reference: emulated, and on a device where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pisces_kernels import sinkhorn_divergence, sinkhorn_points


def clouds(n_rows: int, n_cols: int, dim: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, n_rows, dim) / dim**0.5, torch.randn(2, n_cols, dim) / dim**0.5


@pytest.mark.parametrize("place", ["sm_90", "small"])
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize(("epsilon", "tau"), [(0.2, 1.0), (0.05, (0.9, 0.8)), (0.01, 0.9)])
def test_equals_the_reference(device, place, cost, epsilon, tau, monkeypatch):
    monkeypatch.setenv("PK_DEVICE", place)
    x, y = clouds(20 + int(torch.randint(60, ())), 20 + int(torch.randint(150, ())), 3 + int(torch.randint(30, ())))
    rows, cols = torch.rand(x.shape[:2]) < 0.8, torch.rand(y.shape[:2]) < 0.8
    rows[:, 0] = cols[:, 0] = True
    options: dict[str, Any] = {"cost": cost, "epsilon": epsilon, "tau": tau, "max_iters": 8, "tol": 0.0}
    masks = {"row_mask": rows.to(device), "col_mask": cols.to(device)}
    got = sinkhorn_points(x.to(device), y.to(device), backend="cuda", **masks, **options)
    want = sinkhorn_points(x.double(), y.double(), row_mask=rows, col_mask=cols, backend="reference", **options)
    for potential, exact in ((got.f, want.f), (got.g, want.g)):
        torch.testing.assert_close(potential.cpu().double(), exact, atol=2e-5, rtol=0)
    assert torch.equal(got.n_iters.cpu(), want.n_iters)
    features = torch.randn(2, y.shape[1], 5)
    torch.testing.assert_close(
        got.apply(features.to(device)).cpu().double(), want.apply(features.double()), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize(("precision", "digits"), [("float32", 2e-5), ("tf32", 4e-3), ("bf16", 4e-2)])
def test_precisions_stay_within_their_rounding(device, precision, digits):
    x, y = clouds(40, 90, 20)
    options: dict[str, Any] = {"epsilon": 0.1, "tau": 0.9, "max_iters": 10, "tol": 0.0}
    got = sinkhorn_points(x.to(device), y.to(device), precision=precision, backend="cuda", **options)
    want = sinkhorn_points(x.double(), y.double(), backend="reference", **options)
    away = float((got.f.cpu().double() - want.f).abs().max())
    assert away < digits
    if precision != "float32":
        assert away > 1e-6, "the control: this precision is another one"


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
def test_gradients(device, cost):
    x, y = clouds(7, 12, 5)
    results = []
    for where, dtype, backend in ((device, torch.float32, "cuda"), ("cpu", torch.float64, "reference")):
        leaves = [points.to(where, dtype, copy=True).requires_grad_() for points in (x, y)]
        result = sinkhorn_points(*leaves, cost=cost, epsilon=0.2, tau=0.9, max_iters=300, tol=1e-7, backend=backend)
        (result.value.sum() + result.f.square().sum()).backward()
        results.append([leaf.grad.cpu().double() for leaf in leaves if leaf.grad is not None])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_divergence(device):
    x, y = clouds(30, 40, 4)
    options: dict[str, Any] = {"epsilon": 0.3, "max_iters": 300, "tol": 1e-5}
    got = sinkhorn_divergence(x.to(device), y.to(device), backend="cuda", **options)
    want = sinkhorn_divergence(x.double(), y.double(), backend="reference", **options)
    got, want = (value if isinstance(value, Tensor) else value.value for value in (got, want))
    torch.testing.assert_close(got.cpu().double(), want, atol=2e-5, rtol=0)


def test_what_is_not_there_is_said(device):
    x, y = (points.to(device) for points in clouds(4, 5, 3))
    with pytest.raises(ValueError, match="exact mass"):
        sinkhorn_points(x, y, epsilon=0.1, mass=0.5, backend="cuda")
    with pytest.raises(ValueError, match="'fp8', expected one of"):
        sinkhorn_points(x, y, epsilon=0.1, precision="fp8", backend="cuda")


def test_precision_is_one_of_gpus():
    with pytest.raises(ValueError, match="backend='cuda' or 'triton' only"):
        sinkhorn_points(torch.rand(4, 3), torch.rand(5, 3), epsilon=0.1, precision="bf16", backend="reference")

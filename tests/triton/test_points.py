"""Point clouds with the Triton kernels against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from pisces_kernels import sinkhorn_divergence, sinkhorn_points
from pisces_kernels._triton import _launch

COSTS = ["sqeuclidean", "cosine"]


def size(least: int, most: int) -> int:
    return int(torch.randint(least, most, ()))


def clouds(n_rows: int, n_cols: int, dim: int, problems: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(problems, n_rows, dim) / dim**0.5, torch.randn(problems, n_cols, dim) / dim**0.5


def masks(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Masks over points that are NaN."""
    result = {}
    for name, points in (("row_mask", x), ("col_mask", y)):
        mask = torch.rand(points.shape[:2]) < 0.8
        mask[:, 0] = True
        points[~mask] = torch.nan
        result[name] = mask
    return result


def weights(points: Tensor) -> Tensor:
    """Some of them zero."""
    given = torch.rand(points.shape[:2]) * (torch.rand(points.shape[:2]) < 0.8)
    given[:, 0] = 0.5
    return given / given.sum(-1, keepdim=True)


def both(x: Tensor, y: Tensor, device: str, tensors: dict[str, Tensor], **options: Any) -> tuple[Any, Any]:
    """The kernels' result, and the reference's in float64."""
    precision = options.pop("precision", "float32")
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    got = sinkhorn_points(x.to(device), y.to(device), backend="triton", precision=precision, **moved, **options)
    exact = {name: tensor if tensor.dtype == torch.bool else tensor.double() for name, tensor in tensors.items()}
    return got, sinkhorn_points(x.double(), y.double(), backend="reference", **exact, **options)


def assert_potentials(got: Any, want: Any, atol: float = 2e-5) -> None:
    for potential, exact in ((got.f, want.f), (got.g, want.g)):
        torch.testing.assert_close(potential.cpu().double(), exact, atol=atol, rtol=0, equal_nan=True)
    assert torch.equal(got.n_iters.cpu(), want.n_iters)


@pytest.mark.parametrize(
    ("cost", "epsilon", "tau"),
    [("sqeuclidean", 0.2, 1.0), ("sqeuclidean", 0.01, 0.9), ("cosine", 0.05, (0.9, 0.8)), ("cosine", 0.01, 0.9)],
)
def test_equals_the_reference(team, device, cost, epsilon, tau):
    x, y = clouds(size(20, 80), size(130, 300), size(3, 40))
    tensors = {**masks(x, y), "a": weights(x), "b": weights(y)}
    got, want = both(x, y, device, tensors, cost=cost, epsilon=epsilon, tau=tau, max_iters=6, tol=0.0)
    assert_potentials(got, want)
    torch.testing.assert_close(got.residual.cpu().double(), want.residual, atol=1e-4 / epsilon, rtol=1e-3)
    features = torch.randn(2, y.shape[1], size(1, 80))
    plan = got.apply(features.to(device)).cpu().double()
    torch.testing.assert_close(plan, want.apply(features.double()), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("precision", "digits"), [("float32", 2e-5), ("tf32", 4e-3), ("bf16", 4e-2)])
def test_precisions_stay_within_their_rounding(device, precision, digits):
    x, y = clouds(40, 90, 20)
    got, want = both(x, y, device, {}, epsilon=0.1, tau=0.9, max_iters=6, tol=0.0, precision=precision)
    away = float((got.f.cpu().double() - want.f).abs().max())
    assert away < digits
    if precision == "bf16":
        assert away > 1e-6, "the control: this precision is another one"


@pytest.mark.parametrize("dim", [1, 70, 300])
def test_features_that_do_not_fill_or_do_not_fit_a_tile(device, dim):
    x, y = clouds(9, 35, dim)
    got, want = both(x, y, device, {}, epsilon=0.2, tau=0.9, max_iters=3, tol=0.0)
    assert_potentials(got, want)


def test_problems_stop_one_by_one_and_broken_ones_are_reported(device):
    x, y = clouds(8, 30, 4, problems=4)
    x[1] *= 0.1
    y[1] *= 0.1
    x[2, 3, 0] = torch.inf
    a = torch.full((4, 8), 1 / 8)
    a[3] = 0.0
    got, want = both(x, y, device, {"a": a}, epsilon=0.3, tau=0.9, max_iters=40, tol=1e-3)
    assert_potentials(got, want)
    assert got.residual.isnan().tolist() == [False, False, True, False]
    assert got.n_iters[1] < got.n_iters[0] < 40
    assert got.n_iters[3] == 0


@pytest.mark.parametrize("start", ["f_init", "g_init"])
def test_starts(device, start):
    x, y = clouds(11, 30, 3)
    tensors = {start: torch.rand(2, 11 if start == "f_init" else 30) / 10}
    got, want = both(x, y, device, tensors, epsilon=0.1, max_iters=3, tol=0.0)
    assert_potentials(got, want)


def test_a_log_sum_that_moves_far(device):
    """Strong damping at a small epsilon: references are useless at first, and a half iteration is done again."""
    x, y = clouds(20, 40, 3)
    got, want = both(x, y + 3.0, device, {}, epsilon=0.02, tau=0.5, max_iters=4, tol=0.0)
    assert float((want.f / 0.02).abs().max()) > 200
    assert_potentials(got, want, atol=1e-4)


@pytest.mark.parametrize("cost", COSTS)
def test_gradients(device, cost):
    x, y = clouds(7, 12, 5, problems=1)
    results = []
    for where, dtype, backend in ((device, torch.float32, "triton"), ("cpu", torch.float64, "reference")):
        leaves = [points.to(where, dtype, copy=True).requires_grad_() for points in (x, y)]
        result = sinkhorn_points(*leaves, cost=cost, epsilon=0.3, tau=0.8, max_iters=100, tol=1e-6, backend=backend)
        (result.value.sum() + result.apply(leaves[1]).square().sum()).backward()
        results.append([leaf.grad.cpu().double() for leaf in leaves if leaf.grad is not None])
    assert len(results[0]) == 2
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_divergence(device):
    x, y = clouds(9, 14, 4)
    options: dict[str, Any] = {"epsilon": 3.0, "max_iters": 20, "tol": 1e-4}
    got = sinkhorn_divergence(x.to(device), y.to(device), backend="triton", **options)
    want = sinkhorn_divergence(x.double(), y.double(), backend="reference", **options)
    torch.testing.assert_close(got.cpu().double(), want, atol=5e-5, rtol=0)
    assert float(sinkhorn_divergence(x.to(device), x.to(device), backend="triton", **options).abs().max()) < 1e-5


def test_no_problems(device):
    x, y = clouds(4, 5, 3, problems=0)
    got = sinkhorn_points(x.to(device), y.to(device), epsilon=0.1, backend="triton")
    assert got.f.shape == (0, 4)


@pytest.mark.skipif(not INTERPRETED, reason="no CUDA device is needed: there the kernel is tuned for real")
def test_trials_of_the_tuner_leave_no_trace(device, monkeypatch):
    """A tuned kernel runs several times before the launch that counts: each must start where the first one did."""
    launch = _launch.launch

    def launch_after_a_trial(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(kernel, Autotuner):
            named = dict(zip(kernel.arg_names, arguments, strict=False))
            kernel.pre_hook(named)
            kernel.fn[grid](*arguments, **{**kernel.configs[0].all_kwargs(), **options})
            kernel.post_hook(named, exception=None)
            kernel.pre_hook(named, reset_only=True)
        launch(kernel, grid, *arguments, **options)

    x, y = clouds(30, 50, 8)
    options: dict[str, Any] = {"epsilon": 0.1, "tau": 0.9, "max_iters": 3, "tol": 0.0, "backend": "triton"}
    once = sinkhorn_points(x.to(device), y.to(device), **options)
    monkeypatch.setattr(_launch, "launch", launch_after_a_trial)
    again = sinkhorn_points(x.to(device), y.to(device), **options)
    assert torch.equal(once.f, again.f)
    assert torch.equal(once.n_iters, again.n_iters)

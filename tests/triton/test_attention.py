"""Transport attention in Triton, and its gradient, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pisces_kernels import transport_attention
from pisces_kernels._triton import _token_cost, fusion


@pytest.fixture(params=["one part", "parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a program has a whole row, or several share it."""
    if request.param == "parts":
        monkeypatch.setattr(fusion, "CHUNK", 64)
    monkeypatch.setattr(_token_cost, "COLS", 128)


def draw(n_samples: int, n_heads: int, n_rows: int, n_cols: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    query, key = torch.randn(n_samples, n_rows, 24), torch.randn(n_samples, n_cols, 24)
    attention = torch.softmax(torch.randn(n_samples, n_heads, n_rows, n_cols), -1)
    frames = torch.arange(n_cols) // 9
    return [query.to(dtype), key.to(dtype), attention.to(dtype), frames, torch.rand(n_cols, 2)]


def moved(inputs: list[Tensor], device: str) -> list[Tensor]:
    return [value.to(device) for value in inputs]


def exact(inputs: list[Tensor]) -> list[Tensor]:
    return [value.double() for value in inputs]


def total_variation(got: Tensor, want: Tensor) -> float:
    """Of the worst row, in units of its sum."""
    apart = (got.cpu().double() - want).abs().sum(-1) / 2
    return float((apart / want.sum(-1).clamp_min(1e-12)).max())


@pytest.mark.parametrize(("epsilon", "tau"), [(0.05, 0.9), (0.01, 1.0), (0.002, 0.9)])
def test_attention_and_plan_equal_the_reference(device, parts, epsilon, tau):
    n_rows, n_cols = 3 + int(torch.randint(5, ())), 70 + int(torch.randint(50, ()))
    inputs = draw(2, 2, n_rows, n_cols)
    rows = torch.rand(2, n_rows) < 0.7
    rows[:, 0], rows[1, 1] = True, False
    inputs[0][~rows] = torch.nan
    inputs[2][1, 0, 1, 5] = torch.nan  # not read, and it comes back
    options: dict[str, Any] = {"epsilon": epsilon, "tau": tau, "max_iters": 8, "tol": 0.0, "return_plan": True}
    got, plan = transport_attention(*moved(inputs, device), row_mask=rows.to(device), backend="triton", **options)
    want, wanted_plan = transport_attention(*exact(inputs), row_mask=rows, backend="reference", **options)
    chosen = rows[:, None, :].expand(want.shape[:3])
    assert total_variation(got.cpu()[chosen], want[chosen]) < 2e-4
    assert total_variation(plan.cpu()[chosen], wanted_plan[chosen]) < 2e-4
    assert torch.equal(got.cpu()[~chosen].view(torch.int32), inputs[2][~chosen].view(torch.int32))
    assert not plan[~chosen.to(device)].any()


def test_rows_far_from_convergence(device, parts):
    """One iteration: f is far from what the final g asks for, and the rows still have the sum 1."""
    inputs = draw(1, 2, 5, 90)
    options: dict[str, Any] = {"epsilon": 0.01, "max_iters": 1}
    got = transport_attention(*moved(inputs, device), backend="triton", **options)
    want = transport_attention(*exact(inputs), backend="reference", **options)
    torch.testing.assert_close(got.sum(-1).cpu(), torch.ones(1, 2, 5), atol=1e-5, rtol=0)
    assert total_variation(got, want) < 2e-4
    other = transport_attention(*exact(inputs), backend="reference", epsilon=0.01, max_iters=2)
    assert total_variation(got, other) > 1e-3  # negative control: an iteration more is seen


@pytest.mark.parametrize("shape", [(1, 1), (1, 75), (6, 1)])
def test_extreme_shapes(device, shape):
    inputs = draw(2, 1, *shape)
    got, plan = transport_attention(*moved(inputs, device), backend="triton", max_iters=20, return_plan=True)
    want, wanted_plan = transport_attention(*exact(inputs), backend="reference", max_iters=20, return_plan=True)
    assert total_variation(got, want) < 2e-4
    assert total_variation(plan, wanted_plan) < 2e-4


def test_exact_mass(device):
    inputs = draw(1, 2, 5, 70)
    options: dict[str, Any] = {"mass": 0.6, "epsilon": 0.02, "max_iters": 10, "tol": 0.0, "return_plan": True}
    got, plan = transport_attention(*moved(inputs, device), backend="triton", **options)
    want, wanted_plan = transport_attention(*exact(inputs), backend="reference", **options)
    torch.testing.assert_close(plan.sum((-2, -1)).cpu(), torch.full((1, 2), 0.6), atol=1e-5, rtol=0)
    assert total_variation(plan, wanted_plan) < 2e-4
    assert total_variation(got, want) < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_read_as_they_are(device, parts, dtype):
    inputs = draw(1, 2, 4, 75, dtype)
    rows = torch.tensor([[True, False, True, True]])
    options: dict[str, Any] = {"max_iters": 8, "tol": 0.0, "return_plan": True}
    got, plan = transport_attention(*moved(inputs, device), row_mask=rows.to(device), backend="triton", **options)
    want, wanted_plan = transport_attention(*exact(inputs), row_mask=rows, backend="reference", **options)
    assert got.dtype == dtype
    assert plan.dtype == torch.float32
    assert torch.equal(got.cpu()[:, :, 1], inputs[2][:, :, 1])
    assert total_variation(plan, wanted_plan) < 2e-4
    assert total_variation(got, want) < 4e-3  # the rounding of the result


@pytest.mark.parametrize("which", ["query", "key", "attention"])
def test_nan_is_not_hidden(device, parts, which):
    inputs = draw(2, 2, 4, 70)
    rows = torch.tensor([[True, False, True, True]] * 2)
    inputs[("query", "key", "attention").index(which)][1, -1] = torch.inf if which == "key" else torch.nan
    got, plan = transport_attention(
        *moved(inputs, device), row_mask=rows.to(device), max_iters=5, return_plan=True, backend="triton"
    )
    bad = torch.zeros(2, 2, 4, 1, dtype=torch.bool)
    bad[1, 1 if which == "attention" else slice(None), rows[1]] = True
    kept = ~rows[:, None, :, None] & inputs[2].isnan()
    assert torch.equal(got.cpu().isnan(), bad.expand(got.shape) | kept)
    assert torch.equal(plan.cpu().isnan(), bad.expand(got.shape))


def test_a_sample_without_selected_rows(device):
    inputs = draw(2, 2, 4, 70)
    rows = torch.tensor([[False] * 4, [True, False, True, True]])
    options: dict[str, Any] = {"max_iters": 10, "return_plan": True}
    got, plan = transport_attention(*moved(inputs, device), row_mask=rows.to(device), backend="triton", **options)
    want, _ = transport_attention(*exact(inputs), row_mask=rows, backend="reference", **options)
    assert torch.equal(got[0].cpu(), inputs[2][0])
    assert not plan[0].any()
    assert total_variation(got, want) < 2e-4


def test_no_samples(device):
    inputs = moved(draw(0, 2, 4, 70), device)
    inputs[2].requires_grad_()
    got, plan = transport_attention(*inputs, return_plan=True, backend="triton")
    got.sum().backward()
    assert got.shape == plan.shape == (0, 2, 4, 70)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_with_the_plan_held(device, parts, dtype):
    inputs = draw(2, 2, 5, 75, dtype)
    rows = torch.rand(2, 5) < 0.7
    rows[0, :2] = torch.tensor([True, False])
    grad = torch.randn(2, 2, 5, 75)
    results = []
    for where, backend, wide in ((device, "triton", dtype), ("cpu", "reference", torch.float64)):
        query, key, attention, *geometry = (value.to(where) for value in inputs)
        leaf = attention.to(wide, copy=True).requires_grad_()
        refined = transport_attention(
            query.to(wide), key.to(wide), leaf, *geometry, row_mask=rows.to(where), max_iters=8, tol=0.0,
            backend=backend,
        )  # fmt: skip
        refined.backward(grad.to(dtype).to(where, wide))
        assert leaf.grad is not None
        assert leaf.grad.dtype == wide
        results.append(leaf.grad.cpu().double())
    got, want = results
    largest = float(want.abs().max())
    torch.testing.assert_close(got, want, atol=largest * (1e-4 if dtype == torch.float32 else 2e-2), rtol=2e-2)
    passed = ~rows[:, None, :].expand(2, 2, 5)
    assert torch.equal(got[passed], grad.to(dtype)[passed].double())


def test_a_differentiable_plan(device):
    """Query, key and attention have gradients through the cost, the solve and the fusion."""
    inputs, grad = draw(1, 2, 4, 40), torch.randn(1, 2, 4, 40)
    results = []
    for where, backend, wide in ((device, "triton", torch.float32), ("cpu", "reference", torch.float64)):
        leaves = [value.to(where, wide, copy=True).requires_grad_() for value in inputs[:3]]
        refined = transport_attention(
            *leaves, *moved(inputs[3:], where), differentiable_plan=True, epsilon=0.2, max_iters=60, tol=1e-6,
            backend=backend,
        )  # fmt: skip
        refined.backward(grad.to(where, wide))
        results.append([leaf.grad.cpu().double() for leaf in leaves if leaf.grad is not None])
    assert len(results[0]) == len(results[1]) == 3
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-4 * float(want.abs().max()), rtol=1e-3)

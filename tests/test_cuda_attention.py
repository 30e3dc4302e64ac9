"""Token cost and transport attention on CUDA against the float64 reference: emulated, and on a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pisces_kernels import token_cost, transport_attention


def draw(n_samples: int, n_heads: int, n_rows: int, n_cols: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    query, key = torch.randn(n_samples, n_rows, 24), torch.randn(n_samples, n_cols, 24)
    attention = torch.softmax(torch.randn(n_samples, n_heads, n_rows, n_cols), -1)
    frames = torch.arange(n_cols) // 9
    return query.to(dtype), key.to(dtype), attention.to(dtype), frames, torch.rand(n_cols, 2)


def moved(inputs: tuple[Tensor, ...], device: str) -> list[Tensor]:
    return [value.to(device) for value in inputs]


def exact(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [value.double() for value in inputs]


def total_variation(got: Tensor, want: Tensor) -> float:
    """Of the worst row, in units of its sum."""
    apart = (got.cpu().double() - want).abs().sum(-1) / 2
    return float((apart / want.sum(-1).clamp_min(1e-12)).max())


@pytest.mark.parametrize("place", ["sm_90", "tiny", "tiny_80"])
@pytest.mark.parametrize(("epsilon", "tau"), [(0.05, 0.9), (0.01, 1.0), (0.002, 0.9)])
def test_attention_and_plan_equal_the_reference(device, place, epsilon, tau, monkeypatch):
    monkeypatch.setenv("PK_DEVICE", place)
    n_rows, n_cols = 3 + int(torch.randint(50, ())), 40 + int(torch.randint(200, ()))
    inputs = draw(2, 2, n_rows, n_cols, torch.float32)
    rows = torch.rand(2, n_rows) < 0.7
    rows[0, 0] = True
    options: dict[str, Any] = {"epsilon": epsilon, "tau": tau, "max_iters": 50, "tol": 0.0, "return_plan": True}
    got, plan = transport_attention(*moved(inputs, device), row_mask=rows.to(device), backend="cuda", **options)
    want, wanted_plan = transport_attention(*exact(inputs), row_mask=rows, backend="reference", **options)
    assert total_variation(got, want) < 2e-4
    assert total_variation(plan, wanted_plan) < 2e-4
    kept = ~rows[:, None, :, None].expand_as(want)
    assert torch.equal(got.cpu()[kept], inputs[2][kept])
    assert (plan.cpu()[kept] == 0).all()


def test_exact_mass(device):
    inputs = draw(1, 2, 9, 80, torch.float32)
    options: dict[str, Any] = {"mass": 0.6, "epsilon": 0.02, "max_iters": 30, "tol": 0.0, "return_plan": True}
    got, plan = transport_attention(*moved(inputs, device), backend="cuda", **options)
    want, wanted_plan = transport_attention(*exact(inputs), backend="reference", **options)
    torch.testing.assert_close(plan.sum((-2, -1)).cpu(), torch.full((1, 2), 0.6), atol=1e-5, rtol=0)
    assert total_variation(plan, wanted_plan) < 2e-4
    assert total_variation(got, want) < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_read_as_they_are(device, dtype):
    inputs = draw(1, 2, 7, 60, dtype)
    got, plan = transport_attention(*moved(inputs, device), return_plan=True, backend="cuda")
    want, wanted_plan = transport_attention(*exact(inputs), return_plan=True, backend="reference")
    assert got.dtype == dtype
    assert plan.dtype == torch.float32
    assert total_variation(plan, wanted_plan) < 2e-4
    assert total_variation(got, want) < 4e-3  # the rounding of the result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_with_the_plan_held(device, dtype):
    inputs = draw(2, 2, 6, 50, dtype)
    rows = torch.rand(2, 6) < 0.7
    grad = torch.randn(2, 2, 6, 50)
    results = []
    for where, backend, wide in ((device, "cuda", dtype), ("cpu", "reference", torch.float64)):
        query, key, attention, *geometry = (value.to(where) for value in inputs)
        leaf = attention.to(wide, copy=True).requires_grad_()
        refined = transport_attention(
            query.to(wide), key.to(wide), leaf, *geometry, row_mask=rows.to(where), tol=1e-7, backend=backend
        )
        refined.backward(grad.to(where, wide))
        assert leaf.grad is not None
        assert leaf.grad.dtype == wide
        results.append(leaf.grad.cpu().double())
    largest = float(results[1].abs().max())
    torch.testing.assert_close(*results, atol=largest * (1e-4 if dtype == torch.float32 else 2e-2), rtol=2e-2)


@pytest.mark.parametrize("place", ["sm_90", "tiny_80"])
@pytest.mark.parametrize("normalize", [True, False])
def test_token_cost_and_its_gradient(device, place, normalize, monkeypatch):
    monkeypatch.setenv("PK_DEVICE", place)
    inputs = draw(2, 2, 5, 1100, torch.float32)
    rows, cols = torch.rand(2, 5) < 0.7, torch.rand(2, 1100) < 0.9
    rows[:, 0] = True
    results = []
    for where, backend, wide in ((device, "cuda", torch.float32), ("cpu", "reference", torch.float64)):
        leaves = [value.to(where, wide, copy=True).requires_grad_() for value in inputs[:3]]
        geometry = [value.to(where) for value in inputs[3:]]
        masks = {"row_mask": rows.to(where), "col_mask": cols.to(where)}
        cost = token_cost(*leaves, *geometry, normalize=normalize, backend=backend, **masks)
        (cost * torch.linspace(-1, 1, 1100).to(where, wide)).sum().backward()
        results.append([value.detach().cpu().double() for value in (cost, *(leaf.grad for leaf in leaves))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5 * max(1.0, float(want.abs().max())), rtol=0)


def test_what_the_kernels_lack_is_said_before_anything_runs(device):
    inputs = moved(draw(1, 1, 4, 20, torch.float32), device)
    with pytest.raises(ValueError, match="computes in float32"):
        token_cost(*(value.double() for value in inputs), backend="cuda")

"""The token cost and its gradient in Triton against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pisces_kernels import token_cost
from pisces_kernels._triton import _token_cost, fusion
from pisces_kernels._triton.cost import cosine_gradient


@pytest.fixture(autouse=True)
def few_columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems have several tiles, parts of a row and blocks of rows."""
    if "long" in request.node.name:
        return
    monkeypatch.setattr(_token_cost, "COLS", 64)
    monkeypatch.setattr(fusion, "CHUNK", 128)


def draw(n_samples: int, n_heads: int, n_rows: int, n_cols: int, dim: int = 24) -> list[Tensor]:
    text, video = torch.randn(n_samples, n_rows, dim), torch.randn(n_samples, n_cols, dim)
    if n_cols == 1 < n_rows:  # cosines that lie apart: the scaling divides by their range, and so do rounding errors
        text[:, 0], text[:, -1] = video[:, 0] + 0.3 * text[:, 0], 0.3 * text[:, -1] - video[:, 0]
    attention = torch.softmax(torch.randn(n_samples, n_heads, n_rows, n_cols), -1)
    return [text, video, attention, torch.arange(n_cols) // 9, torch.rand(n_cols, 2)]


def draw_masks(n_samples: int, n_rows: int, n_cols: int) -> dict[str, Tensor]:
    rows, cols = torch.rand(n_samples, n_rows) < 0.7, torch.rand(n_samples, n_cols) < 0.9
    rows[:, 0] = rows[:, -1] = cols[:, -1] = True
    return {"row_mask": rows, "col_mask": cols}


def poison(inputs: list[Tensor], masks: dict[str, Tensor]) -> None:
    """What is masked is NaN."""
    rows, cols = masks["row_mask"], masks["col_mask"]
    inputs[0][~rows], inputs[1][~cols] = torch.nan, torch.nan
    inputs[2][~(rows[:, None, :, None] & cols[:, None, None, :]).expand_as(inputs[2])] = torch.nan


def cost_and_gradients(
    inputs: list[Tensor],
    grad: Tensor,
    masks: dict[str, Tensor],
    where: str,
    backend: str,
    dtype: torch.dtype,
    **options: Any,
) -> list[Tensor]:
    """Cost and gradients of text, video and attention, in float64."""
    leaves = [value.to(where, dtype, copy=True).requires_grad_() for value in inputs[:3]]
    geometry = [value.to(where) for value in inputs[3:]]
    masks = {name: mask.to(where) for name, mask in masks.items()}
    cost = token_cost(*leaves, *geometry, backend=backend, **masks, **options)
    cost.backward(grad.to(where, dtype))
    return [value.detach().cpu().double() for value in (cost, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def compare(device: str, inputs: list[Tensor], masks: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Fail unless both agree; returns what Triton found."""
    grad = torch.randn(inputs[2].shape)
    got = cost_and_gradients(inputs, grad, masks, device, "triton", torch.float32, **options)
    want = cost_and_gradients(inputs, grad, masks, "cpu", "reference", torch.float64, **options)
    assert len(got) == len(want) == 4
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5 * max(1.0, float(theirs.abs().max())), rtol=0)
    return got


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 2, 4, 300, 24), (1, 3, 19, 64, 40), (1, 1, 70, 30, 33), (2, 1, 3, 1, 16), (1, 1, 1, 1, 1)]
)
def test_cost_and_gradients_equal_the_reference(device, shape, normalize):
    inputs, masks = draw(*shape), draw_masks(shape[0], *shape[2:4])
    compare(device, inputs, {}, normalize=normalize)
    poison(inputs, masks)
    cost, *gradients = compare(device, inputs, masks, normalize=normalize, gamma=0.4, eta=0.7)
    keep = masks["row_mask"][:, None, :, None] & masks["col_mask"][:, None, None, :]
    assert not cost[~keep.expand_as(cost)].any()
    assert not gradients[2][~keep.expand_as(cost)].any()


def test_long_rows(device):
    """As many columns as the kernels have in use: two parts of a row, ten tiles."""
    compare(device, draw(1, 1, 3, 4621, 8), draw_masks(1, 3, 4621))


def test_the_extremes_are_exactly_0_and_1(device):
    inputs = [value.to(device) for value in draw(1, 3, 6, 150)]
    cost = token_cost(*inputs, backend="triton").flatten(-2)
    assert (cost.amin(-1) == 0).all()
    assert (cost.amax(-1) == 1).all()
    assert torch.equal(cost, token_cost(*inputs, backend="triton").flatten(-2))  # bit for bit


def test_a_head_does_not_depend_on_its_batch(device):
    inputs = [value.to(device) for value in draw(2, 2, 5, 150)]
    one = [value[1:2] if value.dim() > 2 else value for value in inputs]
    assert torch.equal(token_cost(*inputs, backend="triton")[1:2], token_cost(*one, backend="triton"))


def test_a_degenerate_cost(device):
    """Features of length 0, rows without attention, one frame, places on top of each other: no NaN, no gradient."""
    text, video, attention, frames, places = draw(2, 2, 4, 90)
    text[0, 1], video[1, 5:9], attention[:, :, 2], frames[:], places[:] = 0.0, 0.0, 0.0, 3, 0.0
    compare(device, [text, video, attention, frames, places], {})
    text, video = torch.ones(2, 4, 8), torch.ones(2, 90, 8)  # a constant cost becomes 0
    cost = token_cost(*(value.to(device) for value in (text, video, attention, frames, places)), backend="triton")
    assert not cost.any()


def test_a_mask_may_remove_everything_of_a_sample(device):
    inputs, masks = draw(3, 2, 5, 70), draw_masks(3, 5, 70)
    masks["row_mask"][0] = masks["col_mask"][1] = False
    poison(inputs, masks)
    cost, *_ = compare(device, inputs, masks)
    assert not cost[:2].any()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_stays_in_its_heads(device, which):
    inputs, masks = draw(2, 2, 5, 70), draw_masks(2, 5, 70)
    inputs[which][1, -1] = torch.nan  # features: of the last token; attention: of the last head
    masks["row_mask"][1, -1] = True
    moved = [value.to(device) for value in inputs]
    cost = token_cost(*moved, backend="triton", **{name: mask.to(device) for name, mask in masks.items()}).cpu()
    keep = masks["row_mask"][:, None, :, None] & masks["col_mask"][:, None, None, :]
    bad = torch.zeros(2, 2, 1, 1, dtype=torch.bool)
    bad[1, 1 if which == 2 else slice(None)] = True
    assert torch.equal(cost.isnan(), keep & bad)


def test_inputs_need_not_be_contiguous(device):
    text, video, attention, frames, places = draw(1, 3, 6, 100)
    strided = [
        text.mT.contiguous().mT,
        video.mT.contiguous().mT,
        attention.transpose(1, 3).contiguous().transpose(1, 3),
    ]
    compare(device, [*strided, frames, places.T.contiguous().T], {})


def test_no_samples(device):
    inputs = [value.to(device) for value in draw(0, 2, 5, 70)]
    leaves = [value.requires_grad_() for value in inputs[:3]]
    cost = token_cost(*leaves, *inputs[3:], backend="triton")
    cost.sum().backward()
    assert cost.shape == leaves[2].shape


def test_ties_share_the_gradient_of_an_extreme(device):
    """Negative control, too: an extreme that is counted once instead of twice is seen."""
    text, video, attention, frames, places = draw(1, 1, 2, 40)
    text[:, 1], attention[:, :, 1] = text[:, 0], attention[:, :, 0]  # every entry is there twice
    compare(device, [text, video, attention, frames, places], {})
    cost = token_cost(*(value.to(device) for value in (text, video, attention, frames, places)), backend="triton")
    assert (cost == 0).sum() == (cost == 1).sum() == 2
    grad, frames, places = torch.randn(1, 1, 2, 40), frames.float().unsqueeze(0), places.unsqueeze(0)
    shared = [value.to(device) for value in (grad, text, video, attention, frames, places)]
    to_cosine, _ = cosine_gradient(*shared, None, None, cost, 0.2, 0.2, True)
    nudged = torch.where((cost == 0) & (torch.arange(2, device=cost.device) == 0)[:, None], 1e-9, cost)
    other, _ = cosine_gradient(*shared, None, None, nudged, 0.2, 0.2, True)
    assert (to_cosine - other).abs().max() > 1e-2

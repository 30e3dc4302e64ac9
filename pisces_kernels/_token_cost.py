"""The PISCES cost between text and video tokens: the public function, its checks, custom op and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, reference

WHO = "token_cost"


def geometry(
    who: str, frame_index: Tensor, positions: Tensor, batch: int, n_cols: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Check the tokens' geometry and give it a batch dimension: ([B, M], [B, M, 2])."""
    if frame_index.shape[-1:] != (n_cols,):
        raise ValueError(
            f"{who}: frame_index has shape {tuple(frame_index.shape)}, "
            f"expected ({batch}, {n_cols}) = (B, M) or ({n_cols},)."
        )
    if positions.shape[-2:] != (n_cols, 2):
        raise ValueError(
            f"{who}: positions has shape {tuple(positions.shape)}, "
            f"expected ({batch}, {n_cols}, 2) = (B, M, 2) or ({n_cols}, 2)."
        )
    frames = _checks.broadcast(who, "frame_index", frame_index, (batch, n_cols), "(B, M)")
    places = _checks.broadcast(who, "positions", positions, (batch, n_cols, 2), "(B, M, 2)")
    return frames.to(dtype), places.to(dtype)


def features(
    who: str, names: tuple[str, str], text: Tensor, video: Tensor, attention: Tensor
) -> tuple[int, int, int, int]:
    """Check text [B, N, D], video [B, M, D] and attention [B, H, N, M] against each other: (B, H, N, M)."""
    _checks.floating(who, names[0], text, 3)
    _checks.floating(who, names[1], video, 3)
    _checks.floating(who, "attention", attention, 4)
    batch, n_rows, dim = text.shape
    n_cols, heads = video.shape[1], attention.shape[1]
    if video.shape[0] != batch or video.shape[2] != dim:
        raise ValueError(
            f"{who}: {names[1]} has shape {tuple(video.shape)}, expected ({batch}, M, {dim}) to match {names[0]}."
        )
    if attention.shape != (batch, heads, n_rows, n_cols):
        raise ValueError(
            f"{who}: attention has shape {tuple(attention.shape)}, "
            f"expected ({batch}, H, {n_rows}, {n_cols}) = (B, H, N, M)."
        )
    if n_rows == 0 or n_cols == 0 or heads == 0 or dim == 0:
        raise ValueError(f"{who}: attention has shape {tuple(attention.shape)} and D = {dim}, expected sizes >= 1.")
    return batch, heads, n_rows, n_cols


def token_cost(
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    *,
    gamma: float = 0.2,
    eta: float = 0.2,
    normalize: bool = True,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the cost of matching each text token with each video token, for all samples and heads at once.

    cost_ij = 1 - cos(text_i, video_j) + gamma |t(i) - t_j| / (t_max - t_min) + eta ||s(i) - s_j|| / sqrt(2), where
    t(i) and s(i) are the means of `frame_index` and `positions` under row i of the attention (scaled to sum 1).
    With `normalize` each (sample, head) matrix is then scaled to [0, 1] over the entries that exist; a constant
    matrix becomes 0.

    Args:
        text: [B, N, D] floating, features of text tokens (all heads concatenated).
        video: [B, M, D] floating, features of video tokens.
        attention: [B, H, N, M] floating, cross-attention probabilities.
        frame_index: [M] or [B, M], time of each video token in any unit; a CLS token has -1.
        positions: [M, 2] or [B, M, 2], place of each video token, in [0, 1]; a CLS token has (-1, -1).
        gamma: weight of time.
        eta: weight of place.
        normalize: min-max scaling.
        row_mask: [B, N] bool, True where the token exists; a masked token is as if it were not there.
        col_mask: [B, M] bool.
        backend: None (the best that can run), "reference" or "cpu".

    Returns:
        [B, H, N, M] float32 (float64 if an input is float64), 0 where masked.

    Gradient:
        With respect to text, video and attention, through the min-max scaling; saved: the inputs and the cost. Where a
        distance is 0 its subgradient 0 is taken.

    Raises:
        TypeError: an input has the wrong kind of dtype.
        ValueError: shapes or devices do not fit.

    Example:
        >>> import torch
        >>> from pisces_kernels import token_cost
        >>> text, video = torch.randn(2, 5, 16), torch.randn(2, 12, 16)
        >>> attention = torch.softmax(torch.randn(2, 4, 5, 12), -1)
        >>> frame_index = torch.arange(3).repeat_interleave(4)
        >>> positions = torch.cartesian_prod(torch.linspace(0, 1, 2), torch.linspace(0, 1, 2)).repeat(3, 1)
        >>> token_cost(text, video, attention, frame_index, positions).shape
        torch.Size([2, 4, 5, 12])

    Source: PISCES (arXiv 2602.01624), semantic reward.
    """
    batch, _, n_rows, n_cols = features(WHO, ("text", "video"), text, video, attention)
    _checks.same_device(
        WHO, text, video=video, attention=attention, frame_index=frame_index, positions=positions, row_mask=row_mask,
        col_mask=col_mask,
    )  # fmt: skip
    dtype = _checks.working_dtype(text, video, attention)
    frames, places = geometry(WHO, frame_index, positions, batch, n_cols, dtype)
    row_mask = _checks.mask(WHO, "row_mask", row_mask, (batch, n_rows), "(B, N)")
    col_mask = _checks.mask(WHO, "col_mask", col_mask, (batch, n_cols), "(B, M)")
    gamma, eta = _checks.number(WHO, "gamma", gamma), _checks.number(WHO, "eta", eta)
    chosen = _dispatch.resolve(WHO, backend, text.device)
    return _token_cost_op(
        text.to(dtype), video.to(dtype), attention.to(dtype), frames, places, gamma, eta, normalize, row_mask,
        col_mask, chosen,
    )  # fmt: skip


@torch.library.custom_op("pisces_kernels::token_cost", mutates_args=())
def _token_cost_op(
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    gamma: float,
    eta: float,
    normalize: bool,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    backend: str,
) -> Tensor:
    """Cost [B, H, N, M] on one back end."""
    compute: Any = reference.token_cost
    if backend == "cpu":
        from ._cpu import token_cost as compute
    with torch.autocast(text.device.type, enabled=False):  # the cost is compared with epsilon: no half precision inside
        return compute(
            text,
            video,
            attention,
            frame_index,
            positions,
            gamma=gamma,
            eta=eta,
            normalize=normalize,
            row_mask=row_mask,
            col_mask=col_mask,
        )


@_token_cost_op.register_fake
def _(text: Tensor, video: Tensor, attention: Tensor, *unused: object) -> Tensor:
    return torch.empty_like(attention, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    text, video, attention, frame_index, positions, gamma, eta, normalize, row_mask, col_mask, _ = inputs
    ctx.save_for_backward(text, video, attention, frame_index, positions, row_mask, col_mask, output)
    ctx.options = (gamma, eta, normalize)


def _unit(tensor: Tensor) -> tuple[Tensor, Tensor]:
    norm = tensor.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return tensor / norm, norm


def _unit_backward(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    return (grad - unit * (grad * unit).sum(-1, keepdim=True)) / norm


@_checks.full_precision
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    text, video, attention, frame_index, positions, row_mask, col_mask, cost = ctx.saved_tensors
    gamma, eta, normalize = ctx.options
    rows = torch.ones_like(text[..., 0], dtype=torch.bool) if row_mask is None else row_mask
    cols = torch.ones_like(video[..., 0], dtype=torch.bool) if col_mask is None else col_mask
    keep = (rows.unsqueeze(-1) & cols.unsqueeze(-2)).unsqueeze(1)  # [B, 1, N, M]
    grad = torch.where(keep, grad, 0.0)
    t = torch.where(cols, frame_index, 0.0)[:, None, None, :]  # [B, 1, 1, M]
    s = torch.where(cols.unsqueeze(-1), positions, 0.0)
    s_y, s_x = s[:, None, None, :, 0], s[:, None, None, :, 1]
    attention = torch.where(keep, attention, 0.0)
    y, y_norm = _unit(torch.where(rows.unsqueeze(-1), text, 0.0))
    x, x_norm = _unit(torch.where(cols.unsqueeze(-1), video, 0.0))

    total = attention.sum(-1, keepdim=True)  # [B, H, N, 1]
    floored = total < reference.RANGE_FLOOR
    weights = attention / total.clamp_min(reference.RANGE_FLOOR)
    mean_t, mean_y, mean_x = ((weights * c).sum(-1, keepdim=True) for c in (t, s_y, s_x))
    t_range = torch.where(cols, frame_index, -torch.inf).amax(-1) - torch.where(cols, frame_index, torch.inf).amin(-1)
    t_range = torch.where(t_range > 0, t_range, 1.0)[:, None, None, None]
    away_y, away_x = mean_y - s_y, mean_x - s_x
    distance = (away_y**2 + away_x**2).sqrt()

    if normalize:
        # cost = (raw - low) / range: the entries at 0 and at 1 also move low and high. Ties share, as in torch.amin.
        raw = (
            1.0
            - (y @ x.transpose(-1, -2)).unsqueeze(1)
            + gamma * (mean_t - t).abs() / t_range
            + eta * distance / 2**0.5
        )
        low = torch.where(keep, raw, torch.inf).amin((-2, -1), keepdim=True)
        high = torch.where(keep, raw, -torch.inf).amax((-2, -1), keepdim=True)
        span = high - low
        divisor = span.clamp_min(reference.RANGE_FLOOR)
        to_divisor = torch.where(
            span > reference.RANGE_FLOOR, -(grad * cost).sum((-2, -1), keepdim=True) / divisor, 0.0
        )
        to_low = -(grad.sum((-2, -1), keepdim=True) / divisor) - to_divisor
        at_low, at_high = (keep & (cost == 0)).to(grad.dtype), (keep & (cost == 1)).to(grad.dtype)
        grad = grad / divisor
        grad = grad + at_low * to_low / at_low.sum((-2, -1), keepdim=True).clamp_min(1)
        grad = grad + at_high * to_divisor / at_high.sum((-2, -1), keepdim=True).clamp_min(1)

    to_t = (grad * gamma * torch.sign(mean_t - t) / t_range).sum(-1, keepdim=True)
    apart = distance > 0
    radial = torch.where(apart, grad * (eta / 2**0.5) / torch.where(apart, distance, 1.0), 0.0)
    to_y, to_x = (radial * away_y).sum(-1, keepdim=True), (radial * away_x).sum(-1, keepdim=True)
    grad_weights = to_t * t + to_y * s_y + to_x * s_x  # [B, H, N, M]
    mean = torch.where(floored, 0.0, to_t * mean_t + to_y * mean_y + to_x * mean_x)
    grad_attention = torch.where(keep, (grad_weights - mean) / total.clamp_min(reference.RANGE_FLOOR), 0.0)

    to_semantic = -grad.sum(1)  # [B, N, M], summed over the heads
    grad_text = torch.where(rows.unsqueeze(-1), _unit_backward(to_semantic @ x, y, y_norm), 0.0)
    grad_video = torch.where(cols.unsqueeze(-1), _unit_backward(to_semantic.transpose(-1, -2) @ y, x, x_norm), 0.0)
    return grad_text, grad_video, grad_attention, *([None] * 8)


_token_cost_op.register_autograd(_backward, setup_context=_setup_context)

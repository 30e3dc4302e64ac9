"""The PISCES cost between text and video tokens: the public function, its checks, custom op and gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _dispatch, reference
from ._autograd import differentiable
from ._precision import full_precision
from ._vmap import fold_into_problems

WHO = "token_cost"


def geometry(
    who: str,
    frame_index: Tensor,
    positions: Tensor,
    batch: int,
    n_cols: int,
    dtype: torch.dtype,
    col_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Check the tokens' geometry and give it a batch dimension: ([B, M] from 0, [B, M, 2])."""
    for name, value in (("frame_index", frame_index), ("positions", positions)):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{who}: {name} has dtype {value.dtype}, expected a floating or integer dtype.")
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
    # Only differences count. Taken from the earliest token before the dtype is narrowed, they are right for times of
    # any origin: float32 separates seconds since 1970 by two minutes.
    frames = frames.detach().double()
    exists = frames if col_mask is None else torch.where(col_mask, frames, torch.inf)
    return (frames - exists.amin(-1, keepdim=True)).to(dtype), places.detach().to(dtype)


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
        frame_index: [M] or [B, M] floating or integer, time of each video token in any unit, from any origin; a CLS
            token has -1 (one frame before the first).
        positions: [M, 2] or [B, M, 2] floating or integer, place of each video token, in [0, 1]; a CLS token has
            (-1, -1). Tokens may lie anywhere: no grid is assumed.
        gamma: weight of time.
        eta: weight of place.
        normalize: min-max scaling.
        row_mask: [B, N] bool, True where the token exists; a masked token is as if it were not there.
        col_mask: [B, M] bool.
        backend: None (the best that can run), "reference", "cpu", "cuda" or "triton" (float32).

    Returns:
        [B, H, N, M] float32 (float64 if text, video or attention is), computed in that dtype also under
        torch.autocast; 0 where masked, which is everywhere if a mask removes every token of a sample. A NaN or inf in
        an entry that exists is not hidden: with `normalize` it makes all existing entries of that sample and head NaN.

    Gradient:
        With respect to text, video and attention, through the min-max scaling, and once more through that (second
        derivatives are exact); saved: the inputs and the cost. Where a distance is 0 its subgradient 0 is taken. Not
        with respect to frame_index and positions. torch.func.grad, vjp and vmap work; forward mode (jvp) raises.

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
    row_mask = _checks.mask(WHO, "row_mask", row_mask, (batch, n_rows), "(B, N)")
    col_mask = _checks.mask(WHO, "col_mask", col_mask, (batch, n_cols), "(B, M)")
    frames, places = geometry(WHO, frame_index, positions, batch, n_cols, dtype, col_mask)
    gamma, eta = _checks.number(WHO, "gamma", gamma), _checks.number(WHO, "eta", eta)
    chosen = _dispatch.resolve(WHO, backend, text.device, dtype)
    return _token_cost(
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
    inputs = (text, video, attention, frame_index, positions)
    options: dict[str, Any] = {"gamma": gamma, "eta": eta, "normalize": normalize}
    options.update(row_mask=row_mask, col_mask=col_mask)
    if _dispatch.has_kernel("token_cost", backend):
        return _dispatch.kernel("token_cost", backend)(*inputs, **options)
    with full_precision(text.device):  # the cost is compared with epsilon: no half precision or TF32 inside
        return reference.token_cost(*inputs, **options)


@_token_cost_op.register_fake
def _(text: Tensor, video: Tensor, attention: Tensor, *unused: object) -> Tensor:
    return torch.empty_like(attention, memory_format=torch.contiguous_format)


def _unit(tensor: Tensor) -> tuple[Tensor, Tensor]:
    norm = tensor.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return tensor / norm, norm


def _unit_backward(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    return (grad - unit * (grad * unit).sum(-1, keepdim=True)) / norm


class _Units(NamedTuple):
    """Features of length 1, 0 where masked; their lengths before; which exist ([B, K, 1] or None)."""

    unit: Tensor
    norm: Tensor
    exists: Tensor | None


def _units(features: Tensor, mask: Tensor | None) -> _Units:
    exists = None if mask is None else mask.unsqueeze(-1)
    return _Units(*_unit(features if exists is None else torch.where(exists, features, 0.0)), exists)


def _by_features(to_cosine: Tensor, text: _Units, video: _Units) -> tuple[Tensor, Tensor]:
    """Gradients of text and video from those of their cosines [B, N, M]."""
    found = []
    for grad, own, other in ((to_cosine, text, video), (to_cosine.transpose(-1, -2), video, text)):
        by_own = _unit_backward(grad @ other.unit, own.unit, own.norm)
        found.append(by_own if own.exists is None else torch.where(own.exists, by_own, 0.0))
    return found[0], found[1]


def _inverse_distance(away_y: Tensor, away_x: Tensor) -> Tensor:
    """1 / ||away||, and 0 where that is 0: there the subgradient 0 is taken, for the second derivative too."""
    squared = away_y**2 + away_x**2
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).rsqrt(), 0.0)


def _raw_at(
    index: Tensor, y: Tensor, x: Tensor, means: Tensor, places: Tensor, time_weight: Tensor, place_weight: float
) -> Tensor:
    """Cost before the scaling of one entry per sample and head.

    Args:
        index: [B, H], entry of the flattened N x M matrix.
        y: [B, N, D], unit text features.
        x: [B, M, D], unit video features.
        means: [B, H, N, 3], expected frame and place of the rows.
        places: [B, M, 3], frame and place of the columns.
        time_weight: [B, 1].
        place_weight: of the distance.

    Returns:
        [B, H].
    """
    row, col = (part.unsqueeze(-1) for part in (index // x.shape[1], index % x.shape[1]))  # [B, H, 1]
    dim = y.shape[-1]
    cosine = (y.gather(1, row.expand(-1, -1, dim)) * x.gather(1, col.expand(-1, -1, dim))).sum(-1)
    mean = means.gather(2, row.unsqueeze(-1).expand(-1, -1, 1, 3)).squeeze(2)  # [B, H, 3]
    time, away_y, away_x = (mean - places.gather(1, col.expand(-1, -1, 3))).unbind(-1)
    distance = (away_y**2 + away_x**2) * _inverse_distance(away_y, away_x)
    return 1.0 - cosine + time_weight * time.abs() + place_weight * distance


def gradients(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    cost: Tensor,
    gamma: float,
    eta: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of text, video and attention, with few temporaries of the size of the cost.

    The expected frame and place of a row are matrix products with the [M, 3] geometry, and what the scaling needs of
    the raw cost is its value at the two extremes.
    """
    rows = torch.ones_like(text[..., 0], dtype=torch.bool) if row_mask is None else row_mask
    cols = torch.ones_like(video[..., 0], dtype=torch.bool) if col_mask is None else col_mask
    keep: Tensor | None = None  # [B, 1, N, M]
    if row_mask is not None or col_mask is not None:
        keep = (rows.unsqueeze(-1) & cols.unsqueeze(-2)).unsqueeze(1)
        grad, attention = torch.where(keep, grad, 0.0), torch.where(keep, attention, 0.0)
    y, x = _units(text, row_mask), _units(video, col_mask)
    places = torch.cat([frame_index.unsqueeze(-1), positions], -1)
    places = torch.where(cols.unsqueeze(-1), places, 0.0)  # [B, M, 3]
    total = attention.sum(-1, keepdim=True)  # [B, H, N, 1]
    floor = total.clamp_min(reference.RANGE_FLOOR)
    means = attention @ places.unsqueeze(1) / floor  # [B, H, N, 3]
    t_range = torch.where(cols, frame_index, -torch.inf).amax(-1) - torch.where(cols, frame_index, torch.inf).amin(-1)
    time_weight = (gamma / torch.where(t_range > 0, t_range, 1.0)).unsqueeze(-1)  # [B, 1]
    place_weight = eta / 2**0.5

    if normalize:
        # cost = (raw - low) / range: the entries at 0 and at 1 also move low and high. Ties share, as in torch.amin.
        at_low, at_high, least, most = cost == 0, cost == 1, cost, cost
        if keep is not None:
            at_low, at_high = keep & at_low, keep & at_high
            least, most = torch.where(keep, cost, torch.inf), torch.where(keep, cost, -torch.inf)
        low, high = (
            _raw_at(index, y.unit, x.unit, means, places, time_weight, place_weight)[..., None, None]
            for index in (least.flatten(-2).argmin(-1), most.flatten(-2).argmax(-1))
        )
        del least, most
        span = high - low
        divisor = span.clamp_min(reference.RANGE_FLOOR)
        to_divisor = torch.where(
            span > reference.RANGE_FLOOR, -(grad * cost).sum((-2, -1), keepdim=True) / divisor, 0.0
        )
        to_low = -(grad.sum((-2, -1), keepdim=True) / divisor) - to_divisor
        n_low, n_high = (at.sum((-2, -1), keepdim=True, dtype=torch.int32).clamp_min(1) for at in (at_low, at_high))
        grad = grad / divisor + at_low * (to_low / n_low) + at_high * (to_divisor / n_high)

    grad_text, grad_video = _by_features(-grad.sum(1), y, x)  # the heads share their cosines

    t, s_y, s_x = places[:, None, None].unbind(-1)  # [B, 1, 1, M]
    mean_t, mean_y, mean_x = (mean.unsqueeze(-1) for mean in means.unbind(-1))  # [B, H, N, 1]
    to_t = (grad * torch.sign(mean_t - t)).sum(-1) * time_weight.unsqueeze(-1)
    grad = grad * _inverse_distance(mean_y - s_y, mean_x - s_x)
    to_y = (grad * (mean_y - s_y)).sum(-1) * place_weight
    to_x = (grad * (mean_x - s_x)).sum(-1) * place_weight
    to_means = torch.stack([to_t, to_y, to_x], -1)  # [B, H, N, 3]
    along = torch.where(total < reference.RANGE_FLOOR, 0.0, (to_means * means).sum(-1, keepdim=True))
    grad_attention = ((to_means / floor) @ places.unsqueeze(1).transpose(-1, -2)).sub(along / floor)
    if keep is not None:
        grad_attention = torch.where(keep, grad_attention, 0.0)
    return grad_text, grad_video, grad_attention


@torch.library.custom_op("pisces_kernels::token_cost_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    cost: Tensor,
    gamma: float,
    eta: float,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gradients` on one back end."""
    inputs = (grad, text, video, attention, frame_index, positions, row_mask, col_mask, cost, gamma, eta, normalize)
    if _dispatch.has_kernel("token_cost_gradient", backend):
        return _dispatch.kernel("token_cost_gradient", backend)(*inputs)
    if _dispatch.has_kernel("cosine_gradient", backend):
        to_cosine, by_attention = _dispatch.kernel("cosine_gradient", backend)(*inputs)
        with full_precision(grad.device):
            return *_by_features(to_cosine, _units(text, row_mask), _units(video, col_mask)), by_attention
    with full_precision(grad.device):
        return gradients(*inputs)


@_backward_op.register_fake
def _(grad: Tensor, text: Tensor, video: Tensor, attention: Tensor, *unused: object) -> tuple[Tensor, Tensor, Tensor]:
    by_text, by_video, by_attention = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (text, video, attention)
    )
    return by_text, by_video, by_attention


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, gamma, eta, normalize, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (gamma, eta, normalize)


def _backward_again(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives: differentiate the formulas."""
    grad, text, video, attention, frame_index, positions, row_mask, col_mask, cost = ctx.saved_tensors

    def formulas(grad: Tensor, text: Tensor, video: Tensor, attention: Tensor, cost: Tensor) -> tuple[Tensor, ...]:
        geometry_and_masks = (frame_index, positions, row_mask, col_mask)
        return gradients(grad, text, video, attention, *geometry_and_masks, cost, *ctx.options)

    with full_precision(grad.device):
        _, pullback = torch.func.vjp(formulas, grad, text, video, attention, cost)
        by_grad, by_text, by_video, by_attention, by_cost = pullback(grads)
    return by_grad, by_text, by_video, by_attention, *([None] * 4), by_cost, *([None] * 4)


fold_into_problems(_backward_op)
_gradients = differentiable(_backward_op, _backward_again, _backward_setup_context)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    text, video, attention, frame_index, positions, gamma, eta, normalize, row_mask, col_mask, backend = inputs
    ctx.save_for_backward(text, video, attention, frame_index, positions, row_mask, col_mask, output)
    ctx.options = (gamma, eta, normalize, backend)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(grad, *ctx.saved_tensors, *ctx.options), *([None] * 8)


fold_into_problems(_token_cost_op)
_token_cost = differentiable(_token_cost_op, _backward, _setup_context)

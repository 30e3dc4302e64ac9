"""The token-level transport of the released PISCES code, for batches: its names, its arguments, its numbers.

Stands in for `fastvideo/partial_optimal_transport.py` of https://github.com/roar-ai/pisces (commit f8606b0): every
function below takes what the function of that name takes there and returns what it returns. The signatures were
read in that file; the formulas are written out independently in `tests/test_compat_pisces.py` and compared there.

Agrees, to rounding, for one video-caption pair on the geometry of InternVideo2:

- the cost, its floors of 1e-6 included; the plan, its total mass and the iteration at which it stops included (the
  iteration is started where the released one starts, see `solve_partial_ot`); the normalised rows; the fusion, which
  clamps at 1e-6 (`pisces_kernels.transport_attention` adds 1e-6, as the paper writes it); rows that are not selected
  come back bit for bit; gradients run through the attention only.
- `transported_mass` keeps its name, but is a damping exponent: the plan of 0.9 does not carry 0.9. From 0.999 on the
  problem is balanced. `pisces_kernels.sinkhorn(..., mass=0.9)` transports exactly 0.9.

Differs, deliberately:

- Batches. Any number of samples and heads in one call, each with its own lexical tokens (a bool mask [B, Q] as
  `valid_tokens`), and no loop over heads. The released code takes one pair a call.
- Geometry. Any tokens (`geometry`), grids that are not square, no CLS token. Time is divided by its range whatever
  its unit; the released code by at least 1, which differs only where all times lie within less than 1.
- A NaN or inf comes back as NaN, in that sample and head only; the released code turns it into a cost of 1.
- float64 stays float64. float16 and bfloat16 are computed in float32, as there.
- No value is read on the host in the iteration (the released code waits for the device once an iteration). Indices
  are checked where that is free: when they are on the CPU.
- `solve_partial_ot` has the implicit gradient of `sinkhorn` instead of the graph of all iterations.
- A sample without lexical tokens (mask form) keeps its attention; an empty list of indices is an error, as there.

Source: PISCES (arXiv 2602.01624), semantic reward, and its released code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from .._sinkhorn import sinkhorn
from .._token_cost import token_cost
from ..reference import RANGE_FLOOR

__all__ = [
    "apply_partial_ot_attention",
    "build_partial_ot_prior",
    "build_video_token_geometry",
    "compute_spatiotemporal_cost",
    "fuse_attention_with_partial_ot",
    "normalize_transport_rows",
    "solve_partial_ot",
]

PATCHES_PER_FRAME = 256  # 16 x 16, InternVideo2 at 224 pixels
BALANCED_FROM = 0.999  # of transported_mass


def build_video_token_geometry(
    num_video_tokens: int,
    *,
    patches_per_frame: int | tuple[int, int] = PATCHES_PER_FRAME,
    cls: bool = True,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return frame index and place of video tokens that lie frame by frame and row by row, after a CLS token.

    Args:
        num_video_tokens: M, frames times patches, and one for the CLS token.
        patches_per_frame: number of patches of a square grid, or (rows, columns). The pair is ours.
        cls: whether there is a CLS token, which gets frame -1 and place (-1, -1). Ours; the released code has one.
        device: where the results are made.

    Returns:
        (frame_indices [M] int64, spatial_coordinates [M, 2] float32 in [0, 1]).

    Raises:
        ValueError: the patches are not whole frames, or not a square.

    Example:
        >>> from pisces_kernels.compat.pisces import build_video_token_geometry
        >>> build_video_token_geometry(9, patches_per_frame=4)[0].tolist()
        [-1, 0, 0, 0, 0, 1, 1, 1, 1]
    """
    who = "build_video_token_geometry"
    if isinstance(patches_per_frame, tuple):
        n_rows, n_cols = patches_per_frame
    else:
        n_rows = n_cols = math.isqrt(max(patches_per_frame, 0))
        if n_rows * n_cols != patches_per_frame:
            raise ValueError(f"{who}: patches_per_frame is {patches_per_frame}, expected a square or (rows, columns).")
    if n_rows < 1 or n_cols < 1:
        raise ValueError(f"{who}: patches_per_frame is {patches_per_frame}, expected at least one patch.")
    n_frames, rest = divmod(num_video_tokens - int(cls), n_rows * n_cols)
    if n_frames < 1 or rest:
        raise ValueError(
            f"{who}: got {num_video_tokens} tokens, expected {'1 (CLS) + ' if cls else ''}a multiple of "
            f"{n_rows} x {n_cols} patches. Pass patches_per_frame=(rows, columns), or cls=False."
        )
    frames = torch.arange(n_frames, device=device).repeat_interleave(n_rows * n_cols)
    axes = (torch.linspace(0.0, 1.0, size, device=device) for size in (n_rows, n_cols))
    places = torch.cartesian_prod(*axes).repeat(n_frames, 1)
    if cls:
        frames = torch.cat([frames.new_full((1,), -1), frames])
        places = torch.cat([places.new_full((1, 2), -1.0), places])
    return frames, places


def compute_spatiotemporal_cost(
    text_embeddings: Tensor,
    video_embeddings: Tensor,
    attention: Tensor,
    frame_indices: Tensor,
    spatial_coordinates: Tensor,
    *,
    temporal_weight: float = 0.2,
    spatial_weight: float = 0.2,
    eps: float = RANGE_FLOOR,
    row_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the cost of matching text tokens with video tokens, scaled to [0, 1]: `pisces_kernels.token_cost`.

    Args:
        text_embeddings: [N, D] or [B, N, D] floating.
        video_embeddings: [M, D] or [B, M, D].
        attention: [N, M] (as in the released code) or [H, N, M] for one sample, [B, H, N, M] for a batch.
        frame_indices: [M] or [B, M].
        spatial_coordinates: [M, 2] or [B, M, 2].
        temporal_weight: weight of time.
        spatial_weight: weight of place.
        eps: smallest sum of an attention row and smallest range of a cost; only 1e-6, which is built in.
        row_mask: [N] or [B, N] bool, True for the tokens to match; the others cost 0 and have no say. Ours.
        backend: see `pisces_kernels.token_cost`. Ours.

    Returns:
        The shape of attention; float32, or float64 if an input is float64.

    Gradient:
        With respect to text_embeddings, video_embeddings and attention, see `pisces_kernels.token_cost`.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit, or eps is another number.

    Example:
        >>> import torch
        >>> from pisces_kernels.compat import pisces
        >>> geometry = pisces.build_video_token_geometry(9, patches_per_frame=4)
        >>> attention = torch.softmax(torch.randn(5, 9), -1)
        >>> pisces.compute_spatiotemporal_cost(torch.randn(5, 8), torch.randn(9, 8), attention, *geometry).shape
        torch.Size([5, 9])

    Source: PISCES (arXiv 2602.01624), semantic reward.
    """
    who = "compute_spatiotemporal_cost"
    _checks.floating(who, "text_embeddings", text_embeddings)
    _checks.floating(who, "video_embeddings", video_embeddings)
    _checks.floating(who, "attention", attention)
    if eps != RANGE_FLOOR:
        raise ValueError(f"{who}: eps is {eps!r}, expected {RANGE_FLOOR}, which is built in. Leave it out.")
    n_dims = (text_embeddings.ndim, video_embeddings.ndim, attention.ndim)
    if n_dims not in ((2, 2, 2), (2, 2, 3), (3, 3, 4)):
        shapes = [tuple(t.shape) for t in (text_embeddings, video_embeddings, attention)]
        raise ValueError(
            f"{who}: text_embeddings, video_embeddings, attention have shapes {shapes}, expected [N, D], [M, D], "
            "[N, M] or [H, N, M] for one sample; [B, N, D], [B, M, D], [B, H, N, M] for a batch."
        )
    one = text_embeddings.ndim == 2
    if one:
        text_embeddings, video_embeddings = text_embeddings.unsqueeze(0), video_embeddings.unsqueeze(0)
    cost = token_cost(
        text_embeddings,
        video_embeddings,
        attention.reshape(1, -1, *attention.shape[-2:]) if one else attention,
        frame_indices,
        spatial_coordinates,
        gamma=temporal_weight,
        eta=spatial_weight,
        row_mask=row_mask,
        backend=backend,
    )
    return cost.reshape(attention.shape)


def solve_partial_ot(
    cost: Tensor,
    *,
    epsilon: float = 0.05,
    transported_mass: float = 0.9,
    max_iterations: int = 200,
    tolerance: float = 1e-3,
    row_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the damped transport plan between uniform marginals, with the counting measure as reference.

    plan = exp(log_u + log_v - cost / epsilon), where, with m = transported_mass,
    log_u_i = m (log 1/N - log sum_j exp(log_v_j - cost_ij / epsilon)), and the same for log_v.
    `pisces_kernels.sinkhorn` with tau = m uses the product of the marginals as reference instead; with uniform ones
    f / epsilon = log_u + k and g / epsilon = log_v + k, k = m / (1 + m) log(N M). Starting it at f = g = epsilon k
    therefore gives the released iteration (log_u = log_v = 0 at first) one for one, and its plan times
    (N M)^((1 - m) / (1 + m)) is the released plan. Rows scaled to sum 1 do not differ.

    Args:
        cost: [..., N, M] floating; [N, M] in the released code.
        epsilon: entropic regularisation > 0.
        transported_mass: m in (0, 1], the damping exponent rho / (rho + epsilon) of both sides; 1 from 0.999 on.
        max_iterations: most iterations.
        tolerance: a problem stops when log_u and log_v change by less.
        row_mask: [..., N] bool, True where the row exists; N counts these only. Ours.
        backend: see `pisces_kernels.sinkhorn`. Ours.

    Returns:
        [..., N, M] float32 (float64 if cost is), zeros in masked rows; of the same shape if N or M is 0. A plan that
        has not converged is returned as it is; `sinkhorn` has the flags.

    Gradient:
        With respect to cost, implicit: exact at the fixed point.

    Raises:
        TypeError, ValueError: cost is no floating tensor, shapes or ranges do not fit.

    Example:
        >>> import torch
        >>> from pisces_kernels.compat.pisces import solve_partial_ot
        >>> solve_partial_ot(torch.rand(2, 4, 20, 300)).shape
        torch.Size([2, 4, 20, 300])

    Source: PISCES (arXiv 2602.01624), released code; Chizat et al. 2018 (damped updates).
    """
    who = "solve_partial_ot"
    _checks.floating(who, "cost", cost)
    if cost.ndim < 2:
        raise ValueError(f"{who}: cost has shape {tuple(cost.shape)}, expected [..., N, M].")
    epsilon = _checks.positive(who, "epsilon", epsilon)
    tau = _checks.unit_interval(who, "transported_mass", transported_mass)
    tau = 1.0 if tau >= BALANCED_FROM else tau
    dtype = _checks.working_dtype(cost)
    *batch, n_rows, n_cols = cost.shape
    if n_rows == 0 or n_cols == 0:
        return cost.new_zeros(cost.shape, dtype=dtype)
    row_mask = _checks.mask(who, "row_mask", row_mask, (*batch, n_rows), "cost.shape[:-1]")
    if row_mask is None:
        count = torch.full(batch, n_rows, dtype=dtype, device=cost.device)
    else:
        count = row_mask.sum(-1).clamp_min(1).to(dtype)
    log_size = (count * n_cols).log()  # [...], log(N M)
    start = (epsilon * tau / (1 + tau) * log_size).unsqueeze(-1)
    result = sinkhorn(
        cost,
        epsilon=epsilon,
        tau=tau,
        row_mask=row_mask,
        max_iters=max_iterations,
        tol=tolerance,
        f_init=start.expand(*batch, n_rows),
        g_init=start.expand(*batch, n_cols),
        backend=backend,
    )
    return result.plan() * ((1 - tau) / (1 + tau) * log_size).exp()[..., None, None]


def normalize_transport_rows(transport_plan: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Scale the rows of a plan to sum 1.

    Args:
        transport_plan: [..., N, M], non-negative.
        eps: smallest divisor.

    Returns:
        [..., N, M]; a row of zeros stays one.

    Example:
        >>> import torch
        >>> from pisces_kernels.compat.pisces import normalize_transport_rows
        >>> normalize_transport_rows(torch.tensor([[1.0, 3.0]])).tolist()
        [[0.25, 0.75]]
    """
    return transport_plan / transport_plan.sum(-1, keepdim=True).clamp_min(eps)


def _selection(who: str, valid_tokens: Tensor, batch: int, n_queries: int, device: torch.device) -> Tensor:
    """Check lexical tokens: indices [N] int64, or a mask [B, Q] bool, on the device of the attention."""
    if not isinstance(valid_tokens, Tensor) or valid_tokens.is_floating_point() or valid_tokens.is_complex():
        got = valid_tokens.dtype if isinstance(valid_tokens, Tensor) else type(valid_tokens).__name__
        raise TypeError(f"{who}: valid_tokens is {got}, expected a tensor: indices [N] or a bool mask [B, Q].")
    if valid_tokens.dtype == torch.bool:
        return _checks.broadcast(who, "valid_tokens", valid_tokens, (batch, n_queries), "(B, Q)").to(device)
    if valid_tokens.ndim != 1 or valid_tokens.numel() == 0:
        raise ValueError(
            f"{who}: valid_tokens has shape {tuple(valid_tokens.shape)}, expected (N,) indices, N >= 1, or a bool mask "
            f"({batch}, {n_queries}) = (B, Q). Pass a mask where samples differ."
        )
    if _checks.readable(valid_tokens) and not bool(((valid_tokens >= 0) & (valid_tokens < n_queries)).all()):
        raise ValueError(f"{who}: valid_tokens has indices outside of [0, {n_queries}), the text sequence.")
    return valid_tokens.to(device, torch.int64)


@torch.no_grad()
def build_partial_ot_prior(
    query_embeddings: Tensor,
    key_layer: Tensor,
    attention_probs: Tensor,
    valid_tokens: Tensor,
    *,
    patches_per_frame: int | tuple[int, int] = PATCHES_PER_FRAME,
    geometry: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the transport plans of all samples and heads, rows scaled to sum 1: cost, solve, normalise.

    Args:
        query_embeddings: [B, Q, D] floating, projected text queries, heads concatenated.
        key_layer: [B, H, M, D / H], projected video keys of each head.
        attention_probs: [B, H, Q, M], cross-attention probabilities.
        valid_tokens: lexical tokens, one of: indices [N] that hold for every sample; a bool mask [B, Q]. The mask is
            ours: samples may differ.
        patches_per_frame: see `build_video_token_geometry`; there is a CLS token.
        geometry: (frame_indices [M] or [B, M], spatial_coordinates [M, 2] or [B, M, 2]) instead. Ours.
        backend: see `pisces_kernels.sinkhorn`. Ours.

    Returns:
        float32 (float64 if an input is), without gradient. Indices: [H, N, M] if B = 1, as in the released code, else
        [B, H, N, M]. Mask: [B, H, Q, M], zeros in rows that are not selected.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit, or indices are out of range.

    Example:
        >>> import torch
        >>> from pisces_kernels.compat.pisces import build_partial_ot_prior
        >>> attention_probs = torch.softmax(torch.randn(1, 3, 5, 9), -1)
        >>> build_partial_ot_prior(
        ...     torch.randn(1, 5, 12), torch.randn(1, 3, 9, 4), attention_probs, torch.tensor([1, 2]),
        ...     patches_per_frame=4,
        ... ).shape
        torch.Size([3, 2, 9])

    Source: PISCES (arXiv 2602.01624), semantic reward.
    """
    who = "build_partial_ot_prior"
    _checks.floating(who, "query_embeddings", query_embeddings, 3)
    _checks.floating(who, "key_layer", key_layer, 4)
    _checks.floating(who, "attention_probs", attention_probs, 4)
    batch, n_queries, dim = query_embeddings.shape
    _, heads, n_tokens, head_dim = key_layer.shape
    if key_layer.shape[0] != batch or heads * head_dim != dim:
        raise ValueError(
            f"{who}: key_layer has shape {tuple(key_layer.shape)}, expected ({batch}, H, M, {dim} / H) to match "
            "query_embeddings."
        )
    if attention_probs.shape != (batch, heads, n_queries, n_tokens):
        raise ValueError(
            f"{who}: attention_probs has shape {tuple(attention_probs.shape)}, expected "
            f"({batch}, {heads}, {n_queries}, {n_tokens}) = (B, H, Q, M)."
        )
    chosen = _selection(who, valid_tokens, batch, n_queries, attention_probs.device)
    if geometry is None:
        geometry = build_video_token_geometry(
            n_tokens, patches_per_frame=patches_per_frame, device=attention_probs.device
        )
    rows = chosen if chosen.dtype == torch.bool else None
    if rows is None:
        query_embeddings, attention_probs = query_embeddings[:, chosen], attention_probs[:, :, chosen]
    video = key_layer.transpose(1, 2).flatten(2)  # [B, M, D]
    cost = compute_spatiotemporal_cost(
        query_embeddings, video, attention_probs, *geometry, row_mask=rows, backend=backend
    )
    plan = solve_partial_ot(cost, row_mask=None if rows is None else rows.unsqueeze(1), backend=backend)
    prior = normalize_transport_rows(plan)
    return prior.squeeze(0) if rows is None and batch == 1 else prior


def fuse_attention_with_partial_ot(
    attention_probs: Tensor, transport_prior: Tensor, valid_tokens: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """Replace the attention of lexical rows by its product with the prior, scaled to sum 1.

    fused = softmax_j(log max(attention, eps) + log max(prior, eps)).

    Args:
        attention_probs: [B, H, Q, M] floating.
        transport_prior: what `build_partial_ot_prior` returned for these tokens.
        valid_tokens: indices [N] or bool mask [B, Q], see `build_partial_ot_prior`.
        eps: smallest factor, > 0.

    Returns:
        [B, H, Q, M] in the dtype of attention_probs, computed in float32 or float64; rows that are not selected are
        the same bits.

    Gradient:
        With respect to attention_probs; 0 where it is below eps. The prior is a constant.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit, or indices are out of range.

    Example:
        >>> import torch
        >>> from pisces_kernels.compat.pisces import fuse_attention_with_partial_ot
        >>> attention_probs = torch.softmax(torch.randn(1, 3, 5, 9), -1)
        >>> prior = torch.softmax(torch.randn(3, 2, 9), -1)
        >>> fused = fuse_attention_with_partial_ot(attention_probs, prior, torch.tensor([1, 2]))
        >>> torch.equal(fused[:, :, 0], attention_probs[:, :, 0])
        True

    Source: PISCES (arXiv 2602.01624), equation 3 and released code.
    """
    who = "fuse_attention_with_partial_ot"
    _checks.floating(who, "attention_probs", attention_probs, 4)
    _checks.floating(who, "transport_prior", transport_prior)
    eps = _checks.positive(who, "eps", eps)
    batch, _, n_queries, _ = attention_probs.shape
    chosen = _selection(who, valid_tokens, batch, n_queries, attention_probs.device)
    by_mask = chosen.dtype == torch.bool
    selected = attention_probs if by_mask else attention_probs[:, :, chosen]
    if not by_mask and batch == 1 and transport_prior.ndim == 3:
        transport_prior = transport_prior.unsqueeze(0)
    if transport_prior.shape != selected.shape:
        raise ValueError(
            f"{who}: transport_prior has shape {tuple(transport_prior.shape)}, expected {tuple(selected.shape)} = "
            f"({'B, H, Q, M' if by_mask else 'B, H, N, M'}) for these valid_tokens."
        )
    _checks.same_device(who, attention_probs, transport_prior=transport_prior)
    dtype = _checks.working_dtype(attention_probs)
    logs = selected.to(dtype).clamp_min(eps).log() + transport_prior.detach().to(dtype).clamp_min(eps).log()
    fused = torch.softmax(logs, -1).to(attention_probs.dtype)
    if by_mask:
        return torch.where(chosen[:, None, :, None], fused, attention_probs)
    return attention_probs.index_copy(2, chosen, fused)


def apply_partial_ot_attention(
    attention_probs: Tensor,
    query_embeddings: Tensor,
    key_layer: Tensor,
    valid_tokens: Tensor,
    *,
    patches_per_frame: int | tuple[int, int] = PATCHES_PER_FRAME,
    geometry: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Build the prior and fuse it into the attention: `build_partial_ot_prior`, `fuse_attention_with_partial_ot`.

    `pisces_kernels.transport_attention` does the same in one call, stores neither cost nor plan, and has the options
    (epsilon, tau, mass, ...); it adds 1e-6 to attention and prior, where this clamps at 1e-6.

    Args:
        attention_probs: [B, H, Q, M] floating.
        query_embeddings: [B, Q, D].
        key_layer: [B, H, M, D / H].
        valid_tokens: indices [N] or bool mask [B, Q], see `build_partial_ot_prior`.
        patches_per_frame: see `build_video_token_geometry`. This and what follows is ours.
        geometry: see `build_partial_ot_prior`.
        backend: see `pisces_kernels.sinkhorn`.

    Returns:
        [B, H, Q, M] in the dtype of attention_probs.

    Gradient:
        With respect to attention_probs, the prior held constant.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit, or indices are out of range.

    Example:
        >>> import torch
        >>> from pisces_kernels.compat.pisces import apply_partial_ot_attention
        >>> attention_probs = torch.softmax(torch.randn(1, 3, 5, 9), -1)
        >>> apply_partial_ot_attention(
        ...     attention_probs, torch.randn(1, 5, 12), torch.randn(1, 3, 9, 4), torch.tensor([1, 2]),
        ...     patches_per_frame=4,
        ... ).shape
        torch.Size([1, 3, 5, 9])

    Source: PISCES (arXiv 2602.01624), semantic reward.
    """
    prior = build_partial_ot_prior(
        query_embeddings,
        key_layer,
        attention_probs,
        valid_tokens,
        patches_per_frame=patches_per_frame,
        geometry=geometry,
        backend=backend,
    )
    return fuse_attention_with_partial_ot(attention_probs, prior, valid_tokens)

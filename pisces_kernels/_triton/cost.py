"""The token cost, alone and inside transport attention, in Triton: the adapters."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import _launch
from ._token_cost import write_cost
from ._token_gradient import cosine_gradient
from .fusion import fuse, fusion_gradient
from .sinkhorn import sinkhorn

__all__ = ["cosine_gradient", "fusion_gradient", "token_cost", "transport_attention"]


def token_cost(
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    *,
    gamma: float,
    eta: float,
    normalize: bool,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> Tensor:
    """`reference.token_cost` in Triton; same arguments and result."""
    if attention.numel() == 0:
        return _launch.empty(attention.shape, attention)
    text, video, attention, frame_index, positions = map(_launch.read, (text, video, attention, frame_index, positions))
    masks = _launch.read(row_mask), _launch.read(col_mask)
    return write_cost(text, video, attention, frame_index, positions, *masks, gamma, eta, normalize)


def transport_attention(
    query: Tensor,
    key: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    *,
    epsilon: float,
    tau: float,
    mass: float | None,
    row_mask: Tensor | None,
    max_iters: int,
    tol: float,
    gamma: float,
    eta: float,
    return_plan: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.transport_attention` in Triton; the plan is empty unless asked for."""
    samples, heads, rows, cols = attention.shape
    problems = samples * heads
    if problems == 0:
        plan = _launch.empty(attention.shape if return_plan else (0,), attention)
        return _launch.empty(attention.shape, attention, attention.dtype), plan
    full = partial(attention.new_full, dtype=torch.float32)
    selected = None if row_mask is None else row_mask.unsqueeze(1).expand(-1, heads, -1).reshape(problems, rows)
    a, b = full((problems, rows), 1.0 / rows), full((problems, cols), 1.0 / cols)
    if selected is not None:
        a = selected / selected.sum(-1, keepdim=True).clamp_min(1)
    query, key, attention, frame_index, positions = map(_launch.read, (query, key, attention, frame_index, positions))
    mask = _launch.read(row_mask)
    cost = write_cost(query, key, attention, frame_index, positions, mask, None, gamma, eta, True)
    cost = cost.view(problems, rows, cols)
    f, g, _, _ = sinkhorn(
        cost, a, b, full((problems,), epsilon),
        tau_a=tau if mass is None else 1.0, tau_b=tau if mass is None else 1.0,
        mass=None if mass is None else full((problems,), mass),
        row_mask=selected, col_mask=None, max_iters=max_iters, tol=tol, f_init=None, g_init=None, acceleration=None,
    )  # fmt: skip
    return fuse(attention, cost, f, g, a, mask, epsilon, return_plan)

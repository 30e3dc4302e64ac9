"""Random transport problems, token geometries and tolerances that several test files share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Largest allowed difference of potentials between the fused float32 solve and the float64 reference, in cost units.
POTENTIAL_TOLERANCE = 1e-5
# The same for a float64 solve: only the order of summation differs.
DOUBLE_TOLERANCE = 1e-10

# Sizes that do not divide vectors or panels of any instruction set, extremes included.
SIZES = [(1, 1), (1, 37), (29, 1), (7, 33), (40, 257), (65, 31)]

# Every kind of problem. 0.63 of the mass is never the weight of a whole number of uniform rows of these sizes: there
# the multiplier of the mass would not be unique.
KINDS: dict[str, dict[str, object]] = {
    "balanced": {},
    "tau": {"tau": 0.9},
    "semi": {"tau": (1.0, 0.5)},
    "mass": {"mass": 0.63},
}


def random_costs(n_problems: int, n_rows: int, n_cols: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Costs that fill [0, 1] in each problem: [P, N, M]."""
    cost = torch.rand(n_problems, n_rows, n_cols, dtype=torch.float64)
    cost = cost - cost.amin((1, 2), keepdim=True)
    return (cost / cost.amax((1, 2), keepdim=True).clamp_min(1e-6)).to(dtype)


def random_weights(n_problems: int, size: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Weights with sum 1, none of them tiny: [P, size]."""
    weights = 0.2 + torch.rand(n_problems, size, dtype=torch.float64)
    return (weights / weights.sum(-1, keepdim=True)).to(dtype)


def random_mask(n_problems: int, size: int) -> Tensor:
    """Boolean masks that keep at least the first entry: [P, size]."""
    mask = torch.rand(n_problems, size) < 0.75
    mask[:, 0] = True
    return mask


def token_grid(frames: int, rows: int, cols: int, *, cls: bool = True) -> tuple[Tensor, Tensor]:
    """Geometry of video tokens, frame by frame and row by row: (frame_index [M], positions [M, 2])."""
    frame_index = torch.arange(frames, dtype=torch.float32).repeat_interleave(rows * cols)
    places = torch.cartesian_prod(torch.linspace(0, 1, rows), torch.linspace(0, 1, cols)).repeat(frames, 1)
    if cls:
        frame_index = torch.cat([torch.tensor([-1.0]), frame_index])
        places = torch.cat([torch.full((1, 2), -1.0), places])
    return frame_index, places


def token_problem(
    batch: int, heads: int, n_rows: int, n_cols: int, dim: int = 12, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """What a cross-attention layer gives: text [B, N, D], video [B, M, D], attention [B, H, N, M]."""
    text = torch.randn(batch, n_rows, dim, dtype=torch.float64) + 0.5
    video = torch.randn(batch, n_cols, dim, dtype=torch.float64) + 0.5
    logits = (text @ video.transpose(-1, -2)).unsqueeze(1) / math.sqrt(dim)
    attention = torch.softmax(logits + torch.randn(batch, heads, n_rows, n_cols, dtype=torch.float64), -1)
    return text.to(dtype), video.to(dtype), attention.to(dtype)


def poisoned(value: Tensor, keep: Tensor) -> Tensor:
    """Copy of value with NaN where keep is False."""
    return torch.where(keep, value, torch.nan)


def strided(value: Tensor) -> Tensor:
    """Same values behind strides that no kernel wants: every second element of a larger, transposed tensor."""
    wide = torch.empty(*value.shape[:-2], value.shape[-1] * 2, value.shape[-2], dtype=value.dtype)
    view = wide.transpose(-1, -2)[..., ::2]
    view.copy_(value)
    return view

"""Random point clouds and their explicit cost, shared by the tests of the streamed functions."""

from __future__ import annotations

import torch
from problems import random_weights
from torch import Tensor

COSTS = ["sqeuclidean", "cosine"]


def explicit_cost(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """[..., N, M], by its definition."""
    if cost == "cosine":
        x, y = (torch.nn.functional.normalize(points, dim=-1) for points in (x, y))
        return 1.0 - (x.unsqueeze(-2) * y.unsqueeze(-3)).sum(-1)
    return ((x.unsqueeze(-2) - y.unsqueeze(-3)) ** 2).sum(-1)


def clouds(problems: int, n_rows: int, n_cols: int, dim: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, y, a, b."""
    points = [torch.rand(problems, size, dim, dtype=torch.float64) for size in (n_rows, n_cols)]
    return [t.to(dtype) for t in (*points, random_weights(problems, n_rows), random_weights(problems, n_cols))]


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()

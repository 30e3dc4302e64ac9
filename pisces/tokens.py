"""Geometry of the video tokens: which frame and which place each token of a video encoder stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLS_FRAME = -1.0  # a summary token is nowhere: frame -1, place (-1, -1), as the method's authors have it
CLS_POSITION = (-1.0, -1.0)


@dataclass(frozen=True)
class TokenGrid:
    """A video cut into `frames` x `rows` x `cols` patches, in that order, optionally after one CLS token.

    Attributes:
        frames: token frames, at least 1 (fewer than video frames where a token covers several).
        rows: patch rows, at least 1.
        cols: patch columns, at least 1.
        cls: True when the first token is a summary token without a place.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> grid = TokenGrid(frames=8, rows=16, cols=16, cls=True)
        >>> grid.n_tokens
        2049
        >>> grid.positions().shape
        torch.Size([2049, 2])
    """

    frames: int
    rows: int
    cols: int
    cls: bool = False

    def __post_init__(self) -> None:
        for name in ("frames", "rows", "cols"):
            if getattr(self, name) < 1:
                raise ValueError(f"TokenGrid: {name} is {getattr(self, name)}, expected at least 1.")

    @property
    def n_tokens(self) -> int:
        """Number of tokens M = frames * rows * cols, plus 1 with a CLS token."""
        return self.frames * self.rows * self.cols + int(self.cls)

    def frame_index(self) -> Tensor:
        """[M] float32: token frame 0 .. frames - 1 of each token; the CLS token has -1."""
        index = torch.arange(self.frames, dtype=torch.float32).repeat_interleave(self.rows * self.cols)
        return torch.cat([torch.tensor([CLS_FRAME]), index]) if self.cls else index

    def positions(self) -> Tensor:
        """[M, 2] float32: (y, x) of each token, 0 at the first and 1 at the last row and column; CLS (-1, -1)."""
        y = _axis(self.rows)[:, None].expand(self.rows, self.cols)
        x = _axis(self.cols)[None, :].expand(self.rows, self.cols)
        place = torch.stack([y, x], dim=-1).reshape(-1, 2).repeat(self.frames, 1)
        return torch.cat([torch.tensor([CLS_POSITION]), place]) if self.cls else place


def _axis(n: int) -> Tensor:
    """n coordinates from 0 to 1; a single patch sits in the middle."""
    return torch.linspace(0, 1, n) if n > 1 else torch.tensor([0.5])

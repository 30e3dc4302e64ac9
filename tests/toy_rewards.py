"""Hand-written rewards with a known optimum."""

from __future__ import annotations

import torch
from torch import Tensor


class ColorReward:
    """Minus the squared distance of each video's mean colour from a target: 0 is the best."""

    def __init__(self, target: tuple[float, float, float] = (0.8, 0.3, 0.2), *, weight: float = 1.0) -> None:
        self.target = torch.tensor(target)
        self.weights = {"color": weight}

    def terms(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        assert len(frames) == len(prompts)
        return {"color": -(frames.mean((1, 3, 4)) - self.target).square().sum(-1)}


class LinearReward:
    """Inner product with fixed weights, and a second term; remembers the frames that it saw."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.direction = torch.randn(9, 3, 32, 32, generator=generator)
        self.weights = {"inner": 0.7, "bright": -0.2}
        self.seen: list[Tensor] = []

    def terms(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        self.seen.append(frames.detach())
        return {"inner": (frames * self.direction).sum((1, 2, 3, 4)), "bright": frames.mean((1, 2, 3, 4))}

    def total(self, frames: Tensor) -> Tensor:
        """The weighted sum of the means, written out."""
        terms = self.terms(frames, [""] * len(frames))
        return 0.7 * terms["inner"].mean() - 0.2 * terms["bright"].mean()

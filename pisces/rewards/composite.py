"""Rewards brought to one scale and added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from pisces.rewards.base import Features, Reward


class Standardized(Reward):
    """(reward - mean) / std, so that rewards of different spread pull alike.

    A modality gap shrinks the spread of the quality reward many times over, which acts as a smaller learning rate;
    without a common scale, two rewards cannot be compared by what they do in training.

    Args:
        reward: what to bring to scale.
        mean, std: of the reward over reference videos; see `over` and `standardize`.

    Raises:
        ValueError: std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, reward: Reward, mean: float, std: float) -> None:
        super().__init__()
        if not std > 0:
            raise ValueError(f"Standardized: std is {std}, expected a positive number.")
        self.reward = reward
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))

    @classmethod
    def over(cls, reward: Reward, values: Tensor) -> Self:
        """The reward, standardized over what it was for reference videos: there it gets mean 0 and deviation 1.

        Args:
            reward: what to bring to scale.
            values: [n] its values, n >= 2.

        Raises:
            ValueError: fewer than two values, or all the same.
        """
        if len(values) < 2:
            raise ValueError(f"Standardized: got the rewards of {len(values)} videos, expected at least two.")
        if not values.isfinite().all():
            bad = int((~values.isfinite()).nonzero()[0])
            raise ValueError(
                f"Standardized: the reward of reference video {bad} is {float(values[bad])}, expected a finite number. "
                "Look at what the base model makes."
            )
        std = float(values.std())
        # a spread of rounding errors would blow every difference up
        if not std > 1e-7 * max(1.0, float(values.abs().max())):
            raise ValueError(
                f"Standardized: the reward is {float(values[0]):.4g} for all {len(values)} videos, expected a spread. "
                "Use reference videos that differ."
            )
        return cls(reward, float(values.mean()), std)

    def score(self, features: Features) -> Tensor:
        """Standardized reward [B]."""
        return (self.reward.score(features) - self.mean) / self.std


@torch.no_grad()
def standardize(reward: Reward, frames: Tensor, prompts: Sequence[str], batch_size: int = 32) -> Standardized:
    """Standardize a reward over a reference batch: there it gets mean 0 and standard deviation 1.

    Args:
        reward: what to bring to scale.
        frames: [n, T, 3, H, W] reference videos, such as samples of the generator before training; n >= 2.
        prompts: n prompts.
        batch_size: videos scored at once.

    Raises:
        ValueError: fewer than two videos, not as many prompts as videos, or a reward that is the same for all.

    Example:
        >>> from pisces.encoders import TinyEncoder, TinyEncoderConfig
        >>> from pisces.rewards import QualityReward
        >>> encoder = TinyEncoder(TinyEncoderConfig(vocabulary=("[pad]", "[unk]", "[sep]", "dot"), width=16))
        >>> reward = standardize(QualityReward(encoder), torch.rand(4, 9, 3, 32, 32), ["dot"] * 4)
        >>> reward(torch.rand(2, 9, 3, 32, 32), ["dot", "dot"]).shape
        torch.Size([2])
    """
    prompts = list(prompts)
    if len(frames) < 2 or len(prompts) != len(frames):
        raise ValueError(
            f"standardize: got {len(frames)} videos and {len(prompts)} prompts, expected at least two of each."
        )
    if batch_size < 1:
        raise ValueError(f"standardize: batch_size is {batch_size}, expected at least 1.")
    values = torch.cat(
        [reward(frames[i : i + batch_size], prompts[i : i + batch_size]) for i in range(0, len(frames), batch_size)]
    )
    return Standardized.over(reward, values)


class CompositeReward(Reward):
    """Weighted sum of rewards; each encoder reads the batch once, however many of them share it.

        reward = sum_name weights[name] * rewards[name]

    Args:
        rewards: name -> reward.
        weights: name -> weight, for exactly these names.

    Raises:
        ValueError: no rewards, or other names among the weights.

    Example:
        >>> from pisces.encoders import TinyEncoder, TinyEncoderConfig
        >>> from pisces.rewards import QualityReward, SemanticReward
        >>> encoder = TinyEncoder(TinyEncoderConfig(vocabulary=("[pad]", "[unk]", "[sep]", "dot"), width=16))
        >>> parts = {"quality": QualityReward(encoder), "semantic": SemanticReward(encoder)}
        >>> reward = CompositeReward(parts, {"quality": 1.0, "semantic": 0.5})
        >>> sorted(reward.terms(torch.rand(2, 9, 3, 32, 32), ["dot", "dot"]))
        ['quality', 'semantic']
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        super().__init__()
        if not rewards or set(rewards) != set(weights):
            raise ValueError(
                f"CompositeReward: weights has the names {sorted(weights)}, expected {sorted(rewards)}, at least one."
            )
        self.rewards = nn.ModuleDict(rewards)
        self.weights = {name: float(weights[name]) for name in rewards}

    def score_terms(self, features: Features) -> dict[str, Tensor]:
        """Unweighted reward [B] of each name."""
        return {name: reward.score(features) for name, reward in self.rewards.items()}

    def score(self, features: Features) -> Tensor:
        """Weighted sum [B]."""
        return self.total(self.score_terms(features))

    def terms(self, frames: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Unweighted reward [B] of each name, for the log; `total` adds them up without encoding again."""
        return self.score_terms(Features(frames, prompts))

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum [B] of what `terms` returned."""
        return torch.stack([self.weights[name] * terms[name] for name in self.weights]).sum(0)

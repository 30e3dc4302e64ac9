"""Rewards of videos for their prompts: one number a sample, differentiable in the frames, the same every time."""

from __future__ import annotations

from pisces.rewards.base import Features, Reward
from pisces.rewards.composite import CompositeReward, Standardized, standardize
from pisces.rewards.explain import Explanation, explain
from pisces.rewards.quality import QualityReward
from pisces.rewards.semantic import SemanticReward, Transport, TransportRefiner, leverage

__all__ = [
    "CompositeReward",
    "Explanation",
    "Features",
    "QualityReward",
    "Reward",
    "SemanticReward",
    "Standardized",
    "Transport",
    "TransportRefiner",
    "explain",
    "leverage",
    "standardize",
]

"""Training objectives, one file each; every one is a ``loss(batch, generator)``."""

from pisces.algorithms.base import Algorithm, Batch, FrozenBase, RewardModule, reward_loss
from pisces.algorithms.consistency import Consistency, base_anchor, pseudo_huber
from pisces.algorithms.draft import Draft
from pisces.algorithms.flow_matching import FlowMatching
from pisces.algorithms.grpo import Grpo
from pisces.algorithms.one_step import OneStep

__all__ = [
    "Algorithm",
    "Batch",
    "Consistency",
    "Draft",
    "FlowMatching",
    "FrozenBase",
    "Grpo",
    "OneStep",
    "RewardModule",
    "base_anchor",
    "pseudo_huber",
    "reward_loss",
]

"""Settings of the algorithms: every default stands beside its source, as in pisces/config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


def need(ok: bool, key: str, value: object, wanted: str) -> None:
    """Refuse a setting.

    Raises:
        ValueError: naming key and value, if not ``ok``.
    """
    if not ok:
        raise ValueError(f"{key}: got {value!r}, expected {wanted}.")


@dataclass(frozen=True)
class OneStepConfig:
    """Algorithm ``one_step``: see :class:`pisces.algorithms.OneStep`."""

    name: ClassVar[str] = "one_step"
    needs_videos: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = True
    steps: int = 50  # PISCES: 50 Euler steps
    anchor_weight: float = 1.0  # PISCES: weight of the consistency loss
    phases: int = 1  # PISCES: one phase
    huber_c: float = 0.001  # PISCES

    def __post_init__(self) -> None:
        need(self.steps >= 1, "algorithm.steps", self.steps, "at least 1")
        need(1 <= self.phases <= self.steps, "algorithm.phases", self.phases, f"1 to {self.steps} (the steps)")
        need(self.huber_c > 0, "algorithm.huber_c", self.huber_c, "a positive number")
        need(self.anchor_weight >= 0, "algorithm.anchor_weight", self.anchor_weight, "at least 0")


@dataclass(frozen=True)
class DraftConfig:
    """Algorithm ``draft``: see :class:`pisces.algorithms.Draft`."""

    name: ClassVar[str] = "draft"
    needs_videos: ClassVar[bool] = False
    needs_rewards: ClassVar[bool] = True
    steps: int = 4  # of the small world: the fewest steps whose videos have a shape
    last_k: int | None = None  # all steps; DRaFT (arXiv 2309.17400) finds K = 1 enough for images
    truncation: str = "last"  # DRaFT; "random" is AlignProp's (arXiv 2310.03739)
    renoised: int = 0  # DRaFT-LV takes 2 with last_k 1
    anchor_weight: float = 1.0  # as PISCES weighs its anchor; without one rewards are hacked
    checkpointing: bool = False  # True trades a second forward pass for the memory of K - 1 steps

    def __post_init__(self) -> None:
        need(self.steps >= 1, "algorithm.steps", self.steps, "at least 1")
        k = self.last_k
        need(k is None or 1 <= k <= self.steps, "algorithm.last_k", k, f"1 to {self.steps} (the steps) or null")
        need(self.truncation in ("last", "random"), "algorithm.truncation", self.truncation, "last or random")
        need(self.renoised >= 0, "algorithm.renoised", self.renoised, "at least 0")
        need(self.anchor_weight >= 0, "algorithm.anchor_weight", self.anchor_weight, "at least 0")


@dataclass(frozen=True)
class ConsistencyConfig:
    """Algorithm ``consistency``: see :class:`pisces.algorithms.Consistency`."""

    name: ClassVar[str] = "consistency"
    needs_videos: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = False
    steps: int = 50  # PISCES: 50 Euler steps
    phases: int = 1  # PISCES: one phase
    huber_c: float = 0.001  # PISCES

    def __post_init__(self) -> None:
        need(self.steps >= 1, "algorithm.steps", self.steps, "at least 1")
        need(1 <= self.phases <= self.steps, "algorithm.phases", self.phases, f"1 to {self.steps} (the steps)")
        need(self.huber_c > 0, "algorithm.huber_c", self.huber_c, "a positive number")


@dataclass(frozen=True)
class FlowMatchingConfig:
    """Algorithm ``flow_matching``: see :class:`pisces.algorithms.FlowMatching`."""

    name: ClassVar[str] = "flow_matching"
    needs_videos: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = False
    shift: float | None = None  # the scheduler's
    caption_dropout: float = 0.1  # classifier-free guidance (arXiv 2207.12598): .1 to .2

    def __post_init__(self) -> None:
        need(self.shift is None or self.shift > 0, "algorithm.shift", self.shift, "a positive number or null")
        need(0 <= self.caption_dropout <= 1, "algorithm.caption_dropout", self.caption_dropout, "0 to 1")


@dataclass(frozen=True)
class GrpoConfig:
    """Algorithm ``grpo``: see :class:`pisces.algorithms.Grpo`."""

    name: ClassVar[str] = "grpo"
    needs_rewards: ClassVar[bool] = True
    steps: int = 10  # Flow-GRPO (arXiv 2505.05470): 10 in training are enough where 40 sample
    group_size: int = 16  # PISCES
    eta: float = 0.25  # PISCES
    trained_steps: int | None = None  # all noisy ones: see Grpo
    updates: int = 1  # of each rollout; one is on-policy
    clip: float = 1e-4  # PISCES
    advantage_clip: float = 5.0  # PISCES
    kl_weight: float = 0.0  # PISCES anchors by consistency instead
    anchor_weight: float = 1.0  # PISCES: weight of the consistency loss
    gradient_weight: float = 0.0  # the reward's own gradient beside the policy's
    micro_batch: int = 4  # samples at a time; results do not depend on it
    checkpointing: bool = True  # steps x group_size predictions do not fit otherwise

    @property
    def needs_videos(self) -> bool:
        """For the consistency loss."""
        return self.anchor_weight > 0

    def __post_init__(self) -> None:
        for key, least in (("steps", 2), ("group_size", 2), ("updates", 1), ("micro_batch", 1)):
            need(getattr(self, key) >= least, f"algorithm.{key}", getattr(self, key), f"at least {least}")
        for key in ("eta", "clip", "advantage_clip"):
            need(getattr(self, key) > 0, f"algorithm.{key}", getattr(self, key), "a positive number")
        for key in ("kl_weight", "anchor_weight", "gradient_weight"):
            need(getattr(self, key) >= 0, f"algorithm.{key}", getattr(self, key), "at least 0")
        steps = self.trained_steps
        wanted = f"1 to {self.steps - 1} (all steps but the last) or null"
        need(steps is None or 1 <= steps < self.steps, "algorithm.trained_steps", steps, wanted)


AlgorithmConfig = OneStepConfig | DraftConfig | ConsistencyConfig | FlowMatchingConfig | GrpoConfig
ALGORITHMS: dict[str, type[AlgorithmConfig]] = {
    kind.name: kind for kind in (OneStepConfig, DraftConfig, ConsistencyConfig, FlowMatchingConfig, GrpoConfig)
}

"""What the algorithms share: a batch, the frozen base model, and the reward part of the loss."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pisces.pipelines.base import PipelineAdapter, PromptEmbeds

Logs = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """What one micro-step trains on.

    Attributes:
        prompts: B texts.
        frames: [B, T, C, H, W] in [0, 1] of real videos, where the algorithm needs them.
        latents: [B, C, t, h, w] normalised latents of the same videos, if already encoded.
        number: of the batch in the run's data.
    """

    prompts: list[str]
    frames: Tensor | None = None
    latents: Tensor | None = None
    number: int = 0


class Algorithm(Protocol):
    """A training objective; the trainer knows nothing else of it.

    One that learns several times from a batch is :class:`Stateful` too.
    """

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """The scalar loss of one micro-batch and the scalars to log; all noise comes from ``generator``."""
        ...


@runtime_checkable
class Stateful(Protocol):
    """An algorithm that makes several optimizer steps of what it found out about a batch."""

    updates: int

    def begin(self) -> None:
        """Forget the former batches: ``updates`` steps on new ones follow."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs of each batch, as ``NUMBER/NAME``: a process gets back that of its own batches."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned, of the batches that are this process's."""
        ...


class RewardModule(Protocol):
    """What the algorithms use of ``pisces.rewards.CompositeReward``."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each term."""
        ...

    def terms(self, frames: Tensor, prompts: list[str]) -> Mapping[str, Tensor]:
        """Each reward [B], differentiable in ``frames`` [B, T, C, H, W]."""
        ...


class FrozenBase:
    """The model as it was before training: the denoisers with their LoRA adapters switched off, or frozen copies.

    Args:
        adapter: the pipeline, its LoRA adapters already added if there are to be any, not yet trained.
    """

    def __init__(self, adapter: PipelineAdapter) -> None:
        self.adapter = adapter
        self.copies: dict[str, Any] | None = None
        if not getattr(adapter.transformer, "peft_config", None):
            self.copies = {
                name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in adapter.denoisers.items()
            }

    @torch.no_grad()
    def velocity(self, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds) -> Tensor:
        """The base's velocity [B, C, t, h, w]; arguments as in ``PipelineAdapter.velocity``."""
        if self.copies is not None:
            return self.adapter.velocity(latents, sigma, prompt_embeds, denoisers=self.copies)
        models: list[Any] = list(self.adapter.denoisers.values())
        for model in models:
            model.disable_adapters()
        try:
            return self.adapter.velocity(latents, sigma, prompt_embeds)
        finally:
            for model in models:
                model.enable_adapters()


def recomputed_velocity(
    adapter: PipelineAdapter, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds
) -> Tensor:
    """``adapter.velocity``, computed again in the backward pass instead of keeping its activations."""
    velocity: Tensor = checkpoint(adapter.velocity, latents, sigma, prompt_embeds, use_reentrant=False)
    return velocity


def reward_loss(rewards: RewardModule, frames: Tensor, prompts: list[str]) -> tuple[Tensor, Logs]:
    """Minus the weighted sum of the mean rewards: ``-sum_k w_k mean(R_k)``.

    Args:
        rewards: the terms and their weights.
        frames: [B, T, C, H, W] in [0, 1], with gradient.
        prompts: B texts.

    Returns:
        The scalar, and the logs ``reward`` (the weighted sum) and ``reward/NAME``.
    """
    terms = rewards.terms(frames, prompts)
    total = torch.stack([rewards.weights[name] * values.mean() for name, values in terms.items()]).sum()
    logs = {f"reward/{name}": values.detach().mean() for name, values in terms.items()}
    return -total, {"reward": total.detach(), **logs}


def real_latents(adapter: PipelineAdapter, batch: Batch, *, who: str) -> Tensor:
    """The batch's normalised latents [B, C, t, h, w], encoded now if need be.

    Raises:
        ValueError: if the batch has no videos.
    """
    if batch.latents is not None:
        return batch.latents.to(adapter.device)
    if batch.frames is None:
        raise ValueError(f"{who}: the batch has prompts only, expected real videos. Set data.videos.")
    return adapter.encode_frames(batch.frames.to(adapter.device))


def draw(shape: tuple[int, ...], generator: torch.Generator, device: torch.device, *, uniform: bool = False) -> Tensor:
    """Standard normal (or uniform) numbers drawn on the generator's device, so a seed means the same everywhere."""
    make = torch.rand if uniform else torch.randn
    return make(shape, generator=generator, device=generator.device).to(device)


def expand(sigma: Tensor) -> Tensor:
    """``sigma`` [B] as [B, 1, 1, 1, 1]."""
    return sigma[:, None, None, None, None]

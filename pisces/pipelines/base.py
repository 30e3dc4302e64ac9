"""What the trainer asks of a text-to-video pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class PipelineAdapter(Protocol):
    """One diffusers pipeline behind the few operations that post-training needs.

    Latents are always normalised, [B, C, t, h, w]; frames are [B, T, C, H, W] in [0, 1]; the flow is
    ``x_sigma = sigma * noise + (1 - sigma) * x0`` and the model predicts ``noise - x0``.
    """

    pipe: Any
    lora_targets: tuple[str, ...]
    defaults: dict[str, int]

    @property
    def transformer(self) -> nn.Module:
        """The denoiser: the only part that post-training changes."""
        ...

    @property
    def vae(self) -> nn.Module:
        """The video autoencoder, frozen."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        ...

    @property
    def shift(self) -> float:
        """The scheduler's time shift."""
        ...

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompt embeddings [B, L, D], without gradient."""
        ...

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Normalised latents [B, C, t, h, w] of frames [B, T, C, H, W], without gradient."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, T, C, H, W] of latents [B, C, t, h, w], with gradient."""
        ...

    def latent_shape(
        self, *, n_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """Shape (C, t, h, w) of one video's latents."""
        ...

    def video_size(
        self, *, n_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """(T, H, W): each as given, else the directory's default."""
        ...

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels [steps + 1] of the sampler, from 1 down to 0."""
        ...

    def velocity(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """The model's velocity ``noise - x0`` at ``latents`` of noise level ``sigma`` [B]."""
        ...

    def sample(
        self,
        prompts: list[str] | Tensor,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        guidance_scale: float = 1.0,
        n_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Latents [B, C, t, h, w] of new videos, without gradient."""
        ...

    def save_pretrained(self, path: str | Path) -> Path:
        """Write the whole pipeline as a diffusers directory."""
        ...

    def save_lora(self, path: str | Path) -> Path:
        """Write the LoRA adapter so that ``pipe.load_lora_weights(path)`` reads it."""
        ...

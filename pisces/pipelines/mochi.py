"""Mochi 1 text-to-video (diffusers ``MochiPipeline``)."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from pisces.pipelines.base import Denoisers, PipelineAdapter, PromptEmbeds

MAX_TEXT_TOKENS = 256
# MochiPipeline.__call__: where its grid turns from linear into quadratic.
THRESHOLD_NOISE = 0.025


class MochiAdapter(PipelineAdapter):
    """A ``diffusers.MochiPipeline``. Samples equal ``pipe(...)`` for the same noise.

    Mochi counts time from noise to data: its model is told ``1000 (1 - sigma)`` and predicts ``x0 - noise``.
    """

    pipeline_class: ClassVar[str] = "MochiPipeline"
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"),
        *("ff.net.0.proj", "ff.net.2"),
    )

    def check(self) -> None:
        """Refuse a scheduler that counts from data to noise."""
        if not self.pipe.scheduler.config.get("invert_sigmas", False):
            raise ValueError(
                "MochiAdapter: the scheduler has invert_sigmas false, expected true, as in Mochi's own directory."
            )

    def embed_prompts(self, prompts: list[str]) -> PromptEmbeds:
        """Embeddings [B, L, D] and their mask [B, L]."""
        return self.masked_embeds(prompts, MAX_TEXT_TOKENS)

    def velocity(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds, *, denoisers: Denoisers | None = None
    ) -> Tensor:
        """Minus the model's output at timestep ``1000 (1 - sigma)``."""
        return -self.predict(latents, self.timestep(1 - sigma), prompt_embeds, denoisers)

    def grid(self, steps: int, shape: tuple[int, ...]) -> Tensor:
        """Linear while there is much noise, then quadratic, as the pipeline has it."""
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        if steps < 2:
            return torch.tensor([torch.nan])  # its first half needs a step
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(sigmas=linear_quadratic_schedule(steps, THRESHOLD_NOISE))
        return 1 - torch.as_tensor(scheduler.sigmas)

    def normalize(self, latents: Tensor) -> Tensor:
        """``(z - mean) * factor / std`` of each channel."""
        mean, std = self._statistics(latents)
        return (latents - mean) * self.pipe.vae.config.scaling_factor / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """``std x / factor + mean`` of each channel."""
        mean, std = self._statistics(latents)
        return latents * std / self.pipe.vae.config.scaling_factor + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [1, C, 1, 1, 1]; 0 and 1 where the VAE has none."""
        config: Any = self.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return like.new_zeros(1), like.new_ones(1)
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1).to(like) for x in (config.latents_mean, config.latents_std))
        return mean, std

    @property
    def strides(self) -> tuple[int, int]:
        """Those of the pipeline."""
        return self.pipe.vae_temporal_scale_factor, self.pipe.vae_spatial_scale_factor

"""LTX-Video text-to-video (diffusers ``LTXPipeline``)."""

from __future__ import annotations

import copy
import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from pisces.pipelines.base import Denoisers, PipelineAdapter, PromptEmbeds

# LTXPipeline.__call__: the text tokens it was trained with, pictures a second, and the timestep that decoders which are
# conditioned on one are told.
MAX_TEXT_TOKENS = 128
FRAMES_PER_SECOND = 25
DECODE_TIMESTEP = 0.0


class LTXAdapter(PipelineAdapter):
    """A ``diffusers.LTXPipeline``. Samples equal ``pipe(...)`` for the same noise."""

    pipeline_class: ClassVar[str] = "LTXPipeline"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def embed_prompts(self, prompts: list[str]) -> PromptEmbeds:
        """Embeddings [B, L, D] and their mask [B, L]."""
        return self.masked_embeds(prompts, MAX_TEXT_TOKENS)

    def velocity(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds, *, denoisers: Denoisers | None = None
    ) -> Tensor:
        """The model's output at timestep ``1000 sigma``, from and to one token a patch."""
        _, _, t, h, w = latents.shape
        patches = self.pipe.transformer_spatial_patch_size, self.pipe.transformer_temporal_patch_size
        temporal, spatial = self.strides
        tokens = self.predict(
            self.pipe._pack_latents(latents, *patches),
            self.timestep(sigma),
            prompt_embeds,
            denoisers,
            num_frames=t,
            height=h,
            width=w,
            rope_interpolation_scale=(temporal / self.defaults.get("fps", FRAMES_PER_SECOND), spatial, spatial),
        )
        velocity: Tensor = self.pipe._unpack_latents(tokens, t, h, w, *patches)
        return velocity

    def grid(self, steps: int, shape: tuple[int, ...]) -> Tensor:
        """``1, 1 - 1 / steps, ...``, shifted by the scheduler, the more the longer or larger the video."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        mu = self._log_shift(shape) if scheduler.config.use_dynamic_shifting else None
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return torch.as_tensor(scheduler.sigmas)

    def shift(self, shape: tuple[int, ...]) -> float:
        """The scheduler's time shift for latents of a shape."""
        config = self.pipe.scheduler.config
        return math.exp(self._log_shift(shape)) if config.use_dynamic_shifting else float(config.shift)

    def _log_shift(self, shape: tuple[int, ...]) -> float:
        """Linear in the number of latents, as the pipeline has it; of the default video if no shape is given."""
        config = self.pipe.scheduler.config
        n_latents = math.prod(shape[1:] if shape else self.latent_shape()[1:])
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (high - low) / (many - few)
        return float(n_latents * slope + low - slope * few)

    def normalize(self, latents: Tensor) -> Tensor:
        """``(z - mean) * factor / std`` of each channel."""
        vae = self.pipe.vae
        normalised: Tensor = self.pipe._normalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        return normalised

    def denormalize(self, latents: Tensor) -> Tensor:
        """``std x / factor + mean`` of each channel."""
        vae = self.pipe.vae
        denormalised: Tensor = self.pipe._denormalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        )
        return denormalised

    def decode_timestep(self, batch_size: int, device: torch.device) -> Tensor | None:
        """0, as the pipeline has it, where the decoder is conditioned; no noise is added then."""
        if not self.pipe.vae.config.timestep_conditioning:
            return None
        return torch.full((batch_size,), DECODE_TIMESTEP, device=device, dtype=next(self.vae.parameters()).dtype)

    @property
    def strides(self) -> tuple[int, int]:
        """Those of the pipeline."""
        return self.pipe.vae_temporal_compression_ratio, self.pipe.vae_spatial_compression_ratio

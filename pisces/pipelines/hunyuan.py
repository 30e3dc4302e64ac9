"""HunyuanVideo 1.0 and 1.5 text-to-video (diffusers ``HunyuanVideoPipeline``, ``HunyuanVideo15Pipeline``)."""

from __future__ import annotations

import copy
from abc import ABC
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pisces.pipelines.base import Denoisers, PipelineAdapter, PromptEmbeds

# The guidance that HunyuanVideo's denoiser was distilled with, as a number that it is told: the pipeline's default.
EMBEDDED_GUIDANCE = 6.0


class _Hunyuan(PipelineAdapter, ABC):
    """What both versions share."""

    def grid(self, steps: int, shape: tuple[int, ...]) -> Tensor:
        """``1, 1 - 1 / steps, ...``, shifted by the scheduler."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
        return torch.as_tensor(scheduler.sigmas)

    def normalize(self, latents: Tensor) -> Tensor:
        """Times the VAE's scaling factor."""
        config: Any = self.vae.config
        return latents * config.scaling_factor

    def denormalize(self, latents: Tensor) -> Tensor:
        """Over the VAE's scaling factor."""
        config: Any = self.vae.config
        return latents / config.scaling_factor


class HunyuanVideoAdapter(_Hunyuan):
    """A ``diffusers.HunyuanVideoPipeline``.

    Its denoiser is told a guidance scale (6, the pipeline's default); ``guidance_scale`` of :meth:`sample` is
    classifier-free guidance on top, the pipeline's ``true_cfg_scale``. Samples equal ``pipe(...)`` for the same noise.
    """

    pipeline_class: ClassVar[str] = "HunyuanVideoPipeline"
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    )

    def embed_prompts(self, prompts: list[str]) -> PromptEmbeds:
        """Of the language model [B, L, D] with their mask [B, L], and of CLIP [B, E]."""
        embeds, pooled, mask = self.pipe.encode_prompt(prompt=list(prompts), device=self.device)
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "pooled_projections": pooled}

    def velocity(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds, *, denoisers: Denoisers | None = None
    ) -> Tensor:
        """The model's output at timestep ``1000 sigma``, told the guidance."""
        guidance = torch.full((len(latents),), EMBEDDED_GUIDANCE, dtype=self.pipe.transformer.dtype) * 1e3
        guidance = guidance.to(latents.device)
        return self.predict(latents, self.timestep(sigma), prompt_embeds, denoisers, guidance=guidance)


class HunyuanVideo15Adapter(_Hunyuan):
    """A ``diffusers.HunyuanVideo15Pipeline`` (text to video).

    Samples without guidance equal ``pipe(...)`` with its guider off, for the same noise.
    """

    pipeline_class: ClassVar[str] = "HunyuanVideo15Pipeline"
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def embed_prompts(self, prompts: list[str]) -> PromptEmbeds:
        """Of the language model [B, L, D] and of the glyph encoder [B, G, E], each with its mask."""
        embeds, mask, embeds_2, mask_2 = self.pipe.encode_prompt(
            prompt=list(prompts), device=self.device, dtype=self.pipe.transformer.dtype, batch_size=len(prompts)
        )
        return {
            "encoder_hidden_states": embeds,
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": embeds_2,
            "encoder_attention_mask_2": mask_2,
        }

    def velocity(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds, *, denoisers: Denoisers | None = None
    ) -> Tensor:
        """The model's output at timestep ``1000 sigma``, without an image to start from."""
        dtype = self.pipe.transformer.dtype
        batch_size, channels = latents.shape[:2]
        no_image = latents.new_zeros(batch_size, channels + 1, *latents.shape[2:])
        tokens, width = self.pipe.vision_num_semantic_tokens, self.pipe.vision_states_dim
        return self.predict(
            torch.cat([latents, no_image], dim=1),
            self.timestep(sigma).to(dtype),
            prompt_embeds,
            denoisers,
            image_embeds=latents.new_zeros(batch_size, tokens, width, dtype=dtype),
        )

    def vae_latents(self, video: Tensor) -> Tensor:
        """One video at a time: the VAE's attention does not take a batch (diffusers 0.42)."""
        return torch.cat([super(HunyuanVideo15Adapter, self).vae_latents(one) for one in video.split(1)])

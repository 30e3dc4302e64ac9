"""Wan 2.1 text-to-video (diffusers ``WanPipeline``)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from pisces.pipelines.base import PipelineAdapter, PromptEmbeds

# Wan trains its text conditioning at 512 tokens: the default of WanPipeline.__call__.
MAX_TEXT_TOKENS = 512


class WanAdapter(PipelineAdapter):
    """A ``diffusers.WanPipeline`` with one transformer (Wan 2.1 family).

    With a ``FlowMatchEulerDiscreteScheduler`` samples equal ``pipe(...)`` for the same noise.

    Example:
        >>> from pisces.world import checkpoint_path
        >>> adapter = WanAdapter.from_pretrained(checkpoint_path("wan-good"))
        >>> latents = adapter.sample(["a red square moves left"], steps=4)
        >>> adapter.decode(latents).shape
        torch.Size([1, 9, 3, 32, 32])
    """

    pipeline_class: ClassVar[str] = "WanPipeline"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def check(self) -> None:
        """Refuse the pipelines of Wan 2.2."""
        if self.pipe.transformer is None or self.pipe.transformer_2 is not None or self.pipe.config.expand_timesteps:
            raise ValueError(
                "WanAdapter: got a Wan 2.2 pipeline (two transformers or a timestep per token), expected one "
                "transformer with one timestep a sample. Use a Wan 2.1 text-to-video pipeline."
            )

    def embed_prompts(self, prompts: list[str]) -> PromptEmbeds:
        """Embeddings [B, L, D], zero behind each prompt's end; L is the tokenizer's limit, at most 512."""
        embeds, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=int(min(self.pipe.tokenizer.model_max_length, MAX_TEXT_TOKENS)),
            device=self.device,
        )
        return {"encoder_hidden_states": embeds}

    def normalize(self, latents: Tensor) -> Tensor:
        """``(z - mean) / std`` of each channel."""
        mean, inverse_std = self._statistics(latents)
        return (latents - mean) * inverse_std

    def denormalize(self, latents: Tensor) -> Tensor:
        """``std x + mean`` of each channel."""
        mean, inverse_std = self._statistics(latents)
        return latents / inverse_std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Latent mean and *inverse* standard deviation [1, C, 1, 1, 1], computed as the pipeline does."""
        config: Any = self.vae.config
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1).to(like)
        inverse_std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1).to(like)
        return mean, inverse_std

    @property
    def patch(self) -> int:
        """Latents a token, in height and width."""
        return int(self.pipe.transformer.config.patch_size[1])

    @property
    def latent_channels(self) -> int:
        """Of the VAE, which calls them z_dim."""
        return int(self.pipe.vae.config.z_dim)

"""Wan 2.1 and 2.2 text-to-video (diffusers ``WanPipeline``)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pisces.pipelines.base import Denoisers, PipelineAdapter, PromptEmbeds

# Wan trains its text conditioning at 512 tokens: the default of WanPipeline.__call__.
MAX_TEXT_TOKENS = 512


class WanAdapter(PipelineAdapter):
    """A ``diffusers.WanPipeline``: Wan 2.1, or Wan 2.2 with two experts or with a timestep for each token.

    Of two experts ``transformer`` is the one for timesteps from ``boundary_ratio * 1000`` on, ``transformer_2`` the one
    below; both are trained. With a ``FlowMatchEulerDiscreteScheduler`` samples equal ``pipe(...)`` for the same noise.

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
        """Refuse pipelines of which a part is missing, and one transformer that is trained for two."""
        boundary = self.pipe.config.boundary_ratio
        if self.pipe.transformer is None or (self.pipe.transformer_2 is None) != (boundary is None):
            has = [name for name in ("transformer", "transformer_2") if getattr(self.pipe, name) is not None]
            raise ValueError(
                f"WanAdapter: got boundary_ratio {boundary} with {has}, expected None with transformer alone (Wan 2.1) "
                "or a number with transformer and transformer_2 (Wan 2.2). Load the whole pipeline."
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

    def velocity(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds, *, denoisers: Denoisers | None = None
    ) -> Tensor:
        """The output at timestep ``1000 sigma`` of the expert for it; samples of one batch may need both."""
        if sigma.dim() == 0 or len(self.denoisers) == 1:
            return self._of_one(latents, sigma, prompt_embeds, denoisers, self.denoiser_name(sigma))
        sigma = sigma.expand(len(latents))
        first = self._is_for_first(sigma).tolist()
        order, parts = [], []
        for name, wanted in (("transformer", True), ("transformer_2", False)):
            mine = [place for place, is_first in enumerate(first) if is_first == wanted]
            if mine:
                embeds = {key: value[mine] for key, value in prompt_embeds.items()}
                parts.append(self._of_one(latents[mine], sigma[mine], embeds, denoisers, name))
                order += mine
        return torch.cat(parts)[torch.tensor(order, device=latents.device).argsort()]

    def _of_one(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds, denoisers: Denoisers | None, name: str
    ) -> Tensor:
        """The same of one expert."""
        timestep = self.timestep(sigma)
        if self.pipe.config.expand_timesteps:
            _, _, t, h, w = latents.shape
            n_tokens = t * (h // self.patch) * (w // self.patch)
            timestep = timestep.expand(len(latents))[:, None].expand(-1, n_tokens)
        return self.predict(latents, timestep, prompt_embeds, denoisers, name)

    def denoiser_name(self, sigma: Tensor) -> str:
        """``transformer`` at timesteps from the boundary on, ``transformer_2`` below, as the pipeline has it."""
        return "transformer" if len(self.denoisers) == 1 or self._is_for_first(sigma) else "transformer_2"

    def _is_for_first(self, sigma: Tensor) -> Tensor:
        """Whether noise levels are at the boundary or above."""
        boundary = self.pipe.config.boundary_ratio * self.pipe.scheduler.config.num_train_timesteps
        return self.timestep(sigma) >= boundary

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """One or two."""
        second = self.pipe.transformer_2
        return {"transformer": self.pipe.transformer} | ({} if second is None else {"transformer_2": second})

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

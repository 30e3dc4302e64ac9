"""CogVideoX 1.0 and 1.5 text-to-video (diffusers ``CogVideoXPipeline``), its diffusion seen as a flow."""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor

from pisces.pipelines.base import Denoisers, PipelineAdapter, PromptEmbeds


class CogVideoXAdapter(PipelineAdapter):
    """A ``diffusers.CogVideoXPipeline`` with v-prediction.

    Its state is z = a x0 + s noise with a^2 + s^2 = 1, and it predicts v = a noise - s x0. With sigma = s / (a + s)
    the state of the flow is x = z / (a + s) = sigma noise + (1 - sigma) x0, and

        noise - x0 = (s - a) z + (a + s) v

    An Euler step of that flow is a DDIM step. Samples equal ``pipe(...)`` with the scheduler ``CogVideoXDDIMScheduler``
    for the same noise and a number of steps that divides its 1,000; a ``CogVideoXDPMScheduler`` is stepped by DDIM
    on its own noise levels.

    CogVideoX 1.5 takes latent frames in pairs, and videos have an odd number of them: there is one more in front, which
    is noise like the others for the sampler, a copy of the first one in training, and dropped before decoding.
    """

    pipeline_class: ClassVar[str] = "CogVideoXPipeline"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def check(self) -> None:
        """Refuse other patches in time and other predictions than those of CogVideoX 1.0 and 1.5."""
        patch = self.pipe.transformer.config.patch_size_t
        if patch not in (None, 2):
            raise ValueError(
                f"CogVideoXAdapter: the transformer has patch_size_t {patch}, expected null (CogVideoX 1.0) or 2 (1.5)."
            )
        kind = self.pipe.scheduler.config.prediction_type
        if kind != "v_prediction":
            raise ValueError(f"CogVideoXAdapter: the scheduler has prediction_type {kind!r}, expected 'v_prediction'.")
        spacing = self.pipe.scheduler.config.timestep_spacing
        if spacing != "trailing":  # the others do not begin at pure noise
            raise ValueError(f"CogVideoXAdapter: the scheduler has timestep_spacing {spacing!r}, expected 'trailing'.")

    def embed_prompts(self, prompts: list[str]) -> PromptEmbeds:
        """Embeddings [B, L, D]; L is what the denoiser was made for."""
        embeds, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.pipe.transformer.config.max_text_seq_length,
            device=self.device,
        )
        return {"encoder_hidden_states": embeds}

    def velocity(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds, *, denoisers: Denoisers | None = None
    ) -> Tensor:
        """The model's v at the timestep whose noise level is nearest, as a velocity."""
        sigma = sigma.expand(latents.shape[0]).to(latents.device)
        levels = self._levels(self.pipe.scheduler.alphas_cumprod).to(sigma)
        timestep = (levels[None] - sigma[:, None]).abs().argmin(dim=1)
        norm = ((1 - sigma).square() + sigma.square()).sqrt()
        a, s = (value[:, None, None, None, None] for value in ((1 - sigma) / norm, sigma / norm))
        state = latents.float() * (a + s)
        _, _, t, h, w = latents.shape
        rotary = None
        if self.pipe.transformer.config.use_rotary_positional_embeddings:
            stride = self.pipe.vae_scale_factor_spatial
            rotary = self.pipe._prepare_rotary_positional_embeddings(h * stride, w * stride, t, latents.device)
        v = self.predict(state.transpose(1, 2), timestep, prompt_embeds, denoisers, image_rotary_emb=rotary)
        return (s - a) * state + (a + s) * v.transpose(1, 2)

    def grid(self, steps: int, shape: tuple[int, ...]) -> Tensor:
        """The levels of the scheduler's timesteps, and that of its end."""
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(steps)
        products = scheduler.alphas_cumprod[scheduler.timesteps.long()]
        return self._levels(torch.cat([products, torch.as_tensor(scheduler.final_alpha_cumprod).reshape(1)]))

    @staticmethod
    def _levels(alphas_cumprod: Tensor) -> Tensor:
        """sigma = s / (a + s) of a^2."""
        a, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        return s / (a + s)

    @property
    def n_padding(self) -> int:
        """Latent frames in front of the video's own."""
        return 0 if self.pipe.transformer.config.patch_size_t is None else 1

    def vae_latents(self, video: Tensor) -> Tensor:
        """The mode of the VAE's posterior, its first frame once more in front where CogVideoX 1.5 was trained so."""
        latents = super().vae_latents(video)
        return torch.cat([*[latents[:, :, :1]] * self.n_padding, latents], dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of normalised latents without those in front, differentiable: see :meth:`PipelineAdapter.decode`."""
        return super().decode(latents[:, :, self.n_padding :])

    def normalize(self, latents: Tensor) -> Tensor:
        """Times the VAE's scaling factor."""
        return latents * self.pipe.vae_scaling_factor_image

    def denormalize(self, latents: Tensor) -> Tensor:
        """Over the VAE's scaling factor."""
        return 1 / self.pipe.vae_scaling_factor_image * latents

    def latent_shape(
        self, *, n_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """Shape (C, t, h, w) of the latents of one video, the one in front included.

        Without it t is odd: the VAE decodes pairs, and the first with one more.

        Raises:
            ValueError: if a size is missing or does not fit.
        """
        c, t, h, w = super().latent_shape(n_frames=n_frames, height=height, width=width)
        if t % 2 == 0:
            frames, stride = self.default("n_frames", n_frames), self.strides[0]
            raise ValueError(
                f"CogVideoXAdapter: got {frames} frames, expected 1 + a multiple of {2 * stride} (its VAE takes two "
                f"latent frames at a time). Use {frames + stride}."
            )
        return c, t + self.n_padding, h, w

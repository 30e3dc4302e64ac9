"""What the trainer asks of a text-to-video pipeline, and what all families of them share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from pisces.decode import decode
from pisces.pipelines.files import (
    DEFAULT_KEYS,
    DEFAULTS_FILE,
    check_pipeline_dir,
    quiet_files,
    read_defaults,
    whole_dir,
    write_defaults,
)
from pisces.pipelines.lora import load_lora, save_lora
from pisces.pipelines.prompt_memory import PromptMemory
from pisces.pipelines.sampling import euler, guidance_scales

PromptEmbeds = dict[str, Tensor]
"""What the denoiser is told about B prompts: tensors [B, ...] by the names of its arguments."""

Denoisers = Mapping[str, nn.Module]
"""Denoisers by the names that the pipeline has for them: ``transformer``, with Wan 2.2 ``transformer_2`` too."""


class PipelineAdapter(ABC):
    """One diffusers pipeline behind the few operations that post-training needs.

    Latents are always normalised, [B, C, t, h, w]; frames are [B, T, C, H, W] in [0, 1]; the flow is
    ``x_sigma = sigma * noise + (1 - sigma) * x0`` and the model predicts ``noise - x0``, whatever the pipeline's own
    convention is. Sampling follows the pipeline's call: the same prompt embeddings, the noise levels of its scheduler
    and Euler steps ``x <- x + (sigma_next - sigma) v``.

    A family is a subclass that says what its pipelines are called, how prompts are embedded, what the latents are
    normalised by, and how the denoiser is called: see :mod:`pisces.pipelines.wan`.

    Args:
        pipe: a loaded diffusers pipeline.
        defaults: video size and sampler defaults, keys out of n_frames, height, width, steps, fps; what is
            missing must be passed to the methods that need it.
        decoding: options of :func:`pisces.decode.decode`; None takes its own.

    Raises:
        TypeError: if ``pipe`` is of another class.
        ValueError: if a default has an unknown key, or the pipeline is of a kind that the family does not cover.
    """

    pipeline_class: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]

    def __init__(
        self, pipe: Any, *, defaults: dict[str, int] | None = None, decoding: Mapping[str, Any] | None = None
    ) -> None:
        name = type(self).__name__
        if type(pipe).__name__ != self.pipeline_class:
            raise TypeError(f"{name}: got a {type(pipe).__name__}, expected a diffusers {self.pipeline_class}.")
        defaults = dict(defaults or {})
        unknown = sorted(set(defaults) - set(DEFAULT_KEYS))
        if unknown:
            raise ValueError(f"{name}: unknown defaults {unknown}, expected keys out of {DEFAULT_KEYS}.")
        self.pipe = pipe
        self.defaults = defaults
        self.decoding = dict(decoding or {})
        self.prompt_memory = PromptMemory(lambda text: {k: v[0] for k, v in self.embed_prompts([text]).items()})
        self.check()
        pipe.set_progress_bar_config(disable=True)
        for part_name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                part.eval()
                if part_name not in self.denoisers:
                    part.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        decoding: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load a local diffusers directory.

        Args:
            path: a directory with a ``model_index.json`` and, if wanted, a ``pisces.json`` of defaults
                (keys n_frames, height, width, steps, fps).
            dtype: of the weights, however they are stored: float32, or bfloat16 for large models, where diffusers keeps
                some parts in float32.
            vae_dtype: of the autoencoder; None is ``dtype``.
            device: where everything goes; None leaves it on the CPU.
            decoding: options of :func:`pisces.decode.decode`; None takes its own.

        Returns:
            The adapter; all but the denoisers is frozen.

        Raises:
            FileNotFoundError: if there is no such directory or it holds no diffusers pipeline.
        """
        from diffusers import DiffusionPipeline

        root = check_pipeline_dir(path, who=f"{cls.__name__}.from_pretrained")
        with quiet_files():
            dtypes = {"default": dtype, "vae": vae_dtype or dtype}
            pipe = DiffusionPipeline.from_pretrained(str(root), local_files_only=True, dtype=dtypes)
        for name, part in pipe.components.items():
            # In lower precisions the loaders keep some parts in float32 on purpose: leave those.
            if isinstance(part, nn.Module) and dtypes.get(name, dtype) == torch.float32:
                part.float()
        if device is not None:
            pipe.to(device)
        return cls(pipe, defaults=read_defaults(root), decoding=decoding)

    # ------------------------------------------------------------------ what a family says

    def check(self) -> None:  # noqa: B027 - most families take every pipeline of their class
        """Refuse pipelines of the class that the family does not cover.

        Raises:
            ValueError: saying what is expected.
        """

    @abstractmethod
    def embed_prompts(self, prompts: list[str]) -> PromptEmbeds:
        """Embeddings of B prompts through the pipeline's own ``encode_prompt``, with gradient, not remembered."""

    def masked_embeds(self, prompts: list[str], max_tokens: int) -> PromptEmbeds:
        """Embeddings [B, L, D] and their mask [B, L], of pipelines whose ``encode_prompt`` returns both."""
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompt=list(prompts), do_classifier_free_guidance=False, max_sequence_length=max_tokens, device=self.device
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    def velocity(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds, *, denoisers: Denoisers | None = None
    ) -> Tensor:
        """The predicted velocity ``noise - x0`` at noise level ``sigma``: the model's output at timestep 1000 sigma.

        Args:
            latents: [B, C, t, h, w].
            sigma: [B] or a 0-dim tensor, in [0, 1].
            prompt_embeds: of B prompts.
            denoisers: others of the same architecture (frozen copies) under the same names; None is the adapter's own.

        Returns:
            [B, C, t, h, w], float32.
        """
        return self.predict(latents, self.timestep(sigma), prompt_embeds, denoisers)

    def predict(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        prompt_embeds: PromptEmbeds,
        denoisers: Denoisers | None = None,
        name: str = "transformer",
        **more: Any,
    ) -> Tensor:
        """A denoiser's own output, in float32, for states in its own layout.

        Args:
            hidden_states: [B, ...].
            timestep: [B], 0-dim, or [B, L] where each token has its own.
            prompt_embeds: of B prompts.
            denoisers: as for :meth:`velocity`.
            name: which of them.
            **more: further arguments of the denoiser.
        """
        model: Any = (denoisers or self.denoisers)[name]
        output: Tensor = model(
            hidden_states=hidden_states.to(model.dtype),
            timestep=timestep.expand(len(hidden_states), *timestep.shape[1:]),
            return_dict=False,
            **prompt_embeds,
            **more,
        )[0]
        return output.float()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep of a noise level: 1000 sigma, or as many as the scheduler has."""
        return sigma * self.pipe.scheduler.config.num_train_timesteps

    @abstractmethod
    def normalize(self, latents: Tensor) -> Tensor:
        """The VAE's latents, normalised."""

    @abstractmethod
    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised latents as the VAE has them: the inverse, and the pipeline's own expression."""

    @property
    def strides(self) -> tuple[int, int]:
        """(frames, pixels) a latent, of the VAE."""
        return self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial

    @property
    def patch(self) -> int:
        """Latents a token of the denoiser, in height and width."""
        return int(self.pipe.transformer.config.patch_size)

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.vae.config.latent_channels)

    @property
    def n_padding(self) -> int:
        """Latent frames that the denoiser wants in front of the video's own."""
        return 0

    def shift(self, shape: tuple[int, ...]) -> float:
        """The scheduler's time shift (``shift``, or ``flow_shift`` in the UniPC scheduler) for latents [C, t, h, w]."""
        config = self.pipe.scheduler.config
        return float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0)

    def grid(self, steps: int, shape: tuple[int, ...]) -> Tensor:
        """Noise levels [steps + 1] as the pipeline's call has them, for latents of a shape [C, t, h, w]."""
        scheduler = copy.deepcopy(self.pipe.scheduler)  # the pipeline's own keeps its state
        scheduler.set_timesteps(steps)
        return torch.as_tensor(scheduler.sigmas)

    def vae_latents(self, video: Tensor) -> Tensor:
        """The mode of the VAE's posterior of videos [B, C, T, H, W] in [-1, 1]."""
        latents: Tensor = self.pipe.vae.encode(video).latent_dist.mode()
        return latents

    def decode_timestep(self, batch_size: int, device: torch.device) -> Tensor | None:
        """The timestep [B] on which the VAE's decoder is conditioned, where it is."""
        return None

    # ------------------------------------------------------------------ parts

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The only parts that post-training changes, by name."""
        return {"transformer": self.pipe.transformer}

    @property
    def transformer(self) -> nn.Module:
        """The denoiser; where there are several, the one for most noise."""
        return self.pipe.transformer

    def denoiser_name(self, sigma: Tensor) -> str:
        """Which of the denoisers is meant for a noise level, 0-dim."""
        return "transformer"

    @property
    def vae(self) -> nn.Module:
        """The video autoencoder, frozen."""
        return self.pipe.vae

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.transformer.parameters()).device

    def default(self, key: str, value: int | None) -> int:
        """``value`` if given, else the directory's default for ``key``.

        Raises:
            ValueError: if neither is there.
        """
        if value is not None:
            return int(value)
        if key not in self.defaults:
            raise ValueError(
                f"{type(self).__name__}: {key} is not given and the pipeline directory has no {DEFAULTS_FILE} with it. "
                f"Pass {key}=..., or write {DEFAULTS_FILE} next to model_index.json."
            )
        return int(self.defaults[key])

    # ------------------------------------------------------------------ text

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> PromptEmbeds:
        """Prompt embeddings without gradient, remembered from call to call.

        Each prompt is encoded by itself, so its embedding is the same bit for bit in every batch: a resumed
        run sees other batches when it first meets a prompt.

        Args:
            prompts: B texts; the empty text is the unconditional one.

        Returns:
            Tensors [B, ...], floating-point ones in the transformer's dtype.

        Raises:
            TypeError: if ``prompts`` is one string.
        """
        if isinstance(prompts, str):
            raise TypeError("encode_prompts: got one str, expected a list of prompts. Wrap it: [prompt].")
        remembered = [self.prompt_memory[prompt] for prompt in prompts]
        embeds = {name: torch.stack([one[name] for one in remembered]) for name in remembered[0]}
        dtype = self.pipe.transformer.dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in embeds.items()}

    def clear_prompt_cache(self) -> None:
        """Forget remembered embeddings: needed after the text encoder has changed."""
        self.prompt_memory.clear()

    # ------------------------------------------------------------------ video

    @torch.no_grad()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """Normalised latents of videos: of the mode of the VAE's posterior.

        Args:
            frames: [B, T, C, H, W] in [0, 1]; T = 1 modulo the VAE's temporal factor.

        Returns:
            [B, C, t, h, w], float32.

        Raises:
            ValueError: if ``frames`` has not five dimensions or its size does not fit the VAE.
        """
        if frames.dim() != 5:
            raise ValueError(f"encode_frames: frames has shape {tuple(frames.shape)}, expected [B, T, C, H, W].")
        self.latent_shape(n_frames=frames.shape[1], height=frames.shape[3], width=frames.shape[4])
        parameter = next(self.vae.parameters())
        video = frames.permute(0, 2, 1, 3, 4).to(parameter) * 2.0 - 1.0
        return self.normalize(self.vae_latents(video).float())

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of normalised latents, differentiable: the pipeline's own de-normalisation and :mod:`pisces.decode`.

        Args:
            latents: [B, C, t, h, w].

        Returns:
            Frames [B, T, C, H, W] float32 in [0, 1]. Where the decoder saturates, the clamp's gradient is zero.
        """
        latents = latents.to(next(self.vae.parameters()))
        temb = self.decode_timestep(len(latents), latents.device)
        video = decode(self.vae, self.denormalize(latents), temb=temb, **self.decoding)
        # The same expression as diffusers' VaeImageProcessor.denormalize, so that parity is bit for bit.
        return (video * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4).float()

    def video_size(
        self, *, n_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """(T, H, W): each as given, else the directory's default.

        Raises:
            ValueError: if one is in neither.
        """
        return self.default("n_frames", n_frames), self.default("height", height), self.default("width", width)

    def latent_shape(
        self, *, n_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """Shape (C, t, h, w) of the latents of one video.

        Args:
            n_frames: T, 1 modulo the VAE's temporal factor; None takes the directory's default, as below.
            height: H in pixels, a multiple of the VAE's spatial factor times the patch size.
            width: W in pixels, likewise.

        Raises:
            ValueError: if a size is missing or does not fit.
        """
        n_frames, height, width = self.video_size(n_frames=n_frames, height=height, width=width)
        temporal, spatial = self.strides
        name = type(self).__name__
        if n_frames < 1 or n_frames % temporal != 1 % temporal:
            raise ValueError(
                f"{name}: got {n_frames} frames, expected 1 + a multiple of {temporal} (the VAE's temporal "
                f"factor). Use {max(1, (n_frames - 1) // temporal * temporal + 1)}."
            )
        unit = spatial * self.patch
        for side, size in (("height", height), ("width", width)):
            if size < unit or size % unit:
                raise ValueError(f"{name}: got {side} {size}, expected a multiple of {unit}.")
        return self.latent_channels, (n_frames - 1) // temporal + 1, height // spatial, width // spatial

    # ------------------------------------------------------------------ flow

    def sigmas(self, steps: int, shape: tuple[int, ...] | None = None) -> Tensor:
        """Noise levels [steps + 1] of the sampler, from 1 (or nearly) down to 0.

        ``FlowMatchEulerDiscreteScheduler`` ends its grid near 0 before it appends 0, so its last step is tiny
        (.004 -> 0 at 4 steps, shift 2) unless the scheduler's ``shift_terminal`` is set.

        Args:
            steps: number of sampler steps, at least 1.
            shape: of the latents [C, t, h, w], on which LTX's grid depends; None is that of the default video.
        """
        if steps < 1:
            raise ValueError(f"sigmas: got {steps} steps, expected at least 1.")
        with np.errstate(divide="ignore", invalid="ignore"):  # what comes of it is refused below
            sigmas = self.grid(steps, shape or ())
        if not sigmas.isfinite().all():
            # shift_terminal stretches the grid by its last entry, which is 1 where there is one step
            raise ValueError(
                f"sigmas: the scheduler has no grid of {steps} step(s), expected finite levels. Use 2 or more."
            )
        return sigmas.to(device=self.device, dtype=torch.float32)

    def noise(self, batch_size: int, *, generator: torch.Generator | None = None, **size: int | None) -> Tensor:
        """Standard normal latents [B, C, t, h, w]; drawn on the generator's device, so a seed means one video."""
        shape = (batch_size, *self.latent_shape(**size))
        device = generator.device if generator is not None else torch.device("cpu")
        return torch.randn(shape, generator=generator, device=device).to(self.device)

    @torch.no_grad()
    def sample(
        self,
        prompts: list[str] | PromptEmbeds,
        *,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        guidance_scale: float = 1.0,
        guidance_scale_2: float | None = None,
        n_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Latents of new videos by Euler steps: ``x <- x + (sigma_next - sigma) v``, from noise.

        Args:
            prompts: B texts or their embeddings.
            steps: sampler steps; None takes the directory's default, as for the sizes.
            generator: source of the noise.
            guidance_scale: classifier-free guidance against the empty prompt; 1 is off.
            guidance_scale_2: the same of the denoiser for less noise (Wan 2.2); None is ``guidance_scale``.
            n_frames: T.
            height: H in pixels.
            width: W in pixels.
            noise: [B, C, t, h, w] to start from instead of new noise.

        Returns:
            [B, C, t, h, w], float32; :meth:`decode` makes frames of them.

        Raises:
            ValueError: if a scale is below 1, or there is a second one for a single denoiser or without a first.
        """
        embeds = self.encode_prompts(prompts) if isinstance(prompts, list) else prompts
        batch_size = len(next(iter(embeds.values())))
        scales = guidance_scales(guidance_scale, guidance_scale_2, n_denoisers=len(self.denoisers))
        if noise is None:
            noise = self.noise(batch_size, generator=generator, n_frames=n_frames, height=height, width=width)
        latents = noise.to(self.device, torch.float32)
        sigmas = self.sigmas(self.default("steps", steps), tuple(latents.shape[1:]))
        return euler(self, latents, sigmas, embeds, scales)

    # ------------------------------------------------------------------ files

    def save_pretrained(self, path: str | Path) -> Path:
        """Write the pipeline as a diffusers directory (with ``pisces.json``), whole or not at all.

        Args:
            path: the directory; an older one of that name is replaced.

        Returns:
            The directory.
        """
        with whole_dir(path) as partial, quiet_files():
            self.pipe.save_pretrained(str(partial))
            if self.defaults:
                write_defaults(partial, self.defaults)
        return Path(path)

    def save_lora(self, path: str | Path) -> Path:
        """Write the active LoRA adapter as ``pipe.load_lora_weights(path)`` reads it, rank and alpha included.

        That of Wan 2.2's second denoiser is in its folder ``transformer_2``, to be loaded with
        ``load_into_transformer_2=True``. A pipeline without that method (HunyuanVideo 1.5) reads it by
        ``pipe.transformer.load_lora_adapter(path, prefix=None, weight_name="pytorch_lora_weights.safetensors")``.

        Args:
            path: the directory, which is returned; an older one of that name is replaced.

        Raises:
            ValueError: if a denoiser has no LoRA adapter.
        """
        return save_lora(self, path)

    def load_lora(self, file: str | Path) -> None:
        """Load a LoRA file that :meth:`save_lora` or a diffusers trainer wrote.

        Args:
            file: the ``.safetensors`` file; its name is passed on, since diffusers cannot look for it offline.

        Raises:
            FileNotFoundError: if it is not there, or the one of the second denoiser is not beside it.
            ValueError: if it is of another model.
        """
        load_lora(self, file)

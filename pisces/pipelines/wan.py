"""The Wan text-to-video pipeline (diffusers ``WanPipeline``) as the trainer sees it."""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

# Wan trains its text conditioning at 512 tokens: the default of WanPipeline.__call__.
MAX_TEXT_TOKENS = 512
# Embeddings of the prompts seen last; at Wan's 512 x 4096 float32 (8 MiB each) this keeps memory at 8 GiB at most.
PROMPT_CACHE_SIZE = 1024


class WanAdapter:
    """A ``diffusers.WanPipeline`` behind the operations of :class:`~pisces.pipelines.base.PipelineAdapter`.

    Sampling follows the pipeline's own call: the same prompt embeddings, the same noise levels
    ``scheduler.set_timesteps(steps)`` and Euler steps ``x <- x + (sigma_next - sigma) v``. With a
    ``FlowMatchEulerDiscreteScheduler`` the result equals ``pipe(...)`` for the same noise.

    Args:
        pipe: a loaded ``WanPipeline`` with one transformer (Wan 2.1 family).
        defaults: video size and sampler defaults, keys out of n_frames, height, width, steps, fps; what is
            missing must be passed to the methods that need it.
        decoding: options of :func:`pisces.decode.decode`; None takes its own.

    Raises:
        TypeError: if ``pipe`` is not a ``WanPipeline``.
        ValueError: if the pipeline is a two-transformer or token-timestep Wan 2.2, or a default has an unknown key.

    Example:
        >>> from pisces.world import checkpoint_path
        >>> adapter = WanAdapter.from_pretrained(checkpoint_path("wan-good"))
        >>> latents = adapter.sample(["a red square moves left"], steps=4)
        >>> adapter.decode(latents).shape
        torch.Size([1, 9, 3, 32, 32])
    """

    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __init__(
        self, pipe: Any, *, defaults: dict[str, int] | None = None, decoding: Mapping[str, Any] | None = None
    ) -> None:
        from diffusers import WanPipeline

        if not isinstance(pipe, WanPipeline):
            raise TypeError(f"WanAdapter: got a {type(pipe).__name__}, expected a diffusers WanPipeline.")
        if pipe.transformer is None or pipe.transformer_2 is not None or pipe.config.expand_timesteps:
            raise ValueError(
                "WanAdapter: got a Wan 2.2 pipeline (two transformers or a timestep per token), expected one "
                "transformer with one timestep a sample. Use a Wan 2.1 text-to-video pipeline."
            )
        defaults = dict(defaults or {})
        unknown = sorted(set(defaults) - set(DEFAULT_KEYS))
        if unknown:
            raise ValueError(f"WanAdapter: unknown defaults {unknown}, expected keys out of {DEFAULT_KEYS}.")
        self.pipe = pipe
        self.defaults = defaults
        self.decoding = dict(decoding or {})
        self._prompt_cache: OrderedDict[str, Tensor] = OrderedDict()
        pipe.set_progress_bar_config(disable=True)
        for module in (pipe.vae, pipe.text_encoder):
            module.requires_grad_(False).eval()
        pipe.transformer.eval()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, decoding: Mapping[str, Any] | None = None
    ) -> WanAdapter:
        """Load a local diffusers directory; every weight becomes ``dtype``, however it is stored.

        Args:
            path: a directory with a ``model_index.json`` and, if wanted, a ``pisces.json`` of defaults
                (keys n_frames, height, width, steps, fps).
            dtype: float32, or bfloat16 for large models.
            decoding: options of :func:`pisces.decode.decode`; None takes its own.

        Returns:
            The adapter; text encoder and VAE are frozen.

        Raises:
            FileNotFoundError: if there is no such directory or it holds no diffusers pipeline.
        """
        from diffusers import DiffusionPipeline

        root = check_pipeline_dir(path, who="WanAdapter.from_pretrained")
        with quiet_files():
            pipe = DiffusionPipeline.from_pretrained(str(root), local_files_only=True, dtype=dtype)
        for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
            # In lower precisions the loaders keep some parts in float32 on purpose: leave those.
            if module is not None and dtype == torch.float32:
                module.float()
        return cls(pipe, defaults=read_defaults(root), decoding=decoding)

    # ------------------------------------------------------------------ parts

    @property
    def transformer(self) -> nn.Module:
        """The denoiser."""
        return self.pipe.transformer

    @property
    def vae(self) -> nn.Module:
        """The causal video autoencoder."""
        return self.pipe.vae

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(self.transformer.parameters()).device

    @property
    def shift(self) -> float:
        """The scheduler's time shift (``shift``, or ``flow_shift`` in the UniPC scheduler)."""
        config = self.pipe.scheduler.config
        return float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0)

    @property
    def max_text_tokens(self) -> int:
        """Length to which prompts are padded: the tokenizer's limit, at most 512."""
        return int(min(self.pipe.tokenizer.model_max_length, MAX_TEXT_TOKENS))

    def default(self, key: str, value: int | None) -> int:
        """``value`` if given, else the directory's default for ``key``.

        Raises:
            ValueError: if neither is there.
        """
        if value is not None:
            return int(value)
        if key not in self.defaults:
            raise ValueError(
                f"WanAdapter: {key} is not given and the pipeline directory has no {DEFAULTS_FILE} with it. "
                f"Pass {key}=..., or write {DEFAULTS_FILE} next to model_index.json."
            )
        return int(self.defaults[key])

    # ------------------------------------------------------------------ text

    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Prompt embeddings [B, L, D] through the pipeline's own ``encode_prompt``, with gradient, not cached.

        Args:
            prompts: B texts; the empty text is the unconditional one.

        Returns:
            [B, L, D] in the text encoder's dtype, zero behind each prompt's end.
        """
        embeds, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_tokens,
            device=self.device,
        )
        return embeds

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompt embeddings [B, L, D] without gradient, remembered from call to call.

        Each prompt is encoded by itself, so its embedding is the same bit for bit in every batch: a resumed
        run sees other batches when it first meets a prompt.

        Args:
            prompts: B texts.

        Returns:
            [B, L, D] in the transformer's dtype.

        Raises:
            TypeError: if ``prompts`` is one string.
        """
        if isinstance(prompts, str):
            raise TypeError("encode_prompts: got one str, expected a list of prompts. Wrap it: [prompt].")
        for prompt in prompts:
            if prompt in self._prompt_cache:
                self._prompt_cache.move_to_end(prompt)
            else:
                self._prompt_cache[prompt] = self.embed_prompts([prompt])[0]
        embeds = torch.stack([self._prompt_cache[prompt] for prompt in prompts])
        while len(self._prompt_cache) > PROMPT_CACHE_SIZE:
            self._prompt_cache.popitem(last=False)
        return embeds.to(self.transformer.dtype)

    def clear_prompt_cache(self) -> None:
        """Forget remembered embeddings: needed after the text encoder has changed."""
        self._prompt_cache.clear()

    # ------------------------------------------------------------------ video

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Latent mean and *inverse* standard deviation [1, C, 1, 1, 1], computed as the pipeline does."""
        config = self.vae.config
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1).to(like)
        inverse_std = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1).to(like)
        return mean, inverse_std

    @torch.no_grad()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """Normalised latents of videos: ``(mode of the VAE's posterior - mean) / std``.

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
        latents = self.vae.encode(video).latent_dist.mode().float()
        mean, inverse_std = self._statistics(latents)
        return (latents - mean) * inverse_std

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of normalised latents, differentiable: the pipeline's own de-normalisation and :mod:`pisces.decode`.

        Args:
            latents: [B, C, t, h, w].

        Returns:
            Frames [B, T, C, H, W] float32 in [0, 1]. Where the decoder saturates, the clamp's gradient is zero.
        """
        parameter = next(self.vae.parameters())
        latents = latents.to(parameter)
        mean, inverse_std = self._statistics(latents)
        video = decode(self.vae, latents / inverse_std + mean, **self.decoding)
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
        temporal = self.pipe.vae_scale_factor_temporal
        spatial = self.pipe.vae_scale_factor_spatial
        _, patch_h, patch_w = self.transformer.config.patch_size
        if n_frames < 1 or n_frames % temporal != 1 % temporal:
            raise ValueError(
                f"WanAdapter: got {n_frames} frames, expected 1 + a multiple of {temporal} (the VAE's temporal "
                f"factor). Use {max(1, (n_frames - 1) // temporal * temporal + 1)}."
            )
        for name, size, unit in (("height", height, spatial * patch_h), ("width", width, spatial * patch_w)):
            if size < unit or size % unit:
                raise ValueError(f"WanAdapter: got {name} {size}, expected a multiple of {unit}.")
        t = (n_frames - 1) // temporal + 1
        return int(self.transformer.config.in_channels), t, height // spatial, width // spatial

    # ------------------------------------------------------------------ flow

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels [steps + 1] of the pipeline's scheduler, from 1 down to 0.

        ``FlowMatchEulerDiscreteScheduler`` ends its grid near 0 before it appends 0, so its last step is tiny
        (.004 -> 0 at 4 steps, shift 2) unless the scheduler's ``shift_terminal`` is set.

        Args:
            steps: number of sampler steps, at least 1.
        """
        if steps < 1:
            raise ValueError(f"sigmas: got {steps} steps, expected at least 1.")
        # A copy: the pipeline's own scheduler keeps its state.
        scheduler = copy.deepcopy(self.pipe.scheduler)
        with np.errstate(divide="ignore", invalid="ignore"):  # what comes of it is refused below
            scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas.to(device=self.device, dtype=torch.float32)
        if not sigmas.isfinite().all():
            # shift_terminal stretches the grid by its last entry, which is 1 where there is one step
            raise ValueError(
                f"sigmas: the scheduler has no grid of {steps} step(s), expected finite levels. Use 2 or more."
            )
        return sigmas

    def velocity(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, *, transformer: nn.Module | None = None
    ) -> Tensor:
        """The predicted velocity ``noise - x0`` at noise level ``sigma`` (timestep ``1000 sigma``).

        Args:
            latents: [B, C, t, h, w].
            sigma: [B] or a 0-dim tensor, in [0, 1].
            prompt_embeds: [B, L, D].
            transformer: another denoiser of the same architecture (a frozen copy); None is the adapter's own.

        Returns:
            [B, C, t, h, w], float32.
        """
        model: Any = self.transformer if transformer is None else transformer
        scale = self.pipe.scheduler.config.num_train_timesteps
        return model(
            hidden_states=latents.to(model.dtype),
            timestep=(sigma * scale).expand(latents.shape[0]),
            encoder_hidden_states=prompt_embeds.to(model.dtype),
            return_dict=False,
        )[0].float()

    def noise(self, batch_size: int, *, generator: torch.Generator | None = None, **size: int | None) -> Tensor:
        """Standard normal latents [B, C, t, h, w]; drawn on the generator's device, so a seed means one video."""
        shape = (batch_size, *self.latent_shape(**size))
        device = generator.device if generator is not None else torch.device("cpu")
        return torch.randn(shape, generator=generator, device=device).to(self.device)

    @torch.no_grad()
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
        """Latents of new videos by Euler steps: ``x <- x + (sigma_next - sigma) v``, from noise at sigma 1.

        Args:
            prompts: B texts or their embeddings [B, L, D].
            steps: sampler steps; None takes the directory's default, as for the sizes.
            generator: source of the noise.
            guidance_scale: classifier-free guidance against the empty prompt; 1 is off.
            n_frames: T.
            height: H in pixels.
            width: W in pixels.
            noise: [B, C, t, h, w] to start from instead of new noise.

        Returns:
            [B, C, t, h, w], float32; :meth:`decode` makes frames of them.
        """
        embeds = prompts if isinstance(prompts, Tensor) else self.encode_prompts(prompts)
        if not math.isfinite(guidance_scale) or guidance_scale < 1.0:
            raise ValueError(f"sample: got guidance_scale {guidance_scale}, expected a number >= 1 (1 is off).")
        empty = self.encode_prompts([""]).expand_as(embeds) if guidance_scale > 1.0 else None
        if noise is None:
            noise = self.noise(len(embeds), generator=generator, n_frames=n_frames, height=height, width=width)
        latents = noise.to(self.device, torch.float32)
        sigmas = self.sigmas(self.default("steps", steps))
        for sigma, sigma_next in itertools.pairwise(sigmas):
            velocity = self.velocity(latents, sigma, embeds)
            if empty is not None:
                unconditional = self.velocity(latents, sigma, empty)
                velocity = unconditional + guidance_scale * (velocity - unconditional)
            latents = latents + (sigma_next - sigma) * velocity
        return latents

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

        Args:
            path: the directory; an older one of that name is replaced.

        Returns:
            The directory.

        Raises:
            ValueError: if the transformer has no LoRA adapter.
        """
        from peft.utils import get_peft_model_state_dict

        if not getattr(self.transformer, "peft_config", None):
            raise ValueError("save_lora: the transformer has no LoRA adapter. Add one first, or save_pretrained.")
        with whole_dir(path) as partial:
            self.pipe.save_lora_weights(
                str(partial),
                transformer_lora_layers=get_peft_model_state_dict(self.transformer),
                # Without it the loader takes alpha = rank.
                transformer_lora_adapter_metadata=self.pipe.transformer.peft_config["default"].to_dict(),
            )
        return Path(path)

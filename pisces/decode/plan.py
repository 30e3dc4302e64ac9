"""Which way of decoding fits into memory: predicted by running each on tensors without contents, at the true size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pisces.decode.decoding import decode
from pisces.decode.meter import TensorMeter
from pisces.decode.whole import is_image_class

METHODS: tuple[dict[str, Any], ...] = (
    {"memory": "plain"},
    {"states": "keep"},
    {"states": "offload"},
    {"states": "sqrt"},
    {"states": "cbrt"},
    {"states": "keep", "checkpoint": True},
    {"states": "offload", "checkpoint": True},
    {"states": "sqrt", "checkpoint": True},
    {"states": "cbrt", "checkpoint": True},
)
"""Options of :func:`~pisces.decode.decode` that are compared, with chunks of one latent frame."""


@dataclass(frozen=True)
class Plan:
    """What one way of decoding would take, predicted.

    Attributes:
        options: for :func:`~pisces.decode.decode`.
        peak_bytes: most bytes of tensors alive on the device, frames and their gradient included; the autoencoder's
            weights, the reward's and the denoiser's memory and the workspaces of kernels come on top.
        flops: floating-point operations of the decode and its backward pass.
        relative_time: ``flops`` over those of the plain decode.
    """

    options: dict[str, Any]
    peak_bytes: int
    flops: int
    relative_time: float

    @property
    def name(self) -> str:
        """The options, as one would write them."""
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items())


def plan_decode(vae: Any, latents_shape: Sequence[int], *, methods: Iterable[dict[str, Any]] = METHODS) -> list[Plan]:
    """Predict memory and work of every way to decode and differentiate latents of a shape.

    Each way is run on PyTorch's "meta" device, where tensors have shapes and no contents: exactly the operations of the
    real decode, in seconds and without its memory. A byte is counted while its tensor is alive.

    Args:
        vae: a diffusers autoencoder; its switches (tiling, slicing) count. It is not changed.
        latents_shape: (B, C, t, h, w): :func:`latents_shape` makes it of a video's size.
        methods: options of :func:`~pisces.decode.decode`.

    Returns:
        One plan a method, the least work first.

    Raises:
        ValueError: if the shape is not possible.

    Example:
        >>> from diffusers import AutoencoderKLWan
        >>> from pisces.decode import plan_decode
        >>> vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
        >>> methods = [{"memory": "plain"}, {"states": "keep"}]
        >>> fast, small = plan_decode(vae, (1, 4, 3, 8, 8), methods=methods)
        >>> fast.name
        "memory='plain'"
        >>> small.peak_bytes < fast.peak_bytes
        True
    """
    copy = without_contents(vae)
    temb = _timestep(copy, latents_shape[0])
    measured = []
    for options in methods:
        latents = torch.empty(*latents_shape, dtype=_dtype(copy), device="meta", requires_grad=True)
        with TensorMeter() as meter:
            frames = decode(copy, latents, temb=temb, **options)
            torch.autograd.grad(frames, latents, torch.empty_like(frames))
        del frames
        measured.append((options, meter.peak, meter.flops))
    plain = next((work for options, _, work in measured if options.get("memory") == "plain"), measured[0][2])
    plans = [Plan(options, peak, work, work / plain if plain else math.nan) for options, peak, work in measured]
    return sorted(plans, key=lambda plan: (plan.flops, plan.options.get("states") == "offload"))


def choose(plans: Sequence[Plan], budget: int) -> Plan:
    """The plan with the least work that fits.

    Args:
        plans: of :func:`plan_decode`.
        budget: bytes that are free for the decode.

    Raises:
        ValueError: if none fits, with what would help.

    Example:
        >>> from pisces.decode import choose
        >>> from pisces.decode.plan import Plan
        >>> plans = [Plan({"memory": "plain"}, 900, 3, 1.0), Plan({"states": "keep"}, 300, 4, 1.33)]
        >>> choose(plans, 500).options
        {'states': 'keep'}
    """
    for plan in plans:
        if plan.peak_bytes <= budget:
            return plan
    least = min(plans, key=lambda plan: plan.peak_bytes)
    raise ValueError(
        f"plan: nothing fits into {size_text(budget)}; the least is {size_text(least.peak_bytes)} with {least.name}. "
        "Decode one video at a time (vae.enable_slicing()) or in spatial tiles (vae.enable_tiling(): other frames); "
        "choose frames=..., a smaller picture, or a 16-bit dtype."
    )


def latents_shape(vae: Any, *, frames: int, height: int, width: int, batch: int = 1) -> tuple[int, int, int, int, int]:
    """Shape (B, C, t, h, w) of the latents of videos.

    Args:
        vae: the autoencoder.
        frames: of a video: 1 more than a multiple of the temporal factor (any number for image autoencoders).
        height: in pixels, a multiple of the spatial factor.
        width: likewise.
        batch: videos.

    Raises:
        ValueError: if a size does not fit.
    """
    config = vae.config
    temporal, spatial = factors(vae)
    if min(frames, height, width, batch) < 1 or (frames - 1) % temporal:
        fits = max(0, (frames - 1) // temporal) * temporal + 1
        raise ValueError(f"plan: got {frames} frames, expected 1 + a multiple of {temporal}. Use {fits}.")
    for name, size in (("height", height), ("width", width)):
        if size % spatial:
            raise ValueError(f"plan: got {name} {size}, expected a multiple of {spatial}.")
    channels = config.get("z_dim") or config.latent_channels
    return batch, int(channels), (frames - 1) // temporal + 1, height // spatial, width // spatial


def factors(vae: Any) -> tuple[int, int]:
    """Frames and pixels a side of one latent, in time and in space."""
    config = vae.config
    if is_image_class(vae):
        return 1, int(2 ** (len(config.get("block_out_channels", [0] * 4)) - 1))
    temporal = getattr(vae, "temporal_compression_ratio", None) or config.get("scale_factor_temporal")
    spatial = getattr(vae, "spatial_compression_ratio", None)
    if spatial is None:
        spatial = 2 ** (len(config.block_out_channels) - 1)
    return int(temporal or config.temporal_compression_ratio), int(spatial)


def without_contents(vae: Any) -> Any:
    """A frozen copy of an autoencoder on the meta device: its class, configuration, switches and dtype."""
    copy = made_on_meta(type(vae), vae.config, _dtype(vae))
    for name, value in vars(vae).items():
        if isinstance(value, bool | int | float) and name != "training":
            setattr(copy, name, value)
    return copy


def made_on_meta(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """A frozen autoencoder of a class and a configuration whose parameters have shapes only."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return cls.from_config(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def size_text(size: int) -> str:
    """Bytes for people: 1.5 GB is 1.5e9."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} bytes"


def _dtype(vae: nn.Module) -> torch.dtype:
    return next(vae.parameters()).dtype


def _timestep(vae: Any, batch: int) -> Tensor | None:
    if not vae.config.get("timestep_conditioning"):
        return None
    return torch.empty(batch, dtype=_dtype(vae), device="meta")

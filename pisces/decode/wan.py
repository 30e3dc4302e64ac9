"""AutoencoderKLWan (Wan 2.1 and 2.2): causal convolutions, one latent frame at a time, as diffusers decodes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pisces.decode.cache import Cache
from pisces.decode.stream import Chain, Hidden, Position, Stage, Stream, grouped, plain_stage
from pisces.decode.tiles import SpatialTiles, strided_tiling

EXACT = "Exact for the class's own decode, latent frame by latent frame."


def stream(vae: Any, latents: Tensor, temb: Tensor | None) -> tuple[Stream, Tensor]:
    """The decoder as a stream, and what it reads."""
    n_latents = latents.shape[2]
    steps = grouped(n_latents, 1)
    counts = [1, *[2 ** sum(vae.temperal_upsample)] * (n_latents - 1)]
    stages = [_convolution(vae.decoder.conv_in), *_blocks(vae.decoder), _head(vae.decoder)]
    tiling = strided_tiling(vae, latents, patch=vae.config.patch_size or 1)

    def finish(frames: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        if vae.config.patch_size is not None:
            frames = unpatchify(frames, patch_size=vae.config.patch_size)
        return torch.clamp(frames, min=-1.0, max=1.0)

    if tiling is not None:
        inner = Chain([plain_stage(vae.post_quant_conv), *stages], steps, counts, EXACT)
        return SpatialTiles(inner, tiling, finish), latents
    # All latents at once, as the class does it: that is small, and the frames are then its own bit for bit.
    return Chain([*stages, plain_stage(finish)], steps, counts, EXACT), vae.post_quant_conv(latents)


class _Slots:
    """The list ``feat_cache`` that the class's modules read and write, for a part of the decoder.

    A part that is new to its video finds as many empty entries as it asks for.
    """

    def __init__(self, cache: Cache) -> None:
        self.entries = list(cache) if cache is not None else []
        self.fresh = cache is None

    def __getitem__(self, index: int) -> Any:
        if self.fresh and index == len(self.entries):
            self.entries.append(None)
        return self.entries[index]

    def __setitem__(self, index: int, value: Any) -> None:
        self.entries[index] = value


def _blocks(decoder: Any) -> list[Stage]:
    """The middle and the resolutions, a residual block or a resampling each."""
    stages = [_part(decoder.mid_block)]
    for block in decoder.up_blocks:
        shortcut = getattr(block, "avg_shortcut", None)
        upsamplers = [block.upsampler] if hasattr(block, "upsampler") else list(block.upsamplers or [])
        parts = [_part(module) for module in [*block.resnets, *upsamplers] if module is not None]
        stages += parts if shortcut is None else [_remember, *parts, _shortcut(shortcut)]
    return stages


def _part(module: Any) -> Stage:
    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        slots = _Slots(cache)
        x = module(hidden[0], feat_cache=slots, feat_idx=[0])
        return (x, *hidden[1:]), tuple(slots.entries)

    return stage


def _convolution(conv: Any) -> Stage:
    """A single causal convolution, with the two frames that the decoder's forward keeps for it."""

    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import CACHE_T

        (x,) = hidden
        kept = x[:, :, -CACHE_T:].clone()
        if kept.shape[2] < CACHE_T and cache is not None:
            kept = torch.cat([cache[:, :, -1:], kept], dim=2)
        return (conv(x, cache),), kept

    return stage


def _remember(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
    """The input of a resolution stays beside it."""
    return (hidden[0], hidden[0]), None


def _shortcut(shortcut: Any) -> Stage:
    """The input of a resolution, upsampled, is added to its output."""

    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        x, entered = hidden
        return (x + shortcut(entered, first_chunk=at.first),), None

    return stage


def _head(decoder: Any) -> Stage:
    convolution = _convolution(decoder.conv_out)

    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        return convolution((decoder.nonlinearity(decoder.norm_out(hidden[0])),), cache, at)

    return stage

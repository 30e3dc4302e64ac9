"""AutoencoderKLCogVideoX: causal convolutions, in the batches of latent frames over which the class normalises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pisces.decode.cache import Cache
from pisces.decode.stream import Chain, Hidden, Position, Stage, Stream
from pisces.decode.tiles import SpatialTiles, overlapping_tiling

EXACT = "Exact for the class's own decode, batch of latent frames by batch."


def stream(vae: Any, latents: Tensor, temb: Tensor | None) -> tuple[Stream, Tensor]:
    """The decoder as a stream, and what it reads."""
    steps = batches(latents.shape[2], vae.num_latent_frames_batch_size)
    levels = int(math.log2(vae.config.temporal_compression_ratio))
    counts = [_upsampled(step.stop - step.start, levels) for step in steps]
    chain = Chain(_stages(vae), steps, counts, EXACT)
    tiling = overlapping_tiling(vae, latents, (vae.tile_overlap_factor_height, vae.tile_overlap_factor_width))
    if tiling is None:
        return chain, latents
    return SpatialTiles(chain, tiling, lambda frames: frames), latents


def batches(n_latents: int, size: int) -> list[slice]:
    """The class's batches: the first takes what is left over."""
    n = max(n_latents // size, 1)
    left = n_latents % size
    return [slice(size * i + (left if i else 0), min(size * (i + 1) + left, n_latents)) for i in range(n)]


def _upsampled(frames: int, levels: int) -> int:
    """The first frame of an odd number stays single."""
    for _ in range(levels):
        frames = 2 * frames - frames % 2
    return frames


def _stages(vae: Any) -> list[Stage]:
    decoder = vae.decoder

    def enter(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        latents = hidden[0] if vae.post_quant_conv is None else vae.post_quant_conv(hidden[0])
        x, cache = decoder.conv_in(latents, conv_cache=cache)
        return (x, latents), cache  # every normalisation reads the latents again

    def leave(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        x, latents = hidden
        x, _ = decoder.norm_out(x, latents, conv_cache=None)
        x, cache = decoder.conv_out(decoder.conv_act(x), conv_cache=cache)
        return (x,), cache

    stages: list[Stage] = [enter]
    stages += [_resnet(module) for module in decoder.mid_block.resnets]
    for block in decoder.up_blocks:
        stages += [_resnet(module) for module in block.resnets]
        stages += [_upsampler(module) for module in block.upsamplers or []]
    return [*stages, leave]


def _resnet(module: Any) -> Stage:
    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        x, latents = hidden
        x, cache = module(x, None, latents, conv_cache=cache)
        # A convolution of one frame needs no cache. The class keeps its whole input: most of the cache, never read.
        return (x, latents), {name: entry for name, entry in cache.items() if not name.startswith("norm")}

    return stage


def _upsampler(module: Callable[[Tensor], Tensor]) -> Stage:
    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        return (module(hidden[0]), *hidden[1:]), None

    return stage

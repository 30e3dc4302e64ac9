"""AutoencoderKLHunyuanVideo15: causal convolutions behind an attention that looks back over all latent frames.

That part is run over the whole video, recomputed in the backward pass; what follows it goes chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from pisces.decode.cache import Cache
from pisces.decode.layers import StreamedConv, replicate_padded, residual_stage
from pisces.decode.stream import Chain, Hidden, Position, Stage, Stream, grouped, plain_stage
from pisces.decode.tiles import SpatialTiles, overlapping_tiling

EXACT = "Exact for the class's own decode, latent frame by latent frame; in one piece rounding differs."


def stream(vae: Any, latents: Tensor, temb: Tensor | None) -> tuple[Stream, Tensor]:
    """The decoder as a stream, and what it reads."""
    decoder = vae.decoder
    n_latents = latents.shape[2]
    ratio = vae.temporal_compression_ratio
    tiling = overlapping_tiling(vae, latents, (vae.tile_overlap_factor, vae.tile_overlap_factor))

    def enter(latents: Tensor) -> Tensor:
        # Video by video: the class's attention mask does not broadcast over a batch (diffusers 0.42).
        return torch.cat([enter_one(video) for video in latents.split(1)])

    def enter_one(latents: Tensor) -> Tensor:
        x = decoder.conv_in(latents) + latents.repeat_interleave(repeats=decoder.repeat, dim=1)
        middle: Tensor = decoder.mid_block(x)
        return middle

    if tiling is not None:  # a tile goes through the whole decoder by itself
        stages = [plain_stage(enter), *map(plain_stage, _modules(decoder)), plain_stage(_tail(decoder))]
        steps, counts = [slice(0, n_latents)], [(n_latents - 1) * ratio + 1]
        return SpatialTiles(Chain(stages, steps, counts, EXACT, causal=False), tiling, lambda x: x), latents
    x = recomputed(enter, latents, use_reentrant=False) if torch.is_grad_enabled() else enter(latents)
    conv_out = _conv(decoder.conv_out)

    def leave(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        y, cache = conv_out(decoder.conv_act(decoder.norm_out(hidden[0])), cache, at)
        return (y,), cache

    stages = [
        _upsample(m) if hasattr(m, "add_temporal_upsample") else residual_stage(m, _conv) for m in _modules(decoder)
    ]
    return Chain([*stages, leave], grouped(n_latents, 1), [1, *[ratio] * (n_latents - 1)], EXACT), x


def _modules(decoder: Any) -> list[Any]:
    """Residual blocks and upsamplings behind the middle, in their order."""
    return [module for block in decoder.up_blocks for module in [*block.resnets, *(block.upsamplers or [])]]


def _tail(decoder: Any) -> Any:
    return lambda x: decoder.conv_out(decoder.conv_act(decoder.norm_out(x)))


def _conv(conv: Any) -> StreamedConv:
    return StreamedConv(
        replicate_padded(conv.conv, conv.time_causal_padding[:4], conv.pad_mode),
        kernel=conv.time_causal_padding[4] + 1,
        ahead=0,
        channels=conv.conv.out_channels,
    )


def _upsample(module: Any) -> Stage:
    """Channels become pixels and, behind the video's first frame, frames; the input is repeated and added."""
    conv = _conv(module.conv)
    rearranged, repeats = module._dcae_upsample_rearrange, module.repeats

    def in_space(x: Tensor) -> Tensor:
        result: Tensor = rearranged(x, r1=1, r2=2, r3=2)
        return result

    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        (x,) = hidden
        y, cache = conv(x, cache, at)
        if not module.add_temporal_upsample:
            return (in_space(y) + in_space(x.repeat_interleave(repeats=repeats, dim=1)),), cache
        n_single = int(at.first)
        frames = []
        if n_single:
            first = in_space(y[:, :, :1])
            first = first[:, : first.shape[1] // 2]
            frames.append(first + in_space(x[:, :, :1]).repeat_interleave(repeats=repeats // 2, dim=1))
        if x.shape[2] > n_single:
            later = rearranged(y[:, :, n_single:], r1=2, r2=2, r3=2)
            shortcut = rearranged(x[:, :, n_single:], r1=2, r2=2, r3=2)
            frames.append(later + shortcut.repeat_interleave(repeats=repeats, dim=1))
        return (torch.cat(frames, dim=2),), cache

    return stage

"""AutoencoderKLMochi: causal convolutions whose first frame is repeated; normalisation of every frame by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pisces.decode.cache import Cache
from pisces.decode.layers import StreamedConv, replicate_padded, residual_stage
from pisces.decode.stream import Chain, Hidden, Position, Stage, Stream, grouped, plain_stage
from pisces.decode.tiles import SpatialTiles, strided_tiling


def stream(vae: Any, latents: Tensor, temb: Tensor | None) -> tuple[Stream, Tensor]:
    """The decoder as a stream, and what it reads."""
    framewise = vae.use_framewise_decoding
    steps = grouped(latents.shape[2], vae.num_latent_frames_batch_size if framewise else 1)
    ratio = vae.temporal_compression_ratio
    extra = ratio - 1 if vae.drop_last_temporal_frames else 0
    counts = [(step.stop - step.start) * ratio - (0 if index else extra) for index, step in enumerate(steps)]
    exact = "Exact for the class's own decode, latent frame by latent frame; in one piece rounding differs."
    if framewise:
        exact = "Exact for the class's own frame-wise decode."
    decoder = vae.decoder
    stages = [plain_stage(decoder.conv_in)]
    for block in [decoder.block_in, *decoder.up_blocks, decoder.block_out]:
        stages += [_cached(module) if framewise else residual_stage(module, _conv) for module in block.resnets]
        if block in list(decoder.up_blocks):
            stages.append(plain_stage(_expansion(block)))

    def leave(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        x = decoder.nonlinearity(hidden[0]).permute(0, 2, 3, 4, 1)
        frames = decoder.proj_out(x).permute(0, 4, 1, 2, 3)
        return (frames[:, :, extra:] if at.first else frames,), None

    chain = Chain([*stages, leave], steps, counts, exact)
    tiling = strided_tiling(vae, latents)
    if tiling is None:
        return chain, latents
    return SpatialTiles(chain, tiling, lambda frames: frames), latents


def _cached(module: Any) -> Stage:
    """A residual block that keeps its own caches."""

    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        x, cache = module(hidden[0], conv_cache=cache)
        return (x,), cache

    return stage


def _conv(conv: Any) -> StreamedConv:
    return StreamedConv(
        replicate_padded(conv.conv, conv.time_causal_padding[:4], "replicate"),
        kernel=conv.time_kernel_size,
        ahead=0,
        channels=conv.conv.out_channels,
    )


def _expansion(block: Any) -> Any:
    """What an up block does behind its residual blocks: channels become pixels and frames."""
    time, space = block.temporal_expansion, block.spatial_expansion

    def expand(x: Tensor) -> Tensor:
        x = block.proj(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        b, _, t, h, w = x.shape
        x = x.view(b, -1, time, space, space, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4).contiguous()
        return x.view(b, -1, t * time, h * space, w * space)

    return expand

"""AutoencoderKLHunyuanVideo: it normalises and attends over all frames of what it decodes, so it has no exact chunks.

Its own decode of all but short videos is a blend of tiles in time: these are decoded one at a time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pisces.decode.stream import Chain, Stage, Stream, plain_stage
from pisces.decode.tiles import SpatialTiles, strided_tiling, temporal_tiles

WHOLE = (
    "Exact for the class's own decode, in one piece: it normalises over all frames. use_framewise_decoding tiles it."
)


def stream(vae: Any, latents: Tensor, temb: Tensor | None) -> tuple[Stream, Tensor]:
    """The decoder as a stream, and what it reads."""
    n_latents = latents.shape[2]
    whole: Stream = Chain(
        _stages(vae), [slice(0, n_latents)], [(n_latents - 1) * vae.temporal_compression_ratio + 1], WHOLE, causal=False
    )
    tiling = strided_tiling(vae, latents)
    if tiling is not None:
        whole = SpatialTiles(whole, tiling, lambda frames: frames)
    # A later tile repeats the frame that the first latent of a video is.
    return temporal_tiles(vae, whole, n_latents, dropped=slice(1, None)) or whole, latents


def _stages(vae: Any) -> list[Stage]:
    decoder = vae.decoder
    modules = [vae.post_quant_conv, decoder.conv_in, decoder.mid_block]
    for block in decoder.up_blocks:
        modules += [*block.resnets, *(block.upsamplers or [])]

    def leave(x: Tensor) -> Tensor:
        frames: Tensor = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(x)))
        return frames

    return [plain_stage(module) for module in [*modules, leave]]

"""AutoencoderKLLTXVideo: convolutions that look one frame ahead, so that frames come out a few chunks later."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from pisces.decode.cache import Cache
from pisces.decode.layers import StreamedConv, delayed, lagging
from pisces.decode.stream import Chain, Hidden, Position, Stage, Stream, grouped, plain_stage
from pisces.decode.tiles import SpatialTiles, strided_tiling, temporal_tiles

EXACT = "Exact for the class's own decode, latent frame by latent frame; in one piece rounding differs."
NOISE = "Exact for the class's own decode, in one piece: it injects noise."


def stream(vae: Any, latents: Tensor, temb: Tensor | None) -> tuple[Stream, Tensor]:
    """The decoder as a stream, and what it reads."""
    n_latents, ratio = latents.shape[2], vae.temporal_compression_ratio
    tiling = strided_tiling(vae, latents)
    framewise = vae.use_framewise_decoding and n_latents > vae.tile_sample_min_num_frames // ratio
    stages: list[Stage]
    if injects_noise(vae.decoder):
        stages, note = [plain_stage(lambda x: vae.decoder(x, temb))], NOISE
    else:
        stages, note = _stages(vae.decoder, temb), EXACT
    if framewise or note == NOISE:
        n_frames = (n_latents - 1) * ratio + 1
        whole: Stream = Chain(stages, [slice(0, n_latents)], [n_frames], note, causal=False)
    else:
        steps = grouped(n_latents, 1)
        whole = Chain(stages, steps, _counts(vae.decoder, n_latents), note)
    if tiling is not None:
        whole = SpatialTiles(whole, tiling, lambda frames: frames)
    return temporal_tiles(vae, whole, n_latents, dropped=slice(None, -1)) or whole, latents


def injects_noise(decoder: Any) -> bool:
    """Whether residual blocks draw random numbers, the same for all frames of a call."""
    return any(getattr(module, "per_channel_scale1", None) is not None for module in decoder.modules())


def _counts(decoder: Any, n_latents: int) -> list[int]:
    """Frames that each step writes, latent frame by latent frame."""
    written = [0]
    for n in range(1, n_latents + 1):
        last = n == n_latents
        frames = lagging(n, _ahead(decoder.conv_in), last)
        for module in _modules(decoder):
            if hasattr(module, "stride"):
                frames = lagging(frames, _ahead(module.conv), last)
                frames = max(0, frames * module.stride[0] - module.stride[0] + 1)
            else:
                frames = lagging(lagging(frames, _ahead(module.conv1), last), _ahead(module.conv2), last)
        frames = lagging(frames, _ahead(decoder.conv_out), last)
        written.append(frames * decoder.patch_size_t)
    return [after - before for before, after in itertools.pairwise(written)]


def _ahead(conv: Any) -> int:
    return 0 if conv.is_causal else (conv.kernel_size[0] - 1) // 2


def _conv(conv: Any) -> StreamedConv:
    return StreamedConv(conv.conv, kernel=conv.kernel_size[0], ahead=_ahead(conv), channels=conv.conv.out_channels)


def _modules(decoder: Any) -> list[Any]:
    """Residual blocks and upsamplings, in their order."""
    modules = list(decoder.mid_block.resnets)
    for block in decoder.up_blocks:
        entry = [] if block.conv_in is None else [block.conv_in]
        modules += [*entry, *(block.upsamplers or []), *block.resnets]
    return modules


def _stages(decoder: Any, temb: Tensor | None) -> list[Stage]:
    if decoder.timestep_scale_multiplier is not None:
        if temb is None:
            raise ValueError("decode: this LTX decoder is conditioned on a timestep. Pass temb=..., as for vae.decode.")
        temb = temb * decoder.timestep_scale_multiplier
    conv_in = _conv(decoder.conv_in)

    def enter(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        x, cache = conv_in(hidden[0], cache, at)
        return (x,), cache

    stages: list[Stage] = [enter]
    stages += [_resnet(module, _embedding(decoder.mid_block, temb)) for module in decoder.mid_block.resnets]
    for block in decoder.up_blocks:
        if block.conv_in is not None:  # it takes the timestep as it is: the class does
            stages.append(_resnet(block.conv_in, lambda x: temb))
        stages += [_upsample(module) for module in block.upsamplers or []]
        stages += [_resnet(module, _embedding(block, temb)) for module in block.resnets]
    return [*stages, _leave(decoder, temb)]


def _embedding(block: Any, temb: Tensor | None) -> Any:
    """The timestep as a block's residual blocks take it, for activations x."""

    def embed(x: Tensor) -> Tensor | None:
        if block.time_embedder is None or temb is None:
            return temb
        return _embedded(block.time_embedder, temb, x)

    return embed


def _embedded(embedder: Any, temb: Tensor, x: Tensor) -> Tensor:
    vector = embedder(
        timestep=temb.flatten(), resolution=None, aspect_ratio=None, batch_size=x.shape[0], hidden_dtype=x.dtype
    )
    result: Tensor = vector.view(x.shape[0], -1, 1, 1, 1)
    return result


def _over_channels(norm: Any, x: Tensor) -> Tensor:
    result: Tensor = norm(x.movedim(1, -1)).movedim(-1, 1)
    return result


def _resnet(module: Any, embed: Any) -> Stage:
    conv1, conv2 = _conv(module.conv1), _conv(module.conv2)
    lag = conv1.ahead + conv2.ahead

    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        (x,) = hidden
        before = cache or (None, None, None)
        y = _over_channels(module.norm1, x)
        if module.scale_shift_table is not None:
            scales = embed(x).unflatten(1, (4, -1)) + module.scale_shift_table[None, ..., None, None, None]
            shift1, scale1, shift2, scale2 = scales.unbind(dim=1)
            y = y * (1 + scale1) + shift1
        y, first = conv1(module.nonlinearity(y), before[0], at)
        y = _over_channels(module.norm2, y)
        if module.scale_shift_table is not None:
            y = y * (1 + scale2) + shift2
        y, second = conv2(module.dropout(module.nonlinearity(y)), before[1], at)
        x, waiting = delayed(x, lag, before[2], at)
        if module.norm3 is not None:
            x = _over_channels(module.norm3, x)
        if module.conv_shortcut is not None:
            x = module.conv_shortcut(x) if x.shape[2] else x.new_zeros(y.shape)
        return (y + x,), (first, second, waiting)

    return stage


def _upsample(module: Any) -> Stage:
    conv = _conv(module.conv)
    time, high, wide = module.stride

    def unpacked(x: Tensor, channels: int) -> Tensor:
        b, _, t, h, w = x.shape
        x = x.reshape(b, channels, time, high, wide, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(b, channels, t * time, h * high, w * wide)

    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        (x,) = hidden
        before, waiting, begun = cache or (None, None, False)
        y, before = conv(x, before, at)
        packed = time * high * wide
        skipped = 0 if begun or y.shape[2] == 0 else time - 1  # of the video's first frame one is left
        y = unpacked(y, y.shape[1] // packed)
        if module.residual:
            x, waiting = delayed(x, conv.ahead, waiting, at)
            repeats = packed // module.upscale_factor
            y = y + unpacked(x, x.shape[1] // packed).repeat(1, repeats, 1, 1, 1)
        return (y[:, :, skipped:],), (before, waiting, begun or y.shape[2] > 0)

    return stage


def _leave(decoder: Any, temb: Tensor | None) -> Stage:
    conv_out = _conv(decoder.conv_out)
    space, time = decoder.patch_size, decoder.patch_size_t

    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        x = _over_channels(decoder.norm_out, hidden[0])
        if decoder.time_embedder is not None and temb is not None:
            scales = _embedded(decoder.time_embedder, temb, x).unflatten(1, (2, -1))
            shift, scale = (scales + decoder.scale_shift_table[None, ..., None, None, None]).unbind(dim=1)
            x = x * (1 + scale) + shift
        x, cache = conv_out(decoder.conv_act(x), cache, at)
        b, packed, t, h, w = x.shape
        channels = packed // (time * space * space)
        x = x.reshape(b, channels, time, space, space, t, h, w).permute(0, 1, 5, 2, 6, 4, 7, 3)
        return (x.reshape(b, channels, t * time, h * space, w * space),), cache

    return stage

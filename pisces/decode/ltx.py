"""AutoencoderKLLTXVideo: convolutions that look one frame ahead, so that frames come out a few chunks later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from pisces.decode.cache import Cache
from pisces.decode.layers import StreamedConv, waiting_for
from pisces.decode.stream import Chain, Hidden, Position, Stage, Stream, grouped, plain_stage
from pisces.decode.tiles import SpatialTiles, strided_tiling, temporal_tiles

EXACT = "Exact for the class's own decode, latent frame by latent frame; in one piece rounding differs."
NOISE = "Exact for the class's own decode, in one piece: it injects noise."


def stream(vae: Any, latents: Tensor, temb: Tensor | None) -> tuple[Stream, Tensor]:
    """The decoder as a stream, and what it reads."""
    n_latents, ratio = latents.shape[2], vae.temporal_compression_ratio
    tiling = strided_tiling(vae, latents)
    framewise = vae.use_framewise_decoding and n_latents > vae.tile_sample_min_num_frames // ratio
    noise = injects_noise(vae.decoder)
    if noise:
        n_frames = (n_latents - 1) * ratio + 1
        stages = [plain_stage(lambda x: vae.decoder(x, temb))]
        whole: Stream = Chain(stages, [slice(0, n_latents)], [n_frames], NOISE, causal=False)
    else:
        schedule = _Schedule(vae.decoder, n_latents, whole=framewise)
        stages = _stages(vae.decoder, temb, schedule)
        whole = Chain(stages, schedule.steps, schedule.counts, EXACT, causal=not framewise)
    if tiling is not None:
        whole = SpatialTiles(whole, tiling, lambda frames: frames)
    return temporal_tiles(vae, whole, n_latents, dropped=slice(None, -1)) or whole, latents


def injects_noise(decoder: Any) -> bool:
    """Whether residual blocks draw random numbers, the same for all frames of a call."""
    return any(getattr(module, "per_channel_scale1", None) is not None for module in decoder.modules())


class _Schedule:
    """When each convolution's input ends, and what comes out in each step.

    A convolution that looks ahead gives out its last frames when its input ends. If all ended with the last latents,
    all that lags (some fourteen latent frames in the released decoders) would come out in one step and take the memory
    of so many. So steps without latents follow, and each convolution ends as soon as no more comes out of it in a step
    than while the video lasts.

    Args:
        decoder: the decoder.
        n_latents: of the video.
        whole: one step of all latents instead.

    Attributes:
        steps: the latents that each step reads.
        ends: for each convolution in its order, the step that ends its input.
        counts: frames that each step writes.
    """

    def __init__(self, decoder: Any, n_latents: int, *, whole: bool) -> None:
        convs = list(_convolutions(decoder))
        self.steps = [slice(0, n_latents)] if whole else grouped(n_latents, 1)
        self.counts: list[int] = []
        self.ends = [-1] * len(convs)
        received, given = [0] * len(convs), [0] * len(convs)
        index = 0
        while index < len(self.steps) or self.ends[-1] < 0:
            if index == len(self.steps):
                self.steps.append(slice(n_latents, n_latents))
            frames, over = self.steps[index].stop, self.steps[index].stop == n_latents
            rate, before = n_latents if whole else 1, given[-1]
            for k, (conv, stride) in enumerate(convs):
                received[k] = frames
                if over and self.ends[k] < 0 and frames - given[k] <= rate:
                    self.ends[k] = index
                over = self.ends[k] >= 0
                given[k] = frames if over else max(0, frames - _ahead(conv))
                frames, rate = max(0, given[k] * stride - stride + 1), rate * stride
            self.counts.append((given[-1] - before) * decoder.patch_size_t)
            index += 1


def _convolutions(decoder: Any) -> Iterator[tuple[Any, int]]:
    """All convolutions over time in their order, each with how many frames are made of one behind it."""
    yield decoder.conv_in, 1
    for module in _modules(decoder):
        if hasattr(module, "stride"):
            yield module.conv, module.stride[0]
        else:
            yield module.conv1, 1
            yield module.conv2, 1
    yield decoder.conv_out, 1


def _ahead(conv: Any) -> int:
    return 0 if conv.is_causal else (conv.kernel_size[0] - 1) // 2


def _conv(conv: Any, end: int) -> StreamedConv:
    kernel, channels = conv.kernel_size[0], conv.conv.out_channels
    return StreamedConv(conv.conv, kernel=kernel, ahead=_ahead(conv), channels=channels, end=end)


def _modules(decoder: Any) -> list[Any]:
    """Residual blocks and upsamplings, in their order."""
    modules = list(decoder.mid_block.resnets)
    for block in decoder.up_blocks:
        entry = [] if block.conv_in is None else [block.conv_in]
        modules += [*entry, *(block.upsamplers or []), *block.resnets]
    return modules


def _stages(decoder: Any, temb: Tensor | None, schedule: _Schedule) -> list[Stage]:
    if decoder.timestep_scale_multiplier is not None:
        if temb is None:
            raise ValueError("decode: this LTX decoder is conditioned on a timestep. Pass temb=..., as for vae.decode.")
        temb = temb * decoder.timestep_scale_multiplier
    ends = iter(schedule.ends)  # taken in the order of the convolutions
    conv_in = _conv(decoder.conv_in, next(ends))

    def enter(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        x, cache = conv_in(hidden[0], cache, at)
        return (x,), cache

    stages: list[Stage] = [enter]
    stages += [_resnet(module, _embedding(decoder.mid_block, temb), ends) for module in decoder.mid_block.resnets]
    for block in decoder.up_blocks:
        if block.conv_in is not None:  # it takes the timestep as it is: the class does
            stages.append(_resnet(block.conv_in, lambda x: temb, ends))
        stages += [_upsample(module, ends) for module in block.upsamplers or []]
        stages += [_resnet(module, _embedding(block, temb), ends) for module in block.resnets]
    return [*stages, _leave(decoder, temb, ends)]


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


def _resnet(module: Any, embed: Any, ends: Iterator[int]) -> Stage:
    conv1, conv2 = _conv(module.conv1, next(ends)), _conv(module.conv2, next(ends))

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
        x, waiting = waiting_for(y.shape[2], x, before[2])
        if module.norm3 is not None:
            x = _over_channels(module.norm3, x)
        if module.conv_shortcut is not None:
            x = module.conv_shortcut(x) if x.shape[2] else x.new_zeros(y.shape)
        return (y + x,), (first, second, waiting)

    return stage


def _upsample(module: Any, ends: Iterator[int]) -> Stage:
    conv = _conv(module.conv, next(ends))
    time, high, wide = module.stride

    def unpacked(x: Tensor, channels: int) -> Tensor:
        b, _, t, h, w = x.shape
        x = x.reshape(b, channels, time, high, wide, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(b, channels, t * time, h * high, w * wide)

    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        (x,) = hidden
        before, waiting, begun = cache or (None, None, False)
        y, before = conv(x, before, at)
        packed, n_ready = time * high * wide, y.shape[2]
        skipped = 0 if begun or y.shape[2] == 0 else time - 1  # of the video's first frame one is left
        y = unpacked(y, y.shape[1] // packed)
        if module.residual:
            x, waiting = waiting_for(n_ready, x, waiting)
            repeats = packed // module.upscale_factor
            y = y + unpacked(x, x.shape[1] // packed).repeat(1, repeats, 1, 1, 1)
        return (y[:, :, skipped:],), (before, waiting, begun or y.shape[2] > 0)

    return stage


def _leave(decoder: Any, temb: Tensor | None, ends: Iterator[int]) -> Stage:
    conv_out = _conv(decoder.conv_out, next(ends))
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

"""Causal and centred convolutions in time, chunk by chunk: in the place of padding stands what a cache holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pisces.decode.cache import Cache
from pisces.decode.stream import Hidden, Position, Stage


@dataclass(frozen=True)
class StreamedConv:
    """A convolution over (time, height, width) whose ends of time repeat the first and the last frame.

    The frames that come out of all chunks are those of the convolution over the whole video. With ``ahead`` frames of
    context behind the current one, the output lags ``ahead`` frames, which come out in the step that ends its input.

    Args:
        convolve: the convolution with what it pads in space; none in time.
        kernel: frames that one output frame reads.
        ahead: how many of them come after it: 0 is causal.
        channels: of its output.
        end: number of the step that ends its input; None is the last one.
    """

    convolve: Callable[[Tensor], Tensor]
    kernel: int
    ahead: int
    channels: int
    end: int | None = None

    def __call__(self, x: Tensor, cache: Cache, at: Position) -> tuple[Tensor, Cache]:
        """Output frames that the input so far determines, and the input that later ones need."""
        if self.kernel == 1:
            return self.convolve(x), None
        if cache is not None:
            x = torch.cat([cache, x], dim=2)
        elif x.shape[2] > 0:
            x = _repeated(x, self.kernel - 1 - self.ahead, where=0, front=True)
        ended = at.last if self.end is None else at.number == self.end
        if ended:
            x = _repeated(x, self.ahead, where=x.shape[2] - 1, front=False)
        behind = None if ended or x.shape[2] == 0 else x[:, :, max(0, x.shape[2] - self.kernel + 1) :].clone()
        if x.shape[2] < self.kernel:
            return x.new_zeros((x.shape[0], self.channels, 0, *x.shape[3:])), behind
        return self.convolve(x), behind


def _repeated(x: Tensor, times: int, *, where: int, front: bool) -> Tensor:
    if times == 0:
        return x
    edge = x[:, :, where : where + 1].expand(-1, -1, times, -1, -1)
    return torch.cat([edge, x] if front else [x, edge], dim=2)


def waiting_for(n_frames: int, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """The first ``n_frames`` of what waits and then ``x``, for what is added to a stream that lags; and the rest."""
    if cache is not None:
        x = torch.cat([cache, x], dim=2)
    return x[:, :, :n_frames], x[:, :, n_frames:].clone() if x.shape[2] > n_frames else None


def replicate_padded(conv: Any, pad: tuple[int, ...], mode: str) -> Callable[[Tensor], Tensor]:
    """A convolution behind ``F.pad`` in space: ``pad`` is (left, right, top, bottom)."""

    def convolve(x: Tensor) -> Tensor:
        return conv(torch.nn.functional.pad(x, (*pad, 0, 0), mode=mode))

    return convolve


def residual_stage(module: Any, conv_of: Callable[[Any], StreamedConv]) -> Stage:
    """A causal residual block (norm, activation, convolution, twice) whose convolutions get a cache."""
    conv1, conv2 = conv_of(module.conv1), conv_of(module.conv2)
    conv_shortcut = getattr(module, "conv_shortcut", None)

    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        (x,) = hidden
        before = cache or (None, None)
        y, first = conv1(module.nonlinearity(module.norm1(x)), before[0], at)
        y, second = conv2(module.nonlinearity(module.norm2(y)), before[1], at)
        return (y + (x if conv_shortcut is None else conv_shortcut(x)),), (first, second)

    return stage

"""Decoding as a chain of steps in time, each a pure function of some latents and of what the steps before it left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from pisces.decode.cache import Cache

Hidden = tuple[Tensor, ...]
"""What flows from stage to stage: activations first, then what later stages need beside them."""


class Position(NamedTuple):
    """Where a step stands in its video."""

    first: bool
    last: bool
    number: int


Stage = Callable[[Hidden, Cache, Position], tuple[Hidden, Cache]]
"""A part of a decoder: (activations, what it left at the step before or None, position) -> the same after it."""


class Stream(Protocol):
    """A decoder that works through a video in steps.

    Attributes:
        steps: the latents that each step reads, as slices of time. They may overlap, or be empty behind the end.
        counts: the frames that each step writes.
        exact: one sentence: of which decode the frames and gradients are exact.
        light: its caches are small beside the activations of a step, or there are none.
    """

    @property
    def steps(self) -> Sequence[slice]: ...

    @property
    def counts(self) -> Sequence[int]: ...

    @property
    def exact(self) -> str: ...

    @property
    def light(self) -> bool: ...

    def needs_from(self, index: int) -> int:
        """The earliest step that has to run so that step ``index`` writes what it should."""
        ...

    def step(self, latents: Tensor, cache: Cache, index: int, *, checkpoint: bool) -> tuple[Tensor, Cache]:
        """One step.

        Args:
            latents: [B, C, t, h, w], ``steps[index]`` of the video.
            cache: what the step before returned; None at the first.
            index: number of the step.
            checkpoint: recompute the activations of each stage in the backward pass, instead of keeping them.

        Returns:
            Frames [B, C, counts[index], H, W] and the cache for the next step. Neither input is changed.
        """
        ...


@dataclass(frozen=True)
class Chain:
    """A stream whose steps run through the same stages, each with a cache of its own.

    Args:
        stages: the parts of the decoder in their order.
        steps: as in :class:`Stream`.
        counts: as in :class:`Stream`.
        exact: as in :class:`Stream`.
        causal: a step reads what all steps before it left. False: the steps are independent.
    """

    stages: Sequence[Stage]
    steps: Sequence[slice]
    counts: Sequence[int]
    exact: str
    causal: bool = True

    @property
    def light(self) -> bool:
        """Independent steps have no caches."""
        return not self.causal

    def needs_from(self, index: int) -> int:
        """The first step, or the step itself where steps are independent."""
        return 0 if self.causal else index

    def step(self, latents: Tensor, cache: Cache, index: int, *, checkpoint: bool) -> tuple[Tensor, Cache]:
        """One step: see :meth:`Stream.step`."""
        at = Position(index == 0, index == len(self.steps) - 1, index)
        before = cache if cache is not None else (None,) * len(self.stages)
        hidden: Hidden = (latents,)
        after = []
        for stage, own in zip(self.stages, before, strict=True):
            if checkpoint and torch.is_grad_enabled():
                hidden, own = recomputed(stage, hidden, own, at, use_reentrant=False)
            else:
                hidden, own = stage(hidden, own, at)
            after.append(own)
        return hidden[0], tuple(after) if self.causal else None


def plain_stage(function: Callable[[Tensor], Tensor]) -> Stage:
    """A stage that needs nothing of the steps before it."""

    def stage(hidden: Hidden, cache: Cache, at: Position) -> tuple[Hidden, Cache]:
        return (function(hidden[0]), *hidden[1:]), None

    return stage


def grouped(n_latents: int, size: int) -> list[slice]:
    """Slices of ``size`` latents; the last may be shorter."""
    return [slice(start, min(start + size, n_latents)) for start in range(0, n_latents, size)]


@dataclass(frozen=True)
class Chunk:
    """Steps that one pass with gradient covers."""

    steps: range
    latents: slice
    frames: range
    offsets: tuple[slice, ...] = field(default=())  # of the steps' latents, inside the chunk's

    @property
    def index(self) -> int:
        """Number of its first step."""
        return self.steps.start


def chunks_of(stream: Stream, size: int) -> list[Chunk]:
    """Consecutive steps, together at least ``size`` latents where so many are left; a step without counts as one."""
    chunks: list[Chunk] = []
    start, written = 0, 0
    while start < len(stream.steps):
        stop, empty = start, 0
        while stop < len(stream.steps) and (
            stop == start or stream.steps[stop - 1].stop - stream.steps[start].start + empty < size
        ):
            empty += stream.steps[stop].start == stream.steps[stop].stop
            stop += 1
        first, last = stream.steps[start].start, max(stream.steps[index].stop for index in range(start, stop))
        count = sum(stream.counts[start:stop])
        offsets = tuple(
            slice(stream.steps[index].start - first, stream.steps[index].stop - first) for index in range(start, stop)
        )
        chunks.append(Chunk(range(start, stop), slice(first, last), range(written, written + count), offsets))
        start, written = stop, written + count
    return chunks


def run_chunk(stream: Stream, chunk: Chunk, latents: Tensor, cache: Cache, *, checkpoint: bool) -> tuple[Tensor, Any]:
    """The frames [B, C, T, H, W] of a chunk from its latents, and the cache behind it."""
    parts = []
    for index, offset in zip(chunk.steps, chunk.offsets, strict=True):
        frames, cache = stream.step(latents[:, :, offset], cache, index, checkpoint=checkpoint)
        parts.append(frames[:, :, : stream.counts[index]])
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)), cache

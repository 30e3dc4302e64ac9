"""Two passes over a stream: frames without gradient, then the chunks again with gradient, from the last to the first.

With (frames_k, cache_{k+1}) = step_k(latents_k, cache_k), the second pass computes for k = n-1 .. 0

    d latents_k, d cache_k = (d step_k)^T (d frames_k, d cache_{k+1}),

so that at no time more than one chunk's activations are in memory. Nothing is cut: the gradient is that of autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pisces.decode.cache import Cache, replaced, tensors, to_device, to_host
from pisces.decode.schedule import kept, slots_for, split
from pisces.decode.stream import Chunk, Stream, chunks_of, run_chunk

SWEEPS = {"keep": 1, "offload": 1, "sqrt": 2, "cbrt": 3}
"""Of each policy for the caches: how often a chunk is run without gradient."""


@dataclass
class Saved:
    """What the first pass leaves for the second, by chunk: caches in front of it, random states."""

    caches: dict[int, Cache] = field(default_factory=dict)
    random: dict[int, Any] = field(default_factory=dict)


@dataclass
class Replay:
    """How one batch of videos is decoded, and what of it is needed.

    Args:
        stream: the decoder.
        size: latents of a chunk.
        wanted: the frames to return, ascending; None is all.
        states: what becomes of the caches: a key of :data:`SWEEPS`.
        checkpoint: recompute each stage's activations inside a chunk too.
        stochastic: the decoder draws random numbers, which have to be the same in both passes.
        device: of the latents.
        before: called before each pass (offloading hooks bring the weights back).
    """

    stream: Stream
    size: int
    wanted: Sequence[int] | None
    states: str
    checkpoint: bool
    stochastic: bool
    device: torch.device
    before: Callable[[], None]
    chunks: list[Chunk] = field(init=False)
    picked: list[list[int]] = field(init=False)  # for each chunk, its wanted frames counted from its own first
    runs: list[range] = field(init=False)  # chunks that have to be decoded, as far as they follow from each other

    def __post_init__(self) -> None:
        self.chunks = chunks_of(self.stream, self.size)
        chosen = None if self.wanted is None else set(self.wanted)
        self.picked = [
            [frame - chunk.frames.start for frame in chunk.frames if chosen is None or frame in chosen]
            for chunk in self.chunks
        ]
        self.runs = self._runs()
        # Caches that are small beside a chunk's work are not worth to be computed twice.
        self.sweeps = 1 if self.stream.light else SWEEPS[self.states]
        enabled = torch.amp.is_autocast_available(self.device.type) and torch.is_autocast_enabled(self.device.type)
        self._autocast = enabled, torch.get_autocast_dtype(self.device.type) if enabled else None

    def _runs(self) -> list[range]:
        of_step = {step: number for number, chunk in enumerate(self.chunks) for step in chunk.steps}
        runs: list[range] = []
        for number, chunk in enumerate(self.chunks):
            if self.picked[number]:
                first = of_step[min(self.stream.needs_from(step) for step in chunk.steps)]
                if runs and first < runs[-1].stop:
                    first = min(first, runs.pop().start)
                runs.append(range(first, number + 1))
        return runs

    # ------------------------------------------------------------------ first pass

    def forward(self, latents: Tensor, *, save: bool) -> tuple[Tensor, Saved]:
        """The wanted frames [B, C, T, H, W], without gradient; with ``save`` what the second pass needs."""
        self.before()
        saved = Saved()
        frames: Tensor | None = None
        total, done = sum(map(len, self.picked)), 0
        for run in self.runs:
            keep = {run.start + place for place in kept(len(run), self.sweeps)} if save else set()
            cache: Cache = None
            for number in run:
                if number in keep:
                    saved.caches[number] = replaced(cache, to_host) if self.states == "offload" else cache
                if save and self.stochastic:
                    saved.random[number] = _random_state(self.device)
                with torch.no_grad():
                    part, cache = self.run(number, self.latents_of(number, latents), cache)
                part = _select(part, self.picked[number])
                if frames is None:  # one allocation, not a list and its concatenation
                    frames = part.new_empty((part.shape[0], part.shape[1], total, *part.shape[3:]))
                frames[:, :, done : done + part.shape[2]] = part
                done += part.shape[2]
        assert frames is not None  # decode refuses an empty choice of frames
        return frames, saved

    def run(self, number: int, latents: Tensor, cache: Cache, *, checkpoint: bool = False) -> tuple[Tensor, Cache]:
        """A chunk of its own latents: its frames, and the cache behind it."""
        with self.autocast():
            return run_chunk(self.stream, self.chunks[number], latents, cache, checkpoint=checkpoint)

    def latents_of(self, number: int, latents: Tensor) -> Tensor:
        """What a chunk reads of all latents."""
        return latents[:, :, self.chunks[number].latents]

    # ------------------------------------------------------------------ surroundings

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The caller's autocast, without its cache: casts made without gradient must not serve where gradient flows."""
        enabled, dtype = self._autocast
        if not enabled:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype, cache_enabled=False)

    @contextlib.contextmanager
    def same_random(self, state: Any) -> Iterator[None]:
        """Random numbers as they were in the first pass."""
        if state is None:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(state[0])
            if devices:
                torch.cuda.set_rng_state(state[1], self.device)
            yield


class Reversal:
    """The second pass of a :class:`Replay`: afterwards ``grad_latents`` and ``grad_parameters`` are there.

    Args:
        replay: the first pass' plan.
        latents: what it decoded.
        parameters: of the autoencoder, as far as they require a gradient.
        saved: what it left. Caches are taken out as they are used, and computed again if they are not there.
        grad_frames: gradient of the frames that it returned.
        needs_latents: whether the latents require a gradient.
    """

    def __init__(
        self,
        replay: Replay,
        latents: Tensor,
        parameters: Sequence[Tensor],
        saved: Saved,
        grad_frames: Tensor,
        needs_latents: bool,
    ) -> None:
        self.replay, self.latents, self.parameters, self.saved = replay, latents, parameters, saved
        self.grad_latents = torch.zeros_like(latents) if needs_latents else None
        self.grad_parameters: list[Tensor | None] = [None] * len(parameters)
        self._grad_frames = grad_frames.split([len(picked) for picked in replay.picked], dim=2)
        self._carried: list[Tensor | None] = []  # gradient of the cache behind the chunk that comes next
        replay.before()
        for run in reversed(replay.runs):
            self._carried = []
            self._reverse(run, None, slots_for(len(run), replay.sweeps), replay.sweeps)

    def _reverse(self, chunks: range, cache: Cache, slots: int, sweeps: int) -> None:
        """Differentiate consecutive chunks, from the cache in front of them: pisces/decode/schedule.py."""
        if not any(self.replay.picked[number] for number in chunks) and self._nothing_flows():
            self._carried = []
            return
        if len(chunks) == 1:
            self._differentiate(chunks.start, cache)
            return
        middle = chunks.start + split(len(chunks), slots, sweeps)
        between = self.saved.caches.pop(middle, None)
        if between is None:
            between = self._advanced(range(chunks.start, middle), cache)
        self._reverse(range(middle, chunks.stop), between, slots - 1, sweeps)
        del between
        self._reverse(range(chunks.start, middle), cache, slots, sweeps - 1)

    def _advanced(self, chunks: range, cache: Cache) -> Cache:
        cache = replaced(cache, self._back)
        with torch.no_grad():
            for number in chunks:
                with self.replay.same_random(self.saved.random.get(number)):
                    cache = self.replay.run(number, self.replay.latents_of(number, self.latents), cache)[1]
        return cache

    def _differentiate(self, number: int, cache: Cache) -> None:
        """One chunk with gradient: from the frames and the cache behind it to the latents and the cache before it."""
        replay, wanted = self.replay, self.replay.picked[number]
        leaf = replay.latents_of(number, self.latents).detach().requires_grad_(self.grad_latents is not None)
        before = replaced(cache, lambda tensor: self._back(tensor).detach().requires_grad_(tensor.is_floating_point()))
        with torch.enable_grad(), replay.same_random(self.saved.random.get(number)):
            frames, behind = replay.run(number, leaf, before, checkpoint=replay.checkpoint)
            frames = _select(frames, wanted)
            ends = [(frames, self._grad_frames[number])] if wanted else []
            # Nothing is carried behind the last chunk.
            ends += [
                (tensor, grad)
                for tensor, grad in zip(tensors(behind), self._carried, strict=False)
                if grad is not None and tensor.requires_grad
            ]
            end = _End.apply([grad for _, grad in ends], *(tensor for tensor, _ in ends)) if ends else None
        self._carried = []
        del frames, behind, ends
        if end is None:
            return
        inside = [tensor for tensor in tensors(before) if tensor.requires_grad]
        inputs = [*([leaf] if leaf.requires_grad else []), *self.parameters, *inside]
        found = iter(torch.autograd.grad(end, inputs, allow_unused=True))
        if self.grad_latents is not None:
            grad = next(found)
            if grad is not None:
                replay.latents_of(number, self.grad_latents).add_(grad)
        for index, total in enumerate(self.grad_parameters):
            part = next(found)
            self.grad_parameters[index] = part if total is None else total if part is None else total + part
        self._carried = [next(found) if tensor.requires_grad else None for tensor in tensors(before)]

    def _back(self, tensor: Tensor) -> Tensor:
        """From the host, where the chain of caches waits for its turn."""
        return to_device(tensor, self.replay.device) if self.replay.states == "offload" else tensor

    def _nothing_flows(self) -> bool:
        """Whether nothing flows back into chunks without a wanted frame."""
        if self.replay.wanted is None:  # then it does: spare the device the question
            return all(grad is None for grad in self._carried)
        return all(grad is None or not bool(grad.any()) for grad in self._carried)


class _End(torch.autograd.Function):
    """Tensors and the gradients with which a backward pass starts: neither is held once it is not needed."""

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.grads = grads
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        grads, ctx.grads = ctx.grads, None
        return None, *grads


class Decode(torch.autograd.Function):
    """Frames of latents, by :class:`Replay`: ``apply(replay, latents, *parameters)``."""

    @staticmethod
    def forward(ctx: Any, replay: Replay, latents: Tensor, *parameters: Tensor) -> Tensor:
        """The first pass."""
        frames, ctx.saved = replay.forward(latents, save=True)
        ctx.replay = replay
        ctx.save_for_backward(latents, *parameters)
        return frames

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_frames: Tensor) -> tuple[Any, ...]:
        """The second pass."""
        latents, *parameters = ctx.saved_tensors
        needed = [p for p, needs in zip(parameters, ctx.needs_input_grad[2:], strict=True) if needs]
        result = Reversal(ctx.replay, latents, needed, ctx.saved, grad_frames, ctx.needs_input_grad[1])
        grads = iter(result.grad_parameters)
        return None, result.grad_latents, *(next(grads) if needs else None for needs in ctx.needs_input_grad[2:])


def _select(frames: Tensor, wanted: list[int]) -> Tensor:
    if len(wanted) == frames.shape[2]:
        return frames
    return frames[:, :, wanted]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device

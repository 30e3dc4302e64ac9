"""Batches by number: batch n is a function of the data and the seed, so a position in the data is one number."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pisces.algorithms.base import Batch
from pisces.data import CaptionedVideos, VideoReadError
from pisces.latent_cache import DigestedVideos, LatentCache
from pisces.pipelines.base import PipelineAdapter
from pisces.state import step_generator

logger = logging.getLogger(__name__)

# Latents of the videos seen last are kept, at most this much in all.
LATENT_CACHE_BYTES = 2**30


class Batches(Protocol):
    """Micro-batches by number, without end."""

    fingerprint: str

    def __getitem__(self, index: int) -> Batch:
        """Batch ``index``, the same each time."""
        ...


class ShuffledIndices:
    """Item numbers by batch: one seeded permutation an epoch, epochs back to back.

    Args:
        n_items: number of items, at least 1.
        batch_size: items a batch; it may exceed the number of items.
        seed: seed of the permutations.

    Raises:
        ValueError: if there are no items or the batch is empty.
    """

    def __init__(self, n_items: int, *, batch_size: int, seed: int) -> None:
        if n_items < 1 or batch_size < 1:
            raise ValueError(f"batches: got {n_items} items in batches of {batch_size}, expected at least 1 of each.")
        self.n_items = n_items
        self.batch_size = batch_size
        self.seed = seed
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, index: int) -> list[int]:
        return [self._item(index * self.batch_size + k) for k in range(self.batch_size)]

    def _item(self, position: int) -> int:
        epoch, offset = divmod(position, self.n_items)
        if self._epoch[0] != epoch:
            # The tag keeps the order apart from the noise, whose generators are seeded by (seed, step, part).
            order = torch.randperm(self.n_items, generator=step_generator(self.seed, epoch, 0, 0xDA7A))
            self._epoch = (epoch, order.tolist())
        return self._epoch[1][offset]


class PromptBatches:
    """Batches of prompts.

    Args:
        prompts: the texts, none empty.
        batch_size: prompts a batch.
        seed: seed of the order.

    Raises:
        ValueError: if a prompt is empty (its number is named) or there is none.
    """

    def __init__(self, prompts: Sequence[str], *, batch_size: int, seed: int = 0) -> None:
        for number, prompt in enumerate(prompts):
            if not prompt.strip():
                raise ValueError(f"PromptBatches: prompt {number} is empty.")
        self.texts = list(prompts)
        self.indices = ShuffledIndices(len(self.texts), batch_size=batch_size, seed=seed)
        self.fingerprint = fingerprint(self.texts)

    def __getitem__(self, index: int) -> Batch:
        return Batch([self.texts[item] for item in self.indices[index]], number=index)


class VideoBatches:
    """Batches of captioned videos as latents, encoded once and remembered.

    Each video is encoded by itself, so its latents do not depend on the batch in which it is first met.

    A video that cannot be read gives its place, in every batch, to the next one of the data set that can: batch n
    stays a function of n and the data. It is logged once.

    Args:
        videos: the data set.
        adapter: its VAE encodes them.
        batch_size: videos a batch.
        seed: seed of the order.
        cache: where latents are looked up and kept; None keeps them in memory alone.

    Raises:
        TypeError: a cache for videos that have no digest.
    """

    def __init__(
        self,
        videos: CaptionedVideos,
        adapter: PipelineAdapter,
        *,
        batch_size: int,
        seed: int = 0,
        cache: LatentCache | None = None,
    ) -> None:
        if cache is not None and not isinstance(videos, DigestedVideos):
            raise TypeError(f"VideoBatches: a cache needs videos with a method digest, got a {type(videos).__name__}.")
        self.videos = videos
        self.adapter = adapter
        self.texts = list(videos.captions)
        self.indices = ShuffledIndices(len(videos), batch_size=batch_size, seed=seed)
        self.fingerprint = fingerprint(self.texts)
        self.cache = cache
        self._digest = videos.digest if isinstance(videos, DigestedVideos) else None
        self._memory: dict[int, Tensor] = {}
        self._unreadable: dict[int, VideoReadError] = {}

    def __getitem__(self, index: int) -> Batch:
        """Batch ``index``.

        Raises:
            VideoReadError: no video of the data set can be read.
        """
        items, latents = zip(*(self._readable(item) for item in self.indices[index]), strict=True)
        return Batch([self.texts[item] for item in items], latents=torch.stack(latents), number=index)

    def latents(self, item: int) -> Tensor:
        """Latents [C, t, h, w] of a video by its number in the data set.

        Raises:
            VideoReadError: the video cannot be read.
        """
        if item in self._memory:
            return self._memory[item]
        if self.cache is None or self._digest is None:
            latents = self._encode(item)
        else:
            latents = self.cache.latents(self._digest(item), lambda: self._encode(item))
        if (len(self._memory) + 1) * latents.numel() * latents.element_size() <= LATENT_CACHE_BYTES:
            self._memory[item] = latents
        return latents

    def _encode(self, item: int) -> Tensor:
        frames, _ = self.videos[item]
        return self.adapter.encode_frames(frames[None].to(self.adapter.device))[0]

    def _readable(self, item: int) -> tuple[int, Tensor]:
        """The first of the videos ``item``, ``item + 1``, ... that can be read, and its latents."""
        n_items = len(self.texts)
        for candidate in ((item + k) % n_items for k in range(n_items)):
            if candidate in self._unreadable:
                continue
            try:
                return candidate, self.latents(candidate)
            except VideoReadError as error:
                self._unreadable[candidate] = error
                logger.warning("%s; another takes its place (%d unreadable so far)", error, len(self._unreadable))
        first = self._unreadable[item]
        raise VideoReadError(first.path, f"{first.why}; none of the {n_items} videos can be read") from first


def fingerprint(texts: Sequence[str]) -> str:
    """A short digest of a list of texts: whether a resumed run has the same data."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

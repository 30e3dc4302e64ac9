"""Batches by number: batch n is a function of the data and the seed, so a position in the data is one number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pisces.algorithms.base import Batch
from pisces.data import CaptionedVideos
from pisces.pipelines.base import PipelineAdapter
from pisces.state import step_generator

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

    Args:
        videos: the data set.
        adapter: its VAE encodes them.
        batch_size: videos a batch.
        seed: seed of the order.
    """

    def __init__(self, videos: CaptionedVideos, adapter: PipelineAdapter, *, batch_size: int, seed: int = 0) -> None:
        self.videos = videos
        self.adapter = adapter
        self.texts = list(videos.captions)
        self.indices = ShuffledIndices(len(videos), batch_size=batch_size, seed=seed)
        self.fingerprint = fingerprint(self.texts)
        self._cache: dict[int, Tensor] = {}

    def __getitem__(self, index: int) -> Batch:
        items = self.indices[index]
        return Batch(
            [self.texts[item] for item in items],
            latents=torch.stack([self._latents(item) for item in items]),
            number=index,
        )

    def _latents(self, item: int) -> Tensor:
        if item in self._cache:
            return self._cache[item]
        frames, _ = self.videos[item]
        latents = self.adapter.encode_frames(frames[None].to(self.adapter.device))[0]
        if (len(self._cache) + 1) * latents.numel() * latents.element_size() <= LATENT_CACHE_BYTES:
            self._cache[item] = latents
        return latents


def fingerprint(texts: Sequence[str]) -> str:
    """A short digest of a list of texts: whether a resumed run has the same data."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

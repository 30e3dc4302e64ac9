"""Tiled decoding as diffusers defines it, but changing no tile in place: in space, in time, and the blending."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from pisces.decode.cache import Cache
from pisces.decode.stream import Stream


def blend(before: Tensor, after: Tensor, extent: int, *, dim: int) -> Tensor:
    """Fade the end of one tile into the beginning of the next.

        after[k] <- before[-n + k] (1 - k / n) + after[k] k / n,   k < n = min(extent, both lengths)

    Slice by slice with numbers as weights, as diffusers does it, so that every dtype is rounded alike.

    Args:
        before: the tile above, to the left or earlier, itself blended.
        after: the tile that begins where ``before`` ends.
        extent: how many slices overlap.
        dim: along which they follow each other.

    Returns:
        ``after`` with its first slices faded in.
    """
    n = min(before.shape[dim], after.shape[dim], extent)
    if n == 0:
        return after
    end = before.shape[dim] - n
    faded = [before.select(dim, end + k) * (1 - k / n) + after.select(dim, k) * (k / n) for k in range(n)]
    return torch.cat([torch.stack(faded, dim=dim), after.narrow(dim, n, after.shape[dim] - n)], dim=dim)


@dataclass(frozen=True)
class Tiling:
    """Tiles of one frame: (height, width) each.

    Args:
        latents: size of a tile.
        latent_stride: from one tile to the next.
        blend: pixels over which neighbours fade into each other.
        stride: pixels of a tile that are used.
        size: pixels of the whole frame; None where the tiles' own sum is meant.
    """

    latents: tuple[int, int]
    latent_stride: tuple[int, int]
    blend: tuple[int, int]
    stride: tuple[int, int]
    size: tuple[int, int] | None

    def places(self, height: int, width: int) -> list[list[tuple[slice, slice]]]:
        """Rows of tiles: which latents each covers."""
        return [
            [
                (slice(top, top + self.latents[0]), slice(left, left + self.latents[1]))
                for left in range(0, width, self.latent_stride[1])
            ]
            for top in range(0, height, self.latent_stride[0])
        ]

    def joined(self, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """The frames that decoded tiles make."""
        above: list[Tensor] = []
        result = []
        for row in rows:
            done: list[Tensor] = []
            for place, tile in enumerate(row):
                if above:
                    tile = blend(above[place], tile, self.blend[0], dim=3)
                if done:
                    tile = blend(done[-1], tile, self.blend[1], dim=4)
                done.append(tile)
            above = done
            result.append(torch.cat([tile[..., : self.stride[0], : self.stride[1]] for tile in done], dim=4))
        frames = torch.cat(result, dim=3)
        return frames if self.size is None else frames[..., : self.size[0], : self.size[1]]


@dataclass(frozen=True)
class SpatialTiles:
    """A stream whose every step is decoded tile by tile; with gradient, one tile at a time is in memory.

    Args:
        inner: decodes one tile through time, without ``finish``.
        tiling: where the tiles are.
        finish: what is done to whole frames.
    """

    inner: Stream
    tiling: Tiling
    finish: Callable[[Tensor], Tensor]

    @property
    def steps(self) -> Sequence[slice]:
        """Those of one tile."""
        return self.inner.steps

    @property
    def counts(self) -> Sequence[int]:
        """Those of one tile."""
        return self.inner.counts

    @property
    def exact(self) -> str:
        """Of the class's own tiled decode."""
        return "Exact for the class's own decode in spatial tiles."

    @property
    def light(self) -> bool:
        """As for one tile."""
        return self.inner.light

    def needs_from(self, index: int) -> int:
        """As for one tile."""
        return self.inner.needs_from(index)

    def step(self, latents: Tensor, cache: Cache, index: int, *, checkpoint: bool) -> tuple[Tensor, Cache]:
        """One step: see :meth:`Stream.step`."""
        places = self.tiling.places(latents.shape[3], latents.shape[4])
        before = iter(cache if cache is not None else [None] * sum(map(len, places)))
        rows, after = [], []
        for row in places:
            tiles = []
            for high, wide in row:
                # Recomputed whatever `checkpoint` says: the graphs of all tiles together would be that of the frame.
                tile, own = self._recomputed(latents[..., high, wide], next(before), index, checkpoint)
                tiles.append(tile)
                after.append(own)
            rows.append(tiles)
        return self.finish(self.tiling.joined(rows)), tuple(after)

    def _recomputed(self, latents: Tensor, cache: Cache, index: int, checkpoint: bool) -> tuple[Tensor, Cache]:
        if not torch.is_grad_enabled():
            return self.inner.step(latents, cache, index, checkpoint=False)
        result: tuple[Tensor, Cache] = recomputed(
            self.inner.step, latents, cache, index, checkpoint=checkpoint, use_reentrant=False
        )
        return result


@dataclass(frozen=True)
class TemporalTiles:
    """A stream of tiles in time that are decoded by themselves and fade into each other.

    Its cache is the end of the tile before, in pixels.

    Args:
        inner: decodes one tile, in one step.
        steps: the latents of each tile; they overlap.
        lengths: frames that each tile has, without those that are dropped.
        dropped: which frames all tiles but the first keep, as a slice.
        stride: frames of a tile that are used; the first has one more.
        blend: frames over which tiles fade into each other.
        n_frames: of the whole video.
    """

    inner: Stream
    steps: Sequence[slice]
    lengths: Sequence[int]
    dropped: slice
    stride: int
    blend: int
    n_frames: int

    @property
    def counts(self) -> Sequence[int]:
        """As many as are used, until the video is full."""
        counts, left = [], self.n_frames
        for index, length in enumerate(self.lengths):
            counts.append(min(length, self.stride + (index == 0), left))
            left -= counts[-1]
        return counts

    @property
    def exact(self) -> str:
        """Of the class's own tiled decode."""
        return "Exact for the class's own decode in tiles of time, which is not its decode in one piece."

    @property
    def light(self) -> bool:
        """The cache is a few frames of pixels."""
        return True

    def needs_from(self, index: int) -> int:
        """The tile before, and those before it while tiles are so short that their ends have been blended."""
        while index > 0:
            index -= 1
            if self.lengths[index] >= 2 * self.blend:
                break
        return index

    def step(self, latents: Tensor, cache: Cache, index: int, *, checkpoint: bool) -> tuple[Tensor, Cache]:
        """One step: see :meth:`Stream.step`."""
        frames, _ = self.inner.step(latents, None, 0, checkpoint=checkpoint)
        if index > 0:
            frames = frames[:, :, self.dropped]
        if cache is not None:
            frames = blend(cache, frames, self.blend, dim=2)
        end = frames[:, :, max(frames.shape[2] - self.blend, 0) :].clone()
        return frames[:, :, : self.stride + (index == 0)], end


def strided_tiling(vae: Any, latents: Tensor, *, patch: int = 1) -> Tiling | None:
    """The tiling of classes that have strides (Wan, HunyuanVideo, Mochi, LTX); None if they would not tile.

    Args:
        vae: the autoencoder.
        latents: what it would decode.
        patch: pixels a side that the decoder packs into channels.
    """
    ratio = vae.spatial_compression_ratio
    height, width = latents.shape[3:]
    tile = vae.tile_sample_min_height, vae.tile_sample_min_width
    stride = vae.tile_sample_stride_height, vae.tile_sample_stride_width
    in_latents = tile[0] // ratio, tile[1] // ratio
    if not vae.use_tiling or (height <= in_latents[0] and width <= in_latents[1]):
        return None
    return Tiling(
        latents=in_latents,
        latent_stride=(stride[0] // ratio, stride[1] // ratio),
        blend=(tile[0] // patch - stride[0] // patch, tile[1] // patch - stride[1] // patch),
        stride=(stride[0] // patch, stride[1] // patch),
        size=(height * ratio // patch, width * ratio // patch),
    )


def overlapping_tiling(vae: Any, latents: Tensor, overlap: tuple[float, float]) -> Tiling | None:
    """The tiling of classes that have overlaps (CogVideoX, HunyuanVideo 1.5); None if they would not tile."""
    height, width = latents.shape[3:]
    tile = vae.tile_latent_min_height, vae.tile_latent_min_width
    if not vae.use_tiling or (height <= tile[0] and width <= tile[1]):
        return None
    pixels = vae.tile_sample_min_height, vae.tile_sample_min_width
    faded = int(pixels[0] * overlap[0]), int(pixels[1] * overlap[1])
    return Tiling(
        latents=tile,
        latent_stride=(int(tile[0] * (1 - overlap[0])), int(tile[1] * (1 - overlap[1]))),
        blend=faded,
        stride=(pixels[0] - faded[0], pixels[1] - faded[1]),
        size=None,
    )


def temporal_tiles(vae: Any, inner: Stream, n_latents: int, *, dropped: slice) -> TemporalTiles | None:
    """The tiles in time of classes that have them (HunyuanVideo, LTX); None if they would decode in one piece.

    Args:
        vae: the autoencoder.
        inner: decodes one tile.
        n_latents: of the video.
        dropped: what later tiles keep of their frames.
    """
    ratio = vae.temporal_compression_ratio
    tile, stride = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames
    if not vae.use_framewise_decoding or n_latents <= tile // ratio:
        return None
    steps = [slice(start, min(start + tile // ratio + 1, n_latents)) for start in range(0, n_latents, stride // ratio)]
    lengths = [(step.stop - step.start - 1) * ratio + (index == 0) for index, step in enumerate(steps)]
    return TemporalTiles(inner, steps, lengths, dropped, stride, tile - stride, (n_latents - 1) * ratio + 1)

"""Heat maps over the frames of a video: one row a word, one column a frame."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pixels
from PIL import ImageDraw
from torch import Tensor

from pisces.report import shorten, typeface
from pisces.video import atomic_path, cpu_frames

TILE = 80  # side of a picture, in pixels
GAP, MARGIN = 3, 20
LINE, LABEL = 26, 120  # height of a heading, width of the words
HOT = (255, 130, 0)
_DIM = 0.5  # brightness of a frame where there is no heat
_INK, _FAINT, _PAPER = "#1c2330", "#5b6675", "#ffffff"


def heat_maps(
    path: str | os.PathLike[str],
    frames: Tensor,
    words: Sequence[str],
    blocks: Sequence[tuple[str, Tensor]],
) -> Path:
    """Draw for each block a heading, the frames, and below them a row for each word.

        pixel = (1 - w) * 0.5 * grey(frame) + w * orange,  w = value / greatest value of the word's row

    Every row is scaled by itself: colours compare the places of one word, not words with each other. A row without any
    positive value stays without colour. Patches keep their edges.

    Args:
        path: the .png to write.
        frames: [T, 3, H, W] float in [0, 1], what the encoder saw at each of its token frames; squares fill their tile.
        words: W labels.
        blocks: (heading, values [W, T, rows, cols], not negative), at least one.

    Returns:
        The path.

    Raises:
        ValueError: no block or word, a block of another shape, values that are negative or not finite, frames that are
            none.

    Example:
        >>> plan = torch.rand(2, 4, 4, 4)
        >>> heat_maps("/tmp/pisces-heat.png", torch.rand(4, 3, 32, 32), ["red", "dot"], [("Plan", plan)]).name
        'pisces-heat.png'
    """
    frames = cpu_frames(frames, "heat_maps")
    if not words or not blocks:
        raise ValueError(f"heat_maps: got {len(words)} words and {len(blocks)} blocks, expected at least one of each.")
    for heading, values in blocks:
        if values.dim() != 4 or tuple(values.shape[:2]) != (len(words), len(frames)):
            raise ValueError(
                f"heat_maps: block {heading!r} has shape {tuple(values.shape)}, expected ({len(words)}, {len(frames)}, "
                "rows, cols): words, frames, patches."
            )
        if not bool((values >= 0).all() & torch.isfinite(values).all()):
            raise ValueError(f"heat_maps: block {heading!r} has negative or non-finite values, expected masses.")
    blocks = [(heading, values.detach().cpu().float()) for heading, values in blocks]
    font, bold = typeface(13), typeface(14, bold=True)
    step = TILE + GAP
    block_height = LINE + (1 + len(words)) * step + MARGIN
    longest = max(math.ceil(bold.getlength(heading)) for heading, _ in blocks)
    width = 2 * MARGIN + max(LABEL + len(frames) * step, longest)
    image = Pixels.new("RGB", (width, MARGIN + len(blocks) * block_height), _PAPER)
    draw = ImageDraw.Draw(image)
    shown = [_picture(frame) for frame in frames]
    for k, (heading, values) in enumerate(blocks):
        top = MARGIN + k * block_height
        draw.text((MARGIN, top), heading, fill=_INK, font=bold)
        for row, word in enumerate(["", *words]):
            y = top + LINE + row * step
            label = shorten(word, font, LABEL - 12)
            draw.text((MARGIN, y + TILE // 2), label, fill=_FAINT, font=font, anchor="lm")
            for t, picture in enumerate(shown):
                tile = picture if row == 0 else _heated(picture, values[row - 1], t)
                image.paste(tile, (MARGIN + LABEL + t * step, y))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
    return Path(path)


def _picture(frame: Tensor) -> Pixels.Image:
    """A frame [3, H, W] as a tile."""
    pixels = (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    smaller = max(pixels.shape[:2]) > TILE
    return Pixels.fromarray(pixels).resize(
        (TILE, TILE), Pixels.Resampling.LANCZOS if smaller else Pixels.Resampling.NEAREST
    )


def _heated(picture: Pixels.Image, values: Tensor, t: int) -> Pixels.Image:
    """The tile of frame t under the heat of a word's values [T, rows, cols]."""
    weight = (values[t] / values.max().clamp_min(1e-30)).numpy()
    heat = np.asarray(Pixels.fromarray(weight).resize((TILE, TILE), Pixels.Resampling.NEAREST))[..., None]
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    mixed = (1 - heat) * _DIM * grey + heat * np.array(HOT, dtype=np.float32)
    return Pixels.fromarray(mixed.round().astype(np.uint8))

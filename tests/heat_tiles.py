"""The pictures of a heat map, cut out of its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from pisces.heatmaps import GAP, LABEL, LINE, MARGIN, TILE


def tiles(path: Path, n_words: int, n_frames: int, block: int = 0) -> np.ndarray:
    """Pixels [1 + words, frames, TILE, TILE, 3] of a block."""
    pixels = np.asarray(Image.open(path)).astype(int)
    top = MARGIN + block * (LINE + (1 + n_words) * (TILE + GAP) + MARGIN) + LINE
    left = MARGIN + LABEL
    return np.array(
        [
            [pixels[y : y + TILE, x : x + TILE] for x in (left + t * (TILE + GAP) for t in range(n_frames))]
            for y in (top + row * (TILE + GAP) for row in range(1 + n_words))
        ]
    )

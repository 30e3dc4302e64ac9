"""Videos that are hard to store."""

from __future__ import annotations

import torch
from torch import Tensor


def moving_shapes(n_frames: int = 9, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Saturated shapes with hard edges over noise: what 4:2:0 and a lossy quantiser damage most."""
    generator = torch.Generator().manual_seed(seed)
    frames = 0.15 + 0.03 * torch.randn(n_frames, 3, height, width, generator=generator)
    for t in range(n_frames):
        frames[t, :, 4:12, 2 + t : 10 + t] = torch.tensor([0.9, 0.1, 0.15])[:, None, None]
        frames[t, :, 18:27, 20:28] = torch.tensor([0.1, 0.3, 0.95])[:, None, None]
    return frames.clamp(0, 1)

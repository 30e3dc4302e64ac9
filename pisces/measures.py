"""What can be measured of a video without a reference and without a network: where reward hacking shows first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pisces.encoders.base import check_frames

MEASURES = ("sharpness", "saturation", "motion", "flicker")

# ITU-R BT.601, as the videos that are written here
_LUMA = (0.299, 0.587, 0.114)


@torch.no_grad()
def measure(frames: Tensor) -> dict[str, Tensor]:
    """Sharpness, saturation, motion and flicker of videos.

    With the luma L[t, y, x] and its mean m[t] over a frame:

        sharpness  = mean_t var_yx(Laplacian of L[t])
        saturation = mean over pixels of max_c - min_c
        motion     = mean_t mean_yx |L[t + 1] - L[t] - (m[t + 1] - m[t])|
        flicker    = mean_t |m[t - 1] - 2 m[t] + m[t + 1]| / 2

    so a blink is no motion, a steady fade is no flicker, and a frame that is brighter than both neighbours by d
    counts d.

    Args:
        frames: [B, T, 3, H, W] in [0, 1].

    Returns:
        name -> [B], all at least 0. Motion is 0 below two frames, flicker below three, sharpness below 3 x 3 pixels.

    Raises:
        TypeError, ValueError: frames are no batch of videos in [0, 1].

    Example:
        >>> still = torch.full((1, 4, 3, 8, 8), 0.5)
        >>> {name: value.item() for name, value in measure(still).items()}
        {'sharpness': 0.0, 'saturation': 0.0, 'motion': 0.0, 'flicker': 0.0}
    """
    check_frames(frames, "measure")
    frames = frames.float()
    luma = torch.einsum("btchw,c->bthw", frames, frames.new_tensor(_LUMA))
    level = luma.mean((-2, -1))  # [B, T]
    change = (luma - level[..., None, None]).diff(dim=1)
    bend = level.diff(n=2, dim=1) if level.shape[1] > 2 else level[:, :0]
    return {
        "sharpness": _laplacian(luma).var((-2, -1), correction=0).mean(1) if min(luma.shape[-2:]) > 2 else _zero(luma),
        "saturation": (frames.amax(2) - frames.amin(2)).mean((1, 2, 3)),
        "motion": change.abs().mean((1, 2, 3)) if change.shape[1] else _zero(luma),
        "flicker": bend.abs().mean(1) / 2 if bend.shape[1] else _zero(luma),
    }


def _laplacian(luma: Tensor) -> Tensor:
    """Second differences [B, T, H - 2, W - 2]."""
    kernel = luma.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(luma.flatten(0, 1)[:, None], kernel)[:, 0].unflatten(0, luma.shape[:2])


def _zero(luma: Tensor) -> Tensor:
    return luma.new_zeros(len(luma))

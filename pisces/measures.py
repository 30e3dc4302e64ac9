"""What can be measured of a video without a reference and without a network: where reward hacking shows first."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
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
    return _of_video(_of_frames(frames.float())[0])


@torch.no_grad()
def measure_pictures(pictures: Iterable[Tensor]) -> dict[str, float]:
    """What `measure` says of one video whose pictures come one after the other: two of them are held at a time.

    Args:
        pictures: [3, H, W] in [0, 1], all of one size; at least one.

    Returns:
        name -> number.

    Raises:
        TypeError, ValueError: no picture, or one that is not in [0, 1].

    Example:
        >>> measure_pictures(torch.full((3, 8, 8), level) for level in (0.5, 0.75, 0.5))["flicker"]
        0.25
    """
    found: dict[str, list[Tensor]] = {}
    before: Tensor | None = None
    for picture in pictures:
        check_frames(picture[None, None], "measure_pictures")
        numbers, before = _of_frames(picture[None, None].float(), before)
        for name, values in numbers.items():
            found.setdefault(name, []).append(values)
    if not found:
        raise ValueError("measure_pictures: got no picture, expected at least one. Leave empty videos out.")
    measures = _of_video({name: torch.cat(values, dim=1) for name, values in found.items()})
    return {name: value.item() for name, value in measures.items()}


def _of_frames(frames: Tensor, before: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Numbers of every frame, and what the next frames need of the last one.

    Args:
        frames: [B, T, 3, H, W].
        before: of the frame before them, if there is one.

    Returns:
        Name -> [B, T] (motion [B, T - 1] without a frame before), and luma - level [B, 1, H, W] of the last frame.
    """
    luma = torch.einsum("btchw,c->bthw", frames, frames.new_tensor(_LUMA))
    level = luma.mean((-2, -1))
    centred = luma - level[..., None, None]
    change = (centred if before is None else torch.cat([before, centred], dim=1)).diff(dim=1)
    sharp = min(luma.shape[-2:]) > 2
    numbers = {
        "sharpness": _laplacian(luma).var((-2, -1), correction=0) if sharp else torch.zeros_like(level),
        "saturation": (frames.amax(2) - frames.amin(2)).mean((-2, -1)),
        "motion": change.abs().mean((-2, -1)),
        "level": level,
    }
    return numbers, centred[:, -1:]


def _of_video(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name -> [B] out of the numbers of all frames."""
    level, motion = numbers["level"], numbers["motion"]
    bend = level.diff(n=2, dim=1) if level.shape[1] > 2 else level[:, :0]
    zero = level.new_zeros(len(level))
    return {
        "sharpness": numbers["sharpness"].mean(1),
        "saturation": numbers["saturation"].mean(1),
        "motion": motion.mean(1) if motion.shape[1] else zero,
        "flicker": bend.abs().mean(1) / 2 if bend.shape[1] else zero,
    }


def _laplacian(luma: Tensor) -> Tensor:
    """Second differences [B, T, H - 2, W - 2]."""
    kernel = luma.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    bends = F.conv2d(rearrange(luma, "b t h w -> (b t) 1 h w"), kernel)
    return rearrange(bends, "(b t) 1 h w -> b t h w", b=len(luma))

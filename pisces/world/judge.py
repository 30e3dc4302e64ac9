"""The independent judge of the small world: it measures pixels and learns nothing, so no reward can have taught it.

Semantic score: are the caption's colours, shapes, directions and number of objects in the video? Quality score,
which never reads the caption: is it free of flicker, sharp, smoothly moving, on a clean background, and does every
object have the outline of some shape?
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pisces.world.scene import FRAMES, PALETTE, SHAPES, SIZE, Scenes, coverage, pixel_grid

SEMANTIC = ("color", "shape", "direction", "count")
QUALITY = ("steadiness", "sharpness", "smoothness", "background", "outline")
QUALITY_SHARE = 0.8  # of the total, as VBench weighs quality against semantics

MIN_SATURATION = 0.2  # below it a pixel has no colour
MIN_AREA = 9.0  # pixels, mean over frames, for an object to count as present
MIN_TRAVEL = 2.0  # pixels between the first and the last two frames, for a direction to count
TEMPLATE_RADII = (2.6, 3.2, 3.8, 4.4, 5.0, 5.6, 6.2)


@dataclass(frozen=True)
class _Objects:
    """What each of the six colours does in each video."""

    area: Tensor  # [B, 6, T] pixels
    x: Tensor  # [B, 6, T] centroid
    y: Tensor
    present: Tensor  # [B, 6] bool
    shape: Tensor  # [B, 6] best matching shape
    overlap: Tensor  # [B, 6] its intersection over union
    direction: Tensor  # [B, 6], -1 where it does not move

    def weight(self) -> Tensor:
        """[B, 6] share of each present colour in the coloured area; all zero if nothing is present."""
        area = self.area.mean(-1) * self.present
        return area / area.sum(1, keepdim=True).clamp_min(1e-3)


@torch.no_grad()
def judge(frames: Tensor, scenes: Scenes) -> dict[str, Tensor]:
    """Score videos against the scenes that their captions describe.

    semantic = mean(color, shape, direction, count); quality = mean(steadiness, sharpness, smoothness, background,
    outline); total = 0.8 quality + 0.2 semantic. Every score lies in [0, 1].

    Args:
        frames: [B, FRAMES, 3, SIZE, SIZE] in [0, 1]; values outside are clamped.
        scenes: B scenes.

    Returns:
        name -> [B] for the nine parts and "semantic", "quality", "total".

    Raises:
        ValueError: wrong shape or number of scenes.

    Example:
        >>> from pisces.world.scene import render, sample_scenes
        >>> generator = torch.Generator().manual_seed(0)
        >>> scenes = sample_scenes(8, generator)
        >>> bool(judge(render(scenes, generator), scenes)["semantic"].mean() > 0.98)
        True
    """
    wanted = (len(scenes), FRAMES, 3, SIZE, SIZE)
    if tuple(frames.shape) != wanted:
        raise ValueError(f"judge: frames have shape {tuple(frames.shape)}, expected {wanted}. Pass whole videos.")
    frames = frames.float().clamp(0, 1)
    saturation = frames.amax(2) - frames.amin(2)  # [B, T, S, S]
    objects = _find_objects(frames, saturation)
    scores = _semantic(objects, scenes) | _quality(frames, saturation, objects)
    scores["semantic"] = torch.stack([scores[name] for name in SEMANTIC]).mean(0)
    scores["quality"] = torch.stack([scores[name] for name in QUALITY]).mean(0)
    scores["total"] = QUALITY_SHARE * scores["quality"] + (1 - QUALITY_SHARE) * scores["semantic"]
    return scores


def mean_scores(scores: dict[str, Tensor]) -> dict[str, float]:
    """The mean of every score over the batch."""
    return {name: float(values.mean()) for name, values in scores.items()}


def _find_objects(frames: Tensor, saturation: Tensor) -> _Objects:
    palette = torch.tensor(list(PALETTE.values()))
    palette = F.normalize(palette - palette.mean(1, keepdim=True), dim=1)
    chroma = frames - frames.mean(2, keepdim=True)
    hue = torch.einsum("btchw,kc->bkthw", chroma, palette).argmax(1)  # [B, T, S, S] nearest colour by angle
    softness = torch.where(saturation > MIN_SATURATION, (saturation / 0.8).clamp(0, 1), 0.0)
    masks = torch.stack([softness * (hue == k) for k in range(len(PALETTE))], dim=1)  # [B, 6, T, S, S]

    y, x = pixel_grid()
    area = masks.sum((-1, -2))
    mass = area.clamp_min(1e-3)
    cx, cy = (masks * x).sum((-1, -2)) / mass, (masks * y).sum((-1, -2)) / mass

    aligned = _centred(masks.flatten(0, 2)).view_as(masks).mean(2)  # [B, 6, S, S]
    aligned = aligned / aligned.amax((-1, -2), keepdim=True).clamp_min(1e-3)
    template_shape, templates = _templates()
    shared = torch.minimum(aligned[:, :, None], templates).sum((-1, -2))
    union = torch.maximum(aligned[:, :, None], templates).sum((-1, -2))
    overlap, best = (shared / union).max(-1)

    dx = cx[..., -2:].mean(-1) - cx[..., :2].mean(-1)
    dy = cy[..., -2:].mean(-1) - cy[..., :2].mean(-1)
    sideways = torch.where(dx < 0, 0, 1)
    upright = torch.where(dy < 0, 2, 3)
    direction = torch.where(dx.abs() > dy.abs(), sideways, upright)
    direction = torch.where(torch.maximum(dx.abs(), dy.abs()) > MIN_TRAVEL, direction, -1)
    present = area.mean(-1) > MIN_AREA
    return _Objects(area, cx, cy, present, template_shape[best], overlap, direction)


def _centred(masks: Tensor) -> Tensor:
    """Shift every mask [n, S, S] so that its centroid is the middle of the picture."""
    y, x = pixel_grid()
    mass = masks.sum((1, 2)).clamp_min(1e-4)
    shift_x = (masks * x).sum((1, 2)) / mass - SIZE / 2
    shift_y = (masks * y).sum((1, 2)) / mass - SIZE / 2
    grid = torch.stack([x + shift_x[:, None, None], y + shift_y[:, None, None]], dim=-1) / (SIZE - 1) * 2 - 1
    return F.grid_sample(masks[:, None], grid, align_corners=True)[:, 0]


@cache
def _templates() -> tuple[Tensor, Tensor]:
    """(shape index [n], centred masks [n, S, S]) of every shape in every size."""
    y, x = pixel_grid()
    shape = torch.arange(len(SHAPES)).repeat_interleave(len(TEMPLATE_RADII))
    radius = torch.tensor(TEMPLATE_RADII).repeat(len(SHAPES))
    middle = SIZE / 2
    masks = coverage((x - middle).expand(len(shape), -1, -1), (y - middle).expand(len(shape), -1, -1), radius, shape)
    return shape, _centred(masks)


def _semantic(objects: _Objects, scenes: Scenes) -> dict[str, Tensor]:
    """Each named object's colour must be there, and its shape and direction right; surplus colours cost."""
    needed = scenes.is_object().float()  # [B, 2]
    n = needed.sum(1)

    def of_named(values: Tensor) -> Tensor:
        return values.gather(1, scenes.color)  # [B, 6] -> [B, 2]

    there = of_named(objects.present).float()
    right_shape = (of_named(objects.shape) == scenes.shape) * there
    right_direction = (of_named(objects.direction) == scenes.direction) * there
    area = objects.area.mean(-1)
    named = torch.zeros_like(area).scatter_reduce(1, scenes.color, needed, "amax")
    precision = (area * named).sum(1) / area.sum(1).clamp_min(1e-3)
    return {
        "color": (there * needed).sum(1) / n * precision,
        "shape": (right_shape * needed).sum(1) / n,
        "direction": (right_direction * needed).sum(1) / n,
        "count": (objects.present.sum(1) == scenes.count).float(),
    }


def _quality(frames: Tensor, saturation: Tensor, objects: _Objects) -> dict[str, Tensor]:
    """Caption-free scores; a video without any object has none of an object's virtues."""
    weight = objects.weight()
    something = (weight.sum(1) > 0).float()

    def over_objects(values: Tensor) -> Tensor:
        return (values * weight).sum(1)

    wobble = over_objects(objects.area.std(-1) / objects.area.mean(-1).clamp_min(1e-3))
    brightness = frames.mean((2, 3, 4))
    blinking = (brightness[:, 1:] - brightness[:, :-1]).abs().mean(1)
    steadiness = _penalty(wobble, free=0.04, rate=3) * _penalty(blinking, free=0.006, rate=40)

    soft = ((saturation > 0.12) & (saturation < 0.6)).sum((1, 2, 3))
    full = (saturation >= 0.6).sum((1, 2, 3))
    sharpness = 1 / (soft / full.clamp_min(1) / 0.7).clamp_min(1)

    jitter = over_objects(_line_residual(objects.x) + _line_residual(objects.y))

    empty = (saturation <= 0.12).float()
    n_empty = empty.sum((1, 2, 3)).clamp_min(1)
    grey = frames.mean(2)
    level = (grey * empty).sum((1, 2, 3)) / n_empty
    roughness = (((grey - level[:, None, None, None]) ** 2 * empty).sum((1, 2, 3)) / n_empty).sqrt()
    room = (n_empty / empty[0].numel() / 0.8).clamp(max=1)
    return {
        "steadiness": something * steadiness,
        "sharpness": something * sharpness,
        "smoothness": something * _penalty(jitter, free=0.15, rate=1.5),
        "background": _penalty(roughness, free=0.02, rate=12) * room,
        "outline": something * (over_objects(objects.overlap) / 0.88).clamp(max=1),
    }


def _penalty(fault: Tensor, *, free: float, rate: float) -> Tensor:
    """exp(-rate * what exceeds `free`): real videos stay below `free`."""
    return torch.exp(-rate * (fault - free).clamp_min(0))


def _line_residual(position: Tensor) -> Tensor:
    """Root mean square distance, in pixels, of a track [..., T] from the straight line fitted to it."""
    time = torch.arange(position.shape[-1]) - (position.shape[-1] - 1) / 2
    slope = (position * time).sum(-1, keepdim=True) / (time * time).sum()
    residual = position - position.mean(-1, keepdim=True) - slope * time
    return residual.square().mean(-1).sqrt()

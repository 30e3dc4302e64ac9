"""What the judge says of videos of which the verdict is known: a judge that rewards noise would flatter any result."""

from __future__ import annotations

import torch

from pisces.world.judge import judge, mean_scores
from pisces.world.scene import corrupt_frames, flip_attribute, render, sample_scenes


def calibrate_judge(seed: int, *, n: int = 96, two_objects: float = 0.0) -> dict[str, dict[str, float]]:
    """The judge's mean scores on real, damaged and meaningless videos and on wrong captions.

    Args:
        seed: of the videos.
        n: videos a case.
        two_objects: probability of a second object.

    Returns:
        Case -> scores of `judge`.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(n, generator, two_objects=two_objects)
    frames = render(scenes, generator)
    others = sample_scenes(n, generator, two_objects=two_objects)
    cases = {
        "real": (frames, scenes),
        "damaged": (corrupt_frames(frames, generator, 0.4), scenes),
        "one attribute wrong": (frames, flip_attribute(scenes, generator)),
        "random captions": (frames, others),
        "frozen": (frames[:, :1].expand_as(frames), scenes),
        "backwards": (frames.flip(1), scenes),
        "uniform noise": (torch.rand(frames.shape, generator=generator), scenes),
        "grey noise": (0.5 + 0.1 * torch.randn(frames.shape, generator=generator), scenes),
        "blank": (torch.full_like(frames, 0.15), scenes),
    }
    return {name: mean_scores(judge(video, about)) for name, (video, about) in cases.items()}

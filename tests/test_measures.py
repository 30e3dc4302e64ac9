"""The no-reference measures: equal to their formulas, and blind to what they are not about."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pisces.measures import MEASURES, measure, measure_pictures


def clips(seed: int, *, n: int = 3, n_frames: int = 6, height: int = 11, width: int = 14) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.2 + 0.6 * torch.rand(n, n_frames, 3, height, width, generator=generator)


def by_hand(video: np.ndarray) -> dict[str, float]:
    """The formulas of one video [T, 3, H, W] in float64, pixel by pixel."""
    luma = 0.299 * video[:, 0] + 0.587 * video[:, 1] + 0.114 * video[:, 2]
    n_frames, height, width = luma.shape
    variances, levels = [], luma.mean((1, 2))
    for picture in luma:
        responses = [
            picture[y - 1, x] + picture[y + 1, x] + picture[y, x - 1] + picture[y, x + 1] - 4 * picture[y, x]
            for y in range(1, height - 1)
            for x in range(1, width - 1)
        ]
        variances.append(np.var(responses))
    moved = [np.abs(luma[t + 1] - luma[t] - (levels[t + 1] - levels[t])).mean() for t in range(n_frames - 1)]
    bends = [abs(levels[t - 1] - 2 * levels[t] + levels[t + 1]) / 2 for t in range(1, n_frames - 1)]
    return {
        "sharpness": float(np.mean(variances)),
        "saturation": float((video.max(1) - video.min(1)).mean()),
        "motion": float(np.mean(moved)),
        "flicker": float(np.mean(bends)),
    }


def test_equal_to_the_formulas(seed: int) -> None:
    frames = clips(seed)
    found = measure(frames)
    assert tuple(found) == MEASURES
    for i, video in enumerate(frames.double().numpy()):
        for name, value in by_hand(video).items():
            assert found[name][i].item() == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("n_frames", [1, 2, 3, 7])
def test_pictures_one_by_one_have_the_measures_of_the_video(n_frames: int, seed: int) -> None:
    (video,) = clips(seed, n=1, n_frames=n_frames)
    found = measure_pictures(iter(video))
    assert tuple(found) == MEASURES
    for name, values in measure(video[None]).items():
        assert found[name] == pytest.approx(values.item(), rel=1e-5, abs=1e-9), name


def test_no_picture_and_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="got no picture"):
        measure_pictures([])
    with pytest.raises(TypeError, match="Divide uint8 by 255"):
        measure_pictures([torch.zeros(3, 8, 8, dtype=torch.uint8)])


def test_a_video_counts_for_itself(seed: int) -> None:
    frames = clips(seed)
    for name, values in measure(frames).items():
        for i in range(len(frames)):
            torch.testing.assert_close(measure(frames[i : i + 1])[name][0], values[i], rtol=1e-5, atol=1e-7)
    broken = frames.clone()
    broken[1] = torch.nan
    for values in measure(broken).values():
        assert values.isnan().tolist() == [False, True, False]


def test_a_blink_is_no_motion_and_a_fade_no_flicker(seed: int) -> None:
    still = clips(seed, n_frames=1).expand(-1, 6, -1, -1, -1)
    ramp = torch.linspace(0, 0.2, 6)[:, None, None, None]
    blink = torch.tensor([0.0, 0.1, 0.0, 0.1, 0.0, 0.1])[:, None, None, None]
    at_rest, fading, blinking = measure(still), measure(still + ramp), measure(still + blink)
    for found in (at_rest, fading, blinking):
        assert found["motion"].max() < 1e-6
        torch.testing.assert_close(found["sharpness"], at_rest["sharpness"], rtol=1e-4, atol=0)
        torch.testing.assert_close(found["saturation"], at_rest["saturation"], rtol=1e-4, atol=0)
    assert fading["flicker"].max() < 1e-6
    torch.testing.assert_close(blinking["flicker"], torch.full((3,), 0.1), rtol=1e-4, atol=0)
    # Negative control: what moves is motion.
    moving = torch.stack([still[:, 0].roll(t, dims=-1) for t in range(6)], dim=1)
    assert measure(moving)["motion"].min() > 0.05


def test_blur_is_less_sharp_and_grey_less_saturated(seed: int) -> None:
    frames = clips(seed)
    blurred = torch.nn.functional.avg_pool2d(frames.flatten(0, 1), 3, 1, 1, count_include_pad=False)
    assert (measure(blurred.view_as(frames))["sharpness"] < 0.1 * measure(frames)["sharpness"]).all()
    grey = frames.mean(2, keepdim=True).expand_as(frames)
    assert measure(grey)["saturation"].max() < 1e-6


@pytest.mark.parametrize(("n_frames", "side"), [(1, 8), (2, 8), (1, 1), (3, 2)])
def test_short_and_small_videos_have_no_value_that_they_cannot_have(n_frames: int, side: int, seed: int) -> None:
    found = measure(clips(seed, n_frames=n_frames, height=side, width=side))
    assert all(values.shape == (3,) and values.isfinite().all() for values in found.values())
    assert (found["motion"].max() == 0) == (n_frames < 2 or side == 1)
    assert (found["flicker"].max() == 0) == (n_frames < 3)
    assert (found["sharpness"].max() == 0) == (side < 3)


def test_bytes_are_refused() -> None:
    with pytest.raises(TypeError, match="Divide uint8 by 255"):
        measure(torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"reach from 0 to 2"):
        measure(torch.full((1, 2, 3, 8, 8), 2.0).index_fill(1, torch.tensor([0]), 0.0))

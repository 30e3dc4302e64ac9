"""The small world: captions are true by construction, the judge tells good from bad, files round-trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pisces.data import VideoFolder
from pisces.world.calibration import calibrate_judge
from pisces.world.dataset import write_dataset
from pisces.world.judge import QUALITY, SEMANTIC, judge, mean_scores
from pisces.world.scene import (
    COLORS,
    DIRECTIONS,
    FILLERS,
    FRAMES,
    SHAPES,
    SIZE,
    VOCABULARY,
    Scenes,
    captions,
    corrupt_frames,
    corrupt_scenes,
    flip_attribute,
    is_held_out,
    parse_caption,
    render,
    sample_scenes,
)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("two_objects", [0.0, 0.4, 1.0])
def test_caption_and_scene_are_inverse(seed: int, two_objects: float) -> None:
    generator = generator_of(seed)
    scenes = sample_scenes(64, generator, two_objects=two_objects)
    parsed = Scenes.cat([parse_caption(text) for text in captions(scenes, generator, fillers=0.7)])
    there = scenes.is_object()
    assert torch.equal(parsed.count, scenes.count)
    for name in ("color", "shape", "direction"):
        assert torch.equal(getattr(parsed, name)[there], getattr(scenes, name)[there])


def test_every_caption_word_is_in_the_vocabulary(seed: int) -> None:
    generator = generator_of(seed)
    texts = captions(sample_scenes(256, generator, two_objects=0.5), generator, fillers=1.0)
    assert {word for text in texts for word in text.split()} <= set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)


@pytest.mark.parametrize("split", ["train", "held_out", None])
def test_splits_partition_the_combinations(seed: int, split: str | None) -> None:
    scenes = sample_scenes(2000, generator_of(seed), two_objects=1.0, split=split)
    held = is_held_out(scenes.color, scenes.shape, scenes.direction)
    assert (scenes.color[:, 0] != scenes.color[:, 1]).all()
    if split == "train":
        assert not held.any()
    elif split == "held_out":
        assert held.all()
    else:
        assert 0.1 < float(held.float().mean()) < 0.35
    n = len(COLORS) * len(SHAPES) * len(DIRECTIONS)
    everything = torch.cartesian_prod(*(torch.arange(k) for k in (len(COLORS), len(SHAPES), len(DIRECTIONS))))
    assert 0 < int(is_held_out(*everything.T).sum()) < n / 3


def test_same_generator_state_same_world(seed: int) -> None:
    first, second = (render(sample_scenes(5, g), g) for g in (generator_of(seed), generator_of(seed)))
    assert torch.equal(first, second)
    assert first.shape == (5, FRAMES, 3, SIZE, SIZE)
    assert first.min() >= 0
    assert first.max() <= 1


def test_flip_changes_exactly_one_attribute_of_one_object(seed: int) -> None:
    scenes = sample_scenes(128, generator_of(seed), two_objects=0.5)
    flipped = flip_attribute(scenes, generator_of(seed + 1))
    changed = torch.stack(
        [getattr(flipped, name) != getattr(scenes, name) for name in ("color", "shape", "direction")], dim=-1
    )
    assert torch.equal(changed.sum((1, 2)), torch.ones(128, dtype=torch.long))
    assert not changed[~scenes.is_object()].any()


def test_corruptions_with_probability_zero_change_nothing(seed: int) -> None:
    generator = generator_of(seed)
    scenes = sample_scenes(8, generator)
    frames = render(scenes, generator)
    assert torch.equal(corrupt_frames(frames, generator, 0.0), frames)
    assert torch.equal(corrupt_scenes(scenes, generator, 0.0).color, scenes.color)


def test_judge_is_calibrated(seed: int) -> None:
    scores = calibrate_judge(seed)
    assert scores["real"]["semantic"] > 0.98
    assert scores["real"]["quality"] > 0.97
    for name in ("uniform noise", "grey noise"):
        assert scores[name]["semantic"] < 0.25
        assert scores[name]["quality"] < 0.45
    assert scores["blank"]["semantic"] == 0
    assert scores["blank"]["quality"] <= 0.2 + 1e-6
    assert 0.4 < scores["damaged"]["quality"] < 0.8
    assert scores["damaged"]["semantic"] > 0.7
    assert scores["random captions"]["semantic"] < 0.5
    assert scores["random captions"]["quality"] == pytest.approx(scores["real"]["quality"])
    for name in ("frozen", "backwards"):
        assert scores[name]["direction"] < 0.02
        assert scores[name]["shape"] > 0.95
    assert 0.4 < scores["one attribute wrong"]["semantic"] < 0.8


def test_judge_is_calibrated_for_two_objects(seed: int) -> None:
    scores = calibrate_judge(seed, two_objects=1.0)
    assert scores["real"]["semantic"] > 0.97
    assert scores["real"]["quality"] > 0.93
    assert scores["uniform noise"]["semantic"] < 0.3


def test_judge_scores_each_video_by_itself(seed: int) -> None:
    generator = generator_of(seed)
    scenes = sample_scenes(12, generator, two_objects=0.5)
    frames = corrupt_frames(render(scenes, generator), generator, 0.5)
    together = judge(frames, scenes)
    order = torch.randperm(12, generator=generator)
    shuffled = judge(frames[order], scenes[order])
    for name in (*SEMANTIC, *QUALITY, "semantic", "quality", "total"):
        assert torch.allclose(together[name][order], shuffled[name], atol=1e-6)
        assert ((together[name] >= 0) & (together[name] <= 1)).all()


def test_judge_total_is_the_documented_mean(seed: int) -> None:
    generator = generator_of(seed)
    scenes = sample_scenes(8, generator)
    scores = judge(corrupt_frames(render(scenes, generator), generator, 0.5), scenes)
    semantic = sum(scores[name] for name in SEMANTIC) / len(SEMANTIC)
    quality = sum(scores[name] for name in QUALITY) / len(QUALITY)
    assert torch.allclose(scores["total"], 0.8 * quality + 0.2 * semantic)


def test_folder_of_mp4_reads_back_as_it_was_drawn(tmp_path: Path) -> None:
    folder = VideoFolder(write_dataset(tmp_path / "videos", 24, seed=3, two_objects=0.3))
    frames = torch.stack([folder[i][0] for i in range(len(folder))])
    scenes = Scenes.cat([parse_caption(text) for text in folder.captions])
    scores = mean_scores(judge(frames, scenes))
    assert len(folder) == 24
    assert scores["semantic"] > 0.97
    assert scores["quality"] > 0.95
    assert any(word in FILLERS for text in folder.captions for word in text.split())


@pytest.mark.parametrize("arguments", [{"n": 0}, {"n": 2, "two_objects": 1.5}, {"n": 2, "split": "test"}])
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict) -> None:
    with pytest.raises(ValueError, match="sample_scenes"):
        write_dataset(tmp_path, **arguments)


@pytest.mark.parametrize("caption", ["", "a red square", "a red blue square moves up", "a dog"])
def test_captions_of_another_world_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="parse_caption"):
        parse_caption(caption)


def test_judge_refuses_other_shapes() -> None:
    scenes = sample_scenes(2, generator_of(0))
    with pytest.raises(ValueError, match=r"judge: frames have shape \(2, 4, 3, 32, 32\)"):
        judge(torch.zeros(2, 4, 3, 32, 32), scenes)

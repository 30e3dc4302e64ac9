"""What the small encoder knows, measured on fresh videos: attributes, retrieval, the modality gap and its rankings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pisces.encoders import TextFeatures, VideoFeatures, VideoTextEncoder
from pisces.ot_map.metrics import spearman
from pisces.world import scene
from pisces.world.judge import judge
from pisces.world.scene import ATTRIBUTE_VALUES, COLORS, DIRECTIONS, SHAPES, Scenes, Split


@torch.no_grad()
def encode(encoder: VideoTextEncoder, frames: Tensor, prompts: list[str]) -> tuple[TextFeatures, VideoFeatures]:
    """Both sides in parts of 128 videos."""
    parts = [encoder.encode_video(chunk) for chunk in frames.split(128)]
    tokens = torch.cat([part.tokens for part in parts])
    embedding = torch.cat([part.embedding for part in parts])
    video = VideoFeatures(tokens, embedding, parts[0].frame_index, parts[0].positions)
    return encoder.encode_text(prompts), video


def all_captions() -> list[str]:
    """The 72 captions of one object, in the order (color * 3 + shape) * 4 + direction."""
    return [f"a {c} {s} moves {d}" for c in COLORS for s in SHAPES for d in DIRECTIONS]


@torch.no_grad()
def attribute_accuracy(
    encoder: VideoTextEncoder, scenes: Scenes, frames: Tensor, *, seed: int, fillers: float = 0.0
) -> dict[str, float]:
    """How often the true caption beats one in which one attribute is changed, by match head and by embedding.

    Chance is 0.5. Keys: color, shape, direction (match head) and the same with "embedding_" before them.
    """
    scores: dict[str, float] = {}

    def generator() -> torch.Generator:  # the same fillers in the true and in the changed caption
        return torch.Generator().manual_seed(seed)

    text, video = encode(encoder, frames, scene.captions(scenes, generator(), fillers=fillers))
    match, cosine = encoder.match(text, video), (text.embedding * video.embedding).sum(-1)
    for name in ATTRIBUTE_VALUES:
        flipped = scene.flip_attribute(scenes, torch.Generator().manual_seed(seed + 1), name)
        wrong = encoder.encode_text(scene.captions(flipped, generator(), fillers=fillers))
        scores[name] = _mean(match > encoder.match(wrong, video))
        scores[f"embedding_{name}"] = _mean(cosine > (wrong.embedding * video.embedding).sum(-1))
    return scores


@torch.no_grad()
def encoder_scores(encoder: VideoTextEncoder, *, n: int = 512, seed: int = 77) -> dict[str, Any]:
    """All scores of an encoder on fresh one-object videos, and attributes on two-object ones.

    Args:
        encoder: what to score.
        n: videos in each measurement; for the ranking, captions times 8.
        seed: of the videos; training never uses it.

    Returns:
        attributes (all / held_out / fillers / damaged / two_objects: accuracy of the true caption against one changed
        attribute), r_at_1 (a video's caption among 72, by embedding and by match head; a caption's video among those of
        the 72 captions), gap (|mean text - mean video|), cosine (mean of true pairs), ranking (see `ranking_scores`).
    """
    generator = torch.Generator().manual_seed(seed)
    attributes = {}
    for name in ("all", "held_out", "fillers", "damaged", "two_objects"):
        split: Split | None = "held_out" if name == "held_out" else None
        two = 1.0 if name == "two_objects" else 0.0
        scenes = scene.sample_scenes(n, generator, two_objects=two, split=split)
        frames = scene.render(scenes, generator)
        if name == "damaged":
            frames = scene.corrupt_frames(frames, generator, 0.5)
        fillers = 1.0 if name == "fillers" else 0.0
        attributes[name] = attribute_accuracy(encoder, scenes, frames, seed=seed, fillers=fillers)

    key = torch.arange(72).repeat(max(1, n // 72))
    scenes = Scenes(torch.ones_like(key), *(x[:, None].expand(-1, 2) for x in (key // 12, key // 4 % 3, key % 4)))
    text, video = encode(encoder, scene.render(scenes, generator), all_captions())
    similarity = video.embedding @ text.embedding.T  # [n, 72]
    columns = []
    for i in range(72):
        rows = torch.full((len(key),), i)
        same_text = TextFeatures(text.tokens[rows], text.embedding[rows], text.mask[rows], text.lexical[rows])
        columns.append(encoder.match(same_text, video))
    match = torch.stack(columns, dim=1)
    r_at_1 = {
        "embedding": _mean(similarity.argmax(1) == key),
        "match": _mean(match.argmax(1) == key),
        # one video of each caption at a time, so that chance is 1 / 72 in both directions
        "embedding_text_to_video": _mean(similarity.unflatten(0, (-1, 72)).argmax(1) == torch.arange(72)),
    }
    return {
        "attributes": attributes,
        "r_at_1": r_at_1,
        "gap": round(float((text.embedding.mean(0) - video.embedding.mean(0)).norm()), 4),
        "cosine": round(float(similarity.gather(1, key[:, None]).mean()), 4),
        "ranking": ranking_scores(encoder, n=max(8, n // 8), seed=seed + 1),
    }


@torch.no_grad()
def ranking_scores(encoder: VideoTextEncoder, *, n: int = 64, seed: int = 78) -> dict[str, dict[str, float]]:
    """Does the encoder order videos of one caption as the judge does? Mean within-caption Spearman correlation.

    Every caption has ten videos: two each that are clean, mildly damaged, heavily damaged, wrong (attributes redrawn
    with probability 0.6), and wrong and damaged.

    Returns:
        {"embedding" | "match": {"semantic" | "quality" | "total": correlation}}; captions on which the judge gives ten
        equal marks do not count.
    """
    generator = torch.Generator().manual_seed(seed)
    scenes = scene.sample_scenes(n, generator)
    videos = []
    for damage, lie in ((0.0, 0.0), (0.3, 0.0), (0.8, 0.0), (0.0, 0.6), (0.5, 0.6)):
        for _ in range(2):
            shown = scene.corrupt_scenes(scenes, generator, lie) if lie else scenes
            frames = scene.render(shown, generator)
            videos.append(scene.corrupt_frames(frames, generator, damage) if damage else frames)
    pool = torch.stack(videos, dim=1)  # [n, 10, T, 3, S, S]
    rows = torch.arange(n).repeat_interleave(pool.shape[1])
    marks = judge(pool.flatten(0, 1), scenes[rows])
    prompts = scene.captions(scenes)
    text, video = encode(encoder, pool.flatten(0, 1), [prompts[i] for i in rows])
    rewards = {
        "embedding": (text.embedding * video.embedding).sum(-1),
        "match": encoder.match(text, video),
    }
    return {
        name: {
            mark: within_group_spearman(reward.view(n, -1), marks[mark].view(n, -1))
            for mark in ("semantic", "quality", "total")
        }
        for name, reward in rewards.items()
    }


def within_group_spearman(x: Tensor, y: Tensor) -> float:
    """Mean over the rows of x, y [G, K] of Spearman's rank correlation; rows with a constant side do not count."""
    values = [spearman(a, b) for a, b in zip(x, y, strict=True)]
    values = [value for value in values if not math.isnan(value)]
    return round(sum(values) / len(values), 4) if values else math.nan


def _mean(hits: Tensor) -> float:
    return round(float(hits.float().mean()), 4)

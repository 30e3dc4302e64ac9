"""The scale of the rewards: their mean and spread over videos of the base model, found once a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pisces.pipelines.base import PipelineAdapter
from pisces.processes import Processes
from pisces.rewards import CompositeReward, Reward, Standardized
from pisces.state import step_generator, write_text

REFERENCE_FILE = "reference.json"

# Apart from the noise of the steps, whose generators are seeded by (seed, step, part).
_NOISE_TAG = 0x5CA1E


class ReferenceVideos:
    """Videos of the model as it is now, in parts that are sampled when they are asked for.

    Args:
        adapter: the pipeline.
        prompts: of the videos.
        batch_size: videos of a part.
        steps: of the sampler.
        size: n_frames, height and width; what is missing is the pipeline directory's default.
        seed: of the noise.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        prompts: list[str],
        *,
        batch_size: int,
        steps: int,
        size: Mapping[str, int | None],
        seed: int,
    ) -> None:
        self.adapter = adapter
        self.parts = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
        self.steps = steps
        self.size = dict(size)
        self.seed = seed

    def __call__(self, numbers: range) -> Iterator[tuple[Tensor, list[str]]]:
        """Frames [B, T, C, H, W] and prompts of some of the parts; they do not depend on which others are wanted."""
        generator = step_generator(self.seed, _NOISE_TAG, 0, 0)
        for number, part in enumerate(self.parts):
            noise = self.adapter.noise(len(part), generator=generator, **self.size)
            if number in numbers:
                latents = self.adapter.sample(part, steps=self.steps, noise=noise)
                with torch.no_grad():
                    frames = self.adapter.decode(latents)
                del latents, noise
                yield frames, part
                del frames


@torch.no_grad()
def standardized(
    rewards: Mapping[str, Reward], videos: ReferenceVideos, *, file: Path, identity: Mapping[str, Any]
) -> dict[str, Reward]:
    """The rewards with mean 0 and standard deviation 1 over reference videos.

    The videos are made part by part (64 of 81 x 480 x 832 would take 25 GB), divided among the processes, and only
    once: a file keeps the scale for the runs that go on from this one.

    Args:
        rewards: name -> reward.
        videos: of the base model.
        file: receives the scale; what it already says of the same identity is taken over.
        identity: all that the scale depends on, as JSON has it.
    """
    processes = Processes()
    key = json.dumps(identity, sort_keys=True)
    # What the first process says: another may look when the file has just been written.
    scale = processes.gather(_read(file).get(key))[0]
    if scale is None:
        scale = _measure(CompositeReward(rewards, dict.fromkeys(rewards, 1.0)), videos, processes)
        if processes.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(_read(file) | {key: scale}, indent=1) + "\n")
    return {name: Standardized(reward, *scale[name]) for name, reward in rewards.items()}


def _measure(rewards: CompositeReward, videos: ReferenceVideos, processes: Processes) -> dict[str, tuple[float, float]]:
    """Name -> (mean, standard deviation)."""
    mine = processes.share(len(videos.parts))
    terms: dict[int, dict[str, Tensor]] = {}
    parts = tqdm(videos(mine), desc="reference videos", total=len(mine), unit="part", disable=None, leave=False)
    for number, (frames, prompts) in zip(mine, parts, strict=True):
        terms[number] = {name: value.cpu() for name, value in rewards.terms(frames, prompts).items()}
        del frames
    found = {number: values for part in processes.gather(terms) for number, values in part.items()}
    scale = {}
    for name, reward in rewards.rewards.items():
        whole = Standardized.over(reward, torch.cat([found[number][name] for number in range(len(videos.parts))]))
        scale[name] = (float(whole.mean), float(whole.std))
    return scale


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}

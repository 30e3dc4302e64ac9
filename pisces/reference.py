"""The scale of the rewards: their mean and spread over videos of the base model, found once a run."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pisces.pipelines.base import PipelineAdapter
from pisces.processes import Processes
from pisces.rewards import CompositeReward, Reward, Standardized
from pisces.state import save_tensors, step_generator, write_text
from pisces.tensor_files import read_safetensors
from pisces.video import atomic_path

logger = logging.getLogger(__name__)

REFERENCE_FILE = "reference.json"
PARTS_FOLDER = "reference-parts"

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

    def __call__(self, numbers: Container[int]) -> Iterator[tuple[Tensor, list[str]]]:
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
    once: a file keeps the scale for the runs that go on from this one. Until all are made, a folder beside it keeps the
    rewards of each part, so that a run that is killed goes on from there.

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
        parts = file.parent / PARTS_FOLDER / hashlib.sha256(key.encode()).hexdigest()[:16]
        scale = _measure(CompositeReward(rewards, dict.fromkeys(rewards, 1.0)), videos, processes, parts)
        if processes.is_main:
            write_text(file, json.dumps(_read(file) | {key: scale}, indent=1) + "\n")
            shutil.rmtree(parts)
            if not any(parts.parent.iterdir()):
                parts.parent.rmdir()
    return {name: Standardized(reward, *scale[name]) for name, reward in rewards.items()}


def _measure(
    rewards: CompositeReward, videos: ReferenceVideos, processes: Processes, folder: Path
) -> dict[str, tuple[float, float]]:
    """Name -> (mean, standard deviation); what the folder has of an earlier call is not made again."""
    # What the first process says, as above: the missing parts are divided by one list.
    found = processes.gather(_read_parts(folder))[0]
    missing = [number for number in range(len(videos.parts)) if number not in found]
    mine = [missing[place] for place in processes.share(len(missing))]
    terms: dict[int, dict[str, Tensor]] = {}
    parts = tqdm(videos(mine), desc="reference videos", total=len(mine), unit="part", disable=None, leave=False)
    for number, (frames, prompts) in zip(mine, parts, strict=True):
        terms[number] = {name: value.cpu().clone() for name, value in rewards.terms(frames, prompts).items()}
        if all(value.isfinite().all() for value in terms[number].values()):  # others may be mended by the next start
            with atomic_path(folder / f"{number}.safetensors") as temporary:
                save_tensors(temporary, terms[number])
        del frames
    found |= {number: values for part in processes.gather(terms) for number, values in part.items()}
    scale = {}
    for name, reward in rewards.rewards.items():
        whole = Standardized.over(reward, torch.cat([found[number][name] for number in range(len(videos.parts))]))
        scale[name] = (float(whole.mean), float(whole.std))
    return scale


def _read_parts(folder: Path) -> dict[int, dict[str, Tensor]]:
    """The rewards of the parts that are made, by number."""
    found = {}
    for path in folder.glob("*.safetensors"):
        try:
            found[int(path.stem)], _ = read_safetensors(path, "reference")
        except ValueError as error:  # a machine that lost power: the part is made again
            logger.warning("%s; these videos are made again", error)
    return found


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}

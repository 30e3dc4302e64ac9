"""Validation while training: the same prompts from the same noise, scored, measured and kept as videos."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pisces.algorithms.base import RewardModule
from pisces.data import read_video, write_metadata, write_video
from pisces.measures import measure
from pisces.pipelines.base import PipelineAdapter
from pisces.processes import Processes
from pisces.report import contact_sheet
from pisces.run_log import Record
from pisces.state import step_generator

FPS = 8
SHOWN = 8  # videos on a contact sheet
SHEET_FRAMES = 5  # of each

# Apart from the noise of the steps, whose generators are seeded by (seed, step, part).
_NOISE_TAG = 0x5EED


def validation_dir(output: Path, step: int) -> Path:
    """Where the videos of a validation are."""
    return output / "validation" / f"step-{step:08d}"


class Validation:
    """Samples fixed prompts from fixed noise, so that two steps of a run differ in the model alone.

    Every video is sampled, decoded, scored and written by itself: it takes the memory of one.

    Args:
        adapter: the pipeline that is trained.
        prompts: what the videos are of.
        rewards: those trained on, for the log; None if there are none.
        watched: those only looked at; None if there are none.
        every: optimizer steps between validations.
        steps: of the sampler; None is the pipeline directory's.
        guidance: classifier-free guidance; 1 is off.
        size: n_frames, height and width; what is missing is the pipeline directory's default.
        seed: of the noise.

    Raises:
        ValueError: if there are no prompts, or ``every`` is below 1.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        prompts: Sequence[str],
        *,
        rewards: RewardModule | None = None,
        watched: RewardModule | None = None,
        every: int = 64,
        steps: int | None = None,
        guidance: float = 1.0,
        size: dict[str, int | None] | None = None,
        seed: int = 0,
    ) -> None:
        if not prompts or every < 1:
            raise ValueError(f"Validation: got {len(prompts)} prompts every {every} steps, expected at least 1 each.")
        self.adapter = adapter
        self.prompts = list(prompts)
        self.rewards = rewards
        self.watched = watched
        self.every = every
        self.steps = adapter.default("steps", steps)
        self.guidance = guidance
        self.size = dict(size or {})
        self.seed = seed
        self.processes = Processes()

    def due(self, step: int, last: int) -> bool:
        """Whether a step has a validation; step 0 and the last one always have."""
        return step % self.every == 0 or step == last

    @torch.no_grad()
    def run(self, step: int, output: Path, *, stop: Callable[[], bool] = lambda: False) -> Record | None:
        """Make and score the videos of a step.

        Args:
            step: optimizer steps taken.
            output: the run's folder; receives ``validation/step-.../`` with mp4 files, captions and a contact sheet
                that shows the base's videos above these.
            stop: asked before each video; once it says so, in whichever process, the validation is given up.

        Returns:
            step, the mean of every reward (``reward/NAME``; ``reward`` is their weighted sum), of every watched one
            (``watched/NAME``, ``watched``, and its standard deviation ``watched_std``), of every measure, and seconds;
            None in the place of what is not finite. None as a whole if it was given up.
        """
        started = time.perf_counter()
        folder = validation_dir(output, step)
        rate = self.adapter.defaults.get("fps", FPS)
        mine: dict[int, dict[str, float]] = {}
        for number in self.processes.share(len(self.prompts)):
            if stop():
                break
            frames = self._video(number)
            mine[number] = {name: float(value) for name, value in self._scores(frames, number).items()}
            # A file has no NaN: broken pixels are black in it, and its numbers in the record are null.
            shown = frames[0].cpu().nan_to_num(nan=0.0)
            write_video(folder / f"{number:04d}.mp4", shown, fps=rate, lossless=False)
        parts = self.processes.gather((mine, stop()))
        if any(given_up for _, given_up in parts):
            return None
        scores = {number: values for part, _ in parts for number, values in part.items()}
        if self.processes.is_main:
            rows = [{"file_name": f"{n:04d}.mp4", "text": prompt} for n, prompt in enumerate(self.prompts)]
            write_metadata(folder, rows)
            self._sheet(step, output)
        # in the order of the prompts: their mean is then the same for any number of processes
        columns = {name: [scores[n][name] for n in range(len(self.prompts))] for name in scores[0]}
        numbers = {name: statistics.fmean(values) for name, values in columns.items()}
        if "watched" in columns:
            numbers["watched_std"] = float(torch.tensor(columns["watched"]).std(correction=0))
        numbers["seconds"] = time.perf_counter() - started
        return {"step": step} | {name: value if math.isfinite(value) else None for name, value in numbers.items()}

    def _video(self, number: int) -> Tensor:
        """Frames [1, T, C, H, W] of one prompt."""
        noise = self.adapter.noise(1, generator=step_generator(self.seed, number, 0, _NOISE_TAG), **self.size)
        latents = self.adapter.sample(
            [self.prompts[number]], steps=self.steps, guidance_scale=self.guidance, noise=noise
        )
        return self.adapter.decode(latents)

    def _scores(self, frames: Tensor, number: int) -> dict[str, Tensor]:
        """Every number of one video."""
        scores: dict[str, Tensor] = {}
        for prefix, rewards in (("reward", self.rewards), ("watched", self.watched)):
            if rewards is not None:
                terms = rewards.terms(frames, [self.prompts[number]])
                scores |= {f"{prefix}/{name}": value for name, value in terms.items()}
                scores[prefix] = torch.stack([rewards.weights[name] * value for name, value in terms.items()]).sum(0)
        return scores | measure(frames)

    def _sheet(self, step: int, output: Path) -> None:
        """The base's videos above those of this step, both as they were written."""
        folders = {"before": validation_dir(output, 0), f"step {step}": validation_dir(output, step)}
        if step == 0:
            del folders["before"]
        prompts = self.prompts[:SHOWN]
        rows = []
        for label, folder in folders.items():
            files = [folder / f"{number:04d}.mp4" for number in range(len(prompts))]
            if all(file.is_file() for file in files):
                rows.append((label, torch.stack([read_video(file, n_frames=SHEET_FRAMES) for file in files])))
        contact_sheet(validation_dir(output, step) / "contact-sheet.png", rows, prompts)

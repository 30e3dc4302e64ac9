"""Validation changes nothing of the training, sees what it should, and its guards end a run that goes wrong."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_wan import PROMPTS, build_tiny_wan
from torch import Tensor
from toy_rewards import ColorReward

from pisces.algorithms import Batch, Draft, FrozenBase
from pisces.batches import PromptBatches
from pisces.config import (
    DraftConfig,
    GuardsConfig,
    LoraConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
    ValidationConfig,
)
from pisces.data import VideoFolder
from pisces.guards import alarms, alarms_in_a_row
from pisces.measures import MEASURES
from pisces.pipelines import WanAdapter, prepare
from pisces.run_folder import clear
from pisces.run_log import RunLog
from pisces.trainer import Interrupted, Trainer
from pisces.validation import Validation

LORA = LoraConfig(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan", layers=1, shift_terminal=0.2)


class Countdown:
    """A watched reward that falls by one each time that a whole validation has asked for it."""

    def __init__(self, n_prompts: int, *values: float) -> None:
        self.weights = {"luck": 2.0}
        self.n_prompts, self.values, self.calls = n_prompts, values, 0

    def terms(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        validation, number = divmod(self.calls, self.n_prompts)
        self.calls += 1
        return {"luck": torch.full((len(frames),), self.values[validation] + 0.1 * number)}


def make(
    wan_dir: Path,
    output: Path,
    *,
    steps: int = 4,
    validated: bool = True,
    watched: Any = None,
    guards: GuardsConfig | None = None,
    trackers: tuple[str, ...] = (),
) -> Trainer:
    adapter = WanAdapter.from_pretrained(wan_dir)
    config = TrainConfig(
        algorithm=DraftConfig(steps=2),
        optimizer=OptimizerConfig(lr=2e-3, accumulation=1, ema_decay=0.9),
        validation=ValidationConfig(every=2, guards=guards or GuardsConfig(None, None, None, None)),
        output=OutputConfig(dir=str(output), save_every=2, trackers=trackers),
        steps=steps,
        seed=3,
    )
    prepare(adapter, LORA, seed=3)
    algorithm = Draft(adapter, ColorReward(), FrozenBase(adapter), steps=2)
    validation = None
    if validated:
        validation = Validation(
            adapter, PROMPTS[:2], rewards=algorithm.rewards, watched=watched, every=2, steps=2, seed=7
        )
    batches = PromptBatches(PROMPTS, batch_size=2, seed=3)
    return Trainer(adapter, algorithm, config, batches=batches, validation=validation)


def records(output: Path) -> list[dict[str, Any]]:
    file = output / "validation.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_validation_leaves_the_training_alone(wan_dir: Path, tmp_path: Path) -> None:
    with_it, without = (make(wan_dir, tmp_path / str(v), validated=v) for v in (True, False))
    for trainer in (with_it, without):
        trainer.fit()
    for name, parameter in with_it.parameters.items():
        assert torch.equal(parameter, without.parameters[name]), name
    assert not (tmp_path / "False" / "validation").exists()


def test_what_is_validated_is_the_average_of_the_weights_at_its_step(wan_dir: Path, tmp_path: Path) -> None:
    trainer = make(wan_dir, tmp_path / "run")
    trainer.fit()
    found = records(tmp_path / "run")
    assert [record["step"] for record in found] == [0, 2, 4]
    assert set(found[0]) == {"step", "reward", "reward/color", *MEASURES}
    # once more, from the model that was exported: with the averaged weights
    adapter = WanAdapter.from_pretrained(wan_dir)
    check = Validation(adapter, PROMPTS[:2], rewards=ColorReward(), every=2, steps=2, seed=7)
    base = check.run(0, tmp_path / "check")
    adapter.load_lora(tmp_path / "run" / "final" / "pytorch_lora_weights.safetensors")
    last = check.run(4, tmp_path / "check")
    for name in found[0]:
        assert base[name] == pytest.approx(found[0][name], rel=1e-5), name
        assert last[name] == pytest.approx(found[2][name], rel=1e-4), name
    # Negative control: a step's own weights are others.
    assert found[2]["reward"] > found[0]["reward"]
    own = Validation(trainer.adapter, PROMPTS[:2], rewards=ColorReward(), every=2, steps=2, seed=7)
    assert own.run(4, tmp_path / "own")["reward"] != pytest.approx(found[2]["reward"], rel=1e-4)


def test_its_folder_is_a_data_set_with_a_sheet(wan_dir: Path, tmp_path: Path) -> None:
    make(wan_dir, tmp_path, steps=2).fit()
    for step in (0, 2):
        folder = tmp_path / "validation" / f"step-{step:08d}"
        videos = VideoFolder(folder)
        assert videos.captions == PROMPTS[:2]
        assert videos[0][0].shape[0] == 9
        assert (folder / "contact-sheet.png").stat().st_size > 0


def test_a_resumed_run_has_validated_the_same(wan_dir: Path, tmp_path: Path) -> None:
    make(wan_dir, tmp_path / "whole").fit()
    make(wan_dir, tmp_path / "parts", steps=3).fit()  # its last step is validated, too
    log = tmp_path / "parts" / "validation.jsonl"
    assert [record["step"] for record in records(tmp_path / "parts")] == [0, 2, 3]
    log.write_text(log.read_text() + '{"step": 4, "reward": 9}\n{"step": 5, "rew')  # killed before the save
    make(wan_dir, tmp_path / "parts").fit()
    assert [record for record in records(tmp_path / "parts") if record["step"] != 3] == records(tmp_path / "whole")


@pytest.mark.parametrize("at", [2, 4])
def test_a_signal_is_obeyed_before_videos_are_made(wan_dir: Path, tmp_path: Path, at: int) -> None:
    make(wan_dir, tmp_path / "whole").fit()
    stopped = make(wan_dir, tmp_path / "parts")
    terminate_in_step(stopped, at)
    with pytest.raises(Interrupted) as caught:
        stopped.fit()
    assert caught.value.code == 128 + signal.SIGTERM
    assert [record["step"] for record in records(tmp_path / "parts")] == list(range(0, at, 2))
    assert not (tmp_path / "parts" / "final").exists()
    make(wan_dir, tmp_path / "parts").fit()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert (tmp_path / "parts" / "final").exists()


def terminate_in_step(trainer: Trainer, step: int) -> None:
    """Send SIGTERM to this process in the loss of a step."""
    loss = trainer.algorithm.loss

    def loss_with_signal(batch: Batch, generator: torch.Generator) -> Any:
        if trainer.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return loss(batch, generator)

    trainer.algorithm.loss = loss_with_signal  # type: ignore[method-assign]


def test_a_signal_in_the_last_step_interrupts_nothing_if_nothing_is_left(wan_dir: Path, tmp_path: Path) -> None:
    trainer = make(wan_dir, tmp_path, steps=2, validated=False)
    terminate_in_step(trainer, 2)
    assert trainer.fit() == tmp_path / "final"


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_signal_ends_a_validation(wan_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, at: int) -> None:
    make(wan_dir, tmp_path / "whole").fit()

    class Terminating(Countdown):
        def terms(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
            if self.calls == at:  # the first video of a validation
                signal.raise_signal(signal.SIGTERM)
            return super().terms(frames, prompts)

    stopped = make(wan_dir, tmp_path / "parts", watched=Terminating(2, *[1.0] * 9))
    with pytest.raises(Interrupted), caplog.at_level(logging.WARNING, logger="pisces.trainer"):
        stopped.fit()
    assert stopped.step == at
    assert (f"saved step {at}" in caplog.text) == (tmp_path / "parts" / "checkpoints" / f"step-{at:08d}").is_dir()
    assert ("stopped before the first step" in caplog.text) == (at == 0)
    assert stopped.validation is not None
    assert [record["step"] for record in records(tmp_path / "parts")] == list(range(0, at, 2))
    make(wan_dir, tmp_path / "parts").fit()
    found = [{k: v for k, v in record.items() if "watched" not in k} for record in records(tmp_path / "parts")]
    assert found == records(tmp_path / "whole")


def test_a_new_start_has_no_old_validation(wan_dir: Path, tmp_path: Path) -> None:
    make(wan_dir, tmp_path, steps=2).fit()
    make(wan_dir, tmp_path, steps=1).fit(resume="never")
    assert [record["step"] for record in records(tmp_path)] == [0, 1]
    assert not (tmp_path / "validation" / "step-00000002").exists()


def test_patience_ends_the_run_and_the_best_model_stays(
    wan_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guards = GuardsConfig(None, None, None, watched=0.5, patience=2)
    trainer = make(wan_dir, tmp_path, steps=40, guards=guards, watched=Countdown(2, 1.0, 3.0, 2.9, 3.5, 1.0, 0.9, 9, 9))
    with caplog.at_level(logging.WARNING, logger="pisces.trainer"):
        final = trainer.fit()
    # Best at 6; the alarms at 8 and 10 follow each other, the one at 4 is alone.
    assert trainer.step == 10
    assert final.is_dir()
    found = records(tmp_path)
    assert [record["watched"] for record in found] == pytest.approx([2.1, 6.1, 5.9, 7.1, 2.1, 1.9])
    assert found[0]["watched_std"] == pytest.approx(0.1)
    assert sum("standard deviations below their best" in record.getMessage() for record in caplog.records) == 3
    assert "2 validations in a row with an alarm" in caplog.records[-1].getMessage()
    # best/ is the model of step 6
    adapter = WanAdapter.from_pretrained(wan_dir)
    adapter.load_lora(tmp_path / "best" / "pytorch_lora_weights.safetensors")
    again = Validation(adapter, PROMPTS[:2], rewards=ColorReward(), every=2, steps=2, seed=7).run(1, tmp_path / "a")
    assert again["reward"] == pytest.approx(found[3]["reward"], rel=1e-4)
    # The same command goes no further.
    watched = Countdown(2, *[9.0] * 20)
    resumed = make(wan_dir, tmp_path, steps=40, guards=guards, watched=watched)
    resumed.fit()
    assert (resumed.step, watched.calls) == (10, 0)


def test_numbers_that_are_not_finite_are_null(wan_dir: Path, tmp_path: Path) -> None:
    make(wan_dir, tmp_path, steps=2, watched=Countdown(2, math.nan, 1.0)).fit()
    text = (tmp_path / "validation.jsonl").read_text()
    assert "NaN" not in text
    bad, good = records(tmp_path)
    assert bad["watched"] is None
    assert good["watched"] == pytest.approx(2.1)


def test_a_broken_video_is_an_alarm_and_no_end_of_the_run(
    wan_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From step 2 on one of the two videos is NaN: it is written, counts as null, and is no reason not to resume."""
    video = Validation._video

    def broken(self: Validation, number: int) -> Tensor:
        frames = video(self, number)
        if number == 1 and trainer.step >= 2:
            frames[:, :, :, 5] = math.nan
        return frames

    monkeypatch.setattr(Validation, "_video", broken)
    guards = GuardsConfig(patience=2)
    trainer = make(wan_dir, tmp_path, steps=3, guards=guards)
    with caplog.at_level(logging.WARNING, logger="pisces.trainer"):
        trainer.fit()
    base, bad, last = records(tmp_path)
    assert all(base[name] is not None for name in ("reward", *MEASURES))
    assert all(record[name] is None for record in (bad, last) for name in ("reward", *MEASURES))
    assert len(VideoFolder(tmp_path / "validation" / "step-00000002")) == 2
    messages = [record.getMessage() for record in caplog.records]
    assert sum("sharpness is not finite" in message for message in messages) == 2
    assert "2 validations in a row with an alarm" in messages[-1]
    # The run goes on from there; the guards are a free setting.
    trainer = make(wan_dir, tmp_path, steps=4)
    trainer.fit()
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 3, 4]


def test_nothing_to_validate_is_refused(wan_dir: Path) -> None:
    with pytest.raises(ValueError, match="got 0 prompts every 2 steps"):
        Validation(WanAdapter.from_pretrained(wan_dir), [], every=2)


# ---------------------------------------------------------------------- guards

BASE = {"step": 0, "sharpness": 0.02, "motion": 0.1, "saturation": 0.3, "watched": 1.0, "watched_std": 0.2}


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [("sharpness", 0.011, 0.009), ("motion", 0.06, 0.04), ("saturation", 0.44, 0.46), ("watched", 0.91, 0.89)],
)
def test_each_guard_has_its_limit(name: str, inside: float, outside: float) -> None:
    guards = GuardsConfig()
    assert alarms([BASE, BASE | {name: inside}], guards) == []
    (sentence,) = alarms([BASE, BASE | {name: outside}], guards)
    assert name in sentence
    off = dataclasses.replace(guards, **{name: None})
    assert alarms([BASE, BASE | {name: outside}], off) == []
    better = {"sharpness": 9.0, "motion": 9.0, "saturation": 0.01, "watched": 9.0}
    assert alarms([BASE, BASE | {name: better[name]}], guards) == []


def test_a_run_that_was_first_validated_later_has_no_base() -> None:
    later = BASE | {"step": 10}
    worse = later | {"step": 20, "motion": 0.01}
    assert alarms([later, worse], GuardsConfig()) == []
    (sentence,) = alarms([later, worse | {"watched": 0.5}], GuardsConfig())
    assert "watched" in sentence


def test_alarms_count_without_a_break() -> None:
    good, bad = BASE, BASE | {"motion": 0.01}
    for history, wanted in [([good], 0), ([good, bad, bad], 2), ([good, bad, good], 0), ([good, bad, good, bad], 1)]:
        assert alarms_in_a_row(history, GuardsConfig()) == wanted


def test_what_was_not_measured_is_no_alarm() -> None:
    still = BASE | {"motion": 0.0, "watched_std": 0.0, "watched": None, "sharpness": None}
    assert alarms([still, still], GuardsConfig()) == []
    without = {name: value for name, value in BASE.items() if name in ("step", "saturation")}
    assert alarms([without, without], GuardsConfig()) == []
    assert alarms([BASE, without], GuardsConfig()) == []


@pytest.mark.parametrize("name", ["sharpness", "motion", "saturation", "watched"])
def test_what_was_measured_and_is_not_finite_any_more_is_an_alarm(name: str) -> None:
    (sentence,) = alarms([BASE, BASE | {name: None}], GuardsConfig())
    assert name in sentence
    assert "not finite" in sentence
    assert alarms([BASE, BASE | {name: None}], dataclasses.replace(GuardsConfig(), **{name: None})) == []
    assert alarms_in_a_row([BASE, BASE | {name: None}, BASE | {name: None}], GuardsConfig()) == 2


# ---------------------------------------------------------------------- logs


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_says_what_the_log_says(wan_dir: Path, tmp_path: Path) -> None:
    make(wan_dir, tmp_path, steps=2, trackers=("tensorboard",)).fit()
    # a killed run: it told TensorBoard of a step that its checkpoint does not have
    with RunLog(tmp_path, 2, trackers=("tensorboard",)) as log:
        log.step({"step": 3, "loss": 99.0})
    make(wan_dir, tmp_path, steps=4, trackers=("tensorboard",)).fit()
    found = scalars(tmp_path / "tensorboard")
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "reward/color", "grad_norm"):
        assert found[name] == pytest.approx({record["step"]: record[name] for record in steps}, rel=1e-6), name
    assert found["validation/reward"] == pytest.approx(
        {record["step"]: record["reward"] for record in records(tmp_path)}, rel=1e-6
    )


def test_a_resumed_run_is_one_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[dict[str, Any]] = []

    def init(**options: Any) -> Any:
        runs.append({**options, "logged": []})
        return types.SimpleNamespace(
            log=lambda values, step: runs[-1]["logged"].append((step, values)), finish=lambda: None
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)

    def start(step: int, **settings: Any) -> None:
        with RunLog(tmp_path, step, trackers=("wandb",), settings=settings) as log:
            log.step({"step": step + 1, "loss": 0.5, "reward": None})

    start(0, steps=2)
    start(2, steps=4)
    start(0)
    first, resumed, anew = runs
    assert first["id"] == resumed["id"] != anew["id"]
    assert all(run["resume"] == "allow" for run in runs)
    assert (resumed["config"], resumed["logged"]) == ({"steps": 4}, [(3, {"loss": 0.5})])
    # A new start forgets it, whatever its trackers are.
    clear(tmp_path)
    start(2)
    assert runs[-1]["id"] != anew["id"]
    # An id that the user or a sweep has set is theirs.
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    start(2)
    assert not {"id", "resume"} & runs[-1].keys()

"""Laws of starting over and going on: nothing is deleted unasked, and each process takes over what is its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_wan import build_tiny_wan
from together import run_together
from trained_together import build

from pisces.config import PipelineConfig
from pisces.state import CheckpointError, checkpoint_dir, latest_checkpoint, list_checkpoints


@pytest.fixture(scope="module")
def wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan", layers=1, shift_terminal=0.2)


def steps_there(output: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(output / "checkpoints")]


def test_two_processes_start_anew_over_a_finished_run(wan_dir: Path, tmp_path: Path) -> None:
    build(wan_dir, tmp_path, "draft", 2).fit()
    said = run_together("restarted_together.py", wan_dir, tmp_path)
    assert steps_there(tmp_path) == [1]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    # What the main process gathers is nowhere else.
    assert [output.splitlines()[-1] for output in said] == ["[0, 1]", "[]"]


def test_each_process_takes_over_its_own_rollouts(wan_dir: Path, tmp_path: Path) -> None:
    build(wan_dir, tmp_path, "grpo", 3).fit()  # between the two updates of batches 2 and 3
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    taken = []
    for rank, count in ((0, 1), (0, 2), (1, 2)):
        trainer = build(wan_dir, tmp_path, "grpo", 4)
        trainer.processes.rank, trainer.processes.count = rank, count
        trainer.load(path)
        taken.append(trainer.algorithm.rollouts)  # type: ignore[attr-defined]
    alone, first, second = taken
    assert [sorted(rollouts) for rollouts in taken] == [[2, 3], [2], [3]]
    for number, rollout in {**first, **second}.items():
        assert torch.equal(rollout.states, alone[number].states)
        assert torch.equal(rollout.advantages, alone[number].advantages)


def test_going_on_behind_later_checkpoints_is_refused(wan_dir: Path, tmp_path: Path) -> None:
    build(wan_dir, tmp_path, "draft", 4).fit()
    assert steps_there(tmp_path) == [3, 4]
    older = checkpoint_dir(tmp_path / "checkpoints", 3)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    with pytest.raises(CheckpointError, match=r"later checkpoints \(step-00000004\).*\(step 3\).*Move or delete them"):
        build(wan_dir, tmp_path, "draft", 5).fit(resume=older)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    # Both ways that the message names.
    build(wan_dir, tmp_path / "other", "draft", 5).fit(resume=older)
    checkpoint_dir(tmp_path / "checkpoints", 4).rename(tmp_path / "moved")
    build(wan_dir, tmp_path, "draft", 5).fit(resume=older)
    assert steps_there(tmp_path) == steps_there(tmp_path / "other") == [4, 5]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_a_run_may_go_on_on_another_device(wan_dir: Path, tmp_path: Path) -> None:
    build(wan_dir, tmp_path, "draft", 1).fit()
    moved = build(wan_dir, tmp_path, "draft", 2)
    moved.config = dataclasses.replace(moved.config, pipeline=PipelineConfig(device="cpu"))
    moved.fit()
    assert moved.step == 2

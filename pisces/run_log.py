"""What a run says of itself: one JSON line a step and a validation, and the same numbers for TensorBoard or W&B."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pisces.state import write_text

STEPS_FILE = "log.jsonl"
VALIDATION_FILE = "validation.jsonl"
WANDB_ID_FILE = "wandb-id.txt"
TRACKERS = ("tensorboard", "wandb")

Record = dict[str, float | int | str | None]


class RunLog:
    """The logs of a run, continued where its checkpoint is.

    A killed run has logged steps after its last checkpoint: they will be made again, and are removed here.

    Args:
        folder: receives ``log.jsonl``, ``validation.jsonl``, ``tensorboard/``, and the id of the run at W&B.
        step: optimizer steps of the checkpoint; 0 for a new run.
        trackers: names out of :data:`TRACKERS`. W&B gets what it needs from its own environment variables.
        settings: of the run, for the trackers that show them.
    """

    def __init__(
        self, folder: Path, step: int, *, trackers: Sequence[str] = (), settings: dict[str, Any] | None = None
    ) -> None:
        self.validations: list[Record] = []
        for name in (STEPS_FILE, VALIDATION_FILE):
            kept = [line for line in _lines(folder / name) if step and _step_of(line) <= step]
            if kept or name == STEPS_FILE:
                write_text(folder / name, "".join(line + "\n" for line in kept))
            else:
                (folder / name).unlink(missing_ok=True)
            if name == VALIDATION_FILE:
                self.validations = [json.loads(line) for line in kept]
        self.file = folder / STEPS_FILE
        self._folder = folder
        self._trackers = _start_trackers(trackers, folder, step, settings or {})

    def step(self, record: Record) -> None:
        """Write the record of a training step."""
        self._write(STEPS_FILE, record)

    def validation(self, record: Record) -> None:
        """Write the record of a validation; trackers get it as ``validation/NAME``."""
        self.validations.append(record)
        self._write(VALIDATION_FILE, record, prefix="validation/")

    def _write(self, name: str, record: Record, *, prefix: str = "") -> None:
        with (self._folder / name).open("a") as file:
            file.write(json.dumps(record) + "\n")
        numbers = {
            prefix + key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)
        }
        for tracker in self._trackers:
            tracker.log(numbers, step=record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _start_trackers(names: Sequence[str], folder: Path, step: int, settings: dict[str, Any]) -> list[Any]:
    """Trackers of accelerate, started."""
    started: list[Any] = []
    if not names:
        return started
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # the trackers ask it whether this process writes
    for name in names:
        if name == "tensorboard":
            # purge_step: TensorBoard forgets what a killed run said of later steps
            tracker = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
        else:
            tracker = WandBTracker(
                "pisces", dir=str(folder), name=folder.name, config=settings, **_wandb_run(folder, step)
            )
        tracker.start()
        started.append(tracker)
    return started


def _wandb_run(folder: Path, step: int) -> dict[str, Any]:
    """Which run of W&B this is: a resumed one goes on with its own, under the id that the folder keeps."""
    if "WANDB_RUN_ID" in os.environ:  # the user, or a sweep, has chosen one
        return {}
    file = folder / WANDB_ID_FILE
    if not step or not file.is_file():
        write_text(file, uuid.uuid4().hex)
    # some settings may have changed since (`FREE_SETTINGS` of `run_folder`)
    return {"id": file.read_text().strip(), "resume": "allow", "allow_val_change": True}


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def _step_of(line: str) -> float:
    """The step of a log line; infinite for a line that a kill cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf

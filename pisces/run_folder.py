"""What an earlier run left in the output folder of a new one."""

from __future__ import annotations

import shutil
from pathlib import Path

from pisces.config import TrainConfig
from pisces.run_log import WANDB_ID_FILE
from pisces.sections import flat
from pisces.state import Checkpoint, CheckpointError, list_checkpoints

# By name: the folder is the user's, and may hold other things.
MADE = ("checkpoints/step-*", "final", "best", "validation/step-*", "tensorboard/events.out.tfevents.*", WANDB_ID_FILE)

# What a resumed run may have changed: how long and where, what is looked at, what is remembered where, memory.
FREE_SETTINGS = (
    "steps",
    "output.",
    "validation.every",
    "validation.guards.",
    "data.cache",
    "pipeline.device",
    "pipeline.decode.",
    "pipeline.gradient_checkpointing",
)


def clear(folder: Path) -> None:
    """Delete it: what stays would be resumed from, or taken for the new run's."""
    for path in [path for pattern in MADE for path in folder.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def refuse_results(folder: Path) -> None:
    """Refuse to train over a finished model that has no checkpoint: it would be lost, or taken for the new run's.

    Raises:
        CheckpointError: naming what is there.
    """
    there = [name for name in ("final", "best") if (folder / name).exists()]
    if there:
        raise CheckpointError(
            f"Trainer: {folder} holds {' and '.join(there)} of an earlier run, but no checkpoint to go on from. "
            "Choose another output.dir, or delete them by --no-resume."
        )


def refuse_later(folder: Path, step: int) -> None:
    """Refuse to go on from an earlier step than checkpoints here have: the next start would go on from those.

    Raises:
        CheckpointError: naming them.
    """
    later = [path.name for number, path in list_checkpoints(folder / "checkpoints") if number > step]
    if later:
        raise CheckpointError(
            f"Trainer: {folder} holds later checkpoints ({', '.join(later)}) than the one to go on from (step {step}): "
            "the next start would go on from those. Move or delete them, or choose another output.dir."
        )


def refuse_other_run(checkpoint: Checkpoint, config: TrainConfig, data: str) -> None:
    """Refuse a checkpoint of a run with other settings, :data:`FREE_SETTINGS` apart, or on other data.

    Args:
        checkpoint: with ``config`` and ``data`` of its run in ``meta``.
        config: of this run.
        data: its fingerprint.

    Raises:
        CheckpointError: naming what differs.
    """
    # A learning rate that falls over the steps depends on their number.
    free = FREE_SETTINGS if config.optimizer.schedule == "constant" else FREE_SETTINGS[1:]
    mine, theirs = flat(config.to_dict()), flat(checkpoint.meta["config"])
    changed = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    lines = [f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} here" for k in changed if not k.startswith(free)]
    if lines:
        raise CheckpointError(
            f"Trainer: {checkpoint.path} is of a run with other settings ({'; '.join(lines)}). "
            "Restore them, or choose another output.dir."
        )
    if checkpoint.meta["data"] != data:
        raise CheckpointError(
            f"Trainer: {checkpoint.path} is of a run on other prompts or captions. Choose another output.dir."
        )

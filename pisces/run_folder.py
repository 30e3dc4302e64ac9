"""What an earlier run left in the output folder of a new one."""

from __future__ import annotations

import shutil
from pathlib import Path

from pisces.state import CheckpointError

# By name: the folder is the user's, and may hold other things.
MADE = ("checkpoints/step-*", "final", "best", "validation/step-*", "tensorboard/events.out.tfevents.*")


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

"""The small world in which the whole method is trained, judged and tested on two CPU cores."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def checkpoint_path(name: str) -> Path:
    """The folder of a packaged checkpoint.

    Args:
        name: "encoder" (the small video-text encoder), "wan-base" (the weak generator) or "wan-good".

    Raises:
        FileNotFoundError: no such checkpoint; names those that are there.
    """
    path = CHECKPOINTS / name
    if not path.is_dir():
        there = sorted(p.name for p in CHECKPOINTS.glob("*") if p.is_dir())
        raise FileNotFoundError(
            f"checkpoint_path: no packaged checkpoint {name!r}, found {there}. "
            f"Install the package again, or run: pisces world train-checkpoints --output {CHECKPOINTS}"
        )
    return path

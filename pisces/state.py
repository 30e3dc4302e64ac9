"""Checkpoints that are there whole or not at all, and the random states that make a resumed run the same run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FILE = "state.json"
PARTIAL_SUFFIX = ".partial"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not belong to this run."""


@dataclass(frozen=True)
class Checkpoint:
    """A training state read back.

    Attributes:
        path: its directory.
        step: optimizer steps taken.
        tensors: file stem -> name -> tensor, as given to :func:`save_checkpoint`.
        meta: the rest, out of ``state.json``.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def save_checkpoint(
    root: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    meta: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write ``root/step-00000012``: every file is on the disk before the directory gets its name.

    A kill at any moment, or a full disk, leaves the former checkpoints as they were and at most a ``.partial``
    directory, which the next save removes.

    Args:
        root: the directory of checkpoints.
        step: optimizer steps taken so far.
        tensors: file stem -> name -> tensor; each becomes ``STEM.safetensors``.
        meta: whatever JSON can hold.
        keep: checkpoints to leave, this one and the newest before it; at least 1. Later ones, of a run that went
            further, are not touched: this one would not outlive them.

    Returns:
        The new directory.

    Raises:
        OSError: if the disk is full or not writable; the message names the directory and what to do.
    """
    root = Path(root)
    final = checkpoint_dir(root, step)
    partial = root / (final.name + PARTIAL_SUFFIX)
    try:
        root.mkdir(parents=True, exist_ok=True)
        for rest in root.glob(f"step-*{PARTIAL_SUFFIX}"):
            shutil.rmtree(rest)
        partial.mkdir()
        digests = {}
        for stem, group in tensors.items():
            file = partial / f"{stem}.safetensors"
            save_tensors(file, group)
            digests[file.name] = _digest(file)
            _sync(file)
        state = {"format": FORMAT, "step": step, "sha256": digests, **meta}
        write_text(partial / STATE_FILE, json.dumps(state, indent=1))
        _sync(partial)
        if final.exists():
            # The same step again, of a run that went on from an older checkpoint: the states are equal.
            _remove(final)
        os.replace(partial, final)
        _sync(root)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            error.errno,
            f"save_checkpoint: {final} was not written ({error.strerror}); older checkpoints are intact. "
            "Make room there, or make it writable, and start again: a resumed run goes on from the newest.",
        ) from error
    so_far = [path for number, path in list_checkpoints(root) if number <= step]
    for old in so_far[: -max(1, keep)]:
        _remove(old)
    return final


def checkpoint_dir(root: str | Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return Path(root) / f"step-{step:08d}"


def list_checkpoints(root: str | Path) -> list[tuple[int, Path]]:
    """Finished checkpoints below ``root`` as (step, directory), oldest first."""
    found = []
    for path in Path(root).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def latest_checkpoint(root: str | Path) -> Path | None:
    """The newest finished checkpoint below ``root``; None if there is none."""
    found = list_checkpoints(root)
    return found[-1][1] if found else None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint and check every file against its recorded SHA-256.

    Args:
        path: a ``step-...`` directory.

    Returns:
        The state.

    Raises:
        CheckpointError: naming the file that is missing or damaged, and what to do.
    """
    path = Path(path)
    advice = f"Delete {path} to go on from the checkpoint before it."
    try:
        meta = json.loads((path / STATE_FILE).read_text())
        step, digests = int(meta["step"]), dict(meta["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"load_checkpoint: {path / STATE_FILE} is unreadable ({error}). {advice}") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"load_checkpoint: {path} has format {meta.get('format')}, expected {FORMAT}: another version wrote it."
        )
    tensors = {}
    for name, digest in digests.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"load_checkpoint: {file} is missing. {advice}")
        if _digest(file) != digest:
            raise CheckpointError(f"load_checkpoint: {file} is corrupt (its SHA-256 is not the recorded one). {advice}")
        tensors[file.stem] = load_file(str(file))
    return Checkpoint(path, step, tensors, meta)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.write_text(text)
    _sync(partial)
    os.replace(partial, path)


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the random generators of torch (every device), numpy and Python, as tensors and as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, internal, gauss_next = random.getstate()
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    return tensors, {
        "numpy": [str(name), int(position), int(has_gauss), float(gauss)],
        "python": [version, gauss_next],
    }


def set_random_states(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Restore what :func:`random_states` returned."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
    name, position, has_gauss, gauss = meta["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, gauss))  # noqa: NPY002
    version, gauss_next = meta["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss_next))


def step_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by whole numbers, such as (seed, step): the noise of a step needs no history."""
    state = np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors.

    Args:
        file: the .safetensors to write.
        tensors: name -> tensor, on any device.

    Raises:
        OSError: of the system, naming the file; safetensors has only its text, such as "No space left on device (os
            error 28)".
    """
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, str(file))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(file)) from error


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; a kill on the way leaves no half of one under its name."""
    rest = checkpoint.with_name(f"{checkpoint.name}.old{PARTIAL_SUFFIX}")
    os.replace(checkpoint, rest)
    shutil.rmtree(rest)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

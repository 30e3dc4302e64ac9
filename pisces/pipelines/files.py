"""Reading and writing pipeline directories."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEFAULTS_FILE = "pisces.json"
DEFAULT_KEYS = ("n_frames", "height", "width", "steps", "fps")


@contextmanager
def quiet_files() -> Iterator[None]:
    """Keep the progress bars of diffusers and transformers for reading and writing files off the terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in loggers:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in loggers:
            log.enable_progress_bar()


def find_pipeline(name: str) -> Path:
    """The directory of a pipeline: a local path, or a name on the Hugging Face hub that is in the local cache.

    Nothing is downloaded.

    Args:
        name: such as ``models/wan`` or ``Wan-AI/Wan2.1-T2V-1.3B-Diffusers``.

    Returns:
        The path as it is if it is there, else the cached snapshot.

    Raises:
        FileNotFoundError: if it is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"no such file or directory: {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"no such directory, and no such model in the local Hugging Face cache: {name}. "
            f"If it is on the hub, fetch it: hf download {name}"
        ) from error


def check_pipeline_dir(path: str | Path, *, who: str) -> Path:
    """The directory ``path`` if it holds a diffusers pipeline.

    Raises:
        FileNotFoundError: naming what is missing.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{who}: no such directory: {root}. Give a local diffusers pipeline directory.")
    if not (root / "model_index.json").is_file():
        raise FileNotFoundError(f"{who}: {root} has no model_index.json, so it is not a diffusers pipeline directory.")
    return root


def read_defaults(root: Path) -> dict[str, int]:
    """The defaults in ``pisces.json`` of a pipeline directory; empty if there is none."""
    file = root / DEFAULTS_FILE
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
        wrong = {key: value for key, value in values.items() if key in DEFAULT_KEYS and type(value) is not int}
        if wrong:
            raise ValueError(str(wrong))
        return {key: value for key, value in values.items() if key in DEFAULT_KEYS}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: got {error}, expected a JSON object of integers {DEFAULT_KEYS}.") from error


def write_defaults(root: Path, defaults: dict[str, int]) -> None:
    """Write ``pisces.json`` into a pipeline directory."""
    (root / DEFAULTS_FILE).write_text(json.dumps(defaults, indent=2) + "\n")


def files_fingerprint(path: str | Path) -> str:
    """A short digest of names, sizes and times of the files at a path: whether something was written there since.

    Args:
        path: a file or a folder; "" and what is not there have a digest of their own.
    """
    root = Path(path)
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    seen = []
    for file in files:
        if file.is_file():
            stat = file.stat()
            seen.append((str(file.relative_to(root)), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


@contextmanager
def whole_dir(path: str | Path) -> Iterator[Path]:
    """A directory to fill that gets the name ``path`` at the end, in place of an older one; removed on an error."""
    target = Path(path)
    partial, former = (target.with_name(target.name + suffix) for suffix in (".partial", ".former"))
    if former.exists() and not target.exists():  # a kill came between the two renames below
        os.replace(former, target)
    for rest in (partial, former):
        shutil.rmtree(rest, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            os.replace(target, former)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)

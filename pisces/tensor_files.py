"""Files of tensors and of settings, read without running anything in them; damaged ones are named."""

from __future__ import annotations

import errno
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SHOWN = 8  # names in a message


def read_tensors(path: str | Path, who: str, *, under: str = "") -> dict[str, Tensor]:
    """Named tensors of a file, on the CPU.

    Args:
        path: a .safetensors file, or with any other ending one of torch.save.
        who: name for the messages.
        under: name of a mapping inside a file of torch.save that is taken instead of the whole, where it is there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one of another kind, or something else than named tensors in it.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path, who)[0]
    _check_is_file(path, who)
    try:
        # mapped, gigabytes are read once and not copied; older files are no archives and cannot be
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # garbage ends in errors of any kind
        disk = isinstance(error, OSError) and error.errno != errno.EINVAL  # that is a jump to before the file's start
        if disk or isinstance(error, MemoryError):
            raise
        # not chained: torch's own words advise to switch its safety off
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is not None:
            raise ValueError(
                f"{who}: {path} holds a {code[1]}, expected nothing but tensors: loading anything else could run code. "
                "Save the tensors alone, with torch.save(model.state_dict(), ...)."
            ) from None
        raise ValueError(_damaged(path, who, "torch file")) from None
    if under and isinstance(state, Mapping) and isinstance(state.get(under), Mapping):
        state = state[under]
    inside = f" or under {under!r}" if under else ""
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{who}: {path} holds a {type(state).__name__}, expected named tensors at its top{inside}. Save a "
            "state_dict()."
        )
    other = [f"{name!r}, a {type(x).__name__}" for name, x in state.items() if not _is_named_tensor(name, x)]
    if other:
        raise ValueError(
            f"{who}: {path} holds something else than named tensors ({other[0]}), expected them at its top{inside}. "
            "Save a state_dict()."
        )
    return dict(state)


def read_safetensors(path: str | Path, who: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file by name, on the CPU, and the words in its header.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file or one of another kind.
    """
    path = Path(path)
    _check_is_file(path, who)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(_damaged(path, who, "safetensors file", str(error))) from error


def read_settings(path: str | Path, who: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, or no object.
    """
    path = Path(path)
    text = read_text(path, who)
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(_damaged(path, who, "JSON file", str(error))) from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"{who}: {path} holds a JSON {type(settings).__name__}, expected an object {{...}}. Download it again."
        )
    return settings


def read_text(path: str | Path, who: str) -> str:
    """The text of a UTF-8 file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: its bytes are no text.
    """
    path = Path(path)
    _check_is_file(path, who)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(_damaged(path, who, "text file", str(error))) from error


def check_fit(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    who: str,
    *,
    also: Sequence[str] = (),
    do: str = "Use weights and settings that were written together.",
) -> None:
    """Refuse tensors that are not those of a model, by name and shape.

    Args:
        state: tensors of a file.
        wanted: state of the model.
        who: whose they are, for the message.
        also: shapes that the caller found to be others.
        do: what mends it, for the message.

    Raises:
        ValueError: names that are missing or unexpected, and other shapes.
    """
    shapes = [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    found = listed(
        {
            "missing": [name for name in wanted if name not in state],
            "unexpected": [name for name in state if name not in wanted],
            "of another shape": [*shapes, *also],
        }
    )
    if found:
        raise ValueError(f"{who} does not fit. {found}. {do}")


def listed(problems: Mapping[str, Sequence[str]]) -> str:
    """Names by what is wrong with them, for a message; "" where nothing is.

    Example:
        >>> listed({"missing": ["a", "b"], "unexpected": []})
        '2 missing: a, b'
    """
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for what, names in problems.items()
        if names
    )


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _check_is_file(path: Path, who: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{who}: there is no file {path}. Check the path, or put the file there.")


def _kind(path: Path) -> str | None:
    """What a file that cannot be read is by its first bytes; None where they do not tell."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer and not the file itself"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    return None


def _damaged(path: Path, who: str, noun: str, detail: str = "") -> str:
    """The message about a file that cannot be read as a `noun`."""
    kind, size = _kind(path), f"{path.stat().st_size:,} bytes"
    found = f"{kind} ({size})" if kind else f"damaged, cut short or no {noun} ({size}{detail and f': {detail}'})"
    do = "Run git lfs pull, or download it again." if kind and "Git-LFS" in kind else "Download it again."
    return f"{who}: {path} is {found}, expected a whole {noun}. {do}"

"""Captions and prompts: text files, and what a line of them may look like."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT_KEYS = ("prompt", "text", "caption")


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read prompts from a file: .txt (one a line, blank lines ignored), .jsonl or .csv.

    A .jsonl line is a string or an object, a .csv has a header; the prompt is under `prompt`, `text` or `caption`,
    the first of them that is there.

    Args:
        path: the file, UTF-8.

    Returns:
        The prompts in order, stripped, none empty.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a broken line, an empty prompt in a .jsonl or .csv, or no prompt at all.

    Example:
        >>> _ = Path("/tmp/pisces-prompts.txt").write_text("a red square moves left\\n")
        >>> read_prompts("/tmp/pisces-prompts.txt")
        ['a red square moves left']
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_prompts: no file {str(path)!r}.")
    suffix = path.suffix.lower()
    if suffix == ".txt":
        found = [(str(path), line) for line in read_text(path).splitlines() if line.strip()]
    elif suffix == ".jsonl":
        found = [(where, prompt_of(where, row)) for where, row in json_lines(path)]
    elif suffix == ".csv":
        reader = csv.DictReader(io.StringIO(read_text(path)))
        found = [(f"{path}, line {reader.line_num}", prompt_of(f"{path}", row)) for row in reader]
    else:
        raise ValueError(f"read_prompts: {str(path)!r} ends in {suffix!r}, expected .txt, .jsonl or .csv.")
    for where, prompt in found:
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty.")
    if not found:
        raise ValueError(f"read_prompts: {str(path)!r} holds no prompt.")
    return [prompt.strip() for _, prompt in found]


def prompt_of(where: str, row: Any) -> str:
    """The prompt in a value out of JSON: the value itself, or what is under the first of PROMPT_KEYS that is there."""
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for key in PROMPT_KEYS:
            if key in row:
                return str(row[key] or "")
        keys = ", ".join(repr(str(key)) for key in row)
        raise ValueError(f"{where}: found {keys}, expected one of {', '.join(map(repr, PROMPT_KEYS))}.")
    raise ValueError(f"{where}: expected a string or an object with one of {', '.join(map(repr, PROMPT_KEYS))}.")


def read_text(path: Path) -> str:
    """The text of a file."""
    return to_text(path, path.read_bytes())


def to_text(where: str | Path, content: bytes) -> str:
    """UTF-8 bytes as text, with or without a byte order mark, whatever ends its lines."""
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: it is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for each line of a .jsonl file that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}).") from error

"""Captions and prompts: text files, tables of videos with prompts, and what a line of them may look like."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPT_KEYS = ("prompt", "text", "caption")
VIDEO_KEYS = ("video", "file", "file_name")


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
        raise FileNotFoundError(
            f"read_prompts: no file {str(path)!r}, expected a file of prompts. Check the name, or write it."
        )
    suffix = path.suffix.lower()
    if suffix == ".txt":
        found = [(str(path), line) for line in read_text(path).splitlines() if line.strip()]
    elif suffix == ".jsonl":
        found = [(where, prompt_of(where, row)) for where, row in json_lines(path)]
    elif suffix == ".csv":
        found = [(where, prompt_of(where, row)) for where, row in csv_rows(path)]
    else:
        raise ValueError(f"read_prompts: {str(path)!r} ends in {suffix!r}, expected .txt, .jsonl or .csv.")
    for where, prompt in found:
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty, expected at least one word. Fill it, or remove the line.")
    if not found:
        raise ValueError(f"read_prompts: {str(path)!r} holds no prompt, expected at least one. Write one a line.")
    return [prompt.strip() for _, prompt in found]


def read_pairs(path: str | os.PathLike[str]) -> list[tuple[Path, str, str]]:
    """Read videos with prompts from a table: .jsonl with an object a line, or .csv with a header.

    The video is under `video`, `file` or `file_name`, the prompt under `prompt`, `text` or `caption`, in each case the
    first of them that is there. What else a row has is ignored, so that a table of scores can be read back.

    Args:
        path: the table, UTF-8.

    Returns:
        (video, prompt, place) of each row in order: a relative video is that beside the table, a prompt is as it is
        written and may be empty, the place is for messages.

    Raises:
        FileNotFoundError: no such table.
        ValueError: another suffix, no row, or a row that is broken or without a video or a prompt; it is named.

    Example:
        >>> _ = Path("/tmp/pisces-pairs.csv").write_text('video,prompt\\nclips/a.mp4,"a square, red"\\n')
        >>> read_pairs("/tmp/pisces-pairs.csv")
        [(PosixPath('/tmp/clips/a.mp4'), 'a square, red', '/tmp/pisces-pairs.csv, line 2')]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"read_pairs: no file {str(path)!r}, expected a table of videos and prompts. Check the name."
        )
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise ValueError(f"read_pairs: {str(path)!r} ends in {suffix!r}, expected .csv or .jsonl.")
    rows = csv_rows(path) if suffix == ".csv" else json_lines(path)
    found = [(path.parent / _video_of(where, row), prompt_of(where, row), where) for where, row in rows]
    if not found:
        raise ValueError(
            f"read_pairs: {str(path)!r} holds no video, expected at least one. Write a row a video, with its prompt."
        )
    return found


def _video_of(where: str, row: Any) -> str:
    """The name of the video in a row of a table."""
    wanted = ", ".join(map(repr, VIDEO_KEYS))
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with a video ({wanted}) and a prompt.")
    name = next((row[key] for key in VIDEO_KEYS if key in row), None)
    if name is None:
        keys = ", ".join(repr(str(key)) for key in row)
        raise ValueError(f"{where}: found {keys}, expected a video under one of {wanted}.")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}: the video is {name!r}, expected the name of a file.")
    return name


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


def csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) for each row of a .csv file below its header, blank lines left out.

    The place is the line on which the row begins. Cells that a short row lacks are empty; a long row is an error, since
    most are prompts whose comma was not quoted.
    """
    reader = csv.reader(io.StringIO(read_text(path)))
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if len(cells) > len(header) > 0:
                raise ValueError(
                    f"{where}: it has {len(cells)} cells, expected {len(header)} as in the header. Put text with a "
                    "comma between double quotes."
                )
            if cells and header:
                yield where, dict.fromkeys(header, "") | dict(zip(header, cells, strict=False))
            header = header or cells
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not CSV ({error}).") from error

"""Captioned videos and prompts from files.

A folder of captioned videos is the input of every command. `pisces.video` reads and writes the single file; its
public names are here too, so that `from pisces.data import ...` is all that a user needs.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pisces.video import (
    VideoReadError,
    atomic_path,
    check_frames,
    read_video,
    uniform_indices,
    video_bytes,
    write_video,
)

__all__ = [
    "CaptionedVideos",
    "VideoFolder",
    "VideoReadError",
    "atomic_path",
    "check_frames",
    "read_prompts",
    "read_video",
    "uniform_indices",
    "video_bytes",
    "write_metadata",
    "write_video",
]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
PROMPT_KEYS = ("prompt", "text", "caption")


class CaptionedVideos(Protocol):
    """What training and fitting use of a `VideoFolder`; any object with these will do."""

    captions: list[str]

    def __len__(self) -> int:
        """Number of videos."""
        ...

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Frames [T, C, H, W] in [0, 1] and caption."""
        ...


class VideoFolder(torch.utils.data.Dataset[tuple[Tensor, str]]):
    """A folder of captioned videos.

    Either `metadata.jsonl` holds one `{"file_name": ..., "text": ...}` a line (further keys are kept in `.rows`), or
    each `name.mp4` (or another video suffix) has a `name.txt` beside it. With `metadata.jsonl` files that it does not
    list are ignored. Captions are read and checked at once, videos when they are asked for.

    Args:
        path: the folder.
        n_frames: as in `read_video`.
        size: as in `read_video`.

    Raises:
        FileNotFoundError: the folder, a listed video, or a caption file is missing.
        ValueError: a broken line, an empty caption, or no video at all.

    Example:
        >>> _ = write_video("/tmp/pisces-folder/a.mp4", torch.rand(9, 3, 32, 32))
        >>> _ = write_metadata("/tmp/pisces-folder", [{"file_name": "a.mp4", "text": "noise"}])
        >>> frames, caption = VideoFolder("/tmp/pisces-folder", n_frames=8)[0]
        >>> frames.shape, caption
        (torch.Size([8, 3, 32, 32]), 'noise')
    """

    def __init__(self, path: str | os.PathLike[str], *, n_frames: int | None = None, size: int | None = None) -> None:
        self.path = Path(path)
        self.n_frames = n_frames
        self.size = size
        if not self.path.is_dir():
            raise FileNotFoundError(f"VideoFolder: no folder {str(self.path)!r}.")
        listing = self.path / "metadata.jsonl"
        self.rows = _rows_from_metadata(listing) if listing.is_file() else _rows_from_pairs(self.path)
        self.files = [self.path / row["file_name"] for row in self.rows]
        self.captions = [str(row["text"]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return read_video(self.files[index], n_frames=self.n_frames, size=self.size), self.captions[index]


def _rows_from_metadata(listing: Path) -> list[dict[str, Any]]:
    rows = []
    folder = listing.parent.resolve()
    for where, row in _json_lines(listing):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f'{where}: expected {{"file_name": ..., "text": ...}}.')
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise ValueError(f"{where}: the caption (`text`) of {row['file_name']!r} is missing or empty.")
        video = (folder / row["file_name"]).resolve()
        if not video.is_relative_to(folder):
            raise ValueError(f"{where}: {row['file_name']!r} lies outside the folder.")
        if not video.is_file():
            raise FileNotFoundError(f"{where}: no video {row['file_name']!r} in the folder.")
        rows.append(row)
    if not rows:
        raise ValueError(f"{listing}: it lists no video.")
    return rows


def _rows_from_pairs(folder: Path) -> list[dict[str, Any]]:
    videos = sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
    if not videos:
        raise ValueError(
            f"VideoFolder: {str(folder)!r} has neither metadata.jsonl nor videos. "
            'Write one line {"file_name": ..., "text": ...} a video, or put name.txt beside each name.mp4.'
        )
    rows = []
    for video in videos:
        caption = video.with_suffix(".txt")
        if not caption.is_file():
            raise FileNotFoundError(f"VideoFolder: {str(video)!r} has no caption file {caption.name!r}.")
        text = " ".join(_read_text(caption).split())
        if not text:
            raise ValueError(f"VideoFolder: the caption file {str(caption)!r} is empty.")
        rows.append({"file_name": video.name, "text": text})
    return rows


def write_metadata(folder: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> Path:
    """Write `metadata.jsonl` of a `VideoFolder`, atomically.

    Args:
        folder: where the videos are.
        rows: one dict a video with `file_name` (relative to the folder), `text`, and whatever else is to be kept.

    Returns:
        The path of the file.
    """
    path = Path(folder) / "metadata.jsonl"
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


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
        found = [(str(path), line) for line in _read_text(path).splitlines() if line.strip()]
    elif suffix == ".jsonl":
        found = [(where, _prompt_of(where, row)) for where, row in _json_lines(path)]
    elif suffix == ".csv":
        reader = csv.DictReader(io.StringIO(_read_text(path)))
        found = [(f"{path}, line {reader.line_num}", _prompt_of(f"{path}", row)) for row in reader]
    else:
        raise ValueError(f"read_prompts: {str(path)!r} ends in {suffix!r}, expected .txt, .jsonl or .csv.")
    for where, prompt in found:
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty.")
    if not found:
        raise ValueError(f"read_prompts: {str(path)!r} holds no prompt.")
    return [prompt.strip() for _, prompt in found]


def _prompt_of(where: str, row: Any) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for key in PROMPT_KEYS:
            if key in row:
                return str(row[key] or "")
        keys = ", ".join(repr(str(key)) for key in row)
        raise ValueError(f"{where}: found {keys}, expected one of {', '.join(map(repr, PROMPT_KEYS))}.")
    raise ValueError(f"{where}: expected a string or an object with one of {', '.join(map(repr, PROMPT_KEYS))}.")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for each line of a .jsonl file that is not blank."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}).") from error

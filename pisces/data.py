"""Captioned videos: a folder of files, or the shards of `pisces.shards`.

They are the input of every command; `open_videos` says which of the two a path is. `pisces.video` reads and writes the
single file, `pisces.captions` reads texts; their public names are here too, so that `from pisces.data import ...` is
all that a user needs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pisces.captions import json_lines, read_prompts, read_text
from pisces.shards import VideoShards, digest_of, find_shards
from pisces.video import (
    VIDEO_SUFFIXES,
    Size,
    VideoReadError,
    atomic_path,
    cpu_frames,
    read_pictures,
    read_video,
    uniform_indices,
    video_bytes,
    write_video,
)

__all__ = [
    "CaptionedVideos",
    "VideoFolder",
    "VideoReadError",
    "VideoShards",
    "atomic_path",
    "cpu_frames",
    "find_videos",
    "is_video_folder",
    "open_videos",
    "read_pictures",
    "read_prompts",
    "read_video",
    "uniform_indices",
    "video_bytes",
    "write_metadata",
    "write_video",
]


class CaptionedVideos(Protocol):
    """What training and fitting use of a `VideoFolder` or `VideoShards`; any object with these will do."""

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
        n_frames, size, interpolation: as in `read_video`.

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

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_frames: int | None = None,
        size: Size | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        self.path = Path(path)
        self.n_frames = n_frames
        self.size = size
        self.interpolation = interpolation
        if not self.path.is_dir():
            raise FileNotFoundError(f"VideoFolder: no folder {str(self.path)!r}.")
        listing = self.path / "metadata.jsonl"
        self.rows = _rows_from_metadata(listing) if listing.is_file() else _rows_from_pairs(self.path)
        self.files = [self.path / row["file_name"] for row in self.rows]
        self.captions = [str(row["text"]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        file, how = self.files[index], self.interpolation
        return read_video(file, n_frames=self.n_frames, size=self.size, interpolation=how), self.captions[index]

    def digest(self, index: int) -> str:
        """Of what the frames of a video depend on: its bytes and how it is read, whatever it is called.

        Raises:
            VideoReadError: the file cannot be read.
        """
        file = self.files[index]
        try:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256")
        except OSError as error:
            raise VideoReadError(file, error.strerror or str(error)) from error
        return digest_of(content.digest(), self.n_frames, self.size, self.interpolation)


def open_videos(
    path: str | os.PathLike[str],
    *,
    n_frames: int | None = None,
    size: Size | None = None,
    interpolation: str = "bilinear",
) -> VideoFolder | VideoShards:
    """Open captioned videos: a folder of files, or WebDataset shards.

    Args:
        path: a folder for `VideoFolder`; a .tar file, a brace pattern such as `shards/{000000..000011}.tar`, or a
            folder that holds .tar files and no videos, for `VideoShards`.
        n_frames, size, interpolation: as in `read_video`.

    Raises:
        FileNotFoundError: there is nothing of that name, or something that it names is missing.
        ValueError: captions or shards are damaged or incomplete.

    Example:
        >>> _ = write_video("/tmp/pisces-folder/a.mp4", torch.rand(9, 3, 32, 32))
        >>> _ = write_metadata("/tmp/pisces-folder", [{"file_name": "a.mp4", "text": "noise"}])
        >>> len(open_videos("/tmp/pisces-folder", size=(16, 24)))
        1
    """
    kind = VideoFolder if is_video_folder(Path(path)) else VideoShards
    return kind(path, n_frames=n_frames, size=size, interpolation=interpolation)


def find_videos(path: str | os.PathLike[str]) -> None:
    """Check that what `open_videos` would open is there, without reading it.

    Raises:
        FileNotFoundError: naming the folder or shard that is missing.
        ValueError: a pattern whose braces do not match.
    """
    if not is_video_folder(Path(path)):
        find_shards(path)
    elif not Path(path).is_dir():
        raise FileNotFoundError(f"no such file or directory: {path}")


def is_video_folder(path: Path) -> bool:
    """Whether `open_videos` takes a path for a folder of files: it is no shard, no pattern, and no folder of shards."""
    if not path.is_dir():
        return path.suffix.lower() != ".tar" and "{" not in str(path) and not path.is_file()
    names = [entry.name.lower() for entry in os.scandir(path)]
    # An archive beside the videos that came out of it makes no shard of them.
    videos = "metadata.jsonl" in names or any(name.endswith(VIDEO_SUFFIXES) for name in names)
    return videos or not any(name.endswith(".tar") for name in names)


def _rows_from_metadata(listing: Path) -> list[dict[str, Any]]:
    rows = []
    folder = listing.parent.resolve()
    for where, row in json_lines(listing):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f'{where}: expected {{"file_name": ..., "text": ...}}.')
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise ValueError(f"{where}: the caption (`text`) of {row['file_name']!r} is missing or empty.")
        # by its name: a link that the folder's owner put there may lead anywhere
        video = Path(os.path.normpath(folder / row["file_name"]))
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
        text = " ".join(read_text(caption).split())
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

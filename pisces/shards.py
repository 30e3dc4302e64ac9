"""Captioned videos in WebDataset shards: .tar files whose members of one key are one sample.

The index is made by the standard library's `tarfile`: `webdataset` 1.0 reads shards in order only, while batch n of
a training run needs any sample; and its default decoders unpickle what a member holds. Here members are bytes, of which
a video goes to FFmpeg and a caption to UTF-8 or JSON. Nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from braceexpand import braceexpand
from torch import Tensor

from pisces.captions import prompt_of, to_text
from pisces.video import VIDEO_SUFFIXES, Size, VideoReadError, read_pictures, read_video

CAPTION_SUFFIXES = (".txt", ".json")
RESERVED = re.compile(r"__[^/]*__($|/)")  # names that the format keeps for itself, as webdataset reads it


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a shard.

    Attributes:
        shard: the .tar file.
        name: of the member.
        offset: of its first byte in the shard.
        size: in bytes.
    """

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        """The content.

        Raises:
            VideoReadError: the shard is gone, or shorter than it was.
        """
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise VideoReadError(str(self), error.strerror or str(error)) from error
        if len(content) < self.size:
            raise VideoReadError(str(self), "the shard has become shorter since it was opened")
        return content


def read_item(
    file: Path | Member, *, n_frames: int | None = None, size: Size | None = None, interpolation: str = "bilinear"
) -> Tensor:
    """Frames [T, C, H, W] of a video file or of a member of a shard; as `read_video`."""
    source = file.read() if isinstance(file, Member) else file
    return read_video(source, n_frames=n_frames, size=size, interpolation=interpolation, name=str(file))


def read_item_pictures(file: Path | Member) -> Iterator[Tensor]:
    """Pictures [C, H, W] of a video file or of a member of a shard, one after the other; as `read_pictures`."""
    yield from read_pictures(file.read() if isinstance(file, Member) else file, name=str(file))


class VideoShards(torch.utils.data.Dataset[tuple[Tensor, str]]):
    """Captioned videos of WebDataset shards, in the order of the shards and of the samples' first members.

    The members of a shard whose names are equal up to the first dot of the file name are one sample, wherever they
    are in the shard. It has one video and a caption: a .txt, or else a .json with the text under `prompt`, `text` or
    `caption`; what else it has is ignored. Captions are read and checked at once, videos when they are asked for.

    Args:
        path: a .tar file, a brace pattern such as `shards/{000000..000011}.tar`, or a folder of .tar files.
        n_frames, size, interpolation: as in `read_video`.

    Raises:
        FileNotFoundError: a shard is missing, or a folder has none.
        ValueError: a shard is no tar file or cut off; a sample lacks its video or caption, or has one twice.

    Example:
        >>> from pisces.video import write_video
        >>> _ = write_video("/tmp/pisces-shards/a.mp4", torch.rand(9, 3, 32, 32))
        >>> _ = Path("/tmp/pisces-shards/a.txt").write_text("noise")
        >>> with tarfile.open("/tmp/pisces-shards/000000.tar", "w") as shard:
        ...     for file in ("a.mp4", "a.txt"):
        ...         shard.add(f"/tmp/pisces-shards/{file}", arcname=file)
        >>> frames, caption = VideoShards("/tmp/pisces-shards/{000000..000000}.tar", n_frames=8)[0]
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
        self.files: list[Member] = []
        self.captions: list[str] = []
        for shard in find_shards(path):
            for video, caption in _samples(shard):
                self.files.append(video)
                self.captions.append(caption)
        if not self.files:
            raise ValueError(f"VideoShards: {str(self.path)!r} holds no sample.")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        file, how = self.files[index], self.interpolation
        return read_item(file, n_frames=self.n_frames, size=self.size, interpolation=how), self.captions[index]

    def digest(self, index: int) -> str:
        """As of `VideoFolder`: a video has the same digest in a shard as in a folder.

        Raises:
            VideoReadError: the shard cannot be read.
        """
        content = hashlib.sha256(self.files[index].read()).digest()
        return digest_of(content, self.n_frames, self.size, self.interpolation)


def digest_of(content: bytes, n_frames: int | None, size: Size | None, interpolation: str) -> str:
    """What the frames of a video depend on, as one text: the SHA-256 of its bytes and the arguments of reading it."""
    sides = (size, size) if isinstance(size, int) else size
    return hashlib.sha256(repr((content, n_frames, sides, interpolation)).encode()).hexdigest()


def find_shards(path: str | os.PathLike[str]) -> list[Path]:
    """The shards that a path names, all of them there; a folder's are sorted by name.

    Raises:
        FileNotFoundError: naming the first shard that is missing, or the folder without any.
        ValueError: a pattern whose braces do not match.
    """
    text, path = os.fspath(path), Path(path)
    if path.is_dir():
        shards = sorted(entry for entry in path.iterdir() if entry.suffix.lower() == ".tar" and entry.is_file())
        if not shards:
            raise FileNotFoundError(f"VideoShards: the folder {text!r} holds no .tar file.")
        return shards
    if path.is_file():
        return [path]
    shards = []
    try:
        for name in braceexpand(text, escape=False):
            if not Path(name).is_file():
                of = "" if name == text else f", of the pattern {text!r}"
                raise FileNotFoundError(f"VideoShards: no shard {name!r}{of}.")
            shards.append(Path(name))
    except ValueError as error:
        raise ValueError(f"VideoShards: the braces of {text!r} do not match: {error}.") from error
    return shards


def _samples(shard: Path) -> Iterator[tuple[Member, str]]:
    """Yield the video and the caption of each sample of a shard."""
    with shard.open("rb") as file:
        samples: dict[str, dict[str, Member]] = {}
        for member in _members(shard, file):
            folder, slash, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            # Without a stem it is a hidden file, such as macOS adds.
            if not stem or not dot or RESERVED.match(member.name):
                continue
            kinds = samples.setdefault(folder + slash + stem, {})
            kind = "video" if f".{suffix.lower()}" in VIDEO_SUFFIXES else f".{suffix.lower()}"
            if kind in kinds:
                raise ValueError(
                    f"VideoShards: {shard}: the key {folder + slash + stem!r} has {kinds[kind].name!r} and "
                    f"{member.name!r}, expected one of them. Give each sample a key of its own."
                )
            kinds[kind] = member
        for key, kinds in samples.items():
            if "video" not in kinds:
                raise ValueError(
                    f"VideoShards: {shard}: the sample {key!r} has {', '.join(kinds)} and no video, expected one of "
                    f"{', '.join(VIDEO_SUFFIXES)} behind the first dot of the name."
                )
            yield kinds["video"], _caption(file, key, kinds)


def _members(shard: Path, file: BinaryIO) -> Iterator[Member]:
    """Yield the plain files of a shard; raise ValueError unless the shard is whole."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.issparse():
                    raise tarfile.ReadError(f"{info.name!r} is stored as a sparse file")
                if info.size < 0:  # would lead tarfile back to this header, for ever
                    raise tarfile.ReadError(f"{info.name!r} has a negative size")
                if info.isreg():
                    yield Member(shard, info.name, info.offset_data, info.size)
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"VideoShards: cannot read {shard} as a tar file ({error}). A shard has to be whole and not compressed."
        ) from error
    # tarfile takes a damaged header for the end, and misses a cut between two members: a real end is a block of zeros.
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(
            f"VideoShards: {shard} is cut off or damaged at byte {end}: neither a file nor the end is there."
        )


def _caption(file: BinaryIO, key: str, kinds: dict[str, Member]) -> str:
    """The caption of a sample: its .txt, or else what its .json says."""
    member = next((kinds[suffix] for suffix in CAPTION_SUFFIXES if suffix in kinds), None)
    if member is None:
        video = kinds["video"]
        raise ValueError(f"VideoShards: {video} has no caption. Put {key}.txt or {key}.json into the shard.")
    file.seek(member.offset)
    text = to_text(str(member), file.read(member.size))
    if member is kinds.get(".json"):
        try:
            text = prompt_of(str(member), json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{member}: not JSON ({error.msg}).") from error
    text = " ".join(text.split())
    if not text:
        raise ValueError(f"VideoShards: the caption {str(member)!r} is empty.")
    return text

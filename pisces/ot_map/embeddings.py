"""Embeddings of captioned videos in a folder of shards: made once, by one process or several, and resumed."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pisces.data import VideoFolder, VideoReadError, VideoShards, atomic_path
from pisces.encoders import VideoTextEncoder
from pisces.encoders.base import refused_prompts
from pisces.ot_map.encoder_digest import ANY_FRAMES, EXACT, ROUNDED, encoder_facts
from pisces.processes import Processes

logger = logging.getLogger(__name__)

SHARD_PAIRS = 1024
BATCH_SIZE = 32  # divides SHARD_PAIRS, so that a batch does not depend on where a shard ends
LISTING = "embeddings.json"
FORMAT = 1
FAILED = ".failed"  # RANK.failed: what stopped a process; the next call removes it
PATIENCE = 6 * 3600.0  # seconds; a shard of large videos on a slow device takes an hour
Progress = Callable[[int], object]
"""Called with the number of videos that have been dealt with."""


@dataclass
class Embeddings:
    """Text and video embeddings of one encoder, row i of both from pair i.

    Attributes:
        text: [n, E] L2-normalised.
        video: [n, E] L2-normalised.
        captions: n captions.
        unreadable: (video, reason) of those that are left out: they could not be read, or the encoder refuses their
            caption.
    """

    text: Tensor
    video: Tensor
    captions: list[str]
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def join(cls, parts: list[Embeddings]) -> Embeddings:
        """One after the other."""
        return cls(
            torch.cat([part.text for part in parts]),
            torch.cat([part.video for part in parts]),
            [caption for part in parts for caption in part.captions],
            [video for part in parts for video in part.unreadable],
        )


@torch.no_grad()
def embed(
    videos: VideoFolder | VideoShards,
    model: VideoTextEncoder,
    items: range,
    *,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = lambda n: None,
) -> Embeddings:
    """Embed some of the videos with their captions; what is unreadable, wordless or not finite is listed.

    Args:
        videos: opened with the `n_frames` and `size` of the encoder.
        model: the encoder, on `device`.
        items: their numbers.
        batch_size: videos at a time; None is 32. Embeddings do not depend on it, beyond rounding.
        device: where the encoder is.
        progress: called after each batch.

    Returns:
        The embeddings, on the CPU.

    Raises:
        ValueError: a batch of nothing, or an encoder that refuses every caption, such as one without a tokenizer.
    """
    texts = [torch.empty(0, model.embed_dim)]
    embedded = [torch.empty(0, model.embed_dim)]
    captions: list[str] = []
    unreadable: list[tuple[str, str]] = []
    batch_size = BATCH_SIZE if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"embed: batch_size is {batch_size}, expected at least 1.")
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        frames: list[Tensor] = []
        words: list[str] = []
        read: list[int] = []
        refused = refused_prompts(model, [videos.captions[i] for i in batch])  # before videos are read in vain
        for k, i in enumerate(batch):
            if k in refused:
                unreadable.append((str(videos.files[i]), refused[k]))
                continue
            try:
                clip, caption = videos[i]
            except VideoReadError as error:
                unreadable.append((str(error.path), error.why))
                continue
            frames.append(clip)
            words.append(caption)
            read.append(i)
        if words:
            text = model.encode_text(words).embedding.float().cpu()
            video = model.encode_video(torch.stack(frames).to(device)).embedding.float().cpu()
            finite = text.isfinite().all(-1) & video.isfinite().all(-1)  # one broken pair would break every metric
            texts.append(text[finite])
            embedded.append(video[finite])
            captions += [word for word, sound in zip(words, finite.tolist(), strict=True) if sound]
            broken = [str(videos.files[i]) for i, sound in zip(read, finite.tolist(), strict=True) if not sound]
            unreadable += [
                (file, "the encoder gives it or its caption an embedding that is not finite") for file in broken
            ]
        progress(len(batch))
    return Embeddings(torch.cat(texts), torch.cat(embedded), captions, unreadable)


def extract(
    folder: str | Path,
    videos: VideoFolder | VideoShards,
    model: VideoTextEncoder,
    *,
    shard_pairs: int = SHARD_PAIRS,
    batch_size: int | None = None,
    processes: Processes | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = lambda n: None,
) -> None:
    """Fill a folder with the embeddings of captioned videos; shards that are there are skipped.

    The folder holds embeddings.json, which says of which encoder and videos they are, and for every 1,024 videos
    SHARD.safetensors with `text`, `video` and, in its header, captions and videos that were left out. A shard is
    written whole or not at all; a damaged one is logged and made again. What a shard holds depends on its videos only,
    neither on interruptions nor on the number of processes.

    Args:
        folder: made if missing.
        videos: opened with the `n_frames` and `size` of the encoder.
        model: the encoder, on `device`.
        shard_pairs: videos a shard.
        batch_size: videos at a time, as in `embed`.
        processes: those among which the shards are divided; None: this one alone.
        device: where the encoder is.
        progress: called with the videos of every batch, and of every shard that is there already.

    Raises:
        ValueError: the folder holds embeddings of another encoder or of other videos, or is none of embeddings.
    """
    folder = Path(folder)
    listing = {
        "format": FORMAT,
        **encoder_facts(model),
        "videos": str(videos.path),
        "videos_sha256": _videos_digest(videos),
        "n_videos": len(videos),
        "shard_pairs": shard_pairs,
        "embed_dim": model.embed_dim,
    }
    _open_folder(folder, listing)
    shards = _shards(listing)
    processes = processes or Processes()
    wanted = []
    for k in processes.share(len(shards)):
        if _is_whole(_shard_file(folder, k)):
            progress(len(shards[k]))
        else:
            wanted.append(k)
    if processes.is_main:  # of an earlier call
        for file in folder.glob(f"*{FAILED}"):
            file.unlink()
    # From here on a shard that is there is whole, so `wait_for_shards` need not read them.
    processes.wait()
    try:
        for k in wanted:
            part = embed(videos, model, shards[k], batch_size=batch_size, device=device, progress=progress)
            _write_shard(_shard_file(folder, k), part)
    except BaseException as error:
        if processes.count > 1:  # others may wait for these shards
            (folder / f"{processes.rank}{FAILED}").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise


def wait_for_shards(folder: str | Path, *, patience: float = PATIENCE, seconds: float = 1.0) -> None:
    """Go on when all shards are there: other processes may have more to do than a collective operation would wait.

    Args:
        folder: that `extract` fills.
        patience: seconds without a new shard after which the others are taken for dead.
        seconds: between two looks.

    Raises:
        ValueError: another process failed, or no shard was written for `patience` seconds.
    """
    folder, files = Path(folder), _shard_files(Path(folder))
    n_missing, since = len(files) + 1, time.monotonic()
    while missing := [file.name for file in files if not file.is_file()]:
        lacks = f"{folder} lacks {len(missing)} of {len(files)} shards, the first {missing[0]}"
        failed = {file.name.removesuffix(FAILED): file.read_text("utf-8") for file in folder.glob(f"*{FAILED}")}
        if failed:
            whose = ", ".join(f"process {rank} failed ({why})" for rank, why in sorted(failed.items()))
            raise ValueError(f"wait_for_shards: {whose}, and {lacks}. Call again: what is there is kept.")
        if len(missing) < n_missing:
            n_missing, since = len(missing), time.monotonic()
        if time.monotonic() - since > patience:
            raise ValueError(
                f"wait_for_shards: {lacks}, and none was written for {patience:g} seconds: the process that makes it "
                "is dead or slow. Look after it and call again, or wait longer."
            )
        time.sleep(seconds)


def read_embeddings(folder: str | Path) -> tuple[Embeddings, dict[str, Any]]:
    """Read what `extract` wrote; neither videos nor encoder are needed.

    Args:
        folder: of all shards.

    Returns:
        The embeddings in the order of the videos, and the listing of the folder.

    Raises:
        FileNotFoundError: no listing, or shards that have not been made yet.
        ValueError: a damaged listing or shard, by name.
    """
    folder = Path(folder)
    listing = _read_listing(folder)
    files = _shard_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"read_embeddings: {folder} lacks {len(missing)} of {len(files)} shards, the first {missing[0]}. "
            "Give the videos, too, to make them."
        )
    return Embeddings.join([_read_shard(file) for file in files]), listing


def _open_folder(folder: Path, listing: dict[str, Any]) -> None:
    """Write the listing, or compare with the one that is there; where the videos lie may change."""
    if not (folder / LISTING).is_file():
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            raise ValueError(f"extract: {folder} holds .safetensors files but no {LISTING}. Name another folder.")
        with atomic_path(folder / LISTING) as temporary:
            temporary.write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
        return
    there = _read_listing(folder)
    # an encoder without a digest is told apart by its class
    encoder = EXACT if EXACT in listing else "encoder"
    for what, key, name in (("encoder", encoder, "encoder"), ("videos", "videos_sha256", "videos")):
        if there.get(key) != listing[key]:
            raise ValueError(
                f"extract: {folder} holds embeddings of other {what} ({there.get(name)!r}, {there.get(key)}), "
                f"expected {listing[name]!r}, {listing[key]}. Name another folder, or delete this one."
            )
    # folders of older versions lack some digests, which say nothing that the exact one does not
    ignored = ("videos", ROUNDED, ANY_FRAMES)
    if any(there.get(name) != value for name, value in listing.items() if name not in ignored):
        raise ValueError(f"extract: {folder} has shards of {there.get('shard_pairs')} pairs. Name another folder.")


def _read_listing(folder: Path) -> dict[str, Any]:
    file = folder / LISTING
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {LISTING}, expected a folder of embeddings.")
    try:
        listing = json.loads(file.read_text(encoding="utf-8"))
        known = listing["format"] == FORMAT and listing["n_videos"] > 0 and listing["shard_pairs"] > 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Delete the folder and make it again.") from error
    if not known:
        raise ValueError(f"{file} has format {listing['format']}, expected {FORMAT}: another version wrote it.")
    return dict(listing)


def _shards(listing: dict[str, Any]) -> list[range]:
    """The numbers of the videos of each shard."""
    n, size = listing["n_videos"], listing["shard_pairs"]
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def _shard_file(folder: Path, k: int) -> Path:
    return folder / f"{k:06d}.safetensors"


def _shard_files(folder: Path) -> list[Path]:
    return [_shard_file(folder, k) for k in range(len(_shards(_read_listing(folder))))]


def _is_whole(file: Path) -> bool:
    """Whether a shard is there; a damaged one is removed."""
    if not file.is_file():
        return False
    try:
        _read_shard(file)
    except ValueError as error:
        logger.warning("%s It is made again.", error)
        file.unlink()
        return False
    return True


def _write_shard(file: Path, part: Embeddings) -> None:
    tensors = {"text": part.text.contiguous(), "video": part.video.contiguous()}
    words = {"captions": part.captions, "unreadable": part.unreadable}
    # one entry: safetensors writes several in any order, and equal shards are to have equal bytes
    header = json.dumps({**words, "sha256": _content_digest(tensors, words)})
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, metadata={"pairs": header})


def _read_shard(file: Path) -> Embeddings:
    try:
        with safe_open(file, framework="pt") as opened:
            words = json.loads((opened.metadata() or {})["pairs"])
            tensors = {name: opened.get_tensor(name) for name in ("text", "video")}
        if _content_digest(tensors, words) != words["sha256"]:
            raise ValueError("its SHA-256 is not the recorded one")
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"embeddings: {file} is damaged ({error}). Delete it, and give the videos to make it again."
        ) from error
    return Embeddings(**tensors, captions=words["captions"], unreadable=[(v, why) for v, why in words["unreadable"]])


def _content_digest(tensors: dict[str, Tensor], words: dict[str, Any]) -> str:
    hasher = hashlib.sha256(json.dumps([words["captions"], words["unreadable"]]).encode())
    for tensor in tensors.values():
        hasher.update(repr(tuple(tensor.shape)).encode())
        hasher.update(tensor.numpy())
    return hasher.hexdigest()


def _videos_digest(videos: VideoFolder | VideoShards) -> str:
    """Of names, lengths and captions: quick, wherever the folder lies; new pixels of the same length go unnoticed."""
    hasher = hashlib.sha256()
    for (name, size), caption in zip(_names(videos), videos.captions, strict=True):
        hasher.update(json.dumps([name, size, caption]).encode())
    return hasher.hexdigest()


def _names(videos: VideoFolder | VideoShards) -> Iterator[tuple[str, int]]:
    for file in videos.files:
        if isinstance(file, Path):
            yield file.relative_to(videos.path).as_posix(), file.stat().st_size
        else:
            yield f"{file.shard.name}/{file.name}", file.size

"""What commands that look at videos are given: videos with prompts of folders, shards or tables; transport; device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pisces.captions import read_pairs
from pisces.data import VideoShards, is_video_folder, open_videos
from pisces.encoders import Encoder
from pisces.encoders.base import refused_prompts
from pisces.pipelines.trainable import best_device
from pisces.rewards import Transport
from pisces.shards import Member
from pisces.video import VIDEO_SUFFIXES


class Item(NamedTuple):
    """A video and the text to score it for.

    Attributes:
        file: the video file, or the member of a shard.
        prompt: the text.
        where: the row of the table that names them; empty where there is no table.
    """

    file: Path | Member
    prompt: str
    where: str = ""


def folder_items(folder: Path, prompt: str | None) -> list[Item]:
    """Videos of a folder or of shards with their captions, or all with one prompt.

    Raises:
        FileNotFoundError: no such folder or shard, or a caption is missing.
        ValueError: no video, a bad caption file, or a damaged shard.
    """
    if prompt is None or not folder.is_dir() or not is_video_folder(folder):
        videos = open_videos(folder)
        return [Item(file, prompt or caption) for file, caption in zip(videos.files, videos.captions, strict=True)]
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"score: {str(folder)!r} holds no video ({', '.join(VIDEO_SUFFIXES)}).")
    return [Item(file, prompt) for file in files]


def pair_items(table: Path) -> list[Item]:
    """Rows of a .csv or .jsonl; a video may also be SHARD.tar/MEMBER, as scores of shards name it.

    Raises:
        FileNotFoundError: no such table.
        ValueError: a broken row, or a damaged shard.
    """
    shards: dict[Path, dict[Path, Member]] = {}
    items = []
    for video, prompt, where in read_pairs(table):
        shard = next((p for p in video.parents if p.suffix.lower() == ".tar" and p.is_file()), None)
        if shard is not None and shard not in shards:
            shards[shard] = {Path(str(member)): member for member in VideoShards(shard).files}
        # a member that is not there stays a path, and is unreadable as an absent file is
        file = video if shard is None else shards[shard].get(video, video)
        items.append(Item(file, prompt, where))
    return items


def check_items(encoder: Encoder, items: Sequence[Item], who: str) -> dict[str, str]:
    """Prompts that an encoder refuses, with its reasons: asked before any video is decoded. Some have to remain.

    Raises:
        ValueError: every prompt is refused; the first of them is named.
    """
    prompts = list(dict.fromkeys(item.prompt for item in items))
    refused = {prompts[i]: why for i, why in refused_prompts(encoder, prompts).items()}
    if len(refused) == len(prompts):
        where = items[0].where or items[0].file
        raise ValueError(f"{who}: no video has a prompt that this encoder reads; {where}: {refused[items[0].prompt]}")
    return refused


def choose_device(name: str | None, who: str) -> torch.device:
    """The device of that name; None is the first GPU if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    try:
        device = torch.device(name or best_device())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].split(": ")[-1]
        raise ValueError(
            f"{who}: --device {name} is not there ({why}), expected such as cpu, cuda or cuda:1."
        ) from None
    return device


def choose_transport(who: str, *, tau: float | None, mass: float | None, vanilla: bool = False) -> Transport | None:
    """The transport of the options --tau, --mass and --vanilla, of which at most one is given.

    Raises:
        ValueError: more than one, or a number that is no share.
    """
    options = {"--tau": tau, "--mass": mass}
    given = [name for name, value in options.items() if value is not None] + ["--vanilla"] * vanilla
    if len(given) > 1:
        raise ValueError(f"{who}: got {' and '.join(given)}, expected one of them at most.")
    for name, value in options.items():
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{who}: {name} is {value}, expected more than 0 and at most 1.")
    if vanilla:
        return None
    if mass is not None:
        return Transport(mass=mass)
    return Transport() if tau is None else Transport(tau=tau)


def transport_name(transport: Transport) -> str:
    """Such as "tau 0.9" or "mass 0.7"."""
    return f"tau {transport.tau:g}" if transport.mass is None else f"mass {transport.mass:g}"


def transport_settings(transport: Transport | None) -> dict[str, Any] | None:
    """For a report: what was used, without the `tau` that a `mass` replaces."""
    if transport is None:
        return None
    settings = asdict(transport)
    del settings["tau" if transport.mass is not None else "mass"]
    return settings

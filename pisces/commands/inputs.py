"""What commands that look at videos are given: videos with prompts, of folders, shards or tables; rewards; device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pisces.captions import read_pairs
from pisces.config import resolve_path
from pisces.data import VideoReadError, VideoShards, is_video_folder, open_videos
from pisces.encoders import Encoder, load_encoder
from pisces.encoders.base import refused_prompts
from pisces.ot_map import Alignment
from pisces.pipelines.trainable import best_device
from pisces.rewards import CompositeReward, QualityReward, Reward, SemanticReward, Transport
from pisces.rewards.base import check_match_head
from pisces.sections import override, section
from pisces.shards import Member, read_item
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


def folder_items(folder: Path, prompt: str | None, who: str) -> list[Item]:
    """Videos of a folder or of shards with their captions, or the same videos all with one prompt.

    With a prompt captions may be missing; of a folder that has neither metadata.jsonl nor a video of its own, the
    videos of its subfolders are taken then.

    Args:
        folder: what `open_videos` opens.
        prompt: replaces the captions; None reads them.
        who: name of the command, for the message.

    Raises:
        FileNotFoundError: no such folder or shard, or a caption is missing.
        ValueError: no video, a bad caption file, or a damaged shard.
    """
    if prompt is None or not (folder.is_dir() and is_video_folder(folder)) or (folder / "metadata.jsonl").is_file():
        videos = open_videos(folder)
        return [Item(file, prompt or caption) for file, caption in zip(videos.files, videos.captions, strict=True)]
    for pattern in ("*", "**/*"):
        files = sorted(p for p in folder.glob(pattern) if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
        if files:
            return [Item(file, prompt) for file in files]
    raise ValueError(
        f"{who}: {str(folder)!r} holds no video, expected files ending in {', '.join(VIDEO_SUFFIXES)}. Name the folder "
        "that they are in."
    )


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
    """The device of that name, tried out.

    Args:
        name: such as "cuda:1"; None is the first GPU if there is one, else the CPU.
        who: name of the command, for the message.

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


class TransportChoice(NamedTuple):
    """The transport that a command's options ask for.

    Attributes:
        transport: of the words to the video tokens; None leaves the cross-attention as it is.
        option: which of --tau, --mass, --vanilla and --transport was given, the first; None where none was.
    """

    transport: Transport | None
    option: str | None


def choose_transport(
    who: str,
    *,
    tau: float | None = None,
    mass: float | None = None,
    settings: Sequence[str] | None = None,
    vanilla: bool = False,
) -> TransportChoice:
    """The transport of the options --tau, --mass, --transport and --vanilla.

    Args:
        who: name of the command, for the messages.
        tau, mass: at most one of them, and not beside `vanilla`.
        settings: of the form "key=value", the fields of `Transport`; what is not named has its default.
        vanilla: no transport.

    Raises:
        ValueError: options that exclude each other, an unknown setting, or a value out of its range.
    """
    options = {"--tau": tau, "--mass": mass}
    given = [name for name, value in options.items() if value is not None] + ["--vanilla"] * vanilla
    if len(given) > 1:
        raise ValueError(f"{who}: got {' and '.join(given)}, expected one of them at most.")
    for name, value in options.items():
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{who}: {name} is {value}, expected more than 0 and at most 1.")
    values: dict[str, Any] = {}
    for setting in settings or ():
        if "=" not in setting:
            raise ValueError(f"{who}: --transport is {setting!r}, expected KEY=VALUE, such as rows=mass.")
        override(values, setting)
    if vanilla and values:
        raise ValueError(f"{who}: got --transport and --vanilla, which has none. Leave one of them out.")
    for name, value in options.items():
        if value is not None and values.setdefault(name.removeprefix("--"), value) != value:
            raise ValueError(f"{who}: got {name} and the same setting in --transport. Leave one of them out.")
    given += ["--transport"] * bool(settings)
    return TransportChoice(None if vanilla else section(Transport, values, "--transport"), next(iter(given), None))


class LoadedRewards(NamedTuple):
    """What `load_rewards` returns.

    Attributes:
        encoder: of the rewards.
        rewards: quality, and semantic where the encoder has a match head.
        settings: how they were made, for a report.
    """

    encoder: Encoder
    rewards: CompositeReward
    settings: dict[str, Any]


def load_rewards(
    who: str, encoder: str, ot_map: Path | None, choice: TransportChoice, place: torch.device
) -> LoadedRewards:
    """The rewards by which a command measures videos.

    Args:
        who: name of the command, for the messages.
        encoder: directory of an encoder, or "packaged".
        ot_map: alignment file; None compares the embeddings as they are.
        choice: transport of the semantic reward.
        place: device of the rewards.

    Raises:
        FileNotFoundError: no such encoder or alignment.
        ValueError: the alignment is for another encoder, or a transport was asked of one without a match head.
    """
    model = load_encoder(resolve_path(encoder))
    matches = getattr(model, "has_match_head", True)
    if not matches and choice.option is not None:
        check_match_head(model, f"{who}: {choice.option} is a setting of the semantic reward")
    terms: dict[str, Reward] = {"quality": QualityReward(model, Alignment.load(ot_map) if ot_map else None)}
    if matches:
        terms["semantic"] = SemanticReward(model, transport=choice.transport)
    settings: dict[str, Any] = {
        "encoder": encoder,
        "ot_map": str(ot_map) if ot_map else None,
        "match_head": matches,
        "partial_transport": matches and choice.transport is not None,
        "transport": transport_settings(choice.transport if matches else None),
        "device": str(place),
    }
    return LoadedRewards(model, CompositeReward(terms, dict.fromkeys(terms, 1.0)).to(place), settings)


def read_batches(
    items: Sequence[Item],
    numbers: Sequence[int],
    batch_size: int,
    how_to_read: dict[str, Any],
    skip: Callable[[int, str], object],
    doing: str,
) -> Iterator[tuple[Tensor, list[int]]]:
    """Read videos batch by batch.

    Args:
        items: the videos.
        numbers: which of them are read.
        batch_size: most videos at a time.
        how_to_read: `read_options` of an encoder.
        skip: called with the number of a video that cannot be read and the reason.
        doing: what the progress bar says.

    Yields:
        Frames [B, T, 3, H, W] and the numbers of their items.
    """
    batch: dict[int, Tensor] = {}
    # disable=None: no bar where stderr is no terminal
    for i in tqdm(numbers, desc=doing, unit="video", disable=None if len(numbers) > batch_size else True):
        try:
            batch[i] = read_item(items[i].file, **how_to_read)
        except VideoReadError as error:
            skip(i, error.why)
        if len(batch) == batch_size:
            yield torch.stack(list(batch.values())), list(batch)
            batch = {}
    if batch:
        yield torch.stack(list(batch.values())), list(batch)


def transport_name(transport: Transport) -> str:
    """Such as "tau 0.9" or "mass 0.7, rows mass": the share, and what is not as usual."""
    share = f"tau {transport.tau:g}" if transport.mass is None else f"mass {transport.mass:g}"
    settings, usual = asdict(transport), asdict(Transport())
    others = [f"{name} {value}" for name, value in settings.items() if value != usual[name]]
    return ", ".join([share, *(text for text in others if not text.startswith(("tau ", "mass ")))])


def transport_settings(transport: Transport | None) -> dict[str, Any] | None:
    """For a report: what was used, without the `tau` that a `mass` replaces."""
    if transport is None:
        return None
    settings = asdict(transport)
    del settings["tau" if transport.mass is not None else "mass"]
    return settings

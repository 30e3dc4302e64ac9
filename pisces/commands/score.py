"""`pisces score`: rewards of video files for prompts."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pisces.commands.inputs import Item, TransportChoice, check_items, choose_device, load_rewards, read_batches
from pisces.commands.leverage import evenly, measured, print_leverage
from pisces.data import atomic_path
from pisces.encoders import read_options
from pisces.encoders.tiny import unknown_words
from pisces.rewards import Transport
from pisces.rewards.base import check_match_head


@dataclass(frozen=True)
class Scores:
    """What became of every video.

    Attributes:
        items: the videos with their prompts.
        settings: how they were scored.
        found: by the number of the item, dicts with file, prompt and either quality (a cosine), semantic (log of the
            match probability) and match (the probability), or why the video could not be scored. Without a match head
            semantic and match are None.
    """

    items: Sequence[Item]
    settings: dict[str, Any]
    found: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def in_order(self) -> list[dict[str, Any]]:
        """All that was found, in the order of the items."""
        return [self.found[i] for i in sorted(self.found)]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rewards of those videos that could be scored."""
        return [row for row in self.in_order if "why" not in row]

    @property
    def unreadable(self) -> list[dict[str, Any]]:
        """The others, with the reasons."""
        return [row for row in self.in_order if "why" in row]

    def enter(self, i: int, **values: float | str | None) -> None:
        """Enter what was found about an item."""
        item = self.items[i]
        if item.where and "why" in values:
            values["why"] = f"{item.where}: {values['why']}"
        self.found[i] = {"file": str(item.file), "prompt": item.prompt, **values}


def score(
    items: Sequence[Item],
    *,
    encoder: str,
    ot_map: Path | None,
    choice: TransportChoice,
    json_file: Path | None,
    csv_file: Path | None,
    device: str | None,
    batch_size: int,
    leverage: int,
) -> Scores:
    """Score videos, print the table, write the files.

    A video that cannot be read, or whose prompt the encoder refuses, is skipped with the reason. The files are replaced
    as the batches end, so that a call that is stopped leaves what it has found. An encoder without a match head gives
    the quality reward alone, which is said.

    Args:
        items: videos with prompts.
        encoder: directory of an encoder, or "packaged".
        ot_map: alignment file; None compares the embeddings as they are.
        choice: transport of the words to the video tokens.
        json_file: receives settings, scores, unreadable videos, and how many are pending.
        csv_file: receives one line a video in the order of the items, unreadable ones with their reason. `pair_items`
            reads it: a relative name of a video is written relative to the file's folder.
        device: of encoder and alignment; None is the first GPU if there is one, else the CPU.
        batch_size: videos that are scored at a time.
        leverage: most videos, evenly spread and held in memory, of which the leverage of attention is measured, too; 0
            measures none.

    Returns:
        The scores.

    Raises:
        FileNotFoundError: no such encoder or alignment.
        ValueError: the alignment is for another encoder, no prompt has a word, there is no such device, settings of the
            transport or the leverage are asked of an encoder without a match head, or the leverage of one video.
    """
    place = choose_device(device, "score")
    moved = choice.transport or Transport()  # whose leverage is measured
    model, rewards, settings = load_rewards("score", encoder, ot_map, choice, place)
    if leverage:
        check_match_head(model, "score: --leverage")
    refused = check_items(model, items, "score")
    readable = [i for i, item in enumerate(items) if item.prompt not in refused]
    if leverage and len(readable) < 2:
        raise ValueError("score: --leverage got one video, expected at least two for a standard deviation.")
    settings["leverage"] = None
    scores, files = Scores(items, settings), _Files(json_file, csv_file)
    for i, item in enumerate(items):
        if item.prompt in refused:
            scores.enter(i, why=refused[item.prompt])
    chosen = {readable[k] for k in evenly(len(readable), leverage)} if leverage else set()
    kept: dict[int, Tensor] = {}
    how, skip = read_options(model), lambda i, why: scores.enter(i, why=why)
    for frames, batch in read_batches(items, readable, batch_size, how, skip, "scoring"):
        # copies: a view would hold the whole batch
        kept |= {i: video.clone() for i, video in zip(batch, frames, strict=True) if i in chosen}
        with torch.no_grad():
            terms = rewards.terms(frames.to(place), [items[i].prompt for i in batch])
        for k, i in enumerate(batch):
            found: dict[str, float | None] = {"quality": terms["quality"][k].item(), "semantic": None, "match": None}
            if settings["match_head"]:
                found |= {"semantic": terms["semantic"][k].item(), "match": terms["semantic"][k].exp().item()}
            scores.enter(i, **found)
        files.write(scores)
    files.write(scores, last=True)
    if len(kept) > 1:
        texts = [items[i].prompt for i in kept]
        settings["leverage"] = measured(model, list(kept.values()), texts, moved, place, batch_size)
        files.write(scores, last=True)
    _print(
        scores,
        note=unknown_words(model, [items[i].prompt for i in readable]),
        packaged=encoder == "packaged",
        what="scored" if refused else "read",
    )
    if settings["leverage"]:
        print_leverage(settings["leverage"], moved)
    elif leverage:
        Console(stderr=True).print("pisces: fewer than two videos could be read: no leverage", style="red")
    return scores


class _Files:
    """The files of a call, replaced as a whole whenever something new is found."""

    def __init__(self, json_file: Path | None, csv_file: Path | None) -> None:
        self.json_file, self.csv_file = json_file, csv_file
        self.ended, self.took = 0.0, 0.0

    def write(self, scores: Scores, *, last: bool = False) -> None:
        """Write everything. Files that take long are not written after every batch: a tenth of the time is theirs."""
        begun = time.monotonic()
        if self.took > 0.5 and begun - self.ended < 10 * self.took and not last:
            return
        if self.json_file:
            pending = len(scores.items) - len(scores.found)
            content = {**scores.settings, "scores": scores.rows, "unreadable": scores.unreadable, "pending": pending}
            with atomic_path(self.json_file) as temporary:
                temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if self.csv_file:
            _write_csv(self.csv_file, scores)
        self.ended = time.monotonic()
        self.took = self.ended - begun


def _write_csv(path: Path, scores: Scores) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file", "prompt", "quality", "semantic", "match", "why"])
        writer.writeheader()
        writer.writerows(row | {"file": _seen_from(path.parent, row["file"])} for row in scores.in_order)


def _seen_from(folder: Path, file: str) -> str:
    """The name of a video for a table in another folder; an absolute one stays as it is."""
    if os.path.isabs(file):
        return file
    # both with links resolved: `..` behind a link leads elsewhere than its name says
    return os.path.relpath(
        os.path.join(os.path.realpath(os.path.dirname(file)), os.path.basename(file)), os.path.realpath(folder)
    )


def _print(scores: Scores, *, note: str, packaged: bool, what: str) -> None:
    console, matches = Console(), scores.settings["match_head"]
    if scores.rows:
        table = Table()
        table.add_column("video", overflow="fold")
        table.add_column("prompt", overflow="fold")
        formats = {"quality": "+.3f", "semantic": "+.3f", "match": ".3f"} if matches else {"quality": "+.3f"}
        for key in formats:
            table.add_column(key, justify="right", no_wrap=True)
        for row in scores.rows:
            numbers = [format(row[key], how) for key, how in formats.items()]
            # Text: brackets of a name or a prompt are no markup
            table.add_row(Text(Path(row["file"]).name), Text(row["prompt"]), *numbers)
        if len(scores.rows) > 1:
            means = {key: sum(row[key] for row in scores.rows) / len(scores.rows) for key in formats}
            table.add_section()
            table.add_row("mean", "", *(format(means[key], how) for key, how in formats.items()))
        console.print(table)
        legend = "quality: cosine of text and video embedding"
        if matches:
            legend += "; semantic: log-probability that the text matches; match: that probability"
        console.print(f"{legend}.", style="dim")
        if not matches:
            console.print(
                "This encoder has no match head, which the semantic reward reads: semantic and match are left empty.",
                style="yellow",
            )
        if packaged:
            console.print(
                "Encoder: the packaged small one. It knows 32-pixel videos of moving shapes and nothing else; "
                "give --encoder for other videos.",
                style="dim",
            )
        if note:
            console.print(note, style="yellow")
    errors = Console(stderr=True, soft_wrap=True)
    for entry in scores.unreadable:
        errors.print(f"pisces: skipped {entry['file']}: {entry['why']}", style="red", markup=False, highlight=False)
    if scores.unreadable:
        counts = f"{len(scores.unreadable)} of {len(scores.found)} videos"
        errors.print(f"pisces: {counts} could not be {what}", style="red")

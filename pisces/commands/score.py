"""`pisces score`: rewards of video files for prompts."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from pisces.commands.inputs import Item
from pisces.config import resolve_path
from pisces.data import VideoReadError, atomic_path
from pisces.encoders import load_encoder
from pisces.ot_map import Alignment
from pisces.rewards import CompositeReward, QualityReward, SemanticReward, Transport
from pisces.shards import read_item

BATCH_SIZE = 16


@dataclass(frozen=True)
class Scores:
    """What became of every video.

    Attributes:
        items: the videos with their prompts.
        found: by the number of the item, dicts with file, prompt and either quality (a cosine), semantic (log of the
            match probability) and match (the probability), or why the video could not be scored.
    """

    items: Sequence[Item]
    found: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def in_order(self) -> list[dict[str, Any]]:
        """All that was found, in the order of the items."""
        return [self.found[i] for i in sorted(self.found)]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rewards of those videos that could be read."""
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
    vanilla: bool,
    json_file: Path | None,
    csv_file: Path | None,
) -> Scores:
    """Score videos, print the table, write the files.

    Args:
        items: videos with prompts.
        encoder: directory of an encoder, or "packaged".
        ot_map: alignment file; None compares the embeddings as they are.
        vanilla: leave the cross-attention as it is, without partial transport.
        json_file: receives settings, scores and unreadable files.
        csv_file: receives one line a video in the order of the items, unreadable ones with their reason. `pair_items`
            reads it: a relative name of a video is written relative to the file's folder.

    Returns:
        The scores.

    Raises:
        FileNotFoundError: no such encoder or alignment.
        ValueError: the alignment is for another encoder, or a prompt is empty.
    """
    model = load_encoder(resolve_path(encoder))
    transport = None if vanilla else Transport()
    rewards = CompositeReward(
        {
            "quality": QualityReward(model, Alignment.load(ot_map) if ot_map else None),
            "semantic": SemanticReward(model, transport=transport),
        },
        {"quality": 1.0, "semantic": 1.0},
    )
    scores = _score(rewards, items, model.n_frames, model.size)
    _print(scores, note=unknown_words(model, [item.prompt for item in items]), packaged=encoder == "packaged")
    settings = {"encoder": encoder, "ot_map": str(ot_map) if ot_map else None, "partial_transport": not vanilla}
    if json_file:
        with atomic_path(json_file) as temporary:
            content = {**settings, "scores": scores.rows, "unreadable": scores.unreadable}
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if csv_file:
        _write_csv(csv_file, scores)
    return scores


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


@torch.no_grad()
def _score(rewards: CompositeReward, items: Sequence[Item], n_frames: int, size: int) -> Scores:
    scores = Scores(items)
    batch: list[tuple[int, torch.Tensor]] = []

    def flush() -> None:
        if batch:
            terms = rewards.terms(torch.stack([frames for _, frames in batch]), [items[i].prompt for i, _ in batch])
            for (i, _), quality, semantic in zip(batch, terms["quality"], terms["semantic"], strict=True):
                scores.enter(i, quality=quality.item(), semantic=semantic.item(), match=semantic.exp().item())
            batch.clear()

    # disable=None: no bar where stderr is no terminal
    bar = tqdm(items, desc="scoring", unit="video", disable=None if len(items) > BATCH_SIZE else True)
    for i, item in enumerate(bar):
        try:
            batch.append((i, read_item(item.file, n_frames=n_frames, size=size)))
        except VideoReadError as error:
            scores.enter(i, why=error.why)
        if len(batch) == BATCH_SIZE:
            flush()
    flush()
    return scores


def unknown_words(model: Any, prompts: Sequence[str]) -> str:
    """A remark on words that a word-level encoder has never seen, empty where there are none."""
    known = getattr(model, "word_index", None)
    if known is None:
        return ""
    from pisces.encoders.tiny import PAD, SEP, UNK

    ids = model.token_ids(sorted(set(prompts)))
    words = int(((ids != known[PAD]) & (ids != known[SEP])).sum())
    unknown = int((ids == known[UNK]).sum())
    return f"{unknown} of {words} words are unknown to this encoder and look alike to it." if unknown else ""


def _print(scores: Scores, *, note: str, packaged: bool) -> None:
    console = Console()
    if scores.rows:
        table = Table()
        table.add_column("video", overflow="fold")
        table.add_column("prompt", overflow="fold")
        table.add_column("quality", justify="right", no_wrap=True)
        table.add_column("semantic", justify="right", no_wrap=True)
        table.add_column("match", justify="right", no_wrap=True)
        for row in scores.rows:
            numbers = (f"{row['quality']:+.3f}", f"{row['semantic']:+.3f}", f"{row['match']:.3f}")
            # Text: brackets of a name or a prompt are no markup
            table.add_row(Text(Path(row["file"]).name), Text(row["prompt"]), *numbers)
        if len(scores.rows) > 1:
            means = [
                sum(row[key] for row in scores.rows) / len(scores.rows) for key in ("quality", "semantic", "match")
            ]
            table.add_section()
            table.add_row("mean", "", f"{means[0]:+.3f}", f"{means[1]:+.3f}", f"{means[2]:.3f}")
        console.print(table)
        console.print(
            "quality: cosine of text and video embedding; semantic: log-probability that the text matches; "
            "match: that probability.",
            style="dim",
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
        total = len(scores.rows) + len(scores.unreadable)
        errors.print(f"pisces: {len(scores.unreadable)} of {total} videos could not be read", style="red")

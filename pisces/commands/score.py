"""`pisces score`: rewards of video files for prompts."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from pisces.config import resolve_path
from pisces.data import VideoReadError, atomic_path, is_video_folder, open_videos
from pisces.encoders import load_encoder, read_options
from pisces.ot_map import Alignment
from pisces.rewards import CompositeReward, QualityReward, SemanticReward, Transport
from pisces.shards import Member, read_item
from pisces.video import VIDEO_SUFFIXES

BATCH_SIZE = 16


@dataclass(frozen=True)
class Scores:
    """Rewards of those videos that could be read, and the reasons for the others.

    Attributes:
        rows: dicts with file, prompt, quality (a cosine), semantic (log of the match probability) and match (the
            probability).
        unreadable: dicts with file and why.
    """

    rows: list[dict[str, Any]]
    unreadable: list[dict[str, str]]


def score(
    items: Sequence[tuple[Path | Member, str]],
    *,
    encoder: str,
    ot_map: Path | None,
    vanilla: bool,
    json_file: Path | None,
    csv_file: Path | None,
) -> Scores:
    """Score videos, print the table, write the files.

    Args:
        items: (video file or member of a shard, prompt) pairs.
        encoder: directory of an encoder, or "packaged".
        ot_map: alignment file; None compares the embeddings as they are.
        vanilla: leave the cross-attention as it is, without partial transport.
        json_file: receives settings, scores and unreadable files.
        csv_file: receives one line a video, unreadable ones with their reason.

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
    scores = _score(rewards, items, read_options(model))
    _print(scores, note=unknown_words(model, [prompt for _, prompt in items]), packaged=encoder == "packaged")
    settings = {"encoder": encoder, "ot_map": str(ot_map) if ot_map else None, "partial_transport": not vanilla}
    if json_file:
        with atomic_path(json_file) as temporary:
            content = {**settings, "scores": scores.rows, "unreadable": scores.unreadable}
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if csv_file:
        with atomic_path(csv_file) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["file", "prompt", "quality", "semantic", "match", "why"])
            writer.writeheader()
            writer.writerows(scores.rows)
            writer.writerows(scores.unreadable)
    return scores


def folder_items(folder: Path, prompt: str | None) -> list[tuple[Path | Member, str]]:
    """Videos of a folder or of shards with their captions, or all with one prompt.

    Raises:
        FileNotFoundError: no such folder or shard, or a caption is missing.
        ValueError: no video, a bad caption file, or a damaged shard.
    """
    if prompt is None or not folder.is_dir() or not is_video_folder(folder):
        videos = open_videos(folder)
        return [(file, prompt or caption) for file, caption in zip(videos.files, videos.captions, strict=True)]
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"score: {str(folder)!r} holds no video ({', '.join(VIDEO_SUFFIXES)}).")
    return [(file, prompt) for file in files]


@torch.no_grad()
def _score(rewards: CompositeReward, items: Sequence[tuple[Path | Member, str]], how_to_read: dict[str, Any]) -> Scores:
    scores = Scores([], [])
    batch: list[tuple[Path | Member, str, torch.Tensor]] = []

    def flush() -> None:
        if batch:
            terms = rewards.terms(torch.stack([frames for _, _, frames in batch]), [prompt for _, prompt, _ in batch])
            for i, (file, prompt, _) in enumerate(batch):
                quality, semantic = terms["quality"][i].item(), terms["semantic"][i].item()
                match = terms["semantic"][i].exp().item()
                row = {"file": str(file), "prompt": prompt, "quality": quality, "semantic": semantic, "match": match}
                scores.rows.append(row)
            batch.clear()

    # disable=None: no bar where stderr is no terminal
    for file, prompt in tqdm(items, desc="scoring", unit="video", disable=None if len(items) > BATCH_SIZE else True):
        try:
            batch.append((file, prompt, read_item(file, **how_to_read)))
        except VideoReadError as error:
            scores.unreadable.append({"file": str(file), "why": error.why})
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

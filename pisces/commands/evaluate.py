"""`pisces evaluate`: everything that can be measured of a folder of videos, beside another one."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from pisces.bootstrap import Interval, difference_interval, mean_interval
from pisces.commands.inputs import Item, check_items, choose_device, folder_items
from pisces.config import resolve_path
from pisces.data import VideoReadError, atomic_path
from pisces.encoders import load_encoder
from pisces.measures import measure
from pisces.ot_map import Alignment
from pisces.rewards import CompositeReward, QualityReward, Reward, SemanticReward, Transport
from pisces.shards import read_item
from pisces.world.judge import judge
from pisces.world.scene import FRAMES, SIZE, parse_caption


@dataclass
class Evaluated:
    """One folder.

    Attributes:
        rows: a dict a readable video: file, prompt, and a number for every measure.
        unreadable: dicts with file and why.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        """A measure of all videos."""
        return [row[name] for row in self.rows]

    @property
    def measures(self) -> list[str]:
        """Names of what was measured of every video."""
        return [key for key in self.rows[0] if key not in ("file", "prompt") and all(key in row for row in self.rows)]

    @property
    def identity(self) -> list[tuple[str, str]]:
        """(file name, prompt) of every video."""
        return [(Path(row["file"]).name, row["prompt"]) for row in self.rows]


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        after: the folder.
        before: the one beside it, if one was given.
        paired: whether both have the same files with the same prompts.
        intervals: measure -> mean of the folder.
        differences: measure -> mean of the folder minus that of the other.
    """

    after: Evaluated
    before: Evaluated | None
    paired: bool
    intervals: dict[str, Interval]
    differences: dict[str, Interval]


def evaluate(
    folder: Path,
    *,
    before: Path | None,
    prompt: str | None,
    encoder: str,
    ot_map: Path | None,
    vanilla: bool,
    json_file: Path | None,
    csv_file: Path | None,
    device: str | None = None,
) -> Evaluation:
    """Measure every video of one or two folders, print a table, write the files.

    Measured are both rewards (quality alone where the encoder has no match head), sharpness, saturation, motion and
    flicker, and, where all videos are 9 frames of 32 x 32 pixels with captions of the small world, the scores of its
    judge.

    Args:
        folder: captioned videos, such as `pisces sample` writes.
        before: the same of another model; None measures one folder.
        prompt: replaces the captions.
        encoder: directory of an encoder, or "packaged".
        ot_map: alignment file; None compares the embeddings as they are.
        vanilla: leave the cross-attention as it is, without partial transport.
        json_file: receives settings, means with intervals, and every video's numbers.
        csv_file: receives one line a video.
        device: of the rewards; None is the first GPU if there is one, else the CPU.

    Returns:
        All numbers.

    Raises:
        FileNotFoundError: no such folder, encoder or alignment.
        ValueError: no readable video or no usable prompt in a folder, or no such device.
    """
    place = choose_device(device, "evaluate")
    model = load_encoder(resolve_path(encoder))
    terms: dict[str, Reward] = {"quality": QualityReward(model, Alignment.load(ot_map) if ot_map else None)}
    if getattr(model, "has_match_head", True):
        terms["semantic"] = SemanticReward(model, transport=None if vanilla else Transport())
    rewards = CompositeReward(terms, dict.fromkeys(terms, 1.0)).to(place)
    work = {path: folder_items(path, prompt) for path in (folder, before) if path is not None}
    refused = {path: check_items(model, items, "evaluate") for path, items in work.items()}
    parts = {path: _evaluate_folder(path, items, refused[path], rewards, place) for path, items in work.items()}
    found = _compare(parts[folder], parts[before] if before is not None else None)
    _print(found)
    content = {
        "folder": str(folder),
        "before": str(before) if before else None,
        "paired": found.paired,
        "encoder": encoder,
        "ot_map": str(ot_map) if ot_map else None,
        "partial_transport": not vanilla,
        "means": {name: vars(interval) for name, interval in found.intervals.items()},
        "differences": {name: vars(interval) for name, interval in found.differences.items()},
        "videos": {str(path): part.rows for path, part in parts.items()},
        "unreadable": [entry for part in parts.values() for entry in part.unreadable],
    }
    if json_file:
        with atomic_path(json_file) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if csv_file:
        _write_csv(csv_file, list(parts.values()))
    return found


@torch.no_grad()
def _evaluate_folder(
    folder: Path, items: list[Item], refused: dict[str, str], rewards: CompositeReward, device: torch.device
) -> Evaluated:
    """Every video by itself: it takes the memory of one."""
    found = Evaluated()
    judged: list[dict[str, float]] = []
    for path, text, _ in tqdm(items, desc=folder.name, unit="video", disable=None):
        why = refused.get(text)
        if why is None:
            try:
                frames = read_item(path)[None]
            except VideoReadError as error:
                why = error.why
        if why is not None:
            found.unreadable.append({"file": str(path), "prompt": text, "why": why})
            continue
        numbers = {**rewards.terms(frames.to(device), [text]), **measure(frames)}
        found.rows.append({"file": str(path), "prompt": text, **{name: float(v) for name, v in numbers.items()}})
        scores = _judge(frames, text)
        judged += [scores] if scores is not None else []
    errors = Console(stderr=True, soft_wrap=True)
    for entry in found.unreadable:
        errors.print(f"pisces: skipped {entry['file']}: {entry['why']}", style="red", markup=False, highlight=False)
    if not found.rows:
        raise ValueError(f"evaluate: none of the {len(items)} videos in {str(folder)!r} could be read.")
    if len(judged) == len(found.rows):
        for row, scores in zip(found.rows, judged, strict=True):
            row |= {f"judge/{name}": value for name, value in scores.items()}
    return found


def _judge(frames: Tensor, caption: str) -> dict[str, float] | None:
    """The small world's judge; None for a video or a caption of another world."""
    if frames.shape[1:] != (FRAMES, 3, SIZE, SIZE):
        return None
    try:
        scene = parse_caption(caption)
    except ValueError:
        return None
    return {name: float(value) for name, value in judge(frames, scene).items()}


def _compare(after: Evaluated, before: Evaluated | None) -> Evaluation:
    intervals = {name: mean_interval(after.values(name)) for name in after.measures}
    if before is None:
        return Evaluation(after, None, False, intervals, {})
    paired = after.identity == before.identity
    both = [name for name in after.measures if name in before.measures]
    differences = {name: difference_interval(after.values(name), before.values(name), paired=paired) for name in both}
    return Evaluation(after, before, paired, intervals, differences)


def _print(found: Evaluation) -> None:
    console = Console()
    table = Table()
    table.add_column("measure", no_wrap=True)
    if found.before is None:
        table.add_column("mean [95 % interval]", justify="right", no_wrap=True)
        for name, interval in found.intervals.items():
            table.add_row(name, str(interval))
    else:
        for heading in ("before", "after", "difference [95 % interval]"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, difference in found.differences.items():
            values = found.before.values(name)
            mark = "" if difference.low <= 0 <= difference.high else " *"
            before, after = sum(values) / len(values), found.intervals[name].mean
            table.add_row(name, f"{before:.4g}", f"{after:.4g}", f"{difference}{mark}")
    console.print(table)
    n = len(found.after.rows)
    how = f"{n} videos; intervals by the percentile bootstrap"
    if found.before is not None:
        how += ", * where 0 lies outside; "
        how += "paired by file and prompt" if found.paired else f"unpaired, {len(found.before.rows)} videos before"
    console.print(how + ".", style="dim")
    if not any(name.startswith("judge/") for name in found.intervals):
        console.print(
            "The small world's judge looks only at its own captions and at 9 frames of 32 x 32 pixels "
            "(sample --lossless).",
            style="dim",
        )


def _write_csv(path: Path, parts: Sequence[Evaluated]) -> None:
    names = list(dict.fromkeys(key for part in parts for row in part.rows for key in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, "why"])
        writer.writeheader()
        for part in parts:
            writer.writerows(part.rows)
            writer.writerows(part.unreadable)

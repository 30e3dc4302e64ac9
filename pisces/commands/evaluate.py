"""`pisces evaluate`: everything that can be measured of a folder of videos, beside another one."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pisces.bootstrap import Interval, difference_interval, mean_interval
from pisces.commands.inputs import (
    Item,
    LoadedRewards,
    TransportChoice,
    check_items,
    choose_device,
    folder_items,
    load_rewards,
    read_batches,
)
from pisces.data import VideoReadError, atomic_path
from pisces.encoders import read_options
from pisces.measures import measure_pictures
from pisces.shards import Member, read_item_pictures
from pisces.world.judge import judge
from pisces.world.scene import FRAMES, SIZE, parse_caption


@dataclass
class Evaluated:
    """One folder.

    Attributes:
        rows: a dict a readable video: file, prompt, and a number for every measure.
        unreadable: dicts with file, prompt and why.
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
    def identities(self) -> list[tuple[str, str, int]]:
        """(file name, prompt, how many before it have the same) of every video."""
        seen: Counter[tuple[str, str]] = Counter()
        found = []
        for row in self.rows:
            same = Path(row["file"]).name, row["prompt"]
            found.append((*same, seen[same]))
            seen[same] += 1
        return found


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        after: the folder.
        before: the one beside it, if one was given.
        pairs: by the same file name with the same prompt, rows of the folder and of the other, where these are most
            of both; else None.
        intervals: measure -> mean of the folder.
        differences: measure -> mean of the folder minus that of the other; over the pairs where there are pairs.
    """

    after: Evaluated
    before: Evaluated | None
    pairs: tuple[Evaluated, Evaluated] | None
    intervals: dict[str, Interval]
    differences: dict[str, Interval]


def evaluate(
    folder: Path,
    *,
    before: Path | None,
    prompt: str | None,
    encoder: str,
    ot_map: Path | None,
    choice: TransportChoice,
    json_file: Path | None,
    csv_file: Path | None,
    device: str | None,
    batch_size: int,
) -> Evaluation:
    """Measure every video of one or two folders, print a table, write the files.

    Measured are both rewards (quality alone where the encoder has no match head) as `pisces score` has them, sharpness,
    saturation, motion and flicker of all frames at their own size, and, where all videos are 9 frames of 32 x 32 pixels
    with captions of the small world, the scores of its judge.

    Args:
        folder: captioned videos, such as `pisces sample` writes.
        before: the same of another model; None measures one folder.
        prompt: replaces the captions.
        encoder: directory of an encoder, or "packaged".
        ot_map: alignment file; None compares the embeddings as they are.
        choice: transport of the semantic reward.
        json_file: receives settings, means with intervals, and every video's numbers.
        csv_file: receives one line a video.
        device: of the rewards; None is the first GPU if there is one, else the CPU.
        batch_size: videos that the encoder sees at a time.

    Returns:
        All numbers.

    Raises:
        FileNotFoundError: no such folder, encoder or alignment.
        ValueError: no readable video or no usable prompt in a folder, no such device, or a transport that is asked of
            an encoder without a match head.
    """
    place = choose_device(device, "evaluate")
    loaded = load_rewards("evaluate", encoder, ot_map, choice, place)
    work = {path: folder_items(path, prompt, "evaluate") for path in (folder, before) if path is not None}
    refused = {path: check_items(loaded.encoder, items, "evaluate") for path, items in work.items()}
    parts = {
        path: _evaluate_folder(path, items, refused[path], loaded, place, batch_size) for path, items in work.items()
    }
    found = _compare(parts[folder], parts[before] if before is not None else None)
    _print(found)
    content = {
        "folder": str(folder),
        "before": str(before) if before else None,
        "paired": found.pairs is not None,
        "pairs": len(found.pairs[0].rows) if found.pairs else None,
        **loaded.settings,
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
    folder: Path,
    items: list[Item],
    refused: dict[str, str],
    loaded: LoadedRewards,
    place: torch.device,
    batch_size: int,
) -> Evaluated:
    """Everything of every video; in memory are a batch as the encoder looks at it, and a few pictures of one video."""
    why = {i: refused[item.prompt] for i, item in enumerate(items) if item.prompt in refused}
    readable = [i for i in range(len(items)) if i not in why]
    rows: dict[int, dict[str, Any]] = {}
    judged: dict[int, dict[str, float]] = {}
    how = read_options(loaded.encoder)
    for frames, batch in read_batches(items, readable, batch_size, how, why.__setitem__, folder.name):
        terms = loaded.rewards.terms(frames.to(place), [items[i].prompt for i in batch])
        for k, i in enumerate(batch):
            try:
                measures, whole = _measure(items[i].file)
            except VideoReadError as error:
                why[i] = error.why
                continue
            rewards = {name: values[k].item() for name, values in terms.items()}
            rows[i] = {"file": str(items[i].file), "prompt": items[i].prompt, **rewards, **measures}
            scores = _judge(whole, items[i].prompt) if whole is not None else None
            if scores is not None:
                judged[i] = scores
    if len(judged) == len(rows):
        for i, scores in judged.items():
            rows[i] |= {f"judge/{name}": value for name, value in scores.items()}
    unreadable = [{"file": str(items[i].file), "prompt": items[i].prompt, "why": why[i]} for i in sorted(why)]
    errors = Console(stderr=True, soft_wrap=True)
    for entry in unreadable:
        errors.print(f"pisces: skipped {entry['file']}: {entry['why']}", style="red", markup=False, highlight=False)
    if not rows:
        raise ValueError(
            f"evaluate: none of the {len(items)} videos in {str(folder)!r} could be read, expected at least one. Mend "
            "what is said of them, or name another folder."
        )
    return Evaluated([rows[i] for i in sorted(rows)], unreadable)


def _measure(file: Path | Member) -> tuple[dict[str, float], Tensor | None]:
    """The measures of a whole video, and its frames [1, T, 3, H, W] if they are as many and as large as the judge's."""
    kept: list[Tensor] = []

    def watched() -> Iterator[Tensor]:
        for picture in read_item_pictures(file):
            if picture.shape == (3, SIZE, SIZE) and len(kept) <= FRAMES:  # one more than FRAMES tells a longer video
                kept.append(picture)
            yield picture

    measures = measure_pictures(watched())
    return measures, torch.stack(kept)[None] if len(kept) == FRAMES else None


def _judge(frames: Tensor, caption: str) -> dict[str, float] | None:
    """The small world's judge of frames that are as many and as large as its own; None for a foreign caption."""
    try:
        scene = parse_caption(caption)
    except ValueError:
        return None
    return {name: float(value) for name, value in judge(frames, scene).items()}


def _compare(after: Evaluated, before: Evaluated | None) -> Evaluation:
    intervals = {name: mean_interval(after.values(name)) for name in after.measures}
    if before is None:
        return Evaluation(after, None, None, intervals, {})
    pairs = _pairs(after, before)
    new, old = pairs or (after, before)
    both = [name for name in after.measures if name in before.measures]
    differences = {
        name: difference_interval(new.values(name), old.values(name), paired=pairs is not None) for name in both
    }
    return Evaluation(after, before, pairs, intervals, differences)


def _pairs(after: Evaluated, before: Evaluated) -> tuple[Evaluated, Evaluated] | None:
    """The rows that have a partner, in one order, where these are most of both folders.

    A few chance partners, such as the same short caption under the same number, make no pairs of two folders.
    """
    old = dict(zip(before.identities, before.rows, strict=True))
    found = [(row, old[key]) for key, row in zip(after.identities, after.rows, strict=True) if key in old]
    if 2 * len(found) <= max(len(after.rows), len(before.rows)):
        return None
    return Evaluated([row for row, _ in found]), Evaluated([row for _, row in found])


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
        new, old = found.pairs or (found.after, found.before)
        for name, difference in found.differences.items():
            mark = "" if difference.low <= 0 <= difference.high else " *"
            before, after = (sum(part.values(name)) / len(part.rows) for part in (old, new))
            table.add_row(name, f"{before:.4g}", f"{after:.4g}", f"{difference}{mark}")
    console.print(table)
    console.print(_how(found), style="dim")
    if not any(name.startswith("judge/") for name in found.intervals):
        console.print(
            "The small world's judge looks only at its own captions and at 9 frames of 32 x 32 pixels "
            "(sample --lossless).",
            style="dim",
        )


def _how(found: Evaluation) -> str:
    """One sentence on how the numbers were compared."""
    how = f"{len(found.after.rows)} videos; intervals by the percentile bootstrap"
    if found.before is None:
        return f"{how}."
    how += ", * where 0 lies outside; "
    if found.pairs is None:
        return f"{how}unpaired, {len(found.before.rows)} videos before."
    n = len(found.pairs[0].rows)
    alone = {"after": len(found.after.rows) - n, "before": len(found.before.rows) - n}
    left_out = " and ".join(f"{count} {side}" for side, count in alone.items() if count)
    return f"{how}{n} pairs by file and prompt" + (f", {left_out} without a partner left out." if left_out else ".")


def _write_csv(path: Path, parts: Sequence[Evaluated]) -> None:
    names = list(dict.fromkeys(key for part in parts for row in part.rows for key in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, "why"])
        writer.writeheader()
        for part in parts:
            writer.writerows(part.rows)
            writer.writerows(part.unreadable)

"""`pisces leverage`: whether refining the attention of an encoder can matter at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from pisces.commands.inputs import Item, check_items, choose_device, transport_name, transport_settings
from pisces.config import resolve_path
from pisces.data import VideoReadError, atomic_path
from pisces.encoders import Encoder, load_encoder, read_options
from pisces.rewards import Transport
from pisces.rewards import leverage as measure
from pisces.rewards.base import check_match_head
from pisces.shards import read_item

SMALL = 0.1  # of a standard deviation: what moves the log-odds by less changes the order of few videos


def leverage(
    items: Sequence[Item],
    *,
    encoder: str,
    most: int,
    transport: Transport | None,
    json_file: Path | None,
    device: str | None,
    batch_size: int,
) -> tuple[dict[str, Any], list[str]]:
    """Measure the leverage of attention on the match score of an encoder, print it and how to read it.

    Args:
        items: videos with prompts; videos that match their prompts more and less say most.
        encoder: directory of an encoder with a match head, or "packaged".
        most: videos that are read, evenly spread over the items: all are held in memory.
        transport: whose leverage is measured; None is `Transport()`.
        json_file: receives the numbers.
        device: of the encoder; None is the first GPU if there is one, else the CPU.
        batch_size: videos that are encoded at a time.

    Returns:
        What `measured` returns, and a line for each video that was left out.

    Raises:
        FileNotFoundError: no such encoder.
        ValueError: no such device, an encoder without a match head, or fewer than two readable videos.
    """
    place, transport = choose_device(device, "leverage"), transport or Transport()
    model = load_encoder(resolve_path(encoder)).to(place)
    check_match_head(model, "leverage")
    refused = check_items(model, items, "leverage")
    unreadable = [f"skipped {item.file}: {refused[item.prompt]}" for item in items if item.prompt in refused]
    items = [item for item in items if item.prompt not in refused]
    chosen = [items[k] for k in evenly(len(items), most)]
    frames, prompts = [], []
    for file, prompt, _ in tqdm(chosen, desc="reading", unit="video", disable=None):
        try:
            frames.append(read_item(file, **read_options(model)))
            prompts.append(prompt)
        except VideoReadError as error:
            unreadable.append(f"skipped {file}: {error.why}")
    if len(frames) < 2:
        raise ValueError(
            f"leverage: {len(frames)} of {len(chosen)} videos could be read, expected at least two for a standard "
            "deviation."
        )
    found = measured(model, frames, prompts, transport, place, batch_size)
    print_leverage(found, transport)
    errors = Console(stderr=True, soft_wrap=True)
    for line in unreadable:
        errors.print(f"pisces: {line}", style="red", markup=False, highlight=False)
    if json_file:
        with atomic_path(json_file) as temporary:
            content = {"encoder": encoder, "device": str(place), **found}
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return found, unreadable


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of the numbers below n, evenly spread.

    Example:
        >>> evenly(10, 4)
        [0, 2, 5, 7]
    """
    count = min(n, most)
    return [k * n // count for k in range(count)]


def measured(
    model: Encoder,
    frames: Sequence[Tensor],
    prompts: Sequence[str],
    transport: Transport,
    place: torch.device,
    batch_size: int,
) -> dict[str, Any]:
    """What `pisces.rewards.leverage` returns of videos [T, 3, H, W], with settings and reading, for a report."""
    numbers = measure(model, torch.stack(list(frames)).to(place), prompts, transport, batch_size=batch_size)
    settings = {"transport": transport_settings(transport), "videos": len(frames)}
    return {**settings, **numbers, "reading": reading(numbers)}


def reading(found: Mapping[str, float]) -> str:
    """One sentence that says what the numbers mean.

    Example:
        >>> reading({"logit_std": 4.4, "partial_ot": 0.11, "uniform": 0.27}).split(":")[0]
        'Even uniform attention moves the log-odds by 6% of their standard deviation only'
    """
    std = found["logit_std"]
    if not std > 0:
        return (
            "All videos have the same log-odds: nothing can be said. Use videos that match their prompts more and less."
        )
    uniform, partial = found["uniform"] / std, found["partial_ot"] / std
    if max(uniform, partial) < SMALL:
        return (
            f"Even uniform attention moves the log-odds by {uniform:.0%} of their standard deviation only: refining "
            "the attention can hardly help or harm this encoder's reward."
        )
    if partial < SMALL:
        return (
            f"Attention matters to this encoder (uniform attention moves the log-odds by {uniform:.0%} of their "
            f"standard deviation), but partial transport moves them by {partial:.0%} only: it changes the order of "
            "few videos."
        )
    return (
        f"Partial transport moves the log-odds by {partial:.0%} of their standard deviation (uniform attention by "
        f"{uniform:.0%}): it can change the order of videos."
    )


def print_leverage(found: Mapping[str, Any], transport: Transport) -> None:
    """Print what `measured` returned."""
    console, std = Console(), found["logit_std"]
    moved = f"moved by partial transport, {transport_name(transport)}"
    table = Table()
    for name in ("log-odds of a match", "value", "of the deviation"):
        table.add_column(name, justify="left" if name.startswith("log") else "right", no_wrap=True)
    table.add_row(f"standard deviation over {found['videos']} videos", f"{std:.3f}", "")
    for name, key in ((moved, "partial_ot"), ("moved by uniform attention", "uniform")):
        table.add_row(name, f"{found[key]:.3f}", f"{found[key] / std:.0%}" if std > 0 else "")
    console.print(table)
    console.print(found["reading"], highlight=False)

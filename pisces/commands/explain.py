"""`pisces explain`: which patches of a video each word of a prompt was matched to, drawn on one page."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from pisces.commands.inputs import choose_device, transport_name
from pisces.config import resolve_path
from pisces.encoders import load_encoder, read_options
from pisces.encoders.base import refused_prompts
from pisces.encoders.tiny import unknown_words
from pisces.heatmaps import heat_maps
from pisces.page import Block, Image, Table, Text, html_page
from pisces.rewards import Explanation, Transport
from pisces.rewards import explain as record
from pisces.rewards.base import check_match_head
from pisces.video import read_video


def explain(
    video: Path,
    prompt: str,
    output: Path,
    *,
    encoder: str = "packaged",
    transport: Transport | None,
    layer: int | None = None,
    head: int | None = None,
    device: str | None = None,
) -> tuple[Path, Path]:
    """Draw plan and attention of one video and its prompt.

    Args:
        video: a video file.
        prompt: the text.
        output: the .html to write; the picture in it is also written beside it, as .png.
        encoder: directory of an encoder with a match head, or "packaged".
        transport: of the words to the video tokens; None leaves the cross-attention as it is.
        layer: fusion layer to draw, from 1; None is the last.
        head: attention head to draw, from 1; None is the mean of all.
        device: of the encoder; None is the first GPU if there is one, else the CPU.

    Returns:
        The page and the picture.

    Raises:
        FileNotFoundError: no such encoder.
        ValueError: the video cannot be read, the prompt has no word, the encoder has no match head, no such layer,
            head or device, or `output` is no .html.
    """
    if output.suffix.lower() != ".html":
        raise ValueError(f"explain: --output is {str(output)!r}, expected a name that ends in .html.")
    place = choose_device(device, "explain")
    model = load_encoder(resolve_path(encoder)).to(place)
    check_match_head(model, "explain")
    for why in refused_prompts(model, [prompt]).values():
        raise ValueError(f"explain: {why}")
    frames = read_video(video, **read_options(model))
    found = _drawn(record(model, frames[None].to(place), [prompt], transport, per_head=head is not None))
    _, n_layers, n_heads, _, _ = found.attention.shape
    one_layer = _choose("layer", layer, n_layers, default=n_layers)
    one_head = _choose("head", head, n_heads, default=1)

    where = f"layer {one_layer + 1} of {n_layers}, " + ("mean of the heads" if head is None else f"head {head}")
    named = {"Transport plan": found.plan, "Attention": found.attention}
    if found.plan is not None:
        named["Attention fused with the plan"] = found.refined
    maps = {name: value[0, one_layer, one_head] for name, value in named.items() if value is not None}
    grids = {name: found.on_grid(rows) for name, rows in maps.items()}
    words = found.words[0]
    blocks = [(f"{name}, {where}", grid) for name, grid in grids.items()]
    picture = heat_maps(output.with_suffix(".png"), _seen(frames, blocks[0][1].shape[1]), words, blocks)

    about: list[Block] = [_matches(found, transport)]
    note = unknown_words(model, [prompt])
    if note:
        about.append(Text(note))
    reading = (
        "One row a word, one column a frame. Colours compare the places of one word: each row is scaled to its own "
        "greatest patch. What lies outside the centre square was not seen. Summary tokens, which have no place, are "
        "not drawn."
    )
    page = html_page(
        output,
        f"Why {video.name} got its score",
        [
            ("Match", about),
            ("Words", [_table(words, maps, grids, transport, where)]),
            ("Where each word was matched", [Text(reading), Image(picture, f"{prompt} ({where})")]),
        ],
        lead=f"{prompt}\n\nEncoder: {encoder}.",
    )
    return page, picture


def _drawn(found: Explanation) -> Explanation:
    """The same on the CPU."""
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    return replace(found, **{name: value.cpu() for name, value in values.items() if isinstance(value, Tensor)})


def _choose(what: str, number: int | None, n: int, *, default: int) -> int:
    """Index of a layer or head that is counted from 1."""
    number = default if number is None else number
    if not 1 <= number <= n:
        raise ValueError(f"explain: --{what} is {number}, expected 1 to {n}, as many as this encoder has.")
    return number - 1


def _seen(frames: Tensor, n: int) -> Tensor:
    """The frame [n, 3, H, W] in the middle of each of n token frames, which may cover several frames."""
    middle = ((torch.arange(n) + 0.5) * len(frames) / n).long()
    return frames[middle]


def _matches(found: Explanation, transport: Transport | None) -> Table:
    rows: list[list[str | float | None]] = [["attention as it is", float(found.match[0])]]
    if transport is not None:
        rows.append([f"refined by partial transport, {transport_name(transport)}", float(found.refined_match[0])])
    return Table(["cross-attention", "match probability"], rows)


def _table(
    words: list[str], maps: dict[str, Tensor], grids: dict[str, Tensor], transport: Transport | None, where: str
) -> Table:
    frame = {name: grid.sum((-1, -2)).argmax(-1) + 1 for name, grid in grids.items()}
    attention, plan = maps["Attention"], maps.get("Transport plan")
    if plan is None or transport is None:
        header, note = ["word", "attention: frame"], "frame: the one with most of the attention."
        rows = [[word, str(int(frame["Attention"][i]))] for i, word in enumerate(words)]
        return Table(header, rows, f"{where}; {note}")
    mass = plan.sum(-1)
    overlap = torch.minimum(attention, plan / mass.clamp_min(1e-30)[:, None]).sum(-1)
    header = ["word", "mass", "of its weight", "plan: frame", "attention: frame", "overlap"]
    table: list[list[str | float | None]] = [
        [
            word,
            float(mass[i]),
            f"{float(mass[i]) * len(words):.0%}",
            str(int(frame["Transport plan"][i])),
            str(int(frame["Attention"][i])),
            float(overlap[i]),
        ]
        for i, word in enumerate(words)
    ]
    if transport.mass is not None:
        limits = f"it cannot exceed 100 %, and all words together move {transport.mass:g}"
    elif transport.tau < 1:
        limits = "it can exceed 100 %: both marginals are kept softly"
    else:
        limits = "100 % but for the solver's tolerance: both marginals are kept"
    note = (
        f"mass: what the plan moves from the word, and its share of the word's weight 1 / words ({limits}); frame: the "
        "one with most of the plan or the attention; overlap: of the plan's row and the attention's, 1 where they are "
        "the same."
    )
    return Table(header, table, f"{where}; {note}")

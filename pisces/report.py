"""Pictures of a run: contact sheets, curves, embeddings, and (from `pisces.page`) one page that holds everything."""

from __future__ import annotations

import atexit
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pixels
from PIL import ImageDraw, ImageFont
from torch import Tensor

from pisces.page import Block, Clips, Image, Table, Text, html_page
from pisces.video import atomic_path, cpu_frames

__all__ = [
    "Block",
    "Clips",
    "Image",
    "Table",
    "Text",
    "animated_sheet",
    "contact_sheet",
    "embedding_plot",
    "html_page",
    "read_log",
    "reward_curves",
    "smooth",
]

Row = tuple[str, Tensor]
_TILE = 96  # wanted side of a picture on a contact sheet, in pixels
_GAP, _MARGIN = 3, 20
_INK, _FAINT, _PAPER = "#1c2330", "#5b6675", "#ffffff"
_PALETTE = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#64748b")


# Contact sheets


def contact_sheet(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    prompts: Sequence[str],
    *,
    n_shown: int = 5,
    columns: int | None = None,
) -> Path:
    """Draw clips as strips of pictures, one block a prompt, one strip a row label: before above after.

    Small videos are enlarged by whole pixels, so that a 32-pixel shape keeps its edges; large ones are reduced.

    Args:
        path: the .png to write.
        rows: (label, frames [n, T, 3, H, W] float in [0, 1]); the clip i of every row belongs to `prompts[i]`.
        prompts: n texts.
        n_shown: pictures of each clip, evenly spaced from the first to the last.
        columns: blocks side by side. None: two where there are four prompts or more.

    Returns:
        The path.

    Raises:
        ValueError: no rows, no prompts, counts that differ, or frames that are none.

    Example:
        >>> before, after = torch.rand(2, 2, 9, 3, 32, 32)
        >>> contact_sheet("/tmp/pisces-sheet.png", [("before", before), ("after", after)], ["one", "two"]).name
        'pisces-sheet.png'
    """
    checked = _check_rows("contact_sheet", rows, prompts)
    strips = [(label, frames[:, _spread(frames.shape[1], n_shown)]) for label, frames in checked]
    image = _draw_sheet(strips, prompts, columns)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
    return Path(path)


def animated_sheet(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    prompts: Sequence[str],
    *,
    fps: float = 8.0,
    columns: int | None = None,
) -> Path:
    """Draw the same sheet as a moving picture, one tile a clip: for a README, which shows no mp4.

    Args:
        path: the .gif to write.
        rows: as in `contact_sheet`, but every row has the same number of frames.
        prompts: n texts.
        fps: pictures a second; after the last picture the loop rests for a second.
        columns: blocks side by side. None: four, or as many as there are prompts.

    Returns:
        The path.

    Raises:
        ValueError: as `contact_sheet`, or rows of different length.
    """
    checked = _check_rows("animated_sheet", rows, prompts)
    lengths = {frames.shape[1] for _, frames in checked}
    if len(lengths) > 1:
        raise ValueError(f"animated_sheet: the rows have {sorted(lengths)} frames, expected the same number.")
    n_frames = lengths.pop()
    columns = columns or min(4, len(prompts))
    images = [
        _draw_sheet([(label, frames[:, t : t + 1]) for label, frames in checked], prompts, columns)
        for t in range(n_frames)
    ]
    wait = [round(1000 / fps)] * n_frames
    wait[-1] += 1000
    with atomic_path(path) as temporary:
        images[0].save(
            temporary, format="GIF", save_all=True, append_images=images[1:], duration=wait, loop=0, optimize=True
        )
    return Path(path)


def _check_rows(who: str, rows: Sequence[Row], prompts: Sequence[str]) -> list[Row]:
    if not rows or not prompts:
        raise ValueError(f"{who}: got {len(rows)} rows and {len(prompts)} prompts, expected at least one of each.")
    checked = []
    for label, frames in rows:
        frames = cpu_frames(frames, f"{who}, row {label!r}", "n, T, 3, H, W")
        if len(frames) != len(prompts):
            raise ValueError(f"{who}: row {label!r} has {len(frames)} clips, expected {len(prompts)}, one a prompt.")
        checked.append((label, frames))
    return checked


def _spread(total: int, n: int) -> list[int]:
    """At most n indices from the first to the last of `total`."""
    n = min(n, total)
    return [round(k * (total - 1) / max(1, n - 1)) for k in range(n)]


def _tile_size(height: int, width: int) -> tuple[int, int]:
    """Size at which a picture is drawn: whole multiples upwards, free downwards."""
    side = max(height, width)
    if side <= _TILE:
        scale = max(1, _TILE // side)
        return height * scale, width * scale
    limit = 2 * _TILE
    factor = min(1.0, limit / side)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _to_image(frame: Tensor) -> Pixels.Image:
    """A [3, H, W] picture at the size of its tile."""
    pixels = (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    height, width = _tile_size(*pixels.shape[:2])
    image = Pixels.fromarray(pixels)
    larger = height >= pixels.shape[0]
    return image.resize((width, height), Pixels.Resampling.NEAREST if larger else Pixels.Resampling.LANCZOS)


def typeface(size: int, bold: bool = False) -> Any:
    """DejaVu Sans of matplotlib, so that a sheet looks alike on every machine."""
    package = find_spec("matplotlib")  # found, not imported: its import makes folders in the user's home
    if package is None or package.origin is None:
        raise ModuleNotFoundError("typeface: matplotlib is missing. Install it: pip install matplotlib.")
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / name), size)


def _wrap(text: str, font: Any, width: int, max_lines: int) -> list[str]:
    """Break a text into lines that fit, the last one ending in an ellipsis where some is left over."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < max_lines:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += " " + words.pop(0)
        lines.append(line)
    if lines:
        if words:
            lines[-1] += " …"
        lines = [shorten(line, font, width) for line in lines]
    return lines


def shorten(line: str, font: Any, width: int) -> str:
    """The line, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix("…").rstrip()
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def _draw_sheet(strips: Sequence[Row], prompts: Sequence[str], columns: int | None) -> Pixels.Image:
    """Draw every frame of every strip, in blocks of one prompt each."""
    columns = min(columns or (2 if len(prompts) >= 4 else 1), len(prompts))
    prompt_font, label_font = typeface(14, bold=True), typeface(13)
    sizes = [_tile_size(*frames.shape[-2:]) for _, frames in strips]
    label_width = min(160, max(math.ceil(label_font.getlength(label)) for label, _ in strips)) + 12
    strip_width = max(frames.shape[1] * (width + _GAP) for (_, frames), (_, width) in zip(strips, sizes, strict=True))
    block_width = label_width + strip_width
    texts = [_wrap(prompt, prompt_font, block_width, 3) for prompt in prompts]
    line_height = 19
    strips_height = sum(height + _GAP for height, _ in sizes)

    n_lines = [max(len(text) for text in texts[i : i + columns]) for i in range(0, len(prompts), columns)]
    heights = [lines * line_height + 7 + strips_height for lines in n_lines]
    image = Pixels.new(
        "RGB",
        (2 * _MARGIN + columns * block_width + (columns - 1) * _MARGIN, _MARGIN + sum(h + _MARGIN for h in heights)),
        _PAPER,
    )
    draw = ImageDraw.Draw(image)
    top = _MARGIN
    for i, text in enumerate(texts):
        line, column = divmod(i, columns)
        if column == 0 and line > 0:
            top += heights[line - 1] + _MARGIN
        left = _MARGIN + column * (block_width + _MARGIN)
        y = top + (n_lines[line] - len(text)) * line_height
        for words in text:
            draw.text((left, y), words, fill=_INK, font=prompt_font)
            y += line_height
        y = top + n_lines[line] * line_height + 7
        for (label, frames), (height, width) in zip(strips, sizes, strict=True):
            middle = y + height // 2
            name = shorten(label, label_font, label_width - 12)
            draw.text((left, middle), name, fill=_FAINT, font=label_font, anchor="lm")
            for t in range(frames.shape[1]):
                image.paste(_to_image(frames[i, t]), (left + label_width + t * (width + _GAP), y))
            y += height + _GAP
    return image


# Reward curves


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a JSONL training log; a last line that a killed run left unfinished is dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken line before the last, or no line at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_log: no log {str(path)!r}.")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}).") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected an object with a value for each measure.")
        records.append(record)
    if not records:
        raise ValueError(f"read_log: {str(path)!r} holds no complete line.")
    return records


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean, the window shrinking at both ends; values that are not finite are left out.

    Args:
        values: the series.
        window: number of values averaged.

    Returns:
        A series of the same length, NaN where a window holds nothing finite.

    Example:
        >>> smooth([0.0, 3.0, 6.0, 3.0], 3)
        [1.5, 3.0, 4.0, 4.5]
    """
    half = window // 2
    result = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def reward_curves(
    path: str | os.PathLike[str],
    logs: Mapping[str, str | os.PathLike[str]],
    *,
    keys: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Draw measures over steps, one panel a measure, one colour an arm: raw in pale, smoothed in full.

    Args:
        path: the .png to write.
        logs: name of each arm -> its JSONL log (one object a step with `step` and numbers).
        keys: measures to draw. None: `reward` and whatever starts with `reward`, or else `loss`.
        title: heading of the figure.

    Returns:
        The path.

    Raises:
        ValueError: no logs, or a measure that no log has.

    Example:
        >>> lines = '{"step": 1, "reward": 0.1}\\n{"step": 2, "reward": 0.4}\\n'
        >>> _ = Path("/tmp/pisces-log.jsonl").write_text(lines)
        >>> reward_curves("/tmp/pisces-curves.png", {"both rewards": "/tmp/pisces-log.jsonl"}).name
        'pisces-curves.png'
    """
    _keep_home_clean()
    # The object interface, not pyplot: no global state, and no display is ever looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not logs:
        raise ValueError("reward_curves: got no logs, expected at least one arm.")
    arms = {arm: read_log(log) for arm, log in logs.items()}
    there = [key for records in arms.values() for record in records for key in record]
    if keys is None:
        keys = sorted({key for key in there if key.startswith("reward")}) or ["loss"]
    absent = [key for key in keys if key not in there]
    if absent:
        raise ValueError(f"reward_curves: no log has {absent}, expected some of {sorted(set(there) - {'step'})}.")

    columns = min(3, len(keys))
    n_lines = -(-len(keys) // columns)
    figure = Figure(figsize=(max(6.4, 4.4 * columns), 3.3 * n_lines + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(n_lines, columns, squeeze=False).flatten()
    for panel, key in zip(panels, keys, strict=False):
        for i, (arm, records) in enumerate(arms.items()):
            points = [(r.get("step", n), _number(r.get(key))) for n, r in enumerate(records, 1) if key in r]
            if not points:
                continue
            steps, values = [p[0] for p in points], [p[1] for p in points]
            color = _PALETTE[i % len(_PALETTE)]
            style = "-" if i < len(_PALETTE) else "--"
            panel.plot(steps, values, color=color, alpha=0.22, linewidth=1)
            window = max(1, len(values) // 8)
            panel.plot(steps, smooth(values, window), style, color=color, linewidth=2, label=arm)
        panel.set_title(key.replace("_", " ").replace("/", ": "), fontsize=11, loc="left", color=_INK)
        panel.set_xlabel("step", fontsize=9, color=_FAINT)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.tick_params(labelsize=8, colors=_FAINT)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(4, max(1, len(names))), fontsize=9, frameon=False
    )
    if title:
        figure.suptitle(title, fontsize=13, color=_INK)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", facecolor=_PAPER)
    return Path(path)


# Embeddings


def embedding_plot(
    path: str | os.PathLike[str], before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], *, n_shown: int = 1000
) -> Path:
    """Draw embeddings of pairs before and after an alignment: a projection of each, and densities of their distances.

    Both projections are onto the two principal axes of all four clouds together, so that they can be compared. The
    distance is 1 - cosine, of a text to its own video and to the next pair's.

    Args:
        path: the .png to write.
        before: text and video [n, E], row i of both from pair i, n >= 3.
        after: the same, aligned.
        n_shown: most pairs that are drawn, evenly spaced; the densities are of all.

    Returns:
        The path.

    Raises:
        ValueError: shapes that differ, or fewer than three pairs.

    Example:
        >>> text, video = torch.randn(2, 50, 8)
        >>> embedding_plot("/tmp/pisces-embeddings.png", (text, video), (text + 1, video)).name
        'pisces-embeddings.png'
    """
    clouds = [z.detach().float().cpu() for z in (*before, *after)]
    if len({z.shape for z in clouds}) > 1 or clouds[0].dim() != 2 or len(clouds[0]) < 3:
        raise ValueError(
            f"embedding_plot: got shapes {[tuple(z.shape) for z in clouds]}, expected (n, E) four times, n at least 3."
        )
    _keep_home_clean()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    everything = torch.cat(clouds)
    center = everything.mean(0)
    axes = torch.linalg.svd(everything - center, full_matrices=False).Vh[:2]
    shown = _spread(len(clouds[0]), n_shown)
    figure = Figure(figsize=(13.2, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    names = ("before", "after")
    for side, panel in enumerate(panels[:2]):
        for z, label, color in zip(clouds[2 * side :], ("texts", "videos"), _PALETTE, strict=False):
            x, y = ((z[shown] - center) @ axes.T).T.tolist()
            panel.scatter(x, y, s=9, alpha=0.5, color=color, linewidths=0, label=label)
        panel.set_title(f"{names[side]}: two principal axes", fontsize=11, loc="left", color=_INK)
    panels[0].sharex(panels[1])
    panels[0].sharey(panels[1])
    kinds = ((0, "own video", _PALETTE[2]), (1, "another video", _PALETTE[7]))
    distances = [
        (f"{label}, {names[side]}", color, (":", "-")[side], 1 - torch.cosine_similarity(text, video.roll(shift, 0)))
        for side, (text, video) in enumerate((clouds[:2], clouds[2:]))
        for shift, label, color in kinds
    ]
    low, high = (float(bound) for bound in torch.cat([distance for *_, distance in distances]).aminmax())
    high = max(high, low + 1e-3)  # all may be equal
    edges = torch.linspace(low, high, max(8, min(60, round(2 * len(everything) ** 0.5)))).tolist()
    for label, color, style, distance in distances:
        counts = torch.histogram(distance, torch.tensor(edges)).hist / (len(distance) * (edges[1] - edges[0]))
        panels[2].stairs(counts.tolist(), edges, color=color, linestyle=style, linewidth=1.6, label=label)
    panels[2].set_title("density of 1 - cosine to the text", fontsize=11, loc="left", color=_INK)
    for panel in panels:
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.tick_params(labelsize=8, colors=_FAINT)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", facecolor=_PAPER)
    return Path(path)


def _keep_home_clean() -> None:
    """Send matplotlib's cache to a folder that is removed at exit, unless it is loaded or told where already."""
    if "matplotlib" not in sys.modules and "MPLCONFIGDIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="pisces-matplotlib-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["MPLCONFIGDIR"] = folder


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan

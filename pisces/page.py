"""One self-contained HTML page: text, tables, pictures and short clips in a single file.

Pictures and clips are inside the file and its content policy forbids every request, so it can be mailed, archived and
opened without a network.
"""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pisces.video import atomic_path, video_bytes


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by blank lines; `backticks` mark code."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; numbers are set to the right, floats with three decimals.

    Attributes:
        header: names of the columns.
        rows: cells, strings or numbers; None is a dash.
        note: a sentence below.
        highlight: indices of rows to mark.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    note: str = ""
    highlight: Sequence[int] = ()


@dataclass(frozen=True)
class Image:
    """A .png, .jpg or .gif file with a caption."""

    path: str | os.PathLike[str]
    caption: str = ""


@dataclass(frozen=True)
class Clips:
    """Short clips side by side that play in a loop.

    Attributes:
        clips: (caption, an mp4 that browsers play, or frames [T, 3, H, W]).
        caption: a line above them.
        fps: rate for clips that are given as frames.
    """

    clips: Sequence[tuple[str, str | os.PathLike[str] | Tensor]]
    caption: str = ""
    fps: float = 8.0


Block = Text | Table | Image | Clips
_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}
_DASH = "\u2013"  # in a cell without a value
_NUMERIC = re.compile(r"[-+\u2212]?\d*\.?\d+(e[-+]?\d+)?\s*%?(\s*(±|\+-)\s*\d*\.?\d+)?")


def html_page(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[tuple[str, Sequence[Block]]],
    *,
    lead: str = "",
) -> Path:
    """Write one self-contained HTML file, light or dark as the reader's system is.

    Args:
        path: the .html to write.
        title: heading.
        sections: (heading, blocks), blocks being `Text`, `Table`, `Image` or `Clips`. All text is escaped.
        lead: a paragraph below the title.

    Returns:
        The path.

    Raises:
        FileNotFoundError: a picture or clip is missing.
        ValueError: a picture of another type, or a table whose rows do not fit its header.

    Example:
        >>> table = Table(["arm", "total"], [["base", 0.496], ["both rewards", 0.653]], highlight=[1])
        >>> html_page("/tmp/pisces-page.html", "A run", [("Result", [table])]).name
        'pisces-page.html'
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    if lead:
        body.append(f'<div class="lead">{_paragraphs(lead)}</div>')
    for heading, blocks in sections:
        body.append(f"<section><h2>{html.escape(heading)}</h2>")
        body.extend(_render(block) for block in blocks)
        body.append("</section>")
    page = _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body))
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


_STYLE = """
:root {
  --ink: #1c2330; --faint: #5b6675; --paper: #fbfbfa; --card: #ffffff; --line: #e3e6ea;
  --mark: #eef4ff; --accent: #2563eb;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e9ee; --faint: #9aa5b4; --paper: #12151a; --card: #1a1f27; --line: #2c333d;
    --mark: #1c2a44; --accent: #7aa7ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.015em; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; }
.lead { color: var(--faint); font-size: 1.05rem; }
.note { color: var(--faint); font-size: .875rem; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--line);
  padding: .1em .35em; border-radius: 4px; }
.table { overflow-x: auto; margin: .9rem 0; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .925rem; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .9rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--faint); font-weight: 600; font-size: .85rem; }
.number { text-align: right; }
tr.mark td { background: var(--mark); font-weight: 600; }
figure { margin: 1rem 0; }
figcaption { color: var(--faint); font-size: .875rem; margin-top: .4rem; }
img { display: block; max-width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line);
  background: #fff; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; margin: 1rem 0; }
.clips figure { margin: 0; }
video { display: block; width: 100%; border-radius: 8px; border: 1px solid var(--line);
  image-rendering: pixelated; }
@media print { h2 { break-after: avoid; } figure, .table { break-inside: avoid; } }
"""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _render(block: Block) -> str:
    if isinstance(block, Text):
        return _paragraphs(block.text)
    if isinstance(block, Table):
        return _render_table(block)
    if isinstance(block, Image):
        suffix = Path(block.path).suffix.lower()
        if suffix not in _IMAGE_TYPES:
            raise ValueError(f"html_page: {str(block.path)!r} is no picture, expected {', '.join(_IMAGE_TYPES)}.")
        data = _data_uri(_IMAGE_TYPES[suffix], Path(block.path).read_bytes())
        caption = html.escape(block.caption)
        return f'<figure><img src="{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    clips = []
    for caption, source in block.clips:
        if isinstance(source, Tensor):
            content = video_bytes(source, fps=block.fps, lossless=False)
        else:
            content = Path(source).read_bytes()
        clips.append(
            f'<figure><video src="{_data_uri("video/mp4", content)}" autoplay loop muted playsinline></video>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    heading = f"<p>{html.escape(block.caption)}</p>" if block.caption else ""
    return f'{heading}<div class="clips">{"".join(clips)}</div>'


def _paragraphs(text: str) -> str:
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return "".join(f"<p>{part.strip()}</p>" for part in re.split(r"\n\s*\n", escaped) if part.strip())


def _render_table(table: Table) -> str:
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(f"html_page: a row has {len(row)} cells, expected {len(table.header)}: {list(row)}.")
    lines = ['<div class="table"><table><thead><tr>']
    texts = [[_cell(cell) for cell in row] for row in table.rows]
    right = [
        bool(texts) and all(_NUMERIC.fullmatch(row[j]) or row[j] == _DASH for row in texts)
        for j in range(len(table.header))
    ]
    kind = [' class="number"' if r else "" for r in right]
    lines += [f"<th{k}>{html.escape(name)}</th>" for name, k in zip(table.header, kind, strict=True)]
    lines.append("</tr></thead><tbody>")
    for i, row in enumerate(texts):
        mark = ' class="mark"' if i in table.highlight else ""
        cells = "".join(f"<td{k}>{html.escape(cell)}</td>" for cell, k in zip(row, kind, strict=True))
        lines.append(f"<tr{mark}>{cells}</tr>")
    lines.append("</tbody></table></div>")
    if table.note:
        lines.append(f'<p class="note">{html.escape(table.note)}</p>')
    return "".join(lines)


def _cell(value: str | float | None) -> str:
    if value is None:
        return _DASH
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

"""Contact sheets, reward curves and the page: what is drawn is what was given, and the page needs nothing else."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pixels
from torch import Tensor

from pisces.data import read_video, write_video
from pisces.report import (
    Clips,
    Image,
    Table,
    Text,
    animated_sheet,
    contact_sheet,
    embedding_plot,
    html_page,
    read_log,
    reward_curves,
    smooth,
)


def flat_clips(*levels: float, n_frames: int = 9, size: int = 32) -> Tensor:
    """One clip a level; frame t of it is uniform with red = level and green = t / 10."""
    clips = torch.zeros(len(levels), n_frames, 3, size, size)
    clips[:, :, 0] = torch.tensor(levels)[:, None, None, None]
    clips[:, :, 1] = torch.arange(n_frames)[None, :, None, None] / 10
    return clips


def tiles(path: Path, level: float) -> list[tuple[int, int, float]]:
    """Where pictures of a red level lie on a sheet: (top, left, time told by the green level) in reading order."""
    pixels = np.asarray(Pixels.open(path).convert("RGB")).astype(int)
    mask = (abs(pixels[..., 0] - round(255 * level)) <= 2) & (pixels[..., 2] == 0)
    found = []
    for y, x in zip(*np.nonzero(mask), strict=True):
        green = pixels[y, x, 1]
        if not (mask[y - 1, x] and pixels[y - 1, x, 1] == green) and not (
            mask[y, x - 1] and pixels[y, x - 1, 1] == green
        ):
            found.append((int(y), int(x), green / 25.5))
    return found


def test_a_sheet_shows_each_row_and_time_in_order(tmp_path: Path) -> None:
    rows = [("before", flat_clips(0.2, 0.4)), ("after", flat_clips(0.6, 0.8))]
    path = contact_sheet(tmp_path / "a.png", rows, ["one", "two"])
    placed = {level: tiles(path, level) for level in (0.2, 0.4, 0.6, 0.8)}
    for level, found in placed.items():
        assert [round(time) for _, _, time in found] == [0, 2, 4, 6, 8], level
        assert len({top for top, _, _ in found}) == 1
        assert np.diff([left for _, left, _ in found]).tolist() == [99] * 4  # 96 wide, 3 apart
    tops = [placed[level][0][0] for level in (0.2, 0.6, 0.4, 0.8)]
    assert tops == sorted(tops)  # prompt one: before, after; prompt two: before, after
    wide = contact_sheet(tmp_path / "b.png", rows, ["one", "two"], columns=2, n_shown=3)
    assert [round(time) for _, _, time in tiles(wide, 0.2)] == [0, 4, 8]
    assert tiles(wide, 0.2)[0][0] == tiles(wide, 0.4)[0][0]


def test_small_pictures_are_enlarged_by_whole_pixels(tmp_path: Path) -> None:
    frame = torch.zeros(1, 1, 3, 32, 32)
    frame[0, 0, :2] = torch.rand(2, 32, 32).round() * 0.5 + 0.25
    path = contact_sheet(tmp_path / "a.png", [("x", frame)], ["noise"])
    pixels = np.asarray(Pixels.open(path))
    inside = (pixels[..., 2] == 0).nonzero()
    top, left = inside[0].min(), inside[1].min()
    tile = pixels[top : top + 96, left : left + 96]
    original = (frame[0, 0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert (tile == original.repeat(3, 0).repeat(3, 1)).all()


def test_sheets_bear_any_size_and_text(tmp_path: Path) -> None:
    prompts = ["word " * 200, "unbroken" * 60, "Ünïcode \u2013 “quotes” \n line", "x"]
    rows = [
        ("a label that is far too long for the column " * 3, torch.rand(4, 3, 3, 270, 480)),
        ("", flat_clips(*[0.5] * 4)),
    ]
    path = contact_sheet(tmp_path / "a.png", rows, prompts)
    width, height = Pixels.open(path).size
    assert width < 2600
    assert height < 1500


def test_a_moving_sheet_has_every_frame(tmp_path: Path) -> None:
    path = animated_sheet(tmp_path / "a.gif", [("before", flat_clips(0.2)), ("after", flat_clips(0.9))], ["one"])
    image = Pixels.open(path)
    assert image.n_frames == 9
    assert image.info["loop"] == 0
    image.seek(8)
    assert image.info["duration"] == 1120
    with pytest.raises(ValueError, match=r"\[3, 9\] frames"):
        animated_sheet(tmp_path / "b.gif", [("a", flat_clips(0.1)), ("b", flat_clips(0.1, n_frames=3))], ["one"])


@pytest.mark.parametrize(
    ("rows", "prompts", "message"),
    [
        ([], ["x"], "0 rows"),
        ([("a", flat_clips(0.1))], [], "0 prompts"),
        ([("a", flat_clips(0.1))], ["x", "y"], "row 'a' has 1 clips, expected 2"),
        ([("a", flat_clips(0.1)[0])], ["x"], "row 'a': frames has shape"),
        ([("a", flat_clips(0.1) * 255)], ["x"], "Clamp or rescale"),
    ],
)
def test_sheets_that_cannot_be_drawn(
    tmp_path: Path, rows: list[tuple[str, Tensor]], prompts: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet(tmp_path / "a.png", rows, prompts)
    assert not list(tmp_path.iterdir())


def write_log(path: Path, **series: list[float]) -> Path:
    n = len(next(iter(series.values())))
    lines = [json.dumps({"step": i + 1, **{key: values[i] for key, values in series.items()}}) for i in range(n)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_smoothing_laws(seed: int) -> None:
    values = torch.randn(40).tolist()
    assert smooth(values, 1) == values
    assert smooth([2.0] * 9, 5) == [2.0] * 9
    line = [3.0 * i for i in range(20)]
    assert np.allclose(smooth(line, 5), [3.0, 4.5, *line[2:-2], 52.5, 54.0])
    assert np.var(smooth(values, 9)) < np.var(values)
    assert smooth([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(smooth([math.nan], 3)[0])


def test_curves_of_several_arms(tmp_path: Path) -> None:
    good = {"reward": [0.0, 0.5, 1.0], "reward/quality": [0.1, 0.2, 0.3], "loss": [3.0, 2.0, 1.0]}
    logs = {
        "ours": write_log(tmp_path / "a.jsonl", **good),
        "with gaps": write_log(tmp_path / "b.jsonl", reward=[0.0, math.nan, 0.2]),
    }
    path = reward_curves(tmp_path / "a.png", logs, title="Rewards")
    two = Pixels.open(path).size
    one = Pixels.open(reward_curves(tmp_path / "b.png", logs, keys=["loss"])).size
    assert two[0] > one[0]  # a panel more
    only_loss = {"x": write_log(tmp_path / "c.jsonl", loss=[1.0, 0.5])}
    assert Pixels.open(reward_curves(tmp_path / "c.png", only_loss)).size == one
    with pytest.raises(ValueError, match=r"no log has \['rewards'\], expected some of \['loss', 'reward'"):
        reward_curves(tmp_path / "d.png", logs, keys=["rewards"])
    with pytest.raises(ValueError, match="no logs"):
        reward_curves(tmp_path / "d.png", {})
    assert not (tmp_path / "d.png").exists()


def test_logs_of_killed_and_broken_runs(tmp_path: Path) -> None:
    log = write_log(tmp_path / "a.jsonl", reward=[0.0, 1.0])
    log.write_text(log.read_text() + '{"step": 3, "rew')
    assert [record["step"] for record in read_log(log)] == [1, 2]
    log.write_text('{"step": 1, "rew\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_log(log)
    log.write_text("[1]\n{}\n")
    with pytest.raises(ValueError, match="line 1: expected an object"):
        read_log(log)
    log.write_text("")
    with pytest.raises(ValueError, match="no complete line"):
        read_log(log)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_log(tmp_path / "absent.jsonl")


def test_pictures_leave_no_cache_behind(tmp_path: Path, offline_environment: dict[str, str]) -> None:
    for name in ("home", "tmp", "out"):
        (tmp_path / name).mkdir()
    log = write_log(tmp_path / "log.jsonl", reward=[0.0, 1.0])
    script = (
        "import sys, torch; from pisces.report import *; out, log = sys.argv[1:]\n"
        "contact_sheet(out + '/a.png', [('x', torch.rand(1, 9, 3, 32, 32))], ['x'])\n"
        "reward_curves(out + '/b.png', {'x': log})\n"
    )
    environment = {k: v for k, v in offline_environment.items() if not k.startswith(("MPL", "XDG"))}
    environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path[1:], environment["PYTHONPATH"]])
    subprocess.run(
        [sys.executable, "-B", "-c", script, str(tmp_path / "out"), str(log)], check=True, env=environment, timeout=300
    )
    assert sorted(os.listdir(tmp_path / "out")) == ["a.png", "b.png"]
    assert os.listdir(tmp_path / "home") == os.listdir(tmp_path / "tmp") == []


class Page(HTMLParser):
    """Collects sources, text and whether every tag is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [(tag, value or "") for name, value in attrs if name in ("src", "href", "srcset", "poster")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    frames = flat_clips(0.2, 0.7)
    picture = contact_sheet(tmp_path / "sheet.png", [("x", frames)], ["one", "two"])
    clip = write_video(tmp_path / "clip.mp4", frames[0], lossless=False)
    table = Table(
        ["arm", "total", "spread"], [["<base>", 0.4961, None], ["ours", 0.653, "0.65 ± 0.02"]], "A note & more", [1]
    )
    sections = [
        ("Result & <i>", [Text("First `code <b>`.\n\nSecond."), table]),
        (
            "Pictures",
            [Image(picture, 'say "cheese"'), Clips([("from a file", clip), ("from frames", frames[1])], "All")],
        ),
    ]
    path = html_page(tmp_path / "page.html", "A run <script>", sections, lead="Lead")
    first = path.read_bytes()
    assert html_page(path, "A run <script>", sections, lead="Lead").read_bytes() == first
    picture.unlink()
    clip.unlink()

    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.sources] == ["img", "video", "video"]
    assert all(source.startswith("data:") for _, source in page.sources)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link|<iframe", re.sub(r'"data:[^"]*"', "", text))
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    words = " ".join(page.words)
    for shown in (
        "A run <script>",
        "Result & <i>",
        "code <b>",
        "<base>",
        "0.496",
        "0.653",
        "\u2013",
        "A note & more",
        "Lead",
    ):
        assert shown in words, shown
    assert '<td class="number">0.496</td>' in text
    assert '<tr class="mark"><td>ours</td>' in text
    for (_, source), original in zip(page.sources[1:], frames, strict=True):
        (tmp_path / "back.mp4").write_bytes(base64.b64decode(source.split(",", 1)[1]))
        back = read_video(tmp_path / "back.mp4")
        assert back.shape == (9, 3, 256, 256)
        assert (back[:, :, 4::8, 4::8] - original).abs().mean() < 2 / 255


def test_faults_of_a_page_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("<svg/>")
    for block, kind, message in (
        (Table(["a", "b"], [["x"]]), ValueError, "1 cells, expected 2"),
        (Image(tmp_path / "a.svg"), ValueError, "is no picture"),
        (Image(tmp_path / "absent.png"), FileNotFoundError, "absent"),
        (Clips([("x", tmp_path / "absent.mp4")]), FileNotFoundError, "absent"),
    ):
        with pytest.raises(kind, match=message):
            html_page(tmp_path / "p.html", "x", [("y", [block])])
    assert not (tmp_path / "p.html").exists()


def test_embeddings_are_drawn_and_others_are_refused(tmp_path: Path, seed: int) -> None:
    text, video = torch.randn(2, 40, 6)
    path = embedding_plot(tmp_path / "e.png", (text, video), (text + 1, video), n_shown=10)
    assert Pixels.open(path).size[0] > 1000
    # one picture for one input, another for another
    again = embedding_plot(tmp_path / "f.png", (text, video), (text + 1, video), n_shown=10)
    other = embedding_plot(tmp_path / "g.png", (text, video), (text - 1, video), n_shown=10)
    assert path.read_bytes() == again.read_bytes() != other.read_bytes()
    same = torch.ones(3, 2)
    embedding_plot(tmp_path / "same.png", (same, same), (same, same))  # nothing differs, and nothing fails
    for bad in (text[:39], text[:, :5]):
        with pytest.raises(ValueError, match="embedding_plot"):
            embedding_plot(tmp_path / "h.png", (bad, video), (text, video))
    with pytest.raises(ValueError, match="at least 3"):
        embedding_plot(tmp_path / "h.png", (text[:2], video[:2]), (text[:2], video[:2]))

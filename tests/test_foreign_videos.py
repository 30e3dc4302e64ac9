"""Videos as cameras and the web make them, scored end to end: what they show decides, not how they are stored."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from pisces.cli import app
from pisces.world import scene


def pictures(caption: str) -> list[np.ndarray]:
    """The nine pictures of the small world for a caption, enlarged to 128 pixels."""
    generator = torch.Generator().manual_seed(4)
    frames = (
        scene.render(scene.parse_caption(caption), generator)[0]
        .repeat_interleave(4, dim=-1)
        .repeat_interleave(4, dim=-2)
    )
    return list((255 * frames).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy())


def store(
    path: Path,
    shown: list[np.ndarray],
    codec: str,
    ticks: list[int],
    *,
    rate: int = 24,
    options: dict[str, str] | None = None,
    rotation: int | None = None,
) -> Path:
    """Write pictures that appear at the given ticks of 1 / rate seconds."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = shown[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, rate)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for picture, tick in zip(shown, ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def foreign(folder: Path, shown: list[np.ndarray]) -> dict[str, Path]:
    """The same moving picture in six forms of storage."""
    even = list(range(4 * len(shown)))
    held = [picture for picture in shown for _ in range(4)]
    # the first picture 24 times, every other one only when it appears; the last one again, so that the end is known
    sparse = [shown[0]] * 24 + shown[1:] + [shown[-1]]
    uneven = [*range(24), *(24 * k for k in range(1, len(shown))), 24 * len(shown) - 1]
    b_frames = {"bf": "3", "b_strategy": "0", "g": "36", "crf": "12"}
    vp9 = {"cpu-used": "8", "deadline": "realtime", "crf": "12", "b": "0"}
    return {
        "mpeg4": store(folder / "mpeg4.mp4", held, "mpeg4", even, options={"qscale": "2", "b": "4000000"}),
        "mpeg4 b": store(folder / "old.avi", held, "mpeg4", even, options={"bf": "2", "b": "4000000"}),
        "b frames": store(folder / "b.mp4", held, "libx264", even, options=b_frames),
        "vp9": store(folder / "web.webm", held, "libvpx-vp9", even, options=vp9),
        "variable": store(folder / "variable.mkv", sparse, "libx264", uneven, rate=144, options={"crf": "12"}),
        # stored lying on its side, with the note to turn it counterclockwise
        "turned": store(folder / "phone.mp4", [np.rot90(p, -1) for p in held], "libx264", even, rotation=90),
    }


def score(path: Path, prompt: str, json_file: Path) -> tuple[Result, dict[str, Any]]:
    command = ["score", "--folder", str(path), "--prompt", prompt, "--json", str(json_file)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    return result, json.loads(json_file.read_text())


@pytest.mark.parametrize("caption", ["a red square moves left", "a blue circle moves up"])
def test_storage_does_not_change_the_score_and_content_does(caption: str, tmp_path: Path) -> None:
    shown = pictures(caption)
    files = foreign(tmp_path, shown)
    with av.open(str(files["b frames"])) as container:
        kinds = {frame.pict_type for frame in container.decode(video=0)}
    assert av.video.frame.PictureType.B in kinds
    store(tmp_path / "plain.mp4", [p for p in shown for _ in range(4)], "libx264", list(range(36)))
    result, report = score(tmp_path, caption, tmp_path / "s.json")
    assert result.exit_code == 0, result.output
    found = {Path(row["file"]).name: row for row in report["scores"]}
    assert len(found) == len(files) + 1
    opposite = {"left": "right", "up": "down"}[caption.split()[-1]]
    _, wrong = score(tmp_path, caption.rsplit(" ", 1)[0] + " " + opposite, tmp_path / "w.json")
    for row in wrong["scores"]:
        right = found[Path(row["file"]).name]
        assert right["match"] > 0.9 > 0.1 > row["match"], row["file"]
        assert right["quality"] == pytest.approx(found["plain.mp4"]["quality"], abs=0.1), row["file"]


def test_what_is_cut_or_corrupt_is_named_and_skipped(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    files = foreign(videos, pictures("a red square moves left"))
    bad = []
    for path in files.values():
        data = path.read_bytes()
        cut = videos / f"cut-{path.name}"
        cut.write_bytes(data[: 2 * len(data) // 3])
        overwritten = videos / f"zeroed-{path.name}"
        kept = len(data) // 8  # of more a raw stream may be left that lacks nothing but its header
        overwritten.write_bytes(bytes(len(data) - kept) + data[-kept:])
        bad += [cut.name, overwritten.name]
    result, report = score(videos, "a red square moves left", tmp_path / "s.json")
    assert result.exit_code == 1
    assert sorted(Path(row["file"]).name for row in report["scores"]) == sorted(p.name for p in files.values())
    assert sorted(Path(row["file"]).name for row in report["unreadable"]) == sorted(bad)
    for name in bad:
        assert any(name in line for line in result.stderr.splitlines()), name
    assert "12 of 18 videos could not be read" in result.stderr

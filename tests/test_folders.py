"""Folders of captioned videos and files of prompts: both layouts, links, faults that are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from clips import moving_shapes

from pisces.data import VideoFolder, VideoReadError, read_prompts, write_metadata, write_video


def test_both_layouts_of_a_folder_are_the_same_dataset(tmp_path: Path) -> None:
    clips = {name: moving_shapes(seed=seed) for seed, name in enumerate(("a.mp4", "b.mp4"))}
    rows = [{"file_name": f"clips/{name}", "text": f"video {name}", "seed": 3} for name in clips]
    for name, frames in clips.items():
        write_video(tmp_path / "listed" / "clips" / name, frames)
        write_video(tmp_path / "paired" / name, frames)
        (tmp_path / "paired" / name).with_suffix(".txt").write_text(f"video\n{name}\n")
    write_metadata(tmp_path / "listed", rows)
    listed = VideoFolder(tmp_path / "listed", n_frames=8, size=16)
    paired = VideoFolder(tmp_path / "paired", n_frames=8, size=16)
    assert listed.captions == paired.captions == ["video a.mp4", "video b.mp4"]
    assert len(listed) == len(paired) == 2
    assert listed.rows == rows
    for (frames, caption), (other, other_caption) in zip(listed, paired, strict=True):
        assert caption == other_caption
        assert torch.equal(frames, other)
        assert frames.shape == (8, 3, 16, 16)
    batch, captions = next(iter(torch.utils.data.DataLoader(listed, batch_size=2)))
    assert batch.shape == (2, 8, 3, 16, 16)
    assert list(captions) == listed.captions


def test_faults_of_a_folder_name_the_file(tmp_path: Path) -> None:
    listing = tmp_path / "metadata.jsonl"
    write_video(tmp_path / "a.mp4", moving_shapes(2))
    write_video(tmp_path.parent / "outside.mp4", moving_shapes(2))
    good = {"file_name": "a.mp4", "text": "x"}
    cases = [
        ([good, {"file_name": "b.mp4", "text": "x"}], FileNotFoundError, r"line 2: no video 'b\.mp4'"),
        ([{"file_name": "a.mp4", "text": " "}], ValueError, r"line 1: the caption .*'a\.mp4' is missing or empty"),
        ([{"file_name": "a.mp4"}], ValueError, "caption"),
        ([{"video": "a.mp4", "text": "x"}], ValueError, "file_name"),
        ([["a.mp4", "x"]], ValueError, "file_name"),
        ([{"file_name": "../outside.mp4", "text": "x"}], ValueError, "outside the folder"),
        ([{"file_name": str(tmp_path.parent / "outside.mp4"), "text": "x"}], ValueError, "outside the folder"),
        ([], ValueError, "lists no video"),
    ]
    for rows, kind, message in cases:
        listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(kind, match=message):
            VideoFolder(tmp_path)
    listing.write_text('{"file_name": \n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        VideoFolder(tmp_path)
    listing.write_text(json.dumps(good) + "\n")
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(VideoReadError, match=r"a\.mp4"):
        VideoFolder(tmp_path)[0]
    listing.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.mp4.*no caption file 'a\.txt'"):
        VideoFolder(tmp_path)
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.txt.*empty"):
        VideoFolder(tmp_path)
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(ValueError, match=r"neither metadata\.jsonl nor videos"):
        VideoFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        VideoFolder(tmp_path / "absent")


def test_a_folder_may_hold_links(tmp_path: Path) -> None:
    """Data that lies on another disk; the folder itself may be one, too."""
    write_video(tmp_path / "disk" / "a.mp4", moving_shapes(2))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "here.mp4").symlink_to(tmp_path / "disk" / "a.mp4")
    write_metadata(tmp_path / "videos", [{"file_name": "here.mp4", "text": "x"}])
    (tmp_path / "link").symlink_to(tmp_path / "videos")
    for name in ("videos", "link"):
        frames, caption = VideoFolder(tmp_path / name)[0]
        assert (frames.shape[1], caption) == (3, "x")


def test_prompts_of_every_format(tmp_path: Path) -> None:
    wanted = ["a red square, moving left", 'a "blue" circle', "ein grüner Kreis"]
    (tmp_path / "p.txt").write_text("\ufeff" + "\n\n".join(wanted) + "\r\n", encoding="utf-8")
    lines = [{"prompt": wanted[0], "id": 1}, {"text": wanted[1]}, wanted[2]]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    (tmp_path / "p.csv").write_text(
        'id,caption\n1,"a red square, moving left"\n2,"a ""blue"" circle"\n3, ein grüner Kreis\n', encoding="utf-8"
    )
    for suffix in ("txt", "jsonl", "csv"):
        assert read_prompts(tmp_path / f"p.{suffix}") == wanted


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "holds no prompt, expected at least one. Write one a line"),
        ("p.txt", b"\xff\xfe\x00", "UTF-8"),
        (
            "p.jsonl",
            b'{"prompt": "x"}\n{"prompt": ""}\n',
            "line 2: the prompt is empty, expected at least one word. Fill it",
        ),
        ("p.jsonl", b'{"prompts": "x"}\n', "line 1: found 'prompts', expected one of 'prompt'"),
        ("p.jsonl", b"[1]\n", "line 1: expected a string or an object"),
        ("p.jsonl", b"{x}\n", "line 1: not JSON"),
        ("p.csv", b"prompt\nx\n  \ny\n", "line 3: the prompt is empty"),
        ("p.csv", b"a,b\nx,y\n", "found 'a', 'b', expected"),
        ("p.yaml", b"x\n", "expected .txt, .jsonl or .csv"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"absent\.txt', expected a file of prompts. Check the name"):
        read_prompts(tmp_path / "absent.txt")

"""WebDataset shards: the samples that webdataset itself reads, in any order, and every fault named."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from safetensors.torch import load_file
from typer.testing import CliRunner

from pisces.cli import app
from pisces.data import VideoFolder, VideoReadError, VideoShards, find_videos, open_videos, write_metadata
from pisces.video import video_bytes
from pisces.world.dataset import write_dataset

Members = list[tuple[str, bytes]]


def clip(seed: int, height: int = 16, width: int = 16) -> bytes:
    """A short video of noise."""
    generator = torch.Generator().manual_seed(seed)
    return video_bytes(torch.rand(3, 3, height, width, generator=generator))


def write_shard(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, seed: int, caption: str) -> Members:
    return [(f"{key}.mp4", clip(seed)), (f"{key}.txt", caption.encode())]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of three samples each, as webdataset writes them; captions as text or JSON."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for s in range(3):
        with webdataset.TarWriter(str(folder / f"{s:06d}.tar")) as writer:
            for n in range(3):
                caption = f"clip {s} {n}"
                kind = {"txt": caption} if n else {"json": {"id": n, "caption": caption}}
                writer.write({"__key__": f"{n:04d}", "MP4" if s == 1 else "mp4": clip(3 * s + n), **kind, "cls": 3})
    return folder


def test_the_samples_are_those_of_webdataset(shards: Path) -> None:
    pattern = str(shards / "{000000..000002}.tar")
    videos = VideoShards(pattern, n_frames=2)
    peer = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert len(videos) == len(peer) == 9
    assert [file.read() for file in videos.files] == [one["mp4"] for one in peer]
    assert [str(file).rpartition(".")[0] for file in videos.files] == [f"{x['__url__']}/{x['__key__']}" for x in peer]
    captions = [one["txt"].decode() if "txt" in one else json.loads(one["json"])["caption"] for one in peer]
    assert videos.captions == captions


def test_shards_and_a_folder_are_the_same_dataset(shards: Path, tmp_path: Path, seed: int) -> None:
    videos = VideoShards(shards, n_frames=2, size=(8, 12))
    rows = []
    for n, (file, caption) in enumerate(zip(videos.files, videos.captions, strict=True)):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{n}.mp4").write_bytes(file.read())
        rows.append({"file_name": f"{n}.mp4", "text": caption})
    write_metadata(tmp_path / "folder", rows)
    folder = VideoFolder(tmp_path / "folder", n_frames=2, size=(8, 12))
    items = list(range(9))
    random.Random(seed).shuffle(items)
    for item in items:
        frames, caption = videos[item]
        assert frames.shape == (2, 3, 8, 12)
        assert torch.equal(frames, folder[item][0])
        assert caption == folder.captions[item]
        assert videos.digest(item) == folder.digest(item)
    digests = {videos.digest(item) for item in items}
    for other in (VideoShards(shards, n_frames=3, size=(8, 12)), VideoShards(shards, n_frames=2, size=(12, 8))):
        digests |= {other.digest(item) for item in items}
    assert len(digests) == 27  # one for each video, number of frames and size
    assert VideoShards(shards, size=8).digest(0) == VideoShards(shards, size=(8, 8)).digest(0)
    assert torch.equal(pickle.loads(pickle.dumps(videos))[4][0], videos[4][0])  # as workers of a loader get it


def test_open_videos_tells_shards_from_folders(shards: Path, tmp_path: Path) -> None:
    for path in (shards, shards / "000000.tar", shards / "{000000,000002}.tar"):
        find_videos(path)
        assert isinstance(open_videos(path), VideoShards), path
    assert open_videos(shards / "{000002,000000}.tar").captions[0] == "clip 2 0"
    # A folder of videos stays one when the archive that they came out of lies beside them.
    (shards / "a.mp4").write_bytes(clip(0))
    (shards / "a.txt").write_text("one clip")
    assert open_videos(shards).captions == ["one clip"]
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_videos(tmp_path / "absent")
    for absent in ("absent", "absent.tar", "{0..2}.tar"):
        with pytest.raises(FileNotFoundError, match="no"):
            find_videos(tmp_path / absent)
    with pytest.raises(FileNotFoundError, match=r"no shard .*000003\.tar', of the pattern .*000009"):
        open_videos(shards / "{000001..000009}.tar")
    with pytest.raises(ValueError, match=r"braces .* do not match"):
        open_videos(shards / "{000001..")


def test_members_may_be_apart_and_others_are_ignored(tmp_path: Path) -> None:
    members = [
        ("._a.mp4", b"what macOS adds"),
        ("README", b"no dot"),
        ("__note__/x.mp4", b"reserved"),
        ("in/a.mp4", clip(0)),
        ("b.webm", b"opened when it is asked for"),
        ("b.json", json.dumps({"text": "second"}).encode()),
        ("in/a.meta.json", b"{"),
        ("in/a.txt", "\ufeff first\r\nclip ".encode()),
        ("in/a.json", b"{}"),
    ]
    videos = VideoShards(write_shard(tmp_path / "a.tar", members))
    assert videos.captions == ["first clip", "second"]
    assert [file.name for file in videos.files] == ["in/a.mp4", "b.webm"]
    with pytest.raises(VideoReadError, match=r"a\.tar/b\.webm.*not a video"):
        videos[1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.mp4", b"x")], r"0\.tar/a\.mp4 has no caption\. Put a\.txt or a\.json"),
        ([("a.txt", b"x")], r"0\.tar: the sample 'a' has \.txt and no video"),
        ([("a.1.mp4", b"x"), ("a.txt", b"x")], r"'a' has \.1\.mp4, \.txt and no video.*first dot"),
        ([("a.mp4", b"x"), ("a.txt", b" \n")], r"caption '.*0\.tar/a\.txt' is empty"),
        ([("a.mp4", b"x"), ("a.json", b'{"text": ""}')], r"caption '.*0\.tar/a\.json' is empty"),
        ([("a.mp4", b"x"), ("a.json", b'{"title": "x"}')], r"0\.tar/a\.json: found 'title', expected one of 'prompt'"),
        ([("a.mp4", b"x"), ("a.json", b"{")], r"0\.tar/a\.json: not JSON"),
        ([("a.mp4", b"x"), ("a.txt", b"\xff\xfe")], r"0\.tar/a\.txt: it is not UTF-8"),
        ([*sample("a", 0, "x"), *sample("a", 1, "y")], r"0\.tar: the key 'a' has 'a\.mp4' and 'a\.mp4'"),
        ([("a.mp4", b"x"), ("a.webm", b"x"), ("a.txt", b"x")], r"key 'a' has 'a\.mp4' and 'a\.webm'"),
        ([], "holds no sample"),
    ],
)
def test_faults_of_a_sample_name_shard_and_member(tmp_path: Path, members: Members, message: str) -> None:
    write_shard(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=message):
        open_videos(tmp_path)


def test_the_same_key_in_two_shards_is_two_samples(tmp_path: Path) -> None:
    for n in range(2):
        write_shard(tmp_path / f"{n}.tar", sample("a", n, f"clip {n}"))
    videos = VideoShards(tmp_path)
    assert videos.captions == ["clip 0", "clip 1"]
    assert not torch.equal(videos[0][0], videos[1][0])


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", sample("a", 0, "x"))
    with tarfile.open(tmp_path / "0.tar.gz", "w:gz") as tar:
        tar.add(shard, arcname="a.mp4")
    (tmp_path / "text.tar").write_text("hello\n" * 999)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "zipped.tar").write_bytes((tmp_path / "0.tar.gz").read_bytes())
    for name in ("0.tar.gz", "text.tar", "empty.tar", "zipped.tar"):
        with pytest.raises(ValueError, match=f"cannot read .*{name} as a tar file.*not compressed"):
            open_videos(tmp_path / name)
    # A size below zero leads tarfile back to the header that it has just read.
    content = bytearray(shard.read_bytes())
    content[124:136] = b"\xff" * 10 + b"\xfe\x00"
    content[148:156] = b" " * 8
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="negative size"):
        open_videos(shard)


def test_a_shard_cut_anywhere_is_named(tmp_path: Path, seed: int) -> None:
    members = [*sample("a", 0, "first"), *sample("b", 1, "second")]
    whole = write_shard(tmp_path / "0.tar", members).read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        last = tar.getmembers()[-1]
        end = last.offset_data + 512  # of the last member: behind it are the blocks of zeros that end a tar
        borders = [info.offset for info in tar.getmembers()]
    cuts = {*borders, end, *random.Random(seed).sample(range(end), 40)}
    for cut in cuts:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut\.tar"):
            open_videos(tmp_path / "cut.tar")
    damaged = bytearray(whole)
    damaged[borders[2] + 5] ^= 1  # a header in the middle, which tarfile takes for the end
    (tmp_path / "cut.tar").write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"cut\.tar is cut off or damaged at byte {borders[2]}"):
        open_videos(tmp_path / "cut.tar")


def test_damaged_bytes_never_do_worse_than_an_error(tmp_path: Path, seed: int) -> None:
    members = [*sample("a", 0, "first"), ("long/" + "b" * 120 + ".mp4", clip(1)), ("long/" + "b" * 120 + ".txt", b"x")]
    whole = write_shard(tmp_path / "0.tar", members).read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        headers = [at for info in tar.getmembers() for at in range(info.offset, info.offset_data)]
    rng = random.Random(seed)
    victim = tmp_path / "1.tar"
    refusals = []
    for _ in range(150):
        broken = bytearray(whole)
        for at in rng.sample(headers, rng.randrange(1, 6)):
            broken[at] = rng.randrange(256)
        start = rng.choice(headers) // 512 * 512
        if rng.random() < 0.5:  # with a checksum that fits, so that what lies behind it is reached
            broken[start + 148 : start + 156] = b" " * 8
            broken[start + 148 : start + 156] = f"{sum(broken[start : start + 512]):06o}\0 ".encode()
        victim.write_bytes(broken)
        try:
            videos = VideoShards(victim)
            _ = [videos[item] for item in range(len(videos))]
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 30
    assert all("1.tar" in refusal for refusal in refusals)


def test_a_playlist_in_a_shard_opens_no_file(tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(clip(0))
    for n, text in enumerate(
        (f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n", f"#EXTM3U\n{tmp_path}/secret.mp4\n")
    ):
        shard = write_shard(tmp_path / f"{n}.tar", [("a.mp4", text.encode()), ("a.txt", b"x")])
        with pytest.raises(VideoReadError, match=r"a\.mp4"):
            VideoShards(shard)[0]


def test_a_shard_that_changes_while_it_is_used_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", sample("a", 0, "x"))
    videos = VideoShards(shard)
    shard.write_bytes(shard.read_bytes()[:700])
    for read in (videos.__getitem__, videos.digest):
        with pytest.raises(VideoReadError, match=r"0\.tar/a\.mp4.*has become shorter"):
            read(0)
    shard.unlink()
    with pytest.raises(VideoReadError, match="No such file"):
        videos.digest(0)


def test_shards_are_scored_and_fitted_on_as_a_folder_is(tmp_path: Path, seed: int) -> None:
    def run(*arguments: object) -> None:
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        assert result.exit_code == 0, result.output

    def scored(*arguments: object) -> list[dict[str, object]]:
        run("score", *arguments, "--json", tmp_path / "scores.json")
        return json.loads((tmp_path / "scores.json").read_text())["scores"]

    folder = VideoFolder(write_dataset(tmp_path / "folder", 20, seed=seed))
    pairs = enumerate(zip(folder.files, folder.captions, strict=True))
    members = [
        member
        for n, (file, caption) in pairs
        for member in ((f"{n:04d}.mp4", file.read_bytes()), (f"{n:04d}.txt", caption.encode()))
    ]
    shard = write_shard(tmp_path / "shards" / "0.tar", members)
    scores, maps = [], []
    for path in (folder.path, tmp_path / "shards" / "{0..0}.tar"):
        scores.append(scored("--folder", path))
        output = tmp_path / "map.safetensors"
        run("fit-ot-map", "--videos", path, "--output", output, "--kind", "center")
        maps.append(load_file(output))
    assert [row.pop("file") for row in scores[1]] == [f"{shard}/{n:04d}.mp4" for n in range(20)]
    assert [{k: v for k, v in row.items() if k != "file"} for row in scores[0]] == scores[1]
    assert all(torch.equal(value, maps[1][name]) for name, value in maps[0].items())
    for path in (shard.parent, shard):
        assert {row["prompt"] for row in scored("--folder", path, "--prompt", "a circle")} == {"a circle"}

"""Laws of embeddings on disk: resumed, divided and damaged, they are what one pass in memory gives, or are refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_encoder import tiny_encoder
from together import run_together
from typer.testing import CliRunner, Result

from pisces.cli import app
from pisces.commands.fit_ot_map import FitOptions, split_pairs
from pisces.data import VideoFolder, VideoShards
from pisces.encoders import TinyEncoder
from pisces.encoders.base import refused_prompts
from pisces.ot_map import Alignment, embeddings
from pisces.ot_map.embeddings import embed, extract, read_embeddings, wait_for_shards
from pisces.processes import Processes
from pisces.world.dataset import write_dataset

N = 22
BROKEN = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned videos of which one cannot be read."""
    path = write_dataset(tmp_path_factory.mktemp("videos") / "all", N, seed=4)
    VideoFolder(path).files[BROKEN].write_bytes(b"broken")
    return path


@pytest.fixture(scope="module")
def model() -> TinyEncoder:
    return tiny_encoder()


@pytest.fixture
def videos(folder: Path, model: TinyEncoder) -> VideoFolder:
    return VideoFolder(folder, n_frames=model.n_frames, size=model.size)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BATCH_SIZE", 2)


class Share(Processes):
    """One of several processes that never meet."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    def wait(self) -> None:
        """The test runs them one after the other."""


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_holds_what_one_pass_gives(videos: VideoFolder, model: TinyEncoder, tmp_path: Path) -> None:
    whole = embed(videos, model, range(N))
    assert [Path(name).name for name, _ in whole.unreadable] == [videos.files[BROKEN].name]
    assert whole.captions == [caption for i, caption in enumerate(videos.captions) if i != BROKEN]
    # row i of both is of pair i, whatever was left out before it
    frames, caption = videos[N - 1]
    torch.testing.assert_close(whole.video[-1:], model.encode_video(frames[None]).embedding, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.text[-1:], model.encode_text([caption]).embedding, rtol=1e-4, atol=1e-5)
    done: list[int] = []
    extract(tmp_path, videos, model, shard_pairs=8, progress=done.append)
    assert sum(done) == N
    found, listing = read_embeddings(tmp_path)
    assert (listing["encoder"], listing["n_videos"], listing["embed_dim"]) == ("TinyEncoder", N, 8)
    assert torch.equal(found.text, whole.text)
    assert torch.equal(found.video, whole.video)
    assert (found.captions, found.unreadable) == (whole.captions, whole.unreadable)
    assert sorted(os.listdir(tmp_path)) == [f"{k:06d}.safetensors" for k in range(3)] + ["embeddings.json"]


@pytest.mark.parametrize("side", ["text", "video"])
def test_pairs_that_are_not_finite_are_named(
    videos: VideoFolder, model: TinyEncoder, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model in float16 overflows: the pair is left out, the others of its batch are what they were."""
    whole = embed(videos, model, range(8), batch_size=3)
    encode, seen = getattr(TinyEncoder, f"encode_{side}"), []

    def overflowing(self: TinyEncoder, batch: list[str] | torch.Tensor) -> Any:
        features = encode(self, batch)
        embedding = features.embedding.clone()
        for row in embedding:
            if len(seen) in (1, 6):
                row[2] = torch.inf if seen[1:] else torch.nan
            seen.append(row)
        return dataclasses.replace(features, embedding=embedding)

    monkeypatch.setattr(TinyEncoder, f"encode_{side}", overflowing)
    monkeypatch.setattr(embeddings, "refused_prompts", lambda *_: {})
    found = embed(videos, model, range(8), batch_size=3)
    sound = [0, 2, 3, 4, 5, 7]
    assert torch.equal(found.text, whole.text[sound])
    assert torch.equal(found.video, whole.video[sound])
    assert found.captions == [whole.captions[i] for i in sound]
    assert [name for name, _ in found.unreadable] == [str(videos.files[i]) for i in (1, 6)]
    assert all("not finite" in why for _, why in found.unreadable)


def test_embeddings_do_not_depend_on_the_batch(videos: VideoFolder, model: TinyEncoder) -> None:
    everything = range(len(videos))
    one, many = (embed(videos, model, everything, batch_size=n) for n in (1, 5))
    for mine, theirs in ((one.text, many.text), (one.video, many.video)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert one.captions == many.captions
    with pytest.raises(ValueError, match="batch_size is 0"):
        embed(videos, model, everything, batch_size=0)


def test_a_resumed_or_divided_extraction_is_the_same(
    videos: VideoFolder, model: TinyEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(tmp_path / "whole", videos, model, shard_pairs=8)
    for rank in (1, 0):
        extract(tmp_path / "divided", videos, model, shard_pairs=8, processes=Share(rank, 2))
        there = len(list((tmp_path / "divided").glob("*.safetensors")))
        assert there == (1 if rank == 1 else 3)
        if rank == 1:
            with pytest.raises(FileNotFoundError, match=r"lacks 2 of 3 shards, the first 000000\.safetensors"):
                read_embeddings(tmp_path / "divided")
    read = VideoFolder.__getitem__

    def killed(self: VideoFolder, index: int) -> object:
        if index == 13:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(VideoFolder, "__getitem__", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(tmp_path / "resumed", videos, model, shard_pairs=8)
    assert sorted(os.listdir(tmp_path / "resumed")) == ["000000.safetensors", "embeddings.json"]
    asked: list[int] = []
    monkeypatch.setattr(VideoFolder, "__getitem__", lambda self, i: (asked.append(i), read(self, i))[1])
    extract(tmp_path / "resumed", videos, model, shard_pairs=8)
    assert asked == list(range(8, N))  # what was there is not read again
    assert bytes_of(tmp_path / "resumed") == bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "divided")


def test_two_processes_fill_one_folder(folder: Path, videos: VideoFolder, model: TinyEncoder, tmp_path: Path) -> None:
    said = run_together("embedded_together.py", folder, tmp_path / "two")
    assert said[0].split() == ["2", str(N - 1)]
    extract(tmp_path / "one", videos, model, shard_pairs=4)
    one, two = bytes_of(tmp_path / "one"), bytes_of(tmp_path / "two")
    assert one.keys() == two.keys()
    # two processes may round otherwise than this one with its threads
    for mine, theirs in zip(*(read_embeddings(tmp_path / name) for name in ("one", "two")), strict=True):
        if isinstance(mine, dict):
            assert mine == theirs
            continue
        torch.testing.assert_close((mine.text, mine.video), (theirs.text, theirs.video), rtol=1e-4, atol=1e-5)
        assert (mine.captions, mine.unreadable) == (theirs.captions, theirs.unreadable)


def test_waiting_ends_when_a_peer_fails_or_nothing_moves(
    videos: VideoFolder, model: TinyEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(tmp_path, videos, model, shard_pairs=8, processes=Share(0, 2))  # shards 0 and 2
    with pytest.raises(ValueError, match=r"lacks 1 of 3 shards, the first 000001.* none was written for 0.1 seconds"):
        wait_for_shards(tmp_path, patience=0.1, seconds=0.02)
    with monkeypatch.context() as patch:
        patch.setattr(TinyEncoder, "encode_video", lambda *_: (_ for _ in ()).throw(MemoryError("too large")))
        with pytest.raises(MemoryError):
            extract(tmp_path, videos, model, shard_pairs=8, processes=Share(1, 2))
    with pytest.raises(ValueError, match=r"process 1 failed \(MemoryError: too large\).*Call again"):
        wait_for_shards(tmp_path)
    extract(tmp_path, videos, model, shard_pairs=8, processes=Share(0, 2))
    assert not list(tmp_path.glob("*.failed"))
    # time counts from the last shard: each comes sooner than patience ends, all together do not
    (tmp_path / "000002.safetensors").unlink()
    clock = iter(range(1000))
    monkeypatch.setattr(embeddings.time, "monotonic", lambda: float(next(clock)))
    looks = 0

    def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks in (4, 8):
            shutil.copy(tmp_path / "000000.safetensors", tmp_path / f"00000{looks // 4}.safetensors")

    monkeypatch.setattr(embeddings.time, "sleep", sleep)
    wait_for_shards(tmp_path, patience=7)
    assert looks == 8


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_shard_is_named_and_made_again(
    damage: str, videos: VideoFolder, model: TinyEncoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extract(tmp_path, videos, model, shard_pairs=8)
    shard = tmp_path / "000001.safetensors"
    good = shard.read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 16
    shard.write_bytes({"cut": good[:-5], "flipped": bytes(flipped), "foreign": b"x"}[damage])
    with pytest.raises(ValueError, match=r"000001\.safetensors is damaged"):
        read_embeddings(tmp_path)
    with caplog.at_level(logging.WARNING):
        extract(tmp_path, videos, model, shard_pairs=8)
    assert "000001.safetensors is damaged" in caplog.text
    assert shard.read_bytes() == good


def test_embeddings_of_something_else_are_refused(
    videos: VideoFolder, folder: Path, model: TinyEncoder, tmp_path: Path
) -> None:
    place = tmp_path / "embeddings"
    extract(place, videos, model, shard_pairs=8)
    with pytest.raises(ValueError, match="other encoder"):
        extract(place, videos, tiny_encoder(1), shard_pairs=8)
    shutil.copytree(folder, tmp_path / "moved")
    moved = VideoFolder(tmp_path / "moved", n_frames=model.n_frames, size=model.size)
    extract(place, moved, model, shard_pairs=8)  # the same videos elsewhere
    moved.captions[3] = "another caption"
    with pytest.raises(ValueError, match="other videos"):
        extract(place, moved, model, shard_pairs=8)
    with pytest.raises(ValueError, match="shards of 8 pairs"):
        extract(place, videos, model, shard_pairs=4)
    listing = json.loads((place / "embeddings.json").read_text())
    older = {
        name: value
        for name, value in listing.items()
        if name not in ("encoder_bf16_sha256", "encoder_any_frames_sha256")
    }
    (place / "embeddings.json").write_text(json.dumps(older))
    extract(place, videos, model, shard_pairs=8)  # filled by a version that knew the exact digest only
    (place / "embeddings.json").write_text(json.dumps({**listing, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        read_embeddings(place)
    (place / "embeddings.json").write_text("{")
    with pytest.raises(ValueError, match=r"embeddings\.json is damaged"):
        read_embeddings(place)
    (place / "embeddings.json").unlink()
    with pytest.raises(ValueError, match=r"no embeddings\.json"):
        extract(place, videos, model, shard_pairs=8)
    with pytest.raises(FileNotFoundError, match=r"no embeddings\.json"):
        read_embeddings(tmp_path)


class Plain:
    """An encoder that is no module, so that it has no digest."""

    def __init__(self, model: TinyEncoder) -> None:
        self.model = model

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)


class Other(Plain):
    """Of another class."""


def test_encoders_without_a_digest_are_told_apart_by_their_class(
    videos: VideoFolder, model: TinyEncoder, tmp_path: Path
) -> None:
    for _ in range(2):
        extract(tmp_path, videos, Plain(model), shard_pairs=8)  # type: ignore[arg-type]
    for other in (Other(model), model):
        with pytest.raises(ValueError, match="embeddings of other encoder"):
            extract(tmp_path, videos, other, shard_pairs=8)  # type: ignore[arg-type]


def test_a_caption_without_a_word_costs_its_pair_only(
    videos: VideoFolder, model: TinyEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embed(videos, model, range(N))
    videos.captions[12], videos.captions[BROKEN] = "!!!", "..."
    read = VideoFolder.__getitem__
    asked: list[int] = []
    monkeypatch.setattr(VideoFolder, "__getitem__", lambda self, i: (asked.append(i), read(self, i))[1])
    extract(tmp_path, videos, model, shard_pairs=8)
    assert sorted(asked) == [i for i in range(N) if i not in (BROKEN, 12)]
    found, _ = read_embeddings(tmp_path)
    kept = torch.tensor([i for i in range(N - 1) if i != 11])  # number 9 was left out before, so that 12 was row 11
    torch.testing.assert_close(found.text, whole.text[kept], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.video, whole.video[kept], rtol=1e-4, atol=1e-5)
    assert [name for name, _ in found.unreadable] == [str(videos.files[i]) for i in (BROKEN, 12)]
    assert "the prompt is '!!!', expected at least one word" in found.unreadable[1][1]


def test_prompts_are_refused_one_by_one_only_if_the_batch_is(
    model: TinyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    read = TinyEncoder.token_texts
    monkeypatch.setattr(TinyEncoder, "token_texts", lambda self, p: (calls.append(list(p)), read(self, p))[1])
    assert refused_prompts(model, ["a red square", "a dog"]) == {}
    assert calls == [["a red square", "a dog"]]
    assert list(refused_prompts(model, ["a dog", "!!!", "a cat", " "])) == [1, 3]
    assert refused_prompts(model, []) == {}
    assert list(refused_prompts(model, ["!!!", *["a dog"] * 100, "!!!"])) == [0, 101]

    def no_tokenizer(self: TinyEncoder, prompts: list[str]) -> None:
        raise ValueError("no tokenizer")

    monkeypatch.setattr(TinyEncoder, "token_texts", no_tokenizer)
    with pytest.raises(ValueError, match="no tokenizer"):  # else every pair would be left out
        refused_prompts(model, ["a red square", "!!!"])


def test_shards_of_videos_have_embeddings_too(model: TinyEncoder, folder: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, (file, caption) in enumerate(zip(VideoFolder(folder).files, VideoFolder(folder).captions, strict=True)):
            (tmp_path / "caption").write_text(caption)
            tar.add(file, f"{i:04d}.mp4")
            tar.add(tmp_path / "caption", f"{i:04d}.txt")
    extract(tmp_path / "one", VideoShards(tmp_path / "0.tar", n_frames=model.n_frames, size=model.size), model)
    extract(tmp_path / "other", VideoFolder(folder, n_frames=model.n_frames, size=model.size), model)
    one, other = (read_embeddings(tmp_path / name)[0] for name in ("one", "other"))
    assert torch.equal(one.video, other.video)
    assert one.captions == other.captions
    assert "0.tar" in one.unreadable[0][0]


# the command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def test_an_alignment_is_fitted_from_embeddings_alone(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "embeddings"
    outputs = [tmp_path / f"{i}.safetensors" for i in range(3)]
    rest = ("--kind", "affine", "--device", "cpu", "--output")
    assert run("fit-ot-map", "--videos", folder, *rest, outputs[0]).exit_code == 0
    first = run("fit-ot-map", "--videos", folder, "--embeddings", place, *rest, outputs[1])
    assert first.exit_code == 0, first.output
    page = tmp_path / "page.html"
    second = run("fit-ot-map", "--embeddings", place, "--compare", "--report", page, *rest, outputs[2])
    assert second.exit_code == 0, second.output
    for result in (first, second):  # also when the videos are not opened
        assert f"1 of {N} videos could not be read" in result.stderr
    maps = [load_file(output) for output in outputs]
    assert all(torch.equal(value, other[name]) for other in maps[1:] for name, value in maps[0].items())
    info = Alignment.load(outputs[2]).info
    assert info["encoder"] == "TinyEncoder"
    assert len(info["encoder_sha256"]) == 64
    for kind in ("none", "mean_shift", "center", "affine", "procrustes", "ridge", "barycentric"):
        assert kind in second.stdout
        assert f"<td>{kind}</td>" in page.read_text()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64" in page.read_text()


def test_no_caption_is_in_two_parts(seed: int) -> None:
    """Held-out videos of a caption that was fitted on would flatter every map."""
    captions = [f"caption {i % 60}" for i in torch.randperm(420).tolist()]
    parts = split_pairs(captions, FitOptions(seed=seed))
    assert sorted(i for part in parts for i in part) == list(range(420))
    of_part = [{captions[i] for i in part} for part in parts]
    assert [len(found) for found in of_part] == [38, 10, 12]
    assert len(set.union(*of_part)) == 60
    assert len(parts[2]) == 84
    assert parts == split_pairs(captions, FitOptions(seed=seed))
    assert parts != split_pairs(captions, FitOptions(seed=seed + 1))
    for options in (FitOptions(kind="affine"), FitOptions(choose="last")):
        assert split_pairs(captions, options)[1] == []
    # one that most videos have is fitted on, whatever the seed
    often = ["a video"] * 300 + captions[:100]
    assert not any(i < 300 for i in split_pairs(often, FitOptions(seed=seed))[2])


def test_few_captions_are_in_several_parts(seed: int) -> None:
    """Where a part would have less than three, pairs are divided; what is measured on goes first."""
    for n_captions, apart in ((13, True), (12, False), (4, False)):
        captions = [f"caption {i % n_captions}" for i in range(20 * n_captions)]
        train, chosen_by, test = split_pairs(captions, FitOptions(seed=seed))
        seen = {captions[i] for i in train + chosen_by}
        assert bool(seen & {captions[i] for i in test}) != apart
        assert {captions[i] for i in train} & {captions[i] for i in chosen_by}
    # without equal captions both are the same
    order = torch.randperm(50, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = split_pairs([str(i) for i in range(50)], FitOptions(seed=seed))
    assert parts == (order[18:], order[10:18], order[:10])


@pytest.mark.parametrize("kept", [False, True])
def test_a_fit_names_captions_without_a_word(folder: Path, tmp_path: Path, kept: bool) -> None:
    shutil.copytree(folder, tmp_path / "videos")
    lines = (tmp_path / "videos" / "metadata.jsonl").read_text().splitlines()
    lines[3] = json.dumps({**json.loads(lines[3]), "text": "!!!"})
    (tmp_path / "videos" / "metadata.jsonl").write_text("\n".join(lines))
    rest = ("--embeddings", tmp_path / "embeddings") if kept else ()
    output = tmp_path / "map.safetensors"
    base = ("fit-ot-map", "--videos", tmp_path / "videos", "--kind", "center", "--device", "cpu", "--output", output)
    result = run(*base, *rest)
    assert result.exit_code == 0, result.output
    assert (
        f"skipped {tmp_path / 'videos' / json.loads(lines[3])['file_name']}: TinyEncoder.encode_text" in result.stderr
    )
    assert f"2 of {N} videos could not be read or have a caption without a word" in result.stderr
    assert "fitted on 16 videos, measured on 4 others" in result.stdout


def test_one_single_caption_is_reported(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "videos")
    rows = [json.loads(line) for line in (tmp_path / "videos" / "metadata.jsonl").read_text().splitlines()]
    alike = "".join(json.dumps({**row, "text": "a red square"}) + "\n" for row in rows)
    (tmp_path / "videos" / "metadata.jsonl").write_text(alike)
    base = ("fit-ot-map", "--videos", tmp_path / "videos", "--device", "cpu", "--output", tmp_path / "map.safetensors")
    result = run(*base, "--compare", "--kind", "mean_shift")
    assert result.exit_code == 0, result.output
    assert "all captions are the same" in result.stdout
    assert "captions in several of these parts: 1 of 1, too few to keep them apart" in result.stdout
    line = next(line for line in result.stdout.splitlines() if "mean_shift" in line)
    assert line.split().count("nan") == 2
    assert "affine" not in result.stdout
    refused = run(*base, "--kind", "affine")
    assert refused.exit_code == 2
    assert "same embedding" in refused.stderr


def test_a_training_is_chosen_resumed_and_the_papers(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "embeddings"
    base = ("fit-ot-map", "--embeddings", place, "--device", "cpu", "--output", tmp_path / "map.safetensors")
    small = ("--steps", "4", "--hidden", "8", "--batch-size", "8")
    fit = (*base, "--videos", folder, *small, "--checkpoints", tmp_path / "fit")
    for extra in ((), (), ("--objective", "sinkhorn", "--checkpoints", tmp_path / "other", "--choose", "rho")):
        result = run(*fit, *extra)
        assert result.exit_code == 0, result.output
        assert "fitted on 14 videos, chosen on 3, measured on 4 others" in result.stdout
    assert Alignment.load(tmp_path / "map.safetensors").info["objective"] == "sinkhorn"
    last = run(*base, *small, "--choose", "last")
    assert "fitted on 17 videos, measured on 4 others" in last.stdout
    refused = run(*fit, "--lr", "1")
    assert refused.exit_code == 2
    assert "other lr" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --videos, or --embeddings"),
        (("--videos", "x", "--objective", "magic"), "--objective is 'magic'"),
        (("--videos", "x", "--choose", "magic"), "--choose is 'magic'"),
        (("--videos", "x", "--report", "page.pdf"), "ends in .html"),
        (("--embeddings", "absent"), "no embeddings.json"),
        (("--embeddings", "absent", "--encoder", "x"), "got --encoder, but the embeddings are there"),
        (("--videos", "x", "--paper", "--lr", "1"), "got --lr, and --paper, which has its own"),
        (
            ("--videos", "x", "--kind", "affine", "--batch-size", "9"),
            "got --batch-size, which kind 'affine' does not use",
        ),
        (("--videos", "x", "--kind", "center", "--checkpoints", "y"), "got --checkpoints, which kind 'center'"),
    ],
)
def test_faults_in_the_command_are_named(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = run("fit-ot-map", "--output", tmp_path / "map.safetensors", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert os.listdir(tmp_path) == []


def test_the_papers_settings_reach_the_fit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pisces.commands.fit_ot_map as command

    called: list[dict[str, object]] = []
    fit = command.fit_alignment

    def small(*pairs: torch.Tensor, **settings: object) -> Alignment:
        called.append(dict(settings))
        return fit(*pairs, **{**settings, "steps": 2, "hidden": 8, "check_every": 1})  # type: ignore[arg-type]

    monkeypatch.setattr(command, "fit_alignment", small)
    result = run("fit-ot-map", "--videos", folder, "--paper", "--device", "cpu", "--output", tmp_path / "m.safetensors")
    assert result.exit_code == 0, result.output
    wanted = {"kind": "ot", "steps": 160_000, "hidden": 1024, "lr": 1e-4, "batch_size": 128, "cost_weight": 1 / 32}
    assert {name: called[0][name] for name in wanted} == wanted

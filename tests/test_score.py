"""Laws of `pisces score`: what it writes can be read back, no row is lost or silently changed, others do not suffer."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused, run
from tiny_transformers import save_tiny

from pisces.captions import read_pairs
from pisces.commands import inputs
from pisces.commands.inputs import transport_settings
from pisces.data import VideoFolder, read_video, write_metadata, write_video
from pisces.encoders import TinyEncoder, load_encoder
from pisces.encoders.base import refused_prompts
from pisces.rewards import CompositeReward, QualityReward, SemanticReward, Transport, leverage
from pisces.world import checkpoint_path, scene

pytestmark = pytest.mark.usefixtures("plain_terminal")


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def report(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> VideoFolder:
    """Six videos of the small world with their captions."""
    folder = tmp_path_factory.mktemp("clips")
    generator = torch.Generator().manual_seed(7)
    scenes = scene.sample_scenes(6, generator)
    texts = scene.captions(scenes)
    for i, frames in enumerate(scene.render(scenes, generator)):
        write_video(folder / f"{i}.mp4", frames)
    write_metadata(folder, [{"file_name": f"{i}.mp4", "text": text} for i, text in enumerate(texts)])
    return VideoFolder(folder)


# Tables of videos and prompts


@pytest.mark.parametrize("shape", ["relative", "absolute", "shard"])
def test_a_table_of_scores_is_read_back_from_any_folder(
    clips: VideoFolder, shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clips.path.parent)
    source = clips.path if shape == "absolute" else Path(clips.path.name)
    if shape == "shard":
        source = tmp_path / "0.tar"
        with tarfile.open(source, "w") as shard:
            for i, text in enumerate(clips.captions):
                (tmp_path / "t.txt").write_text(text)
                shard.add(clips.files[i], f"{i}.mp4")
                shard.add(tmp_path / "t.txt", f"{i}.txt")
    first = tmp_path / "one" / "scores.csv"
    assert run("score", "--folder", source, "--csv", first, "--json", tmp_path / "1.json").exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    second = tmp_path / "two" / "deeper" / "scores.csv"
    result = run("score", "--pairs", first, "--csv", second, "--json", tmp_path / "2.json")
    assert result.exit_code == 0, result.output
    one, two = (report(tmp_path / f"{n}.json")["scores"] for n in (1, 2))
    assert [row["prompt"] for row in two] == clips.captions
    assert [{k: v for k, v in row.items() if k != "file"} for row in two] == [
        {k: v for k, v in row.items() if k != "file"} for row in one
    ]
    assert run("score", "--pairs", second, "--json", tmp_path / "3.json").exit_code == 0
    assert [row["match"] for row in report(tmp_path / "3.json")["scores"]] == [row["match"] for row in one]


def test_rows_that_cannot_be_read_keep_their_place_and_their_prompt(clips: VideoFolder, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"file_name": "absent.mp4", "caption": "one, two\nthree"},
        {"video": str(clips.files[0]), "prompt": clips.captions[0]},
        {"file": str(tmp_path), "text": "a folder"},
        {"video": str(clips.files[0]), "prompt": "a blue square", "text": "not this"},
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("score", "--pairs", pairs, "--csv", tmp_path / "s.csv", "--json", tmp_path / "s.json")
    assert result.exit_code == 1
    prompts = ["one, two\nthree", clips.captions[0], "a folder", "a blue square"]
    found = table(tmp_path / "s.csv")
    assert [row["prompt"] for row in found] == prompts
    assert [bool(row["why"]) for row in found] == [not row["match"] for row in found] == [True, False, True, False]
    unreadable = report(tmp_path / "s.json")["unreadable"]
    assert [(row["prompt"], row["why"]) for row in unreadable] == [
        (row["prompt"], row["why"]) for row in found if row["why"]
    ]
    assert "pairs.jsonl, line 1: no such file" in found[0]["why"]
    assert "line 3" in found[2]["why"]
    assert "2 of 4 videos could not be read" in result.stderr
    again = run("score", "--pairs", tmp_path / "s.csv", "--csv", tmp_path / "t.csv")
    assert again.exit_code == 1
    keys = ("prompt", "quality", "semantic", "match")
    assert [[row[key] for key in keys] for row in table(tmp_path / "t.csv")] == [
        [row[key] for key in keys] for row in found
    ]
    assert "s.csv, line 2" in again.stderr  # the first row, whose prompt has two lines
    assert "s.csv, line 5" in again.stderr


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("p.csv", "clip,prompt\na.mp4,x\n", ("p.csv, line 2", "found 'clip', 'prompt'", "'file_name'")),
        ("p.csv", "video,words\na.mp4,x\n", ("p.csv, line 2", "found 'video', 'words'", "'caption'")),
        ("p.csv", "video,prompt\na.mp4,x\n\n,y\n", ("p.csv, line 4", "the video is ''")),
        ("p.csv", "video,prompt\na.mp4,red, left\n", ("p.csv, line 2", "3 cells, expected 2", "quotes")),
        ("p.csv", "video,prompt\n", ("p.csv", "holds no video", "expected", "Write")),
        ("p.csv", "video,prompt\na.mp4," + "x" * 200_000, ("p.csv, line 2", "not CSV")),
        ("p.jsonl", '{"video": "a.mp4", "prompt": "x"}\n{"video": 3, "prompt": "x"}', ("p.jsonl, line 2", "is 3")),
        ("p.jsonl", '"a.mp4"', ("p.jsonl, line 1", "expected an object")),
        ("p.jsonl", "{", ("p.jsonl, line 1", "not JSON")),
        ("p.txt", "a.mp4", ("p.txt", "expected .csv or .jsonl")),
    ],
)
def test_a_table_that_is_wrong_is_named_with_its_row(
    name: str, content: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    refused(run("score", "--pairs", tmp_path / name, "--json", tmp_path / "s.json"), *parts)
    assert not (tmp_path / "s.json").exists()


def test_a_table_is_one_source_of_videos_and_has_its_own_prompts(clips: VideoFolder, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(f"video,prompt\n{clips.files[0]},x\n")
    refused(run("score", "--pairs", tmp_path / "p.csv", "--prompt", "y"), "--prompt")
    refused(run("score", "--pairs", tmp_path / "p.csv", "--folder", clips.path), "either")
    refused(run("score", "--pairs", tmp_path / "absent.csv"), "absent.csv", "expected a table", "Check")
    (tmp_path / "p.csv").write_text("video,prompt\na.mp4\n")
    assert read_pairs(tmp_path / "p.csv") == [(tmp_path / "a.mp4", "", f"{tmp_path / 'p.csv'}, line 2")]


# Videos as arguments


def test_what_the_shell_makes_of_a_pattern_is_scored(clips: VideoFolder, tmp_path: Path) -> None:
    scores = []
    options = ("--prompt", "a red square moves left", "--json", tmp_path / "s.json")
    for arguments in (
        [*clips.files[:3], *options],
        [*options, *clips.files[:3]],
        ["--video", *clips.files[:3], *options],  # the pattern behind --video
        [*[word for file in clips.files[:3] for word in ("--video", file)], *options],
    ):
        assert run("score", *arguments).exit_code == 0
        scores.append(report(tmp_path / "s.json")["scores"])
    assert [row["file"] for row in scores[0]] == [str(file) for file in clips.files[:3]]
    assert scores[1:] == scores[:1] * 3
    refused(run("score", clips.path, *options), str(clips.path), "--folder")


# Folders


def scored(command: str, folder: Path, report_file: Path, *options: object) -> list[str]:
    """The files that `score` or `evaluate` looks at."""
    where = ("--folder", folder) if command == "score" else (folder,)
    assert run(command, *where, *options, "--json", report_file).exit_code == 0
    left = report(report_file)
    rows = left["scores"] if command == "score" else left["videos"][str(folder)]
    return [row["file"] for row in rows]


@pytest.mark.parametrize("command", ["score", "evaluate"])
@pytest.mark.parametrize("captions", ["listing", "beside"])
def test_a_prompt_replaces_captions_and_not_the_videos(
    captions: str, command: str, clips: VideoFolder, tmp_path: Path
) -> None:
    folder = tmp_path / "v"
    (folder / "deeper").mkdir(parents=True)
    for i in (3, 1, 2):
        (folder / f"{i}.mp4").symlink_to(clips.files[i])
        (folder / "deeper" / f"{i}.mp4").symlink_to(clips.files[i])
        if captions == "beside":
            (folder / f"{i}.txt").write_text(clips.captions[i])
    if captions == "listing":
        names = ["3.mp4", "deeper/1.mp4", "1.mp4"]  # one of a subfolder, one left out, in an order of its own
        write_metadata(folder, [{"file_name": name, "text": "a red square"} for name in names])
    plain = scored(command, folder, tmp_path / "r.json")
    assert len(plain) == 3
    assert scored(command, folder, tmp_path / "r.json", "--prompt", "a blue circle") == plain


def test_with_a_prompt_videos_without_captions_are_found(clips: VideoFolder, tmp_path: Path) -> None:
    for name in ("a/0.mp4", "b/c/1.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(clips.files[0])
    want = [str(tmp_path / name) for name in ("a/0.mp4", "b/c/1.mp4")]
    assert scored("score", tmp_path, tmp_path / "r.json", "--prompt", "a red square") == want
    (tmp_path / "2.mp4").symlink_to(clips.files[2])
    assert scored("score", tmp_path, tmp_path / "r.json", "--prompt", "a red square") == [str(tmp_path / "2.mp4")]
    (tmp_path / "empty").mkdir()
    for command in (("score", "--folder"), ("leverage", "--folder"), ("evaluate",)):
        refused(run(*command, tmp_path / "empty", "--prompt", "x"), f"{command[0]}: ", "holds no video", "expected")


# Prompts that an encoder refuses, and calls that end early


def test_a_prompt_without_a_word_costs_its_own_row_only(clips: VideoFolder, tmp_path: Path) -> None:
    texts = list(clips.captions)
    texts[1], texts[4] = "!!!", ""
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"video": str(f), "text": t}) + "\n" for f, t in zip(clips.files, texts, strict=True))
    )
    assert run("score", "--folder", clips.path, "--csv", tmp_path / "all.csv").exit_code == 0
    result = run("score", "--pairs", tmp_path / "p.jsonl", "--csv", tmp_path / "s.csv", "--json", tmp_path / "s.json")
    assert result.exit_code == 1
    found, whole = table(tmp_path / "s.csv"), table(tmp_path / "all.csv")
    assert [row["prompt"] for row in found] == texts
    for i, (row, other) in enumerate(zip(found, whole, strict=True)):
        if i in (1, 4):
            assert row["match"] == row["quality"] == row["semantic"] == ""
            assert f"p.jsonl, line {i + 1}: " in row["why"]
            assert "at least one word" in row["why"]
            assert "prompts[" not in row["why"]
            assert any(f"{i}.mp4" in line and row["why"] in line for line in result.stderr.splitlines())
        else:
            # a batch may iterate longer than one of its samples would alone
            assert float(row["semantic"]) == pytest.approx(float(other["semantic"]), abs=1e-3)
    assert "2 of 6 videos could not be scored" in result.stderr
    assert len(report(tmp_path / "s.json")["unreadable"]) == 2


def test_prompts_are_read_before_any_video(clips: VideoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a video was decoded")

    monkeypatch.setattr("pisces.commands.inputs.read_item", never)
    monkeypatch.setattr("pisces.commands.evaluate.read_item_pictures", never)
    monkeypatch.setattr("pisces.commands.leverage.read_item", never)
    monkeypatch.setattr("pisces.commands.explain.read_video", never)
    (tmp_path / "p.csv").write_text(f"video,prompt\n{clips.files[0]},?!\n{clips.files[1]},...\n")
    refused(run("score", "--pairs", tmp_path / "p.csv"), "p.csv, line 2", "'?!'", "at least one word")
    refused(run("score", clips.files[0], "--prompt", "?!"), str(clips.files[0]), "at least one word")
    refused(run("leverage", "--folder", clips.path, "--prompt", "?!"), "leverage", "at least one word")
    refused(run("evaluate", clips.path, "--prompt", "?!"), "evaluate", "at least one word")
    refused(run("explain", clips.files[0], "?!", "--output", tmp_path / "w.html"), "explain", "at least one word")


def test_leverage_leaves_a_prompt_without_a_word_out(clips: VideoFolder, tmp_path: Path) -> None:
    rows = [{"file_name": file.name, "text": text} for file, text in zip(clips.files, clips.captions, strict=True)]
    for row in rows:
        (tmp_path / row["file_name"]).symlink_to(clips.path / row["file_name"])
    write_metadata(tmp_path, [*rows[:2], {**rows[2], "text": "!!!"}])
    result = run("leverage", "--folder", tmp_path)
    assert result.exit_code == 1
    assert "over 2 videos" in result.stdout
    assert "2.mp4" in result.stderr


def test_encoders_without_named_tokens_are_asked_too(tmp_path: Path) -> None:
    save_tiny("clip", tmp_path)
    encoder = load_encoder(tmp_path)
    assert not hasattr(encoder, "token_texts")
    assert list(refused_prompts(encoder, ["a dog", "!!!", " ", "a dog", "!!!"])) == [1, 2, 4]
    encoder.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        refused_prompts(encoder, ["a dog"])


def test_a_call_that_is_stopped_leaves_what_it_has_found(
    clips: VideoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("score", "--folder", clips.path, "--batch-size", "2", "--csv")
    assert run(*command, tmp_path / "all.csv").exit_code == 0
    terms = CompositeReward.terms
    calls = []

    def third_fails(self: CompositeReward, frames: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        calls.append(len(frames))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return terms(self, frames, prompts)

    monkeypatch.setattr(CompositeReward, "terms", third_fails)
    result = run(*command, tmp_path / "s.csv", "--json", tmp_path / "s.json")
    assert result.exit_code not in (0, 1, 2)
    assert calls == [2, 2, 2]
    assert table(tmp_path / "s.csv") == table(tmp_path / "all.csv")[:4]
    left = report(tmp_path / "s.json")
    assert len(left["scores"]) == 4
    assert left["pending"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.csv", "s.csv", "s.json"]


# Device and batch


@pytest.mark.parametrize("command", ["score", "leverage"])
def test_the_batch_size_is_that_of_the_encoder_and_changes_nothing(
    command: str, clips: VideoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, seen = TinyEncoder.encode_video, []

    def watched(self: TinyEncoder, frames: torch.Tensor) -> object:
        seen.append(len(frames))
        return encode(self, frames)

    monkeypatch.setattr(TinyEncoder, "encode_video", watched)
    found = []
    for size, batches in ((4, [4, 2]), (6, [6]), (1, [1] * 6)):
        seen.clear()
        options = ("--batch-size", size, "--json", tmp_path / "s.json", "--device", "cpu")
        assert run(command, "--folder", clips.path, *options).exit_code == 0
        assert seen == batches
        left = report(tmp_path / "s.json")
        assert left["device"] == "cpu"
        keys = ("quality", "match") if command == "score" else ("logit_std", "partial_ot", "uniform")
        rows = left["scores"] if command == "score" else [left]
        found.append([row[key] for row in rows for key in keys])
    assert found[1] == pytest.approx(found[0], abs=5e-3)
    assert found[2] == pytest.approx(found[0], abs=5e-3)
    assert run(command, "--folder", clips.path, "--batch-size", "0").exit_code == 2


def test_a_device_that_is_not_there_is_named(clips: VideoFolder, tmp_path: Path) -> None:
    for command in (
        ("score", "--folder", clips.path),
        ("leverage", "--folder", clips.path),
        ("explain", clips.files[0], clips.captions[0], "--output", tmp_path / "w.html"),
    ):
        for device in ("gpu", "cuda:99"):
            refused(run(*command, "--device", device), command[0], f"--device {device}", "cuda:1")


@pytest.mark.gpu
def test_a_gpu_is_taken_and_gives_the_scores_of_the_cpu(clips: VideoFolder, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for name in ("gpu", "cpu"):
        options = ("--device", "cpu") if name == "cpu" else ()
        for command, most in (("score", ()), ("leverage", ("--most", "5"))):
            json_file = tmp_path / f"{command}-{name}.json"
            assert run(command, "--folder", clips.path, *most, *options, "--json", json_file).exit_code == 0
        page = ("--output", tmp_path / f"{name}.html")
        assert run("explain", clips.files[0], clips.captions[0], *page, *options).exit_code == 0
    gpu, cpu = (report(tmp_path / f"score-{name}.json") for name in ("gpu", "cpu"))
    assert (gpu["device"], cpu["device"]) == ("cuda", "cpu")
    for one, two in zip(gpu["scores"], cpu["scores"], strict=True):
        assert one["quality"] == pytest.approx(two["quality"], abs=1e-3)
        assert one["match"] == pytest.approx(two["match"], abs=5e-3)
    gpu, cpu = (report(tmp_path / f"leverage-{name}.json") for name in ("gpu", "cpu"))
    for key in ("logit_std", "partial_ot", "uniform"):
        assert gpu[key] == pytest.approx(cpu[key], rel=2e-2, abs=5e-3)


# Transport, and encoders without a match head


MASSES = Transport(mass=0.3, rows="mass", epsilon=0.2)


def test_the_transport_is_that_of_the_options_and_is_reported(clips: VideoFolder, tmp_path: Path) -> None:
    encoder = load_encoder(checkpoint_path("encoder"))
    frames = torch.stack([read_video(file, n_frames=9, size=32) for file in clips.files])
    found = {}
    for options, transport in (
        ((), Transport()),
        (("--tau", "1"), Transport(tau=1.0)),
        (("--mass", "0.3"), Transport(mass=0.3)),
        (("--mass", "0.3", "--transport", "rows=mass", "--transport", "epsilon=2e-1"), MASSES),
        (("--vanilla",), None),
    ):
        result = run("score", "--folder", clips.path, "--json", tmp_path / "s.json", *options)
        assert result.exit_code == 0
        left = report(tmp_path / "s.json")
        rewards = SemanticReward(encoder, transport=transport)(frames, clips.captions)
        found[options] = [row["semantic"] for row in left["scores"]]
        assert found[options] == pytest.approx(rewards.tolist(), abs=1e-5)
        used = left["transport"]
        assert left["partial_transport"] == (used is not None) == (transport is not None)
        if transport is not None:
            assert Transport(**used) == transport
            assert ("tau" in used) != ("mass" in used)
            assert run("leverage", "--folder", clips.path, "--json", tmp_path / "l.json", *options).exit_code == 0
            numbers = leverage(encoder, frames, clips.captions, transport)
            left = report(tmp_path / "l.json")
            assert {key: left[key] for key in numbers} == pytest.approx(numbers, abs=1e-5)
            assert left["transport"] == used
    assert len({tuple(row) for row in found.values()}) == 5


def test_explain_draws_the_transport_that_was_asked_for(clips: VideoFolder, tmp_path: Path) -> None:
    pages = {}
    for options in (("--mass", "0.3"), ("--tau", "1"), ("--tau", "0.9"), ()):
        page = tmp_path / "w.html"
        assert run("explain", clips.files[0], clips.captions[0], "--output", page, *options).exit_code == 0
        pages[options] = page.read_text()
    assert "refined by partial transport, mass 0.3" in pages["--mass", "0.3"]
    assert "all words together move 0.3" in pages["--mass", "0.3"]
    assert "refined by partial transport, tau 1<" in pages["--tau", "1"]
    assert pages[()] == pages["--tau", "0.9"]


def test_settings_of_the_transport_that_cannot_be_are_refused(clips: VideoFolder, tmp_path: Path) -> None:
    for command in (
        ("score", "--folder", clips.path),
        ("evaluate", clips.path),
        ("leverage", "--folder", clips.path),
        ("explain", clips.files[0], clips.captions[0], "--output", tmp_path / "w.html"),
    ):
        refused(run(*command, "--tau", "0.9", "--mass", "0.5"), command[0], "--tau and --mass")
        refused(run(*command, "--tau", "1.5"), command[0], "--tau is 1.5")
        refused(run(*command, "--mass", "0"), command[0], "--mass is 0")
        refused(run(*command, "--mass", "nan"), command[0], "--mass is nan")
        refused(run(*command, "--transport", "rows"), f"{command[0]}: --transport is 'rows', expected KEY=VALUE")
        refused(run(*command, "--transport", "row=mass"), "--transport.row: unknown key. Did you mean --transport.rows")
        refused(run(*command, "--transport", "gamma=-1"), "gamma is -1.0, expected a finite number of at least 0")
        refused(run(*command, "--transport", "tau=0.8", "--tau", "0.9"), command[0], "--tau and the same setting")
        if command[0] != "leverage":
            refused(run(*command, "--vanilla", "--mass", "0.5"), command[0], "--mass and --vanilla")


@pytest.mark.parametrize("name", ["clip", "xclip"])
def test_an_encoder_without_a_match_head_gives_quality_alone(name: str, clips: VideoFolder, tmp_path: Path) -> None:
    save_tiny(name, tmp_path / name)
    command = ("score", "--folder", clips.path, "--encoder", tmp_path / name)
    result = run(*command, "--csv", tmp_path / "s.csv", "--json", tmp_path / "s.json")
    assert result.exit_code == 0, result.output
    assert "no match head" in result.stdout
    left = report(tmp_path / "s.json")
    assert left["match_head"] is left["partial_transport"] is False
    assert left["transport"] is None
    encoder = load_encoder(tmp_path / name)
    frames = torch.stack([read_video(file) for file in clips.files])
    quality = QualityReward(encoder)(frames, clips.captions)
    assert [row["quality"] for row in left["scores"]] == pytest.approx(quality.tolist(), abs=1e-5)
    assert all(row["semantic"] is row["match"] is None for row in left["scores"])
    for row, value in zip(table(tmp_path / "s.csv"), quality.tolist(), strict=True):
        assert row["semantic"] == row["match"] == row["why"] == ""
        assert float(row["quality"]) == pytest.approx(value, abs=1e-5)
    assert run("score", "--pairs", tmp_path / "s.csv", "--encoder", tmp_path / name).exit_code == 0
    # whatever the option says, the default too
    for options in (("--mass", "0.5"), ("--tau", "0.8"), ("--tau", "0.9"), ("--vanilla",)):
        for one in (command, ("evaluate", clips.path, "--encoder", tmp_path / name)):
            refused(run(*one, *options), f"{one[0]}: {options[0]} ", "match head")


# Leverage beside the scores


def test_leverage_beside_the_scores_is_that_of_its_own_command(
    clips: VideoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pisces.cli_videos.MOST", 4)
    read, seen = inputs.read_item, []

    def watched(file: Path, **options: Any) -> torch.Tensor:
        seen.append(file)
        return read(file, **options)

    monkeypatch.setattr(inputs, "read_item", watched)
    for options in ((), ("--mass", "0.5")):
        seen.clear()
        both = run("score", "--folder", clips.path, "--json", tmp_path / "s.json", "--leverage", *options)
        assert both.exit_code == 0, both.output
        assert seen == clips.files  # each once
        own = run("leverage", "--folder", clips.path, "--most", "4", "--json", tmp_path / "l.json", *options)
        assert own.exit_code == 0
        assert both.stdout.endswith(own.stdout)
        alone = report(tmp_path / "l.json")
        assert alone["videos"] == 4
        found = report(tmp_path / "s.json")
        assert found["leverage"] == {key: alone[key] for key in found["leverage"]}
        assert set(found["leverage"]) >= {"logit_std", "partial_ot", "uniform", "reading", "transport"}
        assert len(found["scores"]) == 6
    vanilla = run("score", "--folder", clips.path, "--json", tmp_path / "v.json", "--leverage", "--vanilla")
    assert vanilla.exit_code == 0
    found = report(tmp_path / "v.json")
    assert found["transport"] is None
    assert found["leverage"]["transport"] == transport_settings(Transport())
    assert run("score", "--folder", clips.path, "--json", tmp_path / "s.json").exit_code == 0
    assert report(tmp_path / "s.json")["leverage"] is None


def test_leverage_needs_two_videos_and_a_match_head(clips: VideoFolder, tmp_path: Path) -> None:
    options = ("--prompt", "a red square", "--leverage", "--json", tmp_path / "s.json")
    refused(run("score", clips.files[0], *options), "--leverage", "at least two")
    save_tiny("clip", tmp_path / "clip")
    refused(run("score", *clips.files[:2], *options, "--encoder", tmp_path / "clip"), "--leverage", "match head")
    assert not (tmp_path / "s.json").exists()
    result = run("score", clips.files[0], tmp_path / "absent.mp4", *options)
    assert result.exit_code == 1
    assert "no leverage" in result.stderr
    found = report(tmp_path / "s.json")
    assert (len(found["scores"]), found["leverage"]) == (1, None)

"""`pisces evaluate`, `report`, `sample --names vbench` and the presets, from the command line."""

from __future__ import annotations

import csv
import json
import os
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import save_tiny
from tiny_wan import PROMPTS, build_tiny_wan
from typer.testing import CliRunner, Result

from pisces import video
from pisces.build import build_training
from pisces.cli import app
from pisces.config import load_config, presets
from pisces.data import VideoFolder, read_video, write_metadata, write_video
from pisces.measures import measure
from pisces.world.judge import judge
from pisces.world.scene import captions, render, sample_scenes

pytestmark = pytest.mark.usefixtures("plain_terminal")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "tiny", layers=1, shift_terminal=0.2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_world(folder: Path, seed: int, *, noise: float = 0.0, n: int = 12) -> torch.Tensor:
    """Videos of the small world with their captions, as they are or damaged; what was written."""
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(n, generator)
    frames = (render(scenes, generator) + noise * torch.randn(n, 9, 3, 32, 32, generator=generator)).clamp(0, 1)
    rows = []
    for i, caption in enumerate(captions(scenes)):
        write_video(folder / f"{i}.mp4", frames[i])
        rows.append({"file_name": f"{i}.mp4", "text": caption})
    write_metadata(folder, rows)
    return frames


# ---------------------------------------------------------------------- evaluate


def test_evaluate_says_which_folder_is_better(tmp_path: Path, seed: int) -> None:
    for name, noise in (("clean", 0.0), ("noisy", 0.25)):
        write_world(tmp_path / name, seed, noise=noise)
    result = run(
        *("evaluate", tmp_path / "clean", "--before", tmp_path / "noisy"),
        *("--json", tmp_path / "e.json", "--csv", tmp_path / "e.csv"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["paired"]
    better = found["differences"]["judge/quality"]
    assert better["low"] > 0
    assert found["differences"]["sharpness"]["high"] < 0  # noise is sharp
    assert found["differences"]["judge/total"]["mean"] == pytest.approx(
        found["means"]["judge/total"]["mean"]
        - sum(row["judge/total"] for row in found["videos"][str(tmp_path / "noisy")]) / 12
    )
    rows = list(csv.DictReader((tmp_path / "e.csv").open()))
    assert len(rows) == 24
    assert float(rows[0]["motion"]) == pytest.approx(found["videos"][str(tmp_path / "clean")][0]["motion"])


def test_its_numbers_are_those_of_the_functions(tmp_path: Path, seed: int) -> None:
    write_world(tmp_path / "clean", seed, n=4)
    assert run("evaluate", tmp_path / "clean", "--json", tmp_path / "e.json").exit_code == 0
    rows = json.loads((tmp_path / "e.json").read_text())["videos"][str(tmp_path / "clean")]
    videos = VideoFolder(tmp_path / "clean")
    scenes = sample_scenes(4, torch.Generator().manual_seed(seed))
    frames = torch.stack([videos[i][0] for i in range(4)])
    for name, values in measure(frames).items():
        assert [row[name] for row in rows] == pytest.approx(values.tolist(), rel=1e-5)
    for name, values in judge(frames, scenes).items():
        assert [row[f"judge/{name}"] for row in rows] == pytest.approx(values.tolist(), rel=1e-5)
    assert run("score", "--folder", tmp_path / "clean", "--json", tmp_path / "s.json").exit_code == 0
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    for name in ("quality", "semantic"):
        assert [row[name] for row in rows] == [score[name] for score in scores]


def test_the_judge_is_silent_about_other_worlds(tmp_path: Path, seed: int) -> None:
    write_world(tmp_path / "a", seed, n=3)
    write_world(tmp_path / "b", seed, n=3)
    rows = [{"file_name": f"{i}.mp4", "text": "a dog on a beach"} for i in range(3)]
    write_metadata(tmp_path / "a", rows)
    write_video(tmp_path / "b" / "1.mp4", torch.rand(5, 3, 40, 48))
    for name in ("a", "b"):
        result = run("evaluate", tmp_path / name, "--json", tmp_path / "e.json")
        assert result.exit_code == 0
        assert "judge looks only at its own captions" in result.output
        assert not any("judge" in key for key in json.loads((tmp_path / "e.json").read_text())["means"])


def test_unreadable_videos_are_named_and_the_others_stay_pairs(tmp_path: Path, seed: int) -> None:
    for name, noise in (("after", 0.0), ("before", 0.2)):
        write_world(tmp_path / name, seed, noise=noise, n=5)
    (tmp_path / "after" / "1.mp4").write_bytes(b"no video")
    (tmp_path / "before" / "3.mp4").write_bytes(b"no video")
    listing = tmp_path / "before" / "metadata.jsonl"
    lines = listing.read_text().splitlines(keepends=True)
    listing.write_text("".join(lines[::-1]))  # pairs are by name and prompt, not by place
    command = ("evaluate", tmp_path / "after", "--before", tmp_path / "before", "--json", tmp_path / "e.json")
    result = run(*command)
    assert result.exit_code == 1
    for name in ("after", "before"):
        assert re.search(rf"skipped .*{name}/\d\.mp4", result.output)
    assert "3 pairs by file and prompt, 1 after and 1 before without a partner left out" in " ".join(
        result.output.split()
    )
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["paired"] is True
    assert found["pairs"] == 3
    after, before = (
        {Path(row["file"]).name: row for row in found["videos"][str(tmp_path / name)]} for name in ("after", "before")
    )
    for name, difference in found["differences"].items():
        pairs = [after[file][name] - before[file][name] for file in ("0.mp4", "2.mp4", "4.mp4")]
        assert difference["mean"] == pytest.approx(sum(pairs) / 3)
        assert min(pairs) - 1e-9 <= difference["low"] <= difference["high"] <= max(pairs) + 1e-9
    # few partners are no pairs: most captions are others
    rows = [json.loads(line) for line in lines]
    write_metadata(tmp_path / "before", [rows[0], *({**row, "text": f"{row['text']} now"} for row in rows[1:])])
    assert "unpaired, 4 videos before" in " ".join(run(*command).output.split())
    assert json.loads((tmp_path / "e.json").read_text())["pairs"] is None
    for file in (tmp_path / "after").glob("*.mp4"):
        file.write_bytes(b"no video")
    result = run("evaluate", tmp_path / "after")
    assert result.exit_code == 2
    assert "none of the 5 videos" in result.output


def test_a_caption_without_a_word_costs_its_video(tmp_path: Path, seed: int) -> None:
    write_world(tmp_path / "v", seed, n=3)
    listing = tmp_path / "v" / "metadata.jsonl"
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    rows[1]["text"] = "!!!"
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("evaluate", tmp_path / "v", "--json", tmp_path / "e.json", "--device", "cpu")
    assert result.exit_code == 1
    found = json.loads((tmp_path / "e.json").read_text())
    assert [row["prompt"] for row in found["unreadable"]] == ["!!!"]
    assert len(found["videos"][str(tmp_path / "v")]) == 2
    result = run("evaluate", tmp_path / "v", "--device", "nowhere")
    assert result.exit_code == 2
    assert "--device nowhere is not there" in result.output


def test_an_encoder_without_a_match_head_measures_quality_alone(tmp_path: Path, seed: int) -> None:
    write_world(tmp_path / "v", seed, n=2)
    save_tiny("clip", tmp_path / "clip")
    result = run("evaluate", tmp_path / "v", "--encoder", tmp_path / "clip", "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "e.json").read_text())
    assert "quality" in found["means"]
    assert "semantic" not in found["means"]
    assert found["match_head"] is found["partial_transport"] is False
    assert found["transport"] is None


def test_the_rewards_are_those_of_score_for_every_transport(tmp_path: Path, seed: int) -> None:
    write_world(tmp_path / "v", seed, n=5)
    seen = []
    for options in ((), ("--tau", "1"), ("--mass", "0.3"), ("--vanilla",)):
        same = (*options, "--batch-size", "2", "--json")
        assert run("evaluate", tmp_path / "v", *same, tmp_path / "e.json").exit_code == 0
        assert run("score", "--folder", tmp_path / "v", *same, tmp_path / "s.json").exit_code == 0
        found, scores = (json.loads((tmp_path / name).read_text()) for name in ("e.json", "s.json"))
        for name in ("partial_transport", "transport", "match_head", "encoder", "ot_map", "device"):
            assert found[name] == scores[name]
        rows = found["videos"][str(tmp_path / "v")]
        assert [row["semantic"] for row in rows] == [row["semantic"] for row in scores["scores"]]
        seen.append([row["semantic"] for row in rows])
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_a_long_large_video_is_read_as_score_reads_it_and_never_held_whole(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(seed)
    still = torch.rand(1, 3, 96, 160, generator=generator)
    frames = torch.cat([still.roll(2 * i, dims=-1) for i in range(40)])
    write_video(tmp_path / "v" / "0.mp4", frames)
    write_metadata(tmp_path / "v", [{"file_name": "0.mp4", "text": "a red square moves left"}])
    pictures: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    convert = video._to_tensor

    def watched(frame: Any, size: tuple[int, int] | None, *rest: Any) -> torch.Tensor:
        picture = convert(frame, size, *rest)
        if size is None:
            pictures.append(weakref.ref(picture))
            alive.append(sum(one() is not None for one in pictures))
        return picture

    monkeypatch.setattr(video, "_to_tensor", watched)
    assert run("evaluate", tmp_path / "v", "--json", tmp_path / "e.json").exit_code == 0
    assert len(alive) == 40
    assert max(alive) <= 3
    monkeypatch.undo()
    (row,) = json.loads((tmp_path / "e.json").read_text())["videos"][str(tmp_path / "v")]
    assert run("score", "--folder", tmp_path / "v", "--json", tmp_path / "s.json").exit_code == 0
    (score,) = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert (row["quality"], row["semantic"]) == (score["quality"], score["semantic"])
    for name, values in measure(read_video(tmp_path / "v" / "0.mp4")[None]).items():
        assert row[name] == pytest.approx(values.item(), rel=1e-4)


# ---------------------------------------------------------------------- VBench


def test_vbench_finds_its_videos(wan: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS[:2]))
    command = ("sample", "--pipeline", wan, "--prompts", tmp_path / "p.txt", "--steps", "2", "--per-prompt", "2")
    vbench = (*command, "--names", "vbench", "--output", tmp_path / "v", "--batch-size", "3")
    assert run(*vbench).exit_code == 0
    # VBench takes the suffix of whatever file it finds first: there is nothing but videos.
    names = sorted(path.name for path in (tmp_path / "v" / "videos").iterdir())
    assert names == sorted(f"{prompt}-{k}.mp4" for prompt in PROMPTS[:2] for k in range(2))
    assert VideoFolder(tmp_path / "v").captions == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    # The same videos under numbers, each with noise of its own.
    assert run(*command, "--output", tmp_path / "n").exit_code == 0
    videos = [read_video(tmp_path / "n" / f"{i:04d}.mp4") for i in range(4)]
    for i, (prompt, k) in enumerate((prompt, k) for prompt in PROMPTS[:2] for k in range(2)):
        difference = read_video(tmp_path / "v" / "videos" / f"{prompt}-{k}.mp4") - videos[i]
        assert difference.abs().mean() < 2e-3
    assert (videos[0] - videos[1]).abs().mean() > 2e-2

    # A stopped call goes on: what is there stays, what is missing is made.
    kept, lost = (tmp_path / "v" / "videos" / name for name in names[:2])
    content, before = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    assert run(*vbench, "--resume").exit_code == 0
    assert kept.stat().st_mtime_ns == before
    assert len(lost.read_bytes()) == pytest.approx(len(content), rel=0.05)
    for options in (("--guidance", "2"), ("--lossless",), ("--fps", "4")):
        result = run(*vbench, "--resume", *options)
        assert result.exit_code == 2
        assert "other prompts or settings" in result.output
    # Other weights under the same name, and videos that nothing is known of.
    model = next((wan / "transformer").glob("*.safetensors"))
    os.utime(model, ns=(1, 1))
    assert "other prompts or settings" in run(*vbench, "--resume").output
    (tmp_path / "v" / "prompts.jsonl").unlink()
    assert "other prompts or settings" in run(*vbench, "--resume").output
    # VBench would take it for a video.
    (tmp_path / "v" / "videos" / "old prompt-0.mp4").touch()
    result = run(*vbench)
    assert result.exit_code == 2
    assert "old prompt-0.mp4" in result.output


def test_a_name_as_long_as_a_file_system_has_is_written(tmp_path: Path) -> None:
    name = "é" * 125 + ".mp4"  # 254 bytes
    assert write_video(tmp_path / name, torch.rand(2, 3, 16, 16)).is_file()


@pytest.mark.parametrize(("prompt", "why"), [("a/b", "cannot be a file name"), ("x" * 260, "cannot be a file name")])
def test_prompts_that_name_no_file_are_refused(wan: Path, tmp_path: Path, prompt: str, why: str) -> None:
    command = ("sample", "--pipeline", wan, "--output", tmp_path, "--names", "vbench", "--prompt")
    result = run(*command, prompt)
    assert result.exit_code == 2
    assert why in result.output
    result = run(*command, "twice", "--prompt", "twice")
    assert "there twice" in result.output
    result = run("sample", "--pipeline", wan, "--output", tmp_path, "--names", "date", "--prompt", "x")
    assert "expected number or vbench" in result.output


def test_lossless_samples_have_their_own_size(wan: Path, tmp_path: Path) -> None:
    command = ("sample", "--pipeline", wan, "--prompt", PROMPTS[0], "--steps", "2")
    for name, options in (("own", ("--lossless",)), ("eyes", ())):
        assert run(*command, "--output", tmp_path / name, *options).exit_code == 0
    assert read_video(tmp_path / "own" / "0000.mp4").shape == (9, 3, 32, 32)
    assert read_video(tmp_path / "eyes" / "0000.mp4").shape == (9, 3, 256, 256)


# ---------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def trained(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with validation."""
    root = tmp_path_factory.mktemp("trained")
    (root / "p.txt").write_text("\n".join(PROMPTS))
    settings = {
        "pipeline": {"path": str(wan)},
        "data": {"prompts": str(root / "p.txt"), "batch_size": 2},
        "algorithm": {"name": "draft", "steps": 2},
        "rewards": {"reference_batch": 4, "transport": None, "semantic": 0},
        "validation": {"every": 2, "n": 2, "watched": {"quality": 0, "transport": None, "reference_batch": 4}},
        "optimizer": {"lr": 0.01, "accumulation": 1},
        "lora": {"rank": 2, "alpha": 2},
        "output": {"dir": str(root / "run")},
        "steps": 4,
    }
    (root / "c.yaml").write_text(json.dumps(settings))
    result = run("train", root / "c.yaml")
    assert result.exit_code == 0, result.output
    return root / "run"


def test_a_run_is_reported_on_one_page(trained: Path) -> None:
    assert run("report", trained).exit_code == 0
    page = (trained / "report.html").read_text()
    assert page.count("data:video/mp4") == 4  # two prompts, before and after
    assert page.count("data:image/png") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for words in (PROMPTS[0], "watched/semantic", "reward/quality", "sharpness", "optimizer.lr", "0.01"):
        assert words in page, words
    record = json.loads((trained / "validation.jsonl").read_text().splitlines()[-1])
    assert f"{record['sharpness']:.4g}" in page


def test_what_is_watched_is_not_trained_on(trained: Path) -> None:
    steps = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    validations = [json.loads(line) for line in (trained / "validation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in validations] == [0, 2, 4]
    assert all("reward/semantic" not in record for record in steps + validations)
    assert all("watched/semantic" in record and "watched/quality" not in record for record in validations)


def test_a_run_that_has_only_begun_is_reported(trained: Path, tmp_path: Path) -> None:
    for name in ("log.jsonl", "validation.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    result = run("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert "optimizer.lr" in (tmp_path / "report.html").read_text()


def test_a_run_of_skipped_steps_is_reported(trained: Path, tmp_path: Path) -> None:
    nothing = {"loss": None, "reward": None, "grad_norm": None, "skipped": "loss is not finite"}
    lines = [{"step": step, **nothing, "lr": 1e-3, "seconds": 0.5, "memory_gb": 1.5} for step in (1, 2)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    result = run("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert re.search(r"<td[^>]*>2</td>\s*<td[^>]*>2</td>\s*<td[^>]*>0\.5</td>", (tmp_path / "report.html").read_text())


def test_reports_of_nothing_are_refused(trained: Path, tmp_path: Path) -> None:
    assert "no log" in run("report", tmp_path).output
    assert "expected --output" in run("report", trained, trained).output
    assert "expected different names" in run("report", trained, trained, "--output", tmp_path / "x.html").output


# ---------------------------------------------------------------------- presets


@pytest.mark.parametrize("name", ["tiny-wan", "tiny-wan-grpo"])
def test_presets_of_the_small_world_need_nothing_else(name: str, tmp_path: Path) -> None:
    config = load_config(f"preset:{name}", [f"output.dir={tmp_path}"])
    assert config.pipeline.path == "packaged:wan-base"


@pytest.mark.parametrize("name", ["paper-hunyuan", "paper-hunyuan-grpo", "wan-1.3b"])
def test_presets_of_large_models_want_files(name: str, wan: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "videos", 0, n=1)
    own = [f"pipeline.path={wan}", f"data.videos={tmp_path / 'videos'}"]
    config = load_config(f"preset:{name}", own)  # enough for `plan` and `encode`, which read no reward
    with pytest.raises(ValueError, match=r"rewards\.encoder: say where your encoder is, such as --set rewards\.enc"):
        build_training(config)
    assert load_config(f"preset:{name}", [*own, f"rewards.encoder={tmp_path}"]).lora is not None
    with pytest.raises((ValueError, FileNotFoundError), match=r"data\.videos|data:|pipeline\.path"):
        load_config(f"preset:{name}")


def test_every_preset_is_named_in_the_help() -> None:
    text = run("train", "--help").output
    assert len(presets()) == 5
    for name, sentence in presets().items():
        assert name in text
        assert sentence
    result = run("train", "preset:paper-hunyan")
    assert result.exit_code == 2
    assert "paper-hunyuan" in result.output

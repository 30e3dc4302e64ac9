"""The command line end to end: help that teaches, results in the named folder only, faults named in one line."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from commands import refused, run
from safetensors.torch import load_file, save_file
from tiny_wan import build_tiny_wan

from pisces.data import VideoFolder, read_prompts, read_video, write_metadata, write_video
from pisces.doctor import PACKAGES, diagnose

COMMANDS = [
    "demo",
    "train",
    "fit-ot-map",
    "score",
    "explain",
    "leverage",
    "sample",
    "plan",
    "doctor",
    "world write",
    "world train-checkpoints",
]


pytestmark = pytest.mark.usefixtures("plain_terminal")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioned folder of the small world."""
    folder = tmp_path_factory.mktemp("shapes")
    assert run("world", "write", folder, "--n", "40", "--seed", "3").exit_code == 0
    return folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory with random weights."""
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "tiny")


def real_looking(path: Path, codec: str, pix_fmt: str, *, audio: bool = False) -> Path:
    """Three seconds at 24 pictures a second, 162x90, with moving bands and noise, as a camera would give."""
    rng = np.random.default_rng(0)
    ys, xs = np.mgrid[:90, :162]
    options = {"cpu-used": "8", "deadline": "realtime"} if codec == "libvpx-vp9" else {}
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = 162, 90, pix_fmt
        sound = container.add_stream("aac", rate=48000) if audio else None
        for t in range(72):
            picture = np.stack([(xs + 3 * t) % 255, (2 * ys + t) % 255, (xs + ys) % 255], -1)
            picture = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
        if sound is not None:
            for k in range(140):
                wave = np.sin(np.arange(1024 * k, 1024 * (k + 1)) / 20, dtype=np.float32)[None]
                block = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
                block.rate, block.pts = 48000, 1024 * k
                container.mux(sound.encode(block))
            container.mux(sound.encode(None))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Help


def test_help_names_every_command() -> None:
    text = run("--help").output
    for command in COMMANDS:
        assert command.split()[0] in text
    assert "No command uses the network, unless the settings of a training name the tracker wandb" in " ".join(
        text.split()
    )
    assert "train-checkpoints" in run("world", "--help").output


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_examples_whose_options_exist(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    text = result.output
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith(f"pisces {command}")]
    assert examples, text
    options = text[text.index("Options") :]
    for example in examples:
        for word in shlex.split(example)[1:]:
            if word.startswith("--"):
                assert f"{word} " in options, (word, example)


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = "import sys; import pisces.cli; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'av')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0


# score


def test_foreign_videos_are_scored_and_bad_ones_named(tmp_path: Path) -> None:
    good = [
        real_looking(tmp_path / "camera.mp4", "libx264", "yuv420p", audio=True),
        real_looking(tmp_path / "old.avi", "mjpeg", "yuvj420p"),
        real_looking(tmp_path / "web.webm", "libvpx-vp9", "yuv420p"),
    ]
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(good[0].read_bytes()[: good[0].stat().st_size // 2])
    (tmp_path / "note.mp4").write_text("no video")
    options = [
        item for path in (*good, cut, tmp_path / "note.mp4", tmp_path / "absent.mp4") for item in ("--video", path)
    ]
    result = run(
        "score",
        *options,
        "--prompt",
        "a bicycle moves left",
        "--json",
        tmp_path / "s.json",
        "--csv",
        tmp_path / "s.csv",
    )
    assert result.exit_code == 1
    for path in good:
        assert path.name in result.stdout
    assert "1 of 4 words are unknown" in result.stdout
    assert "packaged small one" in result.stdout
    assert "3 of 6 videos could not be read" in result.stderr
    for name, why in (("cut.mp4", "cut off"), ("note.mp4", "not a video"), ("absent.mp4", "no such file")):
        assert any(name in line and why in line for line in result.stderr.splitlines()), result.stderr

    report = json.loads((tmp_path / "s.json").read_text())
    assert [Path(row["file"]) for row in report["scores"]] == good
    assert [Path(row["file"]).name for row in report["unreadable"]] == ["cut.mp4", "note.mp4", "absent.mp4"]
    for row in report["scores"]:
        assert -1 <= row["quality"] <= 1
        assert row["semantic"] <= 0
        assert row["match"] == pytest.approx(np.exp(row["semantic"]), rel=1e-4)
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert float(rows[0]["quality"]) == pytest.approx(report["scores"][0]["quality"])
    assert "cut off" in rows[3]["why"]
    again = run("score", *options[:6], "--prompt", "a bicycle moves left", "--json", tmp_path / "t.json")
    assert again.exit_code == 0
    assert json.loads((tmp_path / "t.json").read_text())["scores"] == report["scores"]


def test_the_right_caption_scores_higher_than_a_wrong_one(shapes: Path, tmp_path: Path) -> None:
    assert run("score", "--folder", shapes, "--json", tmp_path / "right.json").exit_code == 0
    videos = VideoFolder(shapes)
    swapped = tmp_path / "swapped"
    shutil.copytree(shapes, swapped)
    texts = videos.captions[1:] + videos.captions[:1]
    write_metadata(swapped, [{**row, "text": text} for row, text in zip(videos.rows, texts, strict=True)])
    assert run("score", "--folder", swapped, "--json", tmp_path / "wrong.json").exit_code == 0
    right, wrong = (json.loads((tmp_path / f"{name}.json").read_text())["scores"] for name in ("right", "wrong"))
    for key, margin in (("quality", 0.1), ("match", 0.3)):
        gain = np.mean([a[key] - b[key] for a, b in zip(right, wrong, strict=True)])
        assert gain > margin, (key, gain)


def test_scores_do_not_depend_on_company_and_transport_can_be_left_out(shapes: Path, tmp_path: Path) -> None:
    files = VideoFolder(shapes).files[:3]

    def scores(*arguments: object) -> list[dict[str, float]]:
        assert (
            run("score", *arguments, "--prompt", "a red circle moves up", "--json", tmp_path / "s.json").exit_code == 0
        )
        return json.loads((tmp_path / "s.json").read_text())["scores"]

    together = scores(*[item for file in files for item in ("--video", file)])
    for file, row in zip(files, together, strict=True):
        (alone,) = scores("--video", file)
        for key in ("quality", "semantic"):
            assert alone[key] == pytest.approx(row[key], abs=1e-4)
    vanilla = scores("--vanilla", *[item for file in files for item in ("--video", file)])
    assert [row["quality"] for row in vanilla] == pytest.approx([row["quality"] for row in together])
    assert [row["semantic"] for row in vanilla] != [row["semantic"] for row in together]


def test_faults_in_score_are_named(shapes: Path, tmp_path: Path) -> None:
    video = VideoFolder(shapes).files[0]
    refused(run("score", "--video", video), "--prompt")
    refused(run("score", "--prompt", "x"), "--video", "--folder")
    refused(run("score", "--video", video, "--folder", shapes, "--prompt", "x"), "either")
    refused(run("score", "--video", video, "--prompt", "  "), "--prompt is empty")
    refused(run("score", "--video", video, "--prompt", "?!"), "at least one word")
    refused(run("score", "--folder", tmp_path / "absent"), "absent")
    refused(run("score", "--folder", tmp_path), "metadata.jsonl")
    refused(run("score", "--folder", tmp_path, "--prompt", "x"), "holds no video")
    refused(run("score", "--video", video, "--prompt", "x", "--encoder", tmp_path / "none"), "none", "config.json")
    refused(run("score", "--video", video, "--prompt", "x", "--ot-map", tmp_path / "m.safetensors"), "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes(b"0" * 99)
    refused(run("score", "--video", video, "--prompt", "x", "--ot-map", tmp_path / "m.safetensors"))
    assert run("score", "--vidoe", video).exit_code == 2
    assert os.listdir(tmp_path) == ["m.safetensors"]


# fit-ot-map


def test_a_map_is_fitted_measured_and_used(shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    shutil.copytree(shapes, folder)
    (folder / "00007.mp4").write_bytes(b"broken")
    output = tmp_path / "map.safetensors"
    fit = ("fit-ot-map", "--videos", folder, "--output", output, "--steps", "3", "--hidden", "16")
    result = run(*fit)
    assert result.exit_code == 0, result.output
    assert "fitted on 25 videos, chosen on 6, measured on 8 others" in result.stdout
    for word in (
        "none",
        "center",
        "center_ot",
        "gap",
        "r_at_1",
        "rho",
        "sinkhorn_divergence",
        "mutual_knn",
        "spearman",
    ):
        assert word in result.stdout
    assert "00007.mp4" in result.stderr
    assert "1 of 40 videos could not be read" in result.stderr
    first = load_file(output)
    assert run(*fit).exit_code == 0
    assert all(torch.equal(value, first[name]) for name, value in load_file(output).items())

    video = VideoFolder(shapes).files[0]
    for name, extra in (("plain", ()), ("mapped", ("--ot-map", output))):
        assert run("score", "--video", video, "--prompt", "a", "--json", tmp_path / name, *extra).exit_code == 0
    plain, mapped = (json.loads((tmp_path / name).read_text())["scores"][0] for name in ("plain", "mapped"))
    assert mapped["quality"] != pytest.approx(plain["quality"], abs=1e-3)
    assert mapped["semantic"] == pytest.approx(plain["semantic"])


def test_faults_in_fit_ot_map_are_named(shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "map.safetensors"
    refused(run("fit-ot-map", "--videos", shapes, "--output", tmp_path / "map.pt"), ".safetensors")
    refused(run("fit-ot-map", "--videos", shapes, "--output", output, "--kind", "magic"), "'magic'", "center_ot")
    refused(run("fit-ot-map", "--videos", shapes, "--output", output, "--held-out", "1.5"), "--held-out is 1.5")
    refused(run("fit-ot-map", "--videos", tmp_path / "absent", "--output", output), "absent")
    few = tmp_path / "few"
    write_video(few / "a.mp4", torch.rand(2, 3, 32, 32))
    write_metadata(few, [{"file_name": "a.mp4", "text": "x"}])
    refused(run("fit-ot-map", "--videos", few, "--output", output), "1 readable videos")
    write_metadata(few, [{"file_name": "a.mp4", "text": " "}])
    refused(run("fit-ot-map", "--videos", few, "--output", output), "caption", "empty")
    (few / "a.mp4").write_bytes(b"")
    write_metadata(few, [{"file_name": "a.mp4", "text": "x"}])
    result = run("fit-ot-map", "--videos", few, "--output", output)
    assert result.exit_code == 2
    assert "none of the 1 videos" in result.stderr
    assert os.listdir(tmp_path) == ["few"]


# sample and train


def test_brackets_in_a_prompt_are_no_markup(shapes: Path) -> None:
    result = run("score", "--video", VideoFolder(shapes).files[0], "--prompt", "[red]square[/bold] :cat:")
    assert result.exit_code == 0, result.output
    assert "[red]square[/bold] :cat:" in result.stdout


def test_a_lora_or_an_encoder_of_another_kind_is_named(wan: Path, shapes: Path, tmp_path: Path) -> None:
    name = "transformer.blocks.0.attn1.to_q.lora_{}.weight"
    save_file({name.format("A"): torch.zeros(4, 7), name.format("B"): torch.zeros(9, 4)}, tmp_path / "l.safetensors")
    command = ("sample", "--pipeline", wan, "--output", tmp_path / "x", "--prompt", "a")
    refused(run(*command, "--lora", tmp_path / "l.safetensors"), "l.safetensors", "another model")
    save_file({"blocks.0.attn1.to_q.lora_A.default.weight": torch.zeros(4, 7)}, tmp_path / "n.safetensors")
    result = run(*command, "--lora", tmp_path / "n.safetensors")
    assert result.exit_code == 2
    assert "holds no LoRA" in result.stderr
    (tmp_path / "config.json").write_text("[1]")
    refused(run("score", "--folder", shapes, "--encoder", tmp_path), "config.json", "a JSON list")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("fps", ["0", "-3", "nan"])
def test_a_rate_that_is_none_is_refused(wan: Path, tmp_path: Path, fps: str) -> None:
    command = ("sample", "--pipeline", wan, "--output", tmp_path / "x", "--prompt", "a", "--fps", fps)
    refused(run(*command), "--fps")
    assert not (tmp_path / "x").exists()


def test_samples_are_reproducible_and_the_folder_is_a_data_set(wan: Path, tmp_path: Path) -> None:
    texts = ["a red square moves left", "a blue circle moves up", "a green triangle"]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    one = tmp_path / "one"
    result = run("sample", "--pipeline", wan, "--output", one, "--prompts", tmp_path / "p.txt", "--steps", "2")
    assert result.exit_code == 0, result.output
    names = ["0000.mp4", "0001.mp4", "0002.mp4", "contact-sheet.png", "metadata.jsonl", "prompts.jsonl"]
    assert sorted(os.listdir(one)) == names
    assert read_prompts(one / "prompts.jsonl") == texts
    rows = [json.loads(line) for line in (one / "prompts.jsonl").read_text().splitlines()]
    assert [(row["seed"], row["steps"], row["guidance"]) for row in rows] == [(0, 2, 1.0), (1, 2, 1.0), (2, 2, 1.0)]
    frames, caption = VideoFolder(one)[1]
    assert frames.shape == (9, 3, 256, 256)
    assert caption == texts[1]
    assert run("score", "--folder", one).exit_code == 0

    # Video 2 alone, from its own seed, is the same video.
    alone = tmp_path / "alone"
    command = ("sample", "--pipeline", wan, "--output", alone, "--prompt", texts[2], "--steps", "2")
    assert run(*command, "--seed", "2").exit_code == 0
    difference = (read_video(alone / "0000.mp4") - read_video(one / "0002.mp4")).abs()
    assert difference.mean() < 2e-3
    assert run(*command, "--seed", "3").exit_code == 0
    assert (read_video(alone / "0000.mp4") - read_video(one / "0002.mp4")).abs().mean() > 2e-2


def test_train_resumes_and_its_lora_changes_the_samples(wan: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red square moves left\na blue circle moves up\n")
    config = tmp_path / "config.yaml"
    settings = {
        "pipeline": {"path": str(wan)},
        "data": {"prompts": str(tmp_path / "p.txt"), "batch_size": 2},
        "algorithm": {"name": "draft", "steps": 2},
        "rewards": {"reference_batch": 4, "transport": None},
        "optimizer": {"lr": 0.05, "accumulation": 1},
        "lora": {"rank": 2, "alpha": 2},
        "validation": {"n": 1},
        "output": {"dir": str(tmp_path / "run"), "save_every": 1},
        "steps": 1,
    }
    config.write_text(json.dumps(settings))  # JSON is YAML
    result = run("train", config)
    assert result.exit_code == 0, result.output
    assert run("train", config, "--set", "steps=2").exit_code == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2]

    prompt = ("--prompt", "a red square moves left", "--steps", "2")
    assert run("sample", "--pipeline", wan, "--output", tmp_path / "before", *prompt).exit_code == 0
    lora = ("--lora", tmp_path / "run" / "final")
    assert run("sample", "--pipeline", wan, "--output", tmp_path / "after", *prompt, *lora).exit_code == 0
    before, after = (read_video(tmp_path / name / "0000.mp4") for name in ("before", "after"))
    assert (before - after).abs().mean() > 1e-3

    for broken, parts in (
        ({"optimiser": {}}, ("optimiser", "optimizer")),
        ({"steps": "many"}, ("steps", "'many'")),
        ({"data": {"prompts": str(tmp_path / "absent.txt")}}, ("data.prompts", "absent.txt")),
        ({"pipeline": {"path": str(tmp_path / "nowhere")}}, ("pipeline.path", "nowhere")),
    ):
        config.write_text(json.dumps({**settings, **broken}))
        refused(run("train", config), *parts)
    config.write_text("a: [")
    refused(run("train", config), "YAML")
    config.write_text(json.dumps(settings))
    refused(run("train", config, "--set", "lora.rang=3"), "lora.rang", "lora.rank")
    refused(run("train", tmp_path / "absent.yaml"), "absent.yaml")


def test_faults_in_sample_are_named(wan: Path, tmp_path: Path) -> None:
    base = ("sample", "--output", tmp_path / "out", "--pipeline")
    refused(run(*base, wan), "--prompt")
    refused(run(*base, wan, "--prompt", " "), "--prompt is empty")
    refused(run(*base, wan, "--prompts", tmp_path / "absent.txt"), "absent.txt")
    refused(run(*base, tmp_path / "absent", "--prompt", "x"), "absent")
    refused(run(*base, "packaged:nothing", "--prompt", "x"), "nothing")
    refused(run(*base, tmp_path, "--prompt", "x"), "model_index.json")
    refused(run(*base, wan, "--prompt", "x", "--lora", tmp_path), "LoRA")
    refused(run(*base, wan, "--prompt", "x", "--n-frames", "8"), "8 frames")
    refused(run(*base, wan, "--prompt", "x", "--width", "33"), "33")
    refused(run(*base, wan, "--prompt", "x", "--guidance", "0.5"), "0.5")
    assert not (tmp_path / "out").exists()


# doctor, world, and what holds for all


def test_doctor_tells_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checks = {check.name: check for check in diagnose(tmp_path / "not" / "yet")}
    assert checks["torch"].detail == torch.__version__
    assert checks["reference"].state == checks["writing mp4"].state == checks["encoder"].state == "ok"
    result = run("doctor")
    assert all(name in result.stdout for name in ("torch", "reference", "cuda", "wan-base", "threads", "disk"))
    assert result.exit_code == int(any(check.state == "bad" for check in checks.values()))
    assert {row["name"] for row in json.loads(run("doctor", "--json").stdout)} == set(checks)

    monkeypatch.setattr("pisces.world.CHECKPOINTS", tmp_path)
    result = run("doctor")
    assert result.exit_code == 1
    assert "pisces world train-checkpoints" in result.stdout
    missing = {row["name"]: row for row in json.loads(run("doctor", "--json").stdout)}["encoder"]
    assert f"train-checkpoints --output {tmp_path}" in str(missing)  # which is where they are looked for


def test_doctor_looks_for_all_that_is_required() -> None:
    required = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
    assert set(PACKAGES) == {re.split(r"[^\w-]", requirement)[0] for requirement in required}


def test_the_world_is_written_by_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("world", "write", tmp_path / name, "--n", "4", "--seed", seed).exit_code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")
    refused(run("world", "write", tmp_path / "d", "--split", "test"), "'test'", "held_out")
    refused(run("world", "train-checkpoints", "--output", tmp_path / "d", "--only", "vea"), "vea", "vae")


def test_checkpoints_are_never_trained_into_the_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[Path] = []
    monkeypatch.setattr("pisces.world.checkpoints.train_checkpoints", lambda output, only: folders.append(output))
    monkeypatch.chdir(tmp_path)
    assert run("world", "train-checkpoints", "--only", "encoder").exit_code == 0
    assert [folder.resolve() for folder in folders] == [tmp_path / "checkpoints-new"]


def test_nothing_is_written_outside_the_output_folder(wan: Path, shapes: Path, tmp_path: Path) -> None:
    for name in ("home", "cwd", "tmp"):
        (tmp_path / name).mkdir()
    source = contents(shapes), contents(wan)
    guard = str(Path(__file__).parent / "no_network")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MPL", "XDG", "HF_", "TRANSFORMERS"))}
    environment |= {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": os.pathsep.join([guard, *filter(None, sys.path)]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    out = tmp_path / "out"
    for arguments in (
        ["sample", "--pipeline", wan, "--output", out / "samples", "--prompt", "a red square", "--steps", "1"],
        ["score", "--folder", out / "samples", "--csv", out / "scores.csv"],
    ):
        command = [sys.executable, "-m", "pisces.cli", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path / "cwd", env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    for name in ("home", "cwd", "tmp"):
        assert [p for p in (tmp_path / name).rglob("*") if p.is_file()] == []
    assert (contents(shapes), contents(wan)) == source
    assert sorted(os.listdir(out)) == ["samples", "scores.csv"]
    assert not [p for p in out.rglob("*") if ".tmp" in p.name]


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    absent = tmp_path / "absent.yaml"
    command = [sys.executable, "-m", "pisces.cli", "train", str(absent)]
    short = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert short.returncode == 2
    assert short.stderr.startswith("pisces: ")
    assert "Traceback" not in short.stderr
    with pytest.raises(FileNotFoundError, match="absent"):
        run("--debug", "train", absent)
    refused(run("train", absent), "absent")  # and the next command is short again


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("pisces.world.dataset.write_dataset", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("world", "write", tmp_path)

"""A training run from settings to an exported model, with real rewards and files; and that a killed one goes on."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from tiny_wan import PROMPTS, WORDS, build_tiny_wan

from pisces.build import build_adapter, build_batches, build_training, reference_videos, run_training
from pisces.config import TrainConfig, load_config
from pisces.data import VideoReadError, video_bytes, write_metadata, write_video
from pisces.encoders import TinyEncoder, TinyEncoderConfig
from pisces.ot_map import Alignment, encoder_facts, fit_alignment
from pisces.pipelines import load_pipeline
from pisces.pipelines.base import PipelineAdapter
from pisces.rewards import standardize
from pisces.state import latest_checkpoint, load_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, an encoder, an alignment, a folder of videos and a file of prompts."""
    root = tmp_path_factory.mktemp("world")
    build_tiny_wan(root / "wan", layers=1, shift_terminal=0.2)
    torch.manual_seed(0)
    encoder = TinyEncoder(TinyEncoderConfig(vocabulary=tuple(WORDS), width=16))
    encoder.save_pretrained(root / "encoder")
    generator = torch.Generator().manual_seed(1)
    rows = []
    for n, prompt in enumerate(PROMPTS):
        write_video(root / "videos" / f"{n}.mp4", torch.rand(9, 3, 32, 32, generator=generator))
        rows.append({"file_name": f"{n}.mp4", "text": prompt})
    write_metadata(root / "videos", rows)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    width = encoder.embed_dim
    text, video = (torch.randn(16, width, generator=generator) for _ in range(2))
    alignment = fit_alignment(text, video, kind="center", progress=False)
    alignment.info |= encoder_facts(encoder)
    alignment.save(root / "map.safetensors")
    return root


def settings(world: Path, output: Path, **sections: Any) -> TrainConfig:
    """Quick settings, read through YAML."""
    values = {
        "pipeline": {"path": str(world / "wan")},
        "data": {"videos": str(world / "videos"), "batch_size": 2},
        "rewards": {"encoder": str(world / "encoder"), "ot_map": str(world / "map.safetensors"), "reference_batch": 4},
        "algorithm": {"name": "draft", "steps": 2},
        "optimizer": {"lr": 1e-3, "accumulation": 1},
        "lora": {"rank": 2, "alpha": 2},
        "validation": {"every": 1, "n": 1},
        "output": {"dir": str(output), "save_every": 1},
        "steps": 2,
        **sections,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "in.yaml").write_text(yaml.safe_dump(values))
    return load_config(output / "in.yaml")


@pytest.mark.parametrize("name", ["draft", "one_step", "consistency", "flow_matching"])
def test_every_algorithm_runs_from_a_file(world: Path, tmp_path: Path, name: str) -> None:
    steps = {} if name == "flow_matching" else {"steps": 3}
    final = run_training(settings(world, tmp_path, algorithm={"name": name, **steps}))
    pipe = DiffusionPipeline.from_pretrained(str(world / "wan"), dtype=torch.float32)
    pipe.load_lora_weights(str(final))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    rewarded = {"reward", "reward/quality", "reward/semantic"}
    assert (rewarded <= set(lines[0])) == (name in ("draft", "one_step"))
    assert all(line[key] is not None for line in lines for key in line)
    assert TrainConfig.from_dict(yaml.safe_load((tmp_path / "config.yaml").read_text())).algorithm.name == name


def test_several_processes_have_a_device_each(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pisces.build.load_pipeline", lambda path, *, device, **_: device)

    def place(wanted: str | None, own: str | None) -> Any:
        config = settings(world, tmp_path, pipeline={"path": str(world / "wan"), "device": wanted})
        return build_adapter(config, None if own is None else torch.device(own))

    for wanted, own in ((None, "cuda:1"), ("cuda", "cuda:1"), (None, "cpu"), ("cpu", "cpu")):
        assert place(wanted, own) == torch.device(own)
    for wanted, own in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1"), ("cpu", "cuda:1"), ("cuda", "cpu")):
        kind = own.partition(":")[0]
        with pytest.raises(ValueError, match=f"device is '{wanted}' for several processes, expected '{kind}'"):
            place(wanted, own)
    assert place("cuda:1", None) == "cuda:1"  # alone, it may choose


def test_prompts_alone_are_enough_for_draft(world: Path, tmp_path: Path) -> None:
    trainer = build_training(settings(world, tmp_path, data={"prompts": str(world / "prompts.txt"), "batch_size": 2}))
    assert set(trainer.batches[0].prompts + trainer.batches[1].prompts) == set(PROMPTS)
    assert trainer.train_step()["loss"] is not None


def test_rewards_of_the_base_are_standardized(world: Path, tmp_path: Path) -> None:
    config = settings(world, tmp_path)
    rewards: Any = build_training(config).algorithm.rewards  # type: ignore[attr-defined]
    adapter = load_pipeline(world / "wan")
    parts = list(reference_videos(4, config, adapter, build_batches(config, adapter))(range(2)))
    assert [len(part) for _, part in parts] == [2, 2]  # data.batch_size at a time
    frames, prompts = torch.cat([part for part, _ in parts]), [prompt for _, part in parts for prompt in part]
    for values in rewards.terms(frames, prompts).values():
        assert float(values.mean()) == pytest.approx(0.0, abs=1e-3)
        assert float(values.std()) == pytest.approx(1.0, abs=1e-3)
    # The same bits as where all videos are there at once.
    for part in rewards.rewards.values():
        whole = standardize(part.reward, frames, prompts, batch_size=2)
        assert torch.equal(part.mean, whole.mean)
        assert torch.equal(part.std, whole.std)
    raw: Any = build_training(
        settings(world, tmp_path, rewards={"encoder": str(world / "encoder"), "standardize": False, "quality": 0})
    ).algorithm.rewards  # type: ignore[attr-defined]
    terms = raw.terms(frames, prompts)
    assert set(terms) == {"semantic"}
    assert float(terms["semantic"].std()) != pytest.approx(1.0, abs=1e-2)


def test_the_scale_of_the_rewards_is_found_once_a_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = PipelineAdapter.decode, []

    def counted(adapter: PipelineAdapter, latents: torch.Tensor) -> torch.Tensor:
        calls.append(len(latents))
        return decode(adapter, latents)

    def scale(**sections: Any) -> list[tuple[float, float]]:
        rewards: Any = build_training(settings(world, tmp_path, **sections)).algorithm.rewards  # type: ignore[attr-defined]
        return [(float(part.mean), float(part.std)) for part in rewards.rewards.values()]

    monkeypatch.setattr(PipelineAdapter, "decode", counted)
    first = scale()
    assert calls == [2, 2]
    assert scale() == first
    assert scale(steps=9) == first
    assert calls == [2, 2]
    # Whatever it depends on is looked at.
    assert scale(seed=4) != first
    assert scale(algorithm={"name": "draft", "steps": 3}) != first
    encoder = next((world / "encoder").glob("*.safetensors"))
    os.utime(encoder, ns=(1, 1))
    assert scale() == first
    assert len(calls) == 8


def test_a_killed_reference_goes_on_and_is_the_same(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode, left = PipelineAdapter.decode, [99]

    def mortal(adapter: PipelineAdapter, latents: torch.Tensor) -> torch.Tensor:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return decode(adapter, latents)

    monkeypatch.setattr(PipelineAdapter, "decode", mortal)
    reference = {"encoder": str(world / "encoder"), "reference_batch": 7}  # in four parts
    watched = reference | {"quality": 0}
    sections = {"rewards": reference, "validation": {"every": 1, "n": 1, "watched": watched}}
    build_training(settings(world, tmp_path / "whole", **sections))
    assert left == [99 - 8]
    parts = tmp_path / "parts" / "reference-parts"
    for lives, n_there in ((1, 1), (0, 1), (2, 3)):
        left[0] = lives
        with pytest.raises(KeyboardInterrupt):
            build_training(settings(world, tmp_path / "parts", **sections))
        assert len(list(parts.glob("*/*.safetensors"))) == n_there
        assert not (tmp_path / "parts" / "reference.json").exists()
    left[0] = 99
    build_training(settings(world, tmp_path / "parts", **sections))
    assert left == [99 - 1 - 4]
    whole, resumed = (json.loads((tmp_path / name / "reference.json").read_text()) for name in ("whole", "parts"))
    assert resumed == whole
    assert len(whole) == 2
    assert not parts.exists()
    # A part that a disk damaged is made again, and it alone.
    left[0] = 3
    with pytest.raises(KeyboardInterrupt):
        build_training(settings(world, tmp_path / "torn", **sections))
    next((tmp_path / "torn" / "reference-parts").glob("*/1.safetensors")).write_bytes(b"half")
    left[0] = 99
    build_training(settings(world, tmp_path / "torn", **sections))
    assert left == [99 - 2 - 4]
    assert json.loads((tmp_path / "torn" / "reference.json").read_text()) == whole
    assert any("1.safetensors" in record.getMessage() for record in caplog.records)


def test_a_reference_that_is_not_finite_is_not_remembered(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, broken = PipelineAdapter.decode, [False, True]
    monkeypatch.setattr(
        PipelineAdapter,
        "decode",
        lambda adapter, latents: decode(adapter, latents) * (torch.nan if broken and broken.pop(0) else 1),
    )
    with pytest.raises(ValueError, match="expected a finite number"):
        build_training(settings(world, tmp_path))
    assert len(list((tmp_path / "reference-parts").glob("*/*.safetensors"))) == 1
    build_training(settings(world, tmp_path))
    assert (tmp_path / "reference.json").exists()


def test_a_full_disk_of_the_reference_is_named(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("pisces.state.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*reference-parts") as caught:
        build_training(settings(world, tmp_path))
    assert caught.value.errno == errno.ENOSPC


def test_parts_of_the_reference_do_not_depend_on_who_makes_them(world: Path, tmp_path: Path) -> None:
    config = settings(world, tmp_path)
    adapter = load_pipeline(world / "wan")
    videos = reference_videos(5, config, adapter, build_batches(config, adapter))
    whole = [frames for frames, _ in videos(range(3))]
    divided = [frames for numbers in (range(0, 3, 2), range(1, 3, 2)) for frames, _ in videos(numbers)]
    assert [len(frames) for frames in whole] == [2, 2, 1]
    for mine, theirs in zip(whole, (divided[0], divided[2], divided[1]), strict=True):
        assert torch.equal(mine, theirs)


def test_one_part_of_the_reference_is_held_at_a_time(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, made, held = PipelineAdapter.decode, [], []

    def watched(adapter: PipelineAdapter, latents: torch.Tensor) -> torch.Tensor:
        gc.collect()
        held.append(sum(video() is not None for video in made))
        frames = decode(adapter, latents)
        made.append(weakref.ref(frames))
        return frames

    monkeypatch.setattr(PipelineAdapter, "decode", watched)
    rewards = {"encoder": str(world / "encoder"), "reference_batch": 9}
    build_training(settings(world, tmp_path, rewards=rewards))
    assert len(made) == 5
    assert max(held) <= 1  # the part before, until its place is taken


def test_the_alignment_of_the_file_is_used(world: Path, tmp_path: Path) -> None:
    rewards: Any = build_training(settings(world, tmp_path)).algorithm.rewards  # type: ignore[attr-defined]
    used = rewards.rewards["quality"].reward.alignment.state_dict()
    wanted = Alignment.load(world / "map.safetensors").state_dict()
    assert used.keys() == wanted.keys()
    assert wanted
    assert all(torch.equal(used[name], wanted[name]) for name in wanted)


def test_an_alignment_of_another_encoder_is_refused(world: Path, tmp_path: Path) -> None:
    TinyEncoder(TinyEncoderConfig(vocabulary=tuple(WORDS), width=16)).save_pretrained(tmp_path / "other")
    rewards = {"encoder": str(tmp_path / "other"), "ot_map": str(world / "map.safetensors"), "standardize": False}
    with pytest.raises(ValueError, match=r"map\.safetensors was fitted with another encoder"):
        build_training(settings(world, tmp_path, rewards=rewards))


def test_bad_videos_and_prompts_are_named(world: Path, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"not a video")
    write_metadata(tmp_path / "videos", [{"file_name": "broken.mp4", "text": "a red square"}])
    data = {"videos": str(tmp_path / "videos"), "batch_size": 1}
    with pytest.raises(VideoReadError, match=r"broken\.mp4"):
        run_training(settings(world, tmp_path, data=data, algorithm={"name": "flow_matching"}))
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompts\.txt"):
        run_training(settings(world, tmp_path, data={"prompts": str(tmp_path / "prompts.txt")}))


def test_prompts_without_a_word_are_refused_before_a_video_is_made(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(adapter: PipelineAdapter, latents: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a video was made")

    monkeypatch.setattr(PipelineAdapter, "decode", decode)
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("a red square\na circle\n")
    bad.write_text("a red square\n!!!\na circle\n\U0001f600\n...\n?\n")
    named = r"refuses 4 of 6 {}: number 2 '!!!', number 4 '\U0001f600', number 5 '\.\.\.' and so on\. .*one word"
    with pytest.raises(ValueError, match=r"^rewards\.encoder: .*" + named.format("prompts of the data")):
        build_training(settings(world, tmp_path, data={"prompts": str(bad)}))
    validation = {"every": 1, "n": 6, "prompts": str(bad)}
    with pytest.raises(ValueError, match=r"^rewards\.encoder: .*" + named.format("validation prompts")):
        build_training(settings(world, tmp_path, data={"prompts": str(good)}, validation=validation))
    # Rewards that are only watched read the prompts of the validation.
    flow = {"algorithm": {"name": "flow_matching"}, "validation": validation}
    watched = {"encoder": str(world / "encoder"), "standardize": False}
    with pytest.raises(ValueError, match=r"^validation\.watched\.encoder: .*" + named.format("validation prompts")):
        build_training(settings(world, tmp_path, **flow | {"validation": validation | {"watched": watched}}))
    build_training(settings(world, tmp_path, **flow))  # no reward reads them


def test_what_the_encoder_does_not_know_is_said(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "prompts.txt").write_text("a red zebra\n")
    data = {"prompts": str(tmp_path / "prompts.txt")}
    quick = {"data": data, "validation": {"every": 0}}
    build_training(settings(world, tmp_path, **quick, rewards={"encoder": "packaged", "standardize": False}))
    small, words = (record.getMessage() for record in caplog.records if record.name == "pisces.build")
    assert "32-pixel videos of moving shapes" in small
    assert "1 of 3 words are unknown" in words
    # Neither where the words are known and the encoder is one's own.
    caplog.clear()
    (tmp_path / "prompts.txt").write_text("a red square\n")
    own = {"encoder": str(world / "encoder"), "standardize": False}
    build_training(settings(world, tmp_path, **quick, rewards=own))
    assert not [record for record in caplog.records if record.name == "pisces.build"]


def test_videos_of_shards_and_of_another_size_are_trained_on(world: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for n, prompt in enumerate(PROMPTS):
            video = video_bytes(torch.rand(12, 3, 40, 56, generator=generator))
            for name, content in ((f"{n}.mp4", video), (f"{n}.json", json.dumps({"caption": prompt}).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    pipeline = {"path": str(world / "wan"), "height": 16, "width": 32}
    data = {"videos": str(tmp_path / "{0..0}.tar"), "batch_size": 2}
    sections = {"pipeline": pipeline, "data": data, "algorithm": {"name": "flow_matching"}}
    trainer = build_training(settings(world, tmp_path / "out", **sections))
    batch = trainer.batches[0]
    assert batch.latents is not None
    assert batch.latents.shape == (2, *trainer.adapter.latent_shape(height=16, width=32))
    assert set(batch.prompts) <= set(PROMPTS)
    trainer.fit()
    assert trainer.step == 2


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    world: Path, tmp_path: Path, offline_environment: dict[str, str]
) -> None:
    sections = {"steps": 5, "algorithm": {"name": "flow_matching"}, "lora": None}
    whole = build_training(settings(world, tmp_path / "whole", **sections))
    whole.fit()
    settings(world, tmp_path / "parts", **sections)
    checkpoints = tmp_path / "parts" / "checkpoints"
    code = (
        f"import sys, time, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from pisces.config import load_config\n"
        "from pisces.build import build_training\n"
        "trainer = build_training(load_config(sys.argv[1]))\n"
        "step = trainer.train_step\n"
        "trainer.train_step = lambda: (time.sleep(0.2), step())[1]\n"
        "trainer.fit()\n"
    )
    root = str(Path(__file__).parent.parent)
    environment = {**offline_environment, "PYTHONPATH": os.pathsep.join([offline_environment["PYTHONPATH"], root])}
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "parts" / "in.yaml")], env=environment)
    deadline = time.monotonic() + 120
    while latest_checkpoint(checkpoints) is None:
        assert child.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    killed_at = load_checkpoint(latest_checkpoint(checkpoints)).step  # type: ignore[arg-type]
    assert 1 <= killed_at < 5
    resumed = build_training(load_config(tmp_path / "parts" / "in.yaml"))
    resumed.fit()
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name])
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]

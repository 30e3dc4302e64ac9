"""Laws of the cache on disk: what comes out has the bits that went in, and no other model's or video's."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_wan import PROMPTS, build_pipeline, build_tiny_wan
from torch import Tensor
from typer.testing import CliRunner

from pisces.batches import VideoBatches
from pisces.build import build_training
from pisces.cli import app
from pisces.config import TrainConfig
from pisces.data import VideoFolder, VideoReadError, write_metadata, write_video
from pisces.digests import module_digest, tokenizer_digest
from pisces.latent_cache import LatentCache
from pisces.pipelines import ADAPTERS, PipelineAdapter, WanAdapter, load_pipeline
from pisces.pipelines.tiny import make_tiny
from pisces.trainer import Trainer

SIZE = (32, 32)


@pytest.fixture(scope="module")
def wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan", layers=1, shift_terminal=0.2)


def write_videos(folder: Path, n: int = 4, *, seed: int = 0, height: int = 32, width: int = 40) -> Path:
    """Noise with the captions of PROMPTS; wider than the pipeline's size."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        write_video(folder / f"{i}.mp4", torch.rand(9, 3, height, width, generator=generator))
        rows.append({"file_name": f"{i}.mp4", "text": PROMPTS[i % len(PROMPTS)]})
    write_metadata(folder, rows)
    return folder


@pytest.fixture(scope="module")
def videos_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_videos(tmp_path_factory.mktemp("data") / "videos")


def settings(wan_dir: Path, videos: Path, output: Path, *, cache: Path | None, **sections: Any) -> dict[str, Any]:
    return {
        "pipeline": {"path": str(wan_dir)},
        "data": {"videos": str(videos), "batch_size": 2, "cache": None if cache is None else str(cache)},
        "algorithm": {"name": "flow_matching", "caption_dropout": 0.5},
        "optimizer": {"lr": 1e-3, "accumulation": 1},
        "lora": {"rank": 2, "alpha": 2},
        "validation": {"every": 0},
        "output": {"dir": str(output), "save_every": 2},
        "steps": 4,
        **sections,
    }


def calls_of(trainer: Trainer) -> dict[str, int]:
    """Count from now on what the trainer decodes and encodes."""
    counts = {"frames": 0, "vae": 0, "text": 0}

    def counted(owner: Any, method: str, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return call(*args, **kwargs)

        setattr(owner, method, wrapper)

    adapter = trainer.adapter
    counted(adapter, "encode_frames", "vae")
    counted(adapter.pipe.text_encoder, "forward", "text")
    batches: Any = trainer.batches
    counted(batches, "_encode", "frames")
    return counts


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def test_training_is_the_same_with_and_without(wan_dir: Path, videos_dir: Path, tmp_path: Path) -> None:
    trainers, counts = {}, {}
    for name, cache in (("plain", None), ("filling", tmp_path / "c"), ("filled", tmp_path / "c")):
        values = settings(wan_dir, videos_dir, tmp_path / name, cache=cache)
        trainer = trainers[name] = build_training(TrainConfig.from_dict(values))
        counts[name] = calls_of(trainer)
        trainer.fit()
    assert losses(tmp_path / "plain") == losses(tmp_path / "filling") == losses(tmp_path / "filled")
    for name, parameter in trainers["plain"].parameters.items():
        for other in ("filling", "filled"):
            assert torch.equal(parameter, trainers[other].parameters[name])
    assert counts["plain"] == counts["filling"]
    assert min(counts["plain"].values()) >= 4
    assert counts["filled"] == {"frames": 0, "vae": 0, "text": 0}
    assert len(list((tmp_path / "c" / "latents").iterdir())) == 4
    assert len(list((tmp_path / "c" / "prompts").iterdir())) <= 5


def test_a_resumed_run_may_begin_or_cease_to_use_one(wan_dir: Path, videos_dir: Path, tmp_path: Path) -> None:
    for name, caches in (("whole", [None, None]), ("on", [None, tmp_path / "c"]), ("off", [tmp_path / "c", None])):
        for steps, cache in zip((2, 4), caches, strict=True):
            values = settings(wan_dir, videos_dir, tmp_path / name, cache=cache, steps=steps)
            build_training(TrainConfig.from_dict(values)).fit()
    assert losses(tmp_path / "whole") == losses(tmp_path / "on") == losses(tmp_path / "off")


# ---------------------------------------------------------------------- names


def names_of(folder: Path, adapter: PipelineAdapter, *, video: str = "v", prompt: str = PROMPTS[0]) -> tuple[str, str]:
    """The names under which an adapter keeps a video's latents and a prompt's embeddings."""
    before = {kind: set((folder / kind).glob("*")) for kind in ("latents", "prompts")}
    cache = LatentCache(folder, adapter)
    cache.latents(video, lambda: torch.zeros(1))
    cache.embeds(prompt, lambda: {"x": torch.zeros(1)})
    new = {kind: set((folder / kind).glob("*")) - known for kind, known in before.items()}
    return tuple(next((path.name for path in new[kind]), "known") for kind in ("latents", "prompts"))  # type: ignore


def test_a_name_depends_on_all_that_the_content_does(tmp_path: Path) -> None:
    def adapter(change: Callable[[Any], object] = lambda pipe: None) -> WanAdapter:
        pipe = build_pipeline(layers=1)
        change(pipe)
        return WanAdapter(pipe, defaults={"n_frames": 9, "height": 32, "width": 32})

    def nudge(part: str) -> Callable[[Any], None]:
        def change(pipe: Any) -> None:
            parameter = next(p for name, p in reversed(list(getattr(pipe, part).named_parameters())))
            parameter.data.view(-1)[-1] += 1e-3

        return change

    def rename(pipe: Any) -> None:
        pipe.tokenizer.add_tokens(["hexagon"])

    names_of(tmp_path, adapter())
    assert names_of(tmp_path, adapter()) == ("known", "known")
    assert names_of(tmp_path, adapter(nudge("transformer"))) == ("known", "known")  # only that is trained
    changed = {
        "vae": names_of(tmp_path, adapter(nudge("vae"))),
        "mean": names_of(tmp_path, adapter(lambda p: p.vae.register_to_config(latents_mean=[0.5] * 16))),
        "tiles": names_of(tmp_path, adapter(lambda p: p.vae.enable_tiling())),
        "vae_dtype": names_of(tmp_path, adapter(lambda p: p.vae.bfloat16())),
        "text_encoder": names_of(tmp_path, adapter(nudge("text_encoder"))),
        "tokenizer": names_of(tmp_path, adapter(rename)),
        "dtype": names_of(tmp_path, adapter(lambda p: p.transformer.bfloat16())),
        "video": names_of(tmp_path, adapter(), video="w"),
        "prompt": names_of(tmp_path, adapter(), prompt=PROMPTS[1]),
    }
    of_video = {"vae", "mean", "tiles", "vae_dtype", "video"}
    for what, (video, prompt) in changed.items():
        assert (video == "known") == (what not in of_video), what
        assert (prompt == "known") == (what in of_video), what
    kinds = list(zip(*changed.values(), strict=True))
    assert [len(set(kind)) for kind in kinds] == [6, 5]  # each change has a name of its own


def test_latents_with_a_frame_in_front_have_names_of_their_own(tmp_path: Path) -> None:
    old, new = (load_pipeline(make_tiny(name, tmp_path / name)) for name in ("cogvideox", "cogvideox15"))
    new.pipe.register_modules(vae=old.pipe.vae)
    names_of(tmp_path / "cache", old)
    assert names_of(tmp_path / "cache", old)[0] == "known"
    assert names_of(tmp_path / "cache", new)[0] != "known"


@pytest.mark.parametrize("name", ["wan", "hunyuanvideo", "hunyuanvideo15", "cogvideox", "ltx", "mochi"])
def test_every_family_finds_its_prompts_again(tmp_path: Path, name: str) -> None:
    """Also from another folder, and after the tokenizers have been used."""
    found = []
    for place in ("a", "b"):
        adapter = load_pipeline(make_tiny(name, tmp_path / place))
        cache = adapter.prompt_memory.store = LatentCache(tmp_path / "cache", adapter)
        found.append(adapter.encode_prompts([*PROMPTS[:2], ""]))
        assert cache.n_written == (3 if place == "a" else 0)
        adapter.clear_prompt_cache()
        adapter.encode_prompts([PROMPTS[0]])
        assert cache.n_written == (3 if place == "a" else 0)
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert value.dtype == found[1][key].dtype
        assert torch.equal(value, found[1][key])
    assert type(adapter) in ADAPTERS.values()


def test_digests_of_parts(seed: int) -> None:
    pipe = build_pipeline(seed=seed, layers=1)
    same = build_pipeline(seed=seed, layers=1)
    assert module_digest(pipe.vae) == module_digest(same.vae)
    before = tokenizer_digest(pipe.tokenizer)
    pipe.tokenizer("a red square", padding="max_length", truncation=True, max_length=5)
    assert tokenizer_digest(pipe.tokenizer) == before
    digests = set()
    for name, tensor in pipe.vae.state_dict().items():  # any tensor, by one bit
        other = copy.deepcopy(pipe.vae)
        flat = other.state_dict()[name].view(-1)
        flat[torch.randint(flat.numel(), ())].mul_(-1)
        if not torch.equal(other.state_dict()[name], tensor):
            digests.add(module_digest(other))
            if len(digests) == 8:
                break
    assert len(digests) == 8


# ---------------------------------------------------------------------- files


def test_damaged_files_are_encoded_again(wan_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = WanAdapter.from_pretrained(wan_dir)
    cache = LatentCache(tmp_path, adapter)
    latents = torch.randn(16, 3, 4, 4)
    embeds = {"hidden": torch.randn(5, 3).bfloat16(), "mask": torch.tensor([True, False]), "n": torch.tensor(3)}
    wanted: dict[str, Callable[[], dict[str, Tensor]]] = {
        "latents": lambda: {"latents": cache.latents("v", lambda: latents)},
        "prompts": lambda: cache.embeds("p", lambda: embeds),
    }
    for kind, get in wanted.items():
        first = get()
        (file,) = (tmp_path / kind).iterdir()
        whole = file.read_bytes()
        for damage in (b"", b"x", whole[:-1], whole[: len(whole) // 2], whole + b"x", bytes(len(whole))):
            file.write_bytes(damage)
            n_written = cache.n_written
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                again = get()
            assert f"{file} is damaged" in caplog.text
            assert cache.n_written == n_written + 1
            assert file.read_bytes() == whole
            for found in (again, get()):
                assert found.keys() == first.keys()
                assert all(torch.equal(found[key], first[key]) for key in first)
                assert all(found[key].dtype == first[key].dtype for key in first)
        assert list((tmp_path / kind).iterdir()) == [file]  # no temporary file stays


def test_a_write_that_fails_leaves_nothing(wan_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LatentCache(tmp_path, WanAdapter.from_pretrained(wan_dir))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pisces.video.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        cache.latents("v", lambda: torch.zeros(3))
    assert list((tmp_path / "latents").iterdir()) == []


def test_a_cache_needs_digests(wan_dir: Path, tmp_path: Path) -> None:
    class Plain:
        captions = PROMPTS

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[Tensor, str]:
            raise NotImplementedError

    adapter = WanAdapter.from_pretrained(wan_dir)
    with pytest.raises(TypeError, match="needs videos with a method digest, got a Plain"):
        VideoBatches(Plain(), adapter, batch_size=1, cache=LatentCache(tmp_path, adapter))


# ---------------------------------------------------------------------- unreadable videos


def test_an_unreadable_video_gives_its_place_to_the_next(
    wan_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_videos(tmp_path / "videos", 6)
    captions = [f"a red square {n}" for n in range(6)]
    write_metadata(folder, [{"file_name": f"{n}.mp4", "text": text} for n, text in enumerate(captions)])
    for n in (1, 2, 5):
        (folder / f"{n}.mp4").write_bytes(b"damaged")
    adapter = WanAdapter.from_pretrained(wan_dir)
    replaced = {0: 0, 1: 3, 2: 3, 3: 3, 4: 4, 5: 0}

    def batches(cache: LatentCache | None = None) -> VideoBatches:
        videos = VideoFolder(folder, n_frames=9, size=SIZE)
        return VideoBatches(videos, adapter, batch_size=4, seed=1, cache=cache)

    with caplog.at_level(logging.WARNING):
        first = batches()
        whole = [first[n] for n in range(6)]
    assert len(caplog.records) == 3  # once a file
    assert "(3 unreadable so far)" in caplog.text
    for n, batch in enumerate(whole):
        assert batch.prompts == [captions[replaced[item]] for item in first.indices[n]]
        assert batch.latents is not None
        for prompt, latents in zip(batch.prompts, batch.latents, strict=True):
            frames, _ = VideoFolder(folder, n_frames=9, size=SIZE)[captions.index(prompt)]
            assert torch.equal(latents, adapter.encode_frames(frames[None])[0])
    # A resumed run begins in the middle, and may have a cache.
    for other in (
        batches(),
        batches(LatentCache(tmp_path / "c", adapter)),
        batches(LatentCache(tmp_path / "c", adapter)),
    ):
        for n in (4, 2, 5):
            batch = other[n]
            assert batch.prompts == whole[n].prompts
            assert torch.equal(batch.latents, whole[n].latents)  # type: ignore[arg-type]
    with pytest.raises(VideoReadError, match=r"1\.mp4"):
        first.latents(1)
    opened = batches(), batches(LatentCache(tmp_path / "c", adapter))
    for n in (0, 3, 4):
        (folder / f"{n}.mp4").unlink()
    for unreadable in opened:
        with pytest.raises(VideoReadError, match="none of the 6 videos can be read"):
            unreadable[0]


# ---------------------------------------------------------------------- pisces encode


def run_encode(path: Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["encode", str(path)], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_encode_fills_the_cache_and_goes_on(wan_dir: Path, tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "videos", 5)
    whole = (folder / "3.mp4").read_bytes()
    (folder / "3.mp4").write_bytes(whole[:-99])
    values = settings(wan_dir, folder, tmp_path / "out", cache=tmp_path / "cache")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values))
    code, out, err = run_encode(path)
    assert code == 1
    assert "5 prompts and 4 videos, of which 0 were there" in out
    assert f"skipped {folder}/3.mp4" in err
    assert "1 of 5 videos could not be read" in err
    (folder / "3.mp4").write_bytes(whole)
    for there in (8 + 1, 9 + 1):
        code, out, err = run_encode(path)
        assert code == 0
        assert f"5 prompts and 5 videos, of which {there} were there" in out
        assert "read" not in err
    trainer = build_training(TrainConfig.from_dict(values))
    counts = calls_of(trainer)
    trainer.fit()
    assert counts == {"frames": 0, "vae": 0, "text": 0}
    # Another size is another video.
    path.write_text(yaml.safe_dump({**values, "pipeline": {**values["pipeline"], "height": 16}}))
    code, out, _ = run_encode(path)
    assert code == 0
    assert "of which 5 were there" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml", "cache", "out", "videos"]


def test_encode_says_what_it_lacks(wan_dir: Path, videos_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    values = settings(wan_dir, videos_dir, tmp_path / "out", cache=None)
    path.write_text(yaml.safe_dump(values))
    code, _, err = run_encode(path)
    assert code == 2
    assert "data.cache is not set" in err
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    data = {"prompts": str(tmp_path / "prompts.txt"), "cache": str(tmp_path / "cache")}
    path.write_text(yaml.safe_dump({**values, "data": data, "algorithm": {"name": "draft"}}))
    code, out, _ = run_encode(path)
    assert code == 0
    assert "5 prompts and 0 videos, of which 0 were there" in out
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_bytes(b"x")
    (tmp_path / "broken" / "a.txt").write_text("a red square")
    path.write_text(yaml.safe_dump({**values, "data": {"videos": str(tmp_path / "broken"), "cache": data["cache"]}}))
    code, _, err = run_encode(path)
    assert code == 2
    assert "none of the 1 videos" in err

"""The packaged checkpoints: small, loadable by diffusers itself, and as good as their scores say."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

from pisces.pipelines.wan import WanAdapter
from pisces.world import CHECKPOINTS, checkpoint_path
from pisces.world.judge import judge, mean_scores
from pisces.world.scene import captions, render, sample_scenes


def test_all_checkpoints_together_are_below_12_megabytes() -> None:
    files = [path for path in CHECKPOINTS.rglob("*") if path.is_file() and ".state" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja"}


def test_no_checkpoint_names_a_path_of_the_machine_that_made_it() -> None:
    for file in CHECKPOINTS.rglob("*.json"):
        assert '"/' not in file.read_text(), file


@pytest.mark.parametrize("name", ["wan-base", "wan-good"])
def test_generators_are_plain_diffusers_directories(name: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(checkpoint_path(name), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, WanPipeline)
    size = json.loads((checkpoint_path(name) / "pisces.json").read_text())
    frames = pipe(
        ["a red square moves left"],
        num_frames=size["n_frames"],
        height=size["height"],
        width=size["width"],
        num_inference_steps=2,
        guidance_scale=1.0,
        max_sequence_length=20,
        output_type="pt",
    ).frames
    assert frames.shape == (1, 9, 3, 32, 32)
    assert frames.isfinite().all()


def test_a_grid_that_the_scheduler_cannot_make_is_named() -> None:
    adapter = WanAdapter.from_pretrained(checkpoint_path("wan-good"))
    assert adapter.sigmas(2).tolist() == pytest.approx([1.0, 0.2, 0.0])
    with pytest.raises(ValueError, match="no grid of 1 step"):
        adapter.sample(["a red square moves left"], steps=1)


def test_reconstructions(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(48, generator)
    frames = render(scenes, generator)
    adapter = WanAdapter.from_pretrained(checkpoint_path("wan-good"))
    with torch.no_grad():
        rebuilt = adapter.decode(adapter.encode_frames(frames))
    psnr = -10 * torch.log10((rebuilt - frames).square().mean((1, 2, 3, 4)))
    scores = mean_scores(judge(rebuilt, scenes))
    assert float(psnr.mean()) > 31
    assert scores["semantic"] >= 0.95
    assert scores["quality"] >= 0.95


def judged(name: str, seed: int, n: int = 48) -> dict[str, float]:
    """The judge on samples for held-out captions, by the directory's own sampler settings."""
    scenes = sample_scenes(n, torch.Generator().manual_seed(seed), split="held_out")
    adapter = WanAdapter.from_pretrained(checkpoint_path(name))
    latents = adapter.sample(captions(scenes), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return mean_scores(judge(adapter.decode(latents), scenes))


def test_the_good_generator_is_good_and_the_base_has_headroom(seed: int) -> None:
    good, base = judged("wan-good", seed), judged("wan-base", seed)
    assert good["semantic"] >= 0.95
    assert good["quality"] >= 0.92
    assert base["total"] < 0.82
    assert base["total"] > 0.5


@pytest.mark.parametrize("name", ["wan-base", "wan-good", "encoder"])
def test_every_checkpoint_has_its_recipe_and_scores(name: str) -> None:
    scores = json.loads((checkpoint_path(name) / "scores.json").read_text())
    assert "seed" in scores or "seed" in scores["recipe"]


def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no packaged checkpoint 'wan-best'.*wan-good"):
        checkpoint_path("wan-best")

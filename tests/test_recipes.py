"""How the small world's checkpoints are trained: resuming is exact, and the losses are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pisces.pipelines import load_pipeline
from pisces.world import checkpoints, vae_recipe
from pisces.world.checkpoints import STAGES, train_checkpoints
from pisces.world.generator_recipe import (
    FLOW_SHIFT,
    GeneratorData,
    build_pipeline,
    encode_ids,
    flow_loss,
    train_generator,
)
from pisces.world.recipe import Muon, run_steps, split_for_muon, step_generator
from pisces.world.vae_recipe import build_vae, start_as_image_model, vae_loss


class Killed(Exception):
    """Stands for a kill in the middle of a step."""


def train_toy(state_file: Path, *, kill_at: int | None = None, seed: int = 3) -> nn.Module:
    """Ten steps of a small regression with both optimizers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    big, rest = split_for_muon(model.named_parameters(), matrices=lambda name, p: p.dim() == 2)
    muon, adam = Muon(big, lr=0.02), torch.optim.AdamW(rest, lr=1e-2)

    def step(i: int) -> dict[str, float]:
        if i == kill_at:
            raise Killed
        x = torch.randn(16, 4, generator=step_generator(seed, i))
        loss = (model(x) - x[:, :1]).square().mean()
        model.zero_grad()
        loss.backward()
        muon.step()
        adam.step()
        return {"loss": loss.item()}

    stateful = {"model": model, "muon": muon, "adam": adam}
    run_steps(
        "toy",
        steps=10,
        step=step,
        stateful=stateful,
        state_file=state_file,
        settings={"seed": seed},
        save_every=2,
        log=lambda _: None,
    )
    return model


def test_a_killed_recipe_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    unbroken = train_toy(tmp_path / "a.pt")
    with pytest.raises(Killed):
        train_toy(tmp_path / "b.pt", kill_at=7)
    resumed = train_toy(tmp_path / "b.pt")
    for mine, theirs in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    # the check can fail: a run without its last steps is another run
    with pytest.raises(Killed):
        train_toy(tmp_path / "c.pt", kill_at=9)
    short = torch.load(tmp_path / "c.pt", weights_only=True)["model"]
    assert not torch.equal(short["0.weight"], unbroken[0].weight)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    train_toy(tmp_path / "state.pt", seed=3)
    with pytest.raises(ValueError, match=r"of a run with .*'seed': 3"):
        train_toy(tmp_path / "state.pt", seed=4)


@pytest.mark.parametrize("shape", [(6, 6), (3, 9), (12, 4), (8, 4, 3, 3)])
def test_muon_moves_along_the_polar_factor(seed: int, shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    # Five iterations do not lift singular values of any size: these are of one order of magnitude.
    u, s, v = torch.linalg.svd(torch.randn(shape).flatten(1), full_matrices=False)
    weight.grad = (u @ torch.diag(0.1 + 0.9 * torch.rand(s.shape)) @ v).reshape(shape)
    Muon([weight], lr=1.0).step()
    update = -weight.detach().flatten(1)
    u, _, v = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
    scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
    singular = torch.linalg.svdvals(update) / scale
    assert singular.min() > 0.5
    assert singular.max() < 1.4
    assert nn.functional.cosine_similarity(update.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_flow_loss_is_its_formula(seed: int) -> None:
    pipe = build_pipeline(build_vae(), seed=0)
    latents, ids = torch.randn(3, 16, 3, 4, 4), torch.randint(3, 30, (3, 20))
    ids[:, 7:] = 0
    loss = flow_loss(pipe, latents, ids, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    u = torch.sigmoid(torch.randn(3, generator=generator))
    sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
    noise = torch.randn(latents.shape, generator=generator)
    text = encode_ids(pipe.text_encoder, ids)
    total = torch.zeros(())
    for i in range(3):
        noisy = sigma[i] * noise[i] + (1 - sigma[i]) * latents[i]
        velocity = pipe.transformer(noisy[None], sigma[i : i + 1] * 1000, text[i : i + 1], return_dict=False)[0]
        total = total + (velocity[0] - noise[i] + latents[i]).square().mean() / 3
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)


def test_recipe_prompts_equal_the_pipelines_own(seed: int) -> None:
    pipe = build_pipeline(build_vae(), seed=0)
    prompts = ["a red square moves left", "please watch a blue circle moves up"]
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=20, return_tensors="pt").input_ids
    theirs, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=20)
    torch.testing.assert_close(encode_ids(pipe.text_encoder, ids), theirs)


def test_generator_trains_without_touching_the_vae(tmp_path: Path) -> None:
    vae = build_vae()
    before = {name: p.clone() for name, p in vae.state_dict().items()}
    data = GeneratorData(videos=32, steps=2, damage=0.3, lies=0.3, fillers=0.5)
    pipe = train_generator(vae, data, tmp_path / "state.pt", name="test", log=lambda _: None)
    assert all(torch.equal(before[name], p) for name, p in pipe.vae.state_dict().items())
    fresh = build_pipeline(build_vae(), seed=0)
    trained = dict(pipe.transformer.named_parameters())
    assert any(not torch.equal(p, trained[name]) for name, p in fresh.transformer.named_parameters())
    assert not any(p.requires_grad for p in trained.values())


def test_vae_starts_as_an_image_model() -> None:
    """With the taps on past frames nearly off a still video is rebuilt almost as its frames are."""
    torch.manual_seed(0)
    vae = build_vae()
    start_as_image_model(vae, taps=0.0)
    frame = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        one = vae.encode(frame).latent_dist.mean
        many = vae.encode(frame.expand(-1, -1, 9, -1, -1)).latent_dist.mean
    torch.testing.assert_close(many[:, :, 0], one[:, :, 0])
    assert many.shape == (1, 16, 3, 4, 4)


@pytest.mark.parametrize("frames", [1, 9])
def test_vae_loss_reaches_every_weight_that_sees_the_video(frames: int) -> None:
    torch.manual_seed(0)
    vae = build_vae()
    loss = vae_loss(vae, torch.rand(2, 3, frames, 32, 32) * 2 - 1, torch.Generator().manual_seed(0), sharpness=0.5)
    loss.backward()
    idle = [name for name, p in vae.named_parameters() if p.grad is None]
    # a single frame is never resampled in time
    assert all("time_conv" in name for name in idle)
    assert bool(idle) == (frames == 1)


def test_all_stages_make_a_loadable_folder_and_are_then_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("IMAGE_STEPS", 1), ("VIDEO_STEPS", 1), ("BANK", 16)):
        monkeypatch.setattr(vae_recipe, name, value)
    monkeypatch.setattr(checkpoints, "SCORED", 4)
    monkeypatch.setattr(checkpoints, "GOOD", GeneratorData(videos=32, steps=1))
    monkeypatch.setattr(checkpoints, "BASE", GeneratorData(videos=32, steps=1, damage=0.3, lies=0.3))
    monkeypatch.setattr(checkpoints, "_make_encoder", lambda folder, *_: folder.mkdir())
    lines: list[str] = []
    train_checkpoints(tmp_path, log=lines.append)
    assert [line.split(":")[0] for line in lines if line.endswith(": training")] == list(STAGES)
    for name in ("wan-good", "wan-base"):
        adapter = load_pipeline(tmp_path / name)
        assert adapter.sample(["a red square moves left"], steps=2).isfinite().all()
        scores = json.loads((tmp_path / name / "scores.json").read_text())
        assert scores["recipe"]["generator"]["steps"] == 1
        assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / name).rglob("*.json"))
        assert 0 <= scores["reconstruction"]["total"] <= 1
    lines.clear()
    train_checkpoints(tmp_path, log=lines.append)
    assert not lines


def test_unknown_stages_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown stages"):
        train_checkpoints(tmp_path, only=["encoders"])
    with pytest.raises(FileNotFoundError, match="no VAE"):
        train_checkpoints(tmp_path, only=["wan-base"])
    assert len(STAGES) == 4

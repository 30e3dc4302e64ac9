"""The planner of pisces.decode: its predictions against measured peaks, its choice, its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from meter import memory_meter
from tiny_vaes import VAES, build, random_latents, timestep
from typer.testing import CliRunner

from pisces.cli import app
from pisces.commands.plan import bytes_of
from pisces.decode import Plan, choose, decode, latents_shape, plan_decode
from pisces.decode.meter import TensorMeter

pytestmark = pytest.mark.usefixtures("one_thread")

SOME: list[dict[str, Any]] = [{"memory": "plain"}, {"states": "keep"}, {"states": "sqrt", "checkpoint": True}]


@pytest.mark.parametrize("name", ["wan22", "cogvideox", "hunyuan", "ltx"])
def test_predicted_is_measured(name: str) -> None:
    vae = build(name, seed=0, dtype=torch.float32)
    latents = random_latents(vae, 5).requires_grad_()
    plans = plan_decode(vae, latents.shape, methods=SOME)
    assert [plan.options for plan in plans] == SOME  # the least work first
    for plan in plans:
        with memory_meter() as memory:
            frames = decode(vae, latents, **plan.options)
            torch.autograd.grad(frames, latents, torch.empty_like(frames))
        assert plan.peak_bytes == pytest.approx(memory.peak, rel=0.2), plan.name  # tiny tensors: workspaces count
    assert plans[0].relative_time == 1 < plans[1].relative_time < plans[2].relative_time


def test_every_class_can_be_planned_without_its_contents() -> None:
    for name in VAES:
        vae = build(name, seed=0, dtype=torch.float32)
        latents = random_latents(vae, 2, batch=1)
        (plan,) = plan_decode(vae, latents.shape, methods=[{"states": "offload"}])
        assert plan.peak_bytes > 0
        assert not next(vae.parameters()).is_meta
        frames = decode(vae, latents, temb=timestep(vae, latents))
        size = {"frames": frames.shape[2], "height": frames.shape[3], "width": frames.shape[4]}
        if name != "cogvideox":  # an even number of its latents makes other numbers of frames
            assert latents_shape(vae, **size) == tuple(latents.shape)


def test_offloaded_caches_take_none_of_the_devices_memory() -> None:
    vae = build("wan", seed=0, dtype=torch.float32)
    kept, offloaded = (
        {n: plan_decode(vae, (1, 4, n, 4, 4), methods=[{"states": states}])[0].peak_bytes for n in (3, 7)}
        for states in ("keep", "offload")
    )
    assert offloaded[7] - offloaded[3] < 0.3 * (kept[7] - kept[3])


def test_the_meter_counts_what_is_alive_and_works() -> None:
    with TensorMeter() as meter:
        x = torch.zeros(10, 20)
        y = x @ torch.zeros(20, 30)
        del x
        y = y.view(30, 10)
        torch.zeros(10)
    assert meter.peak == 4 * (200 + 600 + 300)
    assert meter.alive == 4 * 300
    assert meter.flops == 2 * 10 * 20 * 30


def test_the_choice_is_the_least_work_that_fits() -> None:
    plans = [Plan({"memory": "plain"}, 900, 3, 1.0), Plan({"states": "keep"}, 300, 4, 4 / 3)]
    assert choose(plans, 900) is plans[0]
    assert choose(plans, 899) is plans[1]
    with pytest.raises(ValueError, match=r"nothing fits into 299 bytes; the least is 300 bytes with states='keep'"):
        choose(plans, 299)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"frames": 10, "height": 16, "width": 16}, "expected 1 \\+ a multiple of 4. Use 9"),
        ({"frames": 9, "height": 18, "width": 16}, "got height 18, expected a multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit(size: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latents_shape(build("wan", seed=0), **size)


def test_sizes_in_words() -> None:
    assert [bytes_of(text) for text in ("24GB", "1.5 MiB", "100")] == [24 * 10**9, 3 * 2**19, 100]
    with pytest.raises(ValueError, match="expected a size such as 24GB"):
        bytes_of("much")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pisces.commands.plan.METHODS", SOME)
    build("wan", seed=0, dtype=torch.float32).save_pretrained(tmp_path / "pipeline" / "vae")
    size = ("--frames", "9", "--height", "16", "--width", "16", "--dtype", "float32")
    result = run(str(tmp_path / "pipeline"), *size, "--budget", "100MB")
    assert result.exit_code == 0, result.output
    assert "AutoencoderKLWan, 1 x 9 frames of 16 x 16, float32: latents (1, 4, 3, 4, 4)" in result.output
    assert "memory='plain'" in result.output
    assert "The least work within 100 MB: memory='plain'" in result.output
    result = run(str(tmp_path / "pipeline"), *size, "--budget", "1kB")
    assert result.exit_code == 2
    assert "nothing fits into 1 kB" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("AutoencoderKLNone",), "not a directory or an autoencoder class"),
        (("UNet2DModel",), "not a directory or an autoencoder class"),
        (("AutoencoderKLWan", "--dtype", "int8"), "expected one of float32"),
        (("AutoencoderKLWan", "--frames", "80"), "Use 77"),
        (("AutoencoderKLWan", "--budget", "x"), "expected a size"),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())

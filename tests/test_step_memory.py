"""The memory of a training step is what the prediction says, for every algorithm and number of frames."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused, run
from meter import memory_meter
from tiny_wan import PROMPTS, build_pipeline
from torch import Tensor
from typer.testing import CliRunner

from pisces.algorithms import Draft, FlowMatching, FrozenBase, Grpo, OneStep
from pisces.algorithms.base import Batch
from pisces.cli import app
from pisces.config import LoraConfig
from pisces.decode.meter import TensorMeter
from pisces.pipelines import WanAdapter, load_pipeline, prepare
from pisces.pipelines.tiny import make_tiny
from pisces.pipelines.trainable import trained_parameters
from pisces.step_memory import MeanReward, predict_step


def built(name: str, n_frames: int, memory: str) -> tuple[WanAdapter, Any, Batch]:
    """An algorithm on a fresh tiny pipeline, and a batch of two."""
    size = {"n_frames": n_frames, "height": 32, "width": 32}
    adapter = WanAdapter(build_pipeline(layers=2, shift_terminal=0.2), defaults=size, decoding={"memory": memory})
    prepare(adapter, LoraConfig(rank=2, alpha=4.0))
    base = FrozenBase(adapter)
    algorithm: Any
    if name == "draft":
        algorithm = Draft(adapter, MeanReward(), base, steps=3)
    elif name == "one_step":
        algorithm = OneStep(adapter, MeanReward(), base, steps=5)
    else:
        algorithm = Grpo(
            adapter, MeanReward(), base, steps=3, group_size=2, kl_weight=0.1, anchor_weight=0.0, micro_batch=2
        )
    latents: Tensor = torch.randn(2, *adapter.latent_shape())
    return adapter, algorithm, Batch(PROMPTS[:2], latents=latents)


def measured(name: str, n_frames: int, memory: str) -> int:
    """Most bytes alive in a real step."""
    adapter, algorithm, batch = built(name, n_frames, memory)
    adapter.encode_prompts([*batch.prompts, ""])
    with TensorMeter([*adapter.transformer.parameters(), *adapter.vae.parameters()]) as meter:
        loss, _ = algorithm.loss(batch, torch.Generator().manual_seed(0))
        loss.backward()
    return meter.peak


@pytest.mark.parametrize(
    ("name", "memory"), [("draft", "chunked"), ("draft", "plain"), ("one_step", "chunked"), ("grpo", "chunked")]
)
def test_the_peak_over_frames_is_the_predicted_one(name: str, memory: str) -> None:
    peaks = []
    for n_frames in (9, 29):
        predicted = predict_step(*built(name, n_frames, memory)).peak_bytes
        real = measured(name, n_frames, memory)
        assert predicted == pytest.approx(real, rel=0.2), (n_frames, predicted, real)
        peaks.append(predicted)
    assert peaks[1] > 1.2 * peaks[0]  # so that a constant would not pass


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=4.0)])
def test_the_total_of_a_step_counts_everything_once(lora: LoraConfig | None) -> None:
    """Full fine-tuning of a wide denoiser: gradients and moments are most of it."""

    def flow() -> tuple[WanAdapter, FlowMatching, Batch]:
        size = {"n_frames": 9, "height": 32, "width": 32}
        adapter = WanAdapter(build_pipeline(layers=2, heads=8), defaults=size)
        prepare(adapter, lora)
        return adapter, FlowMatching(adapter), Batch(PROMPTS[:1], latents=torch.randn(1, *adapter.latent_shape()))

    found = predict_step(*flow())
    adapter, algorithm, batch = flow()
    adapter.encode_prompts([*batch.prompts, ""])
    trained = trained_parameters(adapter)
    with TensorMeter(adapter.transformer.parameters()) as meter:
        optimizer = torch.optim.AdamW(trained.values(), foreach=False)
        for _ in range(2):  # the moments are there from the second step on, gradients from its second micro-batch on
            optimizer.zero_grad()
            for seed in range(2):
                loss, _ = algorithm.loss(batch, torch.Generator().manual_seed(seed))
                loss.backward()
            optimizer.step()
    predicted = found.optimizer_bytes + found.peak_bytes
    assert predicted == pytest.approx(meter.peak, rel=0.1)
    if lora is None:
        gradients = sum(p.nbytes for p in trained.values())
        assert gradients > 0.2 * meter.peak  # so that counting them or the weights twice would not pass


def test_the_allocator_sees_the_predicted_slope() -> None:
    """Kernels' workspaces come on top of the prediction, and do not grow with the frames."""
    slopes = []
    for what in (lambda n: predict_step(*built("draft", n, "chunked")).peak_bytes, allocated):
        few, many = (what(n_frames) for n_frames in (17, 41))
        slopes.append((many - few) / 24)
    predicted, real = slopes
    assert predicted == pytest.approx(real, rel=0.2)


def allocated(n_frames: int) -> int:
    """The peak of a real step as the allocator sees it."""
    adapter, algorithm, batch = built("draft", n_frames, "chunked")
    adapter.encode_prompts([*batch.prompts, ""])
    with memory_meter() as memory:
        loss, _ = algorithm.loss(batch, torch.Generator().manual_seed(0))
        loss.backward()
    return memory.peak


def test_a_denoiser_that_looks_at_contents_is_named(tmp_path: Path) -> None:
    adapter = load_pipeline(make_tiny("mochi", tmp_path / "mochi"))
    prepare(adapter, LoraConfig(rank=2, alpha=4.0))
    algorithm = Draft(adapter, MeanReward(), FrozenBase(adapter), steps=2)
    with pytest.raises(ValueError, match="MochiTransformer3DModel looks at the contents"):
        predict_step(adapter, algorithm, Batch(PROMPTS[:1]))


def test_the_command_line_predicts_a_run(tmp_path: Path) -> None:
    texts = [
        CliRunner().invoke(app, ["plan", "preset:tiny-wan", "--set", f"data.batch_size={n}"]).output for n in (1, 4)
    ]
    peaks = [float(re.search(r"at the peak\s+([\d.]+) MB", text).group(1)) for text in texts]  # type: ignore[union-attr]
    assert peaks[1] > 2 * peaks[0]
    result = CliRunner().invoke(app, ["plan", "AutoencoderKLWan", "--set", "steps=2"])
    assert result.exit_code == 2
    assert "--set belongs to settings of a run" in result.output


@pytest.mark.parametrize(
    ("option", "value", "setting"),
    [
        ("--frames", "17", "--set pipeline.n_frames=17"),
        ("--height", "64", "--set pipeline.height=64"),
        ("--width", "832", "--set pipeline.width=832"),  # the default, written down
        ("--batch", "2", "--set data.batch_size=2"),
        ("--dtype", "float32", "--set pipeline.vae_dtype=float32"),
        ("--tiling", None, "leave --tiling out"),
    ],
)
def test_options_of_a_decode_are_not_for_a_run(option: str, value: str | None, setting: str) -> None:
    refused(run("plan", "preset:tiny-wan", option, *([value] if value else [])), option, setting)


def test_a_budget_is_for_the_whole_step() -> None:
    small = ["plan", "preset:tiny-wan", "--set", "data.batch_size=1", "--budget"]
    refused(run(*small, "1MB"), "expected at most 1 MB")
    result = run(*small, "1GB")
    assert result.exit_code == 0, result.output
    assert "Of 1 GB that leaves them" in result.output
    refused(run(*small, "lots"), "got budget 'lots'")

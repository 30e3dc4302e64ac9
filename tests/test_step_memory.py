"""The memory of a training step is what the prediction says, for every algorithm and number of frames."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from meter import memory_meter
from tiny_wan import PROMPTS, build_pipeline
from torch import Tensor
from typer.testing import CliRunner

from pisces.algorithms import Draft, FrozenBase, Grpo, OneStep
from pisces.algorithms.base import Batch
from pisces.cli import app
from pisces.config import LoraConfig
from pisces.decode.meter import TensorMeter
from pisces.pipelines import WanAdapter, load_pipeline, prepare
from pisces.pipelines.tiny import make_tiny
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
    with TensorMeter() as meter:
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

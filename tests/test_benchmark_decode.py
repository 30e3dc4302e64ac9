"""The benchmark of decoding: its methods compute the same gradient, it writes its page and goes on where it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import decode as benchmark

pytestmark = pytest.mark.usefixtures("one_thread")
OTHER_FRAMES = ("diffusers tiling", "diffusers frame-wise")  # than in one piece


def test_all_methods_differentiate_the_same_frames() -> None:
    decoder = benchmark.DECODERS["ltx"]
    latents = torch.randn(1, 4, 3, 4, 4)

    def gradient(method: str) -> Tensor:
        leaf = latents.clone().requires_grad_()
        frames = benchmark.METHODS[method](benchmark.build(decoder), leaf)
        return torch.autograd.grad(frames.square().mean(), leaf)[0]

    plain = gradient("plain")
    for method in benchmark.METHODS:
        distance = float((gradient(method) - plain).norm() / plain.norm())
        assert (distance > 1e-3) == (method in OTHER_FRAMES), method


def test_it_writes_a_page_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "REPEATED_BELOW", 0.0)
    for frames in (["5"], ["5", "9"], ["5", "9"]):
        command = ["decode", "--only", "wan22", "--output", str(tmp_path), "--frames", *frames]
        monkeypatch.setattr(sys, "argv", command)
        benchmark.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["wan22"]["sqrt"]) == {"5", "9"}
    assert results["wan22"]["sqrt"]["9"]["latents"] == 3
    assert results["wan22"]["plain"]["9"]["peak"] > results["wan22"]["sqrt, checkpoint"]["9"]["peak"]
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "wan22, 5 frames",
        "wan22, 9 frames",
    ]
    page = (tmp_path / "README.md").read_text()
    assert "| MB (time beside plain) | 5 | 9 |" in page
    assert (tmp_path / "wan22.svg").stat().st_size > 1000


def test_a_length_that_would_not_fit_is_not_tried() -> None:
    measured = {"5": {"peak": 1e9, "seconds": 1.0}}
    limits = {"frames": [5, 10, 50], "gigabytes": 3.0, "seconds": 5.0}
    arguments = type("Arguments", (), limits)
    assert benchmark.fits(measured, 10, arguments)  # type: ignore[arg-type]
    assert not benchmark.fits(measured, 50, arguments)  # type: ignore[arg-type]

"""The Python of the documents runs as it stands; what a document leaves to its reader is given here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_vaes
import torch
from tiny_wan import build_tiny_wan
from toy_rewards import ColorReward

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def execute(page: str, numbers: range, **names: Any) -> dict[str, Any]:
    """Run blocks of a page one after the other: the names that they leave."""
    for number in numbers:
        exec(compile(blocks(page)[number], f"{page}, block {number}", "exec"), names)
    return names


@pytest.mark.parametrize(("page", "numbers"), [("README.md", range(2)), ("docs/kernels.md", range(1))])
def test_kernels(page: str, numbers: range) -> None:
    names = execute(page, numbers)
    assert torch.isfinite(names["result"].plan()).all()


@pytest.mark.parametrize(("page", "number"), [("README.md", 2), ("docs/decode.md", 0)])
def test_decode(page: str, number: int) -> None:
    vae = tiny_vaes.build("wan", seed=0)
    latents = tiny_vaes.random_latents(vae, 5, batch=1).requires_grad_()  # 17 frames
    names = execute(page, range(number, number + 1), vae=vae, latents=latents, reward=lambda frames: frames.square())
    (wanted,) = torch.autograd.grad(-vae.decode(latents).sample.square().mean(), latents)
    torch.testing.assert_close(latents.grad, wanted)
    assert torch.isfinite(names["loss"])


def test_rewards() -> None:
    names = execute("docs/rewards.md", range(2))
    assert names["reward"](names["frames"], names["prompts"]).shape == (4,)
    assert names["found"].words[0] == ["a", "red", "square", "moves", "left"]


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_tiny_wan(tmp_path / "my-wan", layers=1)
    block = blocks("docs/training.md")[0]
    assert "steps=40" in block
    names = {"my_rewards": ColorReward()}
    exec(
        compile(block.replace("steps=40", "steps=1").replace("batch_size=8", "batch_size=1"), "training", "exec"), names
    )
    assert (tmp_path / "runs" / "mine" / "final").is_dir()

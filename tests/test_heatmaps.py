"""Laws of the heat maps: heat is where the values are, frames are where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from heat_tiles import tiles
from PIL import Image
from torch import Tensor

from pisces.heatmaps import HOT, heat_maps


def test_the_greatest_heat_is_where_the_greatest_value_is(seed: int, tmp_path: Path) -> None:
    words, plan, other = ["one", "two", "three"], 0.9 * torch.rand(3, 5, 4, 2), 0.9 * torch.rand(3, 5, 4, 2)
    for values in (plan, other):
        values.flatten(1)[torch.arange(3), torch.randint(40, (3,))] = 1.0  # clear of rounding
    path = heat_maps(tmp_path / "h.png", torch.zeros(5, 3, 32, 32), words, [("P", plan), ("A", 100 * other)])
    for block, values in enumerate((plan, other)):
        shown = tiles(path, 3, 5, block)
        assert (shown[0] == 0).all()  # the frames themselves
        for i in range(3):
            t, y, x = np.unravel_index(int(values[i].argmax()), values[i].shape)
            patch = shown[1 + i, t, y * 20 : (y + 1) * 20, x * 40 : (x + 1) * 40]
            assert (patch == HOT).all()
            assert (shown[1 + i, ..., 0] == HOT[0]).sum() == 20 * 40  # and nowhere else
            heat = shown[1 + i, :, ::20, ::40, 0] / HOT[0]
            assert np.abs(heat - (values[i] / values[i].max()).numpy()).max() < 0.01


def test_without_heat_the_frame_is_there_dimmed(seed: int, tmp_path: Path) -> None:
    frames = torch.rand(2, 1, 8, 8).expand(2, 3, 8, 8)
    path = heat_maps(tmp_path / "h.png", frames, ["word"], [("P", torch.zeros(1, 2, 2, 2))])
    shown = tiles(path, 1, 2)
    assert np.abs(shown[0, :, 5::10, 5::10, 0] / 255 - frames[:, 0].numpy()).max() < 0.01
    assert np.abs(shown[1] - 0.5 * shown[0]).max() <= 1
    large = heat_maps(tmp_path / "l.png", torch.ones(2, 3, 300, 300), ["word"], [("P", torch.zeros(1, 2, 7, 7))])
    assert (tiles(large, 1, 2)[0] == 255).all()


def test_equal_calls_draw_equal_files_and_long_words_are_cut(seed: int, tmp_path: Path) -> None:
    frames, plan = torch.rand(3, 3, 16, 16), torch.rand(1, 3, 4, 4)
    drawn = [heat_maps(tmp_path / f"{k}.png", frames, ["w" * 500], [("P", plan)]).read_bytes() for k in range(2)]
    assert drawn[0] == drawn[1]
    assert Image.open(tmp_path / "0.png").width < 500


@pytest.mark.parametrize(
    ("words", "plan", "message"),
    [
        ([], torch.rand(0, 2, 4, 4), "0 words"),
        (["a"], torch.rand(2, 2, 4, 4), r"expected \(1, 2, rows"),
        (["a"], torch.rand(1, 3, 4, 4), r"expected \(1, 2, rows"),
        (["a"], torch.rand(1, 2, 16), "rows, cols"),
        (["a"], torch.full((1, 2, 4, 4), -1.0), "negative"),
        (["a"], torch.full((1, 2, 4, 4), torch.nan), "non-finite"),
    ],
)
def test_what_cannot_be_drawn_is_named(words: list[str], plan: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        heat_maps(tmp_path / "h.png", torch.rand(2, 3, 8, 8), words, [("P", plan)])
    assert not (tmp_path / "h.png").exists()

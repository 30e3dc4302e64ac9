"""Geometry of the video tokens."""

from __future__ import annotations

import pytest
import torch

from pisces.tokens import TokenGrid


def test_a_grid_counts_frames_then_rows_then_columns() -> None:
    grid = TokenGrid(frames=2, rows=2, cols=3)
    assert grid.n_tokens == 12
    assert grid.frame_index().tolist() == [0] * 6 + [1] * 6
    y_x = [(0, 0), (0, 0.5), (0, 1), (1, 0), (1, 0.5), (1, 1)]
    assert torch.equal(grid.positions(), torch.tensor(y_x * 2, dtype=torch.float32))


def test_the_cls_token_comes_first_and_is_nowhere() -> None:
    with_cls, without = TokenGrid(3, 4, 5, cls=True), TokenGrid(3, 4, 5)
    assert with_cls.n_tokens == without.n_tokens + 1
    assert with_cls.frame_index()[0] == -1
    assert with_cls.positions()[0].tolist() == [-1, -1]
    assert torch.equal(with_cls.frame_index()[1:], without.frame_index())
    assert torch.equal(with_cls.positions()[1:], without.positions())


@pytest.mark.parametrize(("frames", "n_tokens"), [(8, 2049), (26, 6657), (128, 32769)])
def test_token_counts_of_internvideo2(frames: int, n_tokens: int) -> None:
    grid = TokenGrid(frames, 16, 16, cls=True)
    assert grid.n_tokens == n_tokens == len(grid.frame_index()) == len(grid.positions())


def test_a_single_patch_sits_in_the_middle() -> None:
    assert TokenGrid(1, 1, 2).positions().tolist() == [[0.5, 0.0], [0.5, 1.0]]


@pytest.mark.parametrize("name", ["frames", "rows", "cols"])
def test_empty_grids_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        TokenGrid(**({"frames": 1, "rows": 1, "cols": 1} | {name: 0}))

"""Laws of `token_cost`: the definition element by element, geometry, masks, back ends, bad input."""

from __future__ import annotations

import math

import problems
import pytest
import torch
from problems import random_mask, token_grid, token_problem

from pisces_kernels import token_cost

BACKENDS = ["reference", "cpu"]
# CLS or none, square or not, one frame, one token.
GRIDS = [(3, 4, 4, True), (2, 3, 5, False), (1, 4, 4, True), (4, 1, 1, False), (1, 1, 1, False)]


def by_hand(text, video, attention, frame_index, positions, gamma, eta):
    """The definition for one sample and one head, with loops."""
    n_rows, n_cols = attention.shape
    # a number of float64 times a float32 vector would be float32
    frame_index, positions = frame_index.double(), positions.double()
    span = (frame_index.max() - frame_index.min()).item() or 1.0
    cost = torch.zeros(n_rows, n_cols, dtype=torch.float64)
    for i in range(n_rows):
        row = attention[i] / attention[i].sum()
        mean_t = sum(row[j] * frame_index[j] for j in range(n_cols))
        mean_s = sum(row[j] * positions[j] for j in range(n_cols))
        for j in range(n_cols):
            cosine = torch.dot(text[i], video[j]) / (text[i].norm() * video[j].norm())
            time = abs(mean_t - frame_index[j]) / span
            place = math.dist(mean_s.tolist(), positions[j].tolist()) / math.sqrt(2)
            cost[i, j] = 1 - cosine + gamma * time + eta * place
    return cost


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", GRIDS)
def test_equals_the_definition(backend, grid):
    frame_index, positions = token_grid(*grid[:3], cls=grid[3])
    text, video, attention = token_problem(2, 3, 5, len(frame_index))
    raw = token_cost(
        text, video, attention, frame_index, positions, gamma=0.3, eta=0.1, normalize=False, backend=backend
    )
    scaled = token_cost(text, video, attention, frame_index, positions, gamma=0.3, eta=0.1, backend=backend)
    for b in range(2):
        for h in range(3):
            want = by_hand(text[b], video[b], attention[b, h], frame_index, positions, 0.3, 0.1)
            assert torch.allclose(raw[b, h], want, rtol=0, atol=1e-12)
            span = want.max() - want.min()
            assert torch.allclose(scaled[b, h], (want - want.min()) / span, rtol=0, atol=1e-10)
    assert scaled.amin() == 0
    assert scaled.amax() == 1
    assert not torch.allclose(raw[0, 0], raw[0, 1], atol=1e-4) or len(frame_index) == 1  # heads do differ


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_equals_float64_reference(backend):
    frame_index, positions = token_grid(4, 8, 8)
    text, video, attention = token_problem(2, 4, 9, 257, dim=64)
    want = token_cost(text, video, attention, frame_index, positions, backend="reference")
    got = token_cost(text.float(), video.float(), attention.float(), frame_index, positions, backend=backend)
    assert got.dtype == torch.float32
    assert (got.double() - want).abs().max() < 2e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = token_cost(text.float(), video.float(), attention.float(), frame_index, positions, backend=backend)
    assert torch.equal(same, got)
    half = token_cost(text.bfloat16(), video.bfloat16(), attention.bfloat16(), frame_index, positions, backend=backend)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_masked_is_removed_whatever_is_there(backend, normalize):
    frame_index, positions = token_grid(3, 4, 5)
    text, video, attention = token_problem(3, 2, 7, 61)
    rows, cols = random_mask(3, 7), random_mask(3, 61)
    keep = (rows.unsqueeze(-1) & cols.unsqueeze(-2)).unsqueeze(1).expand(3, 2, 7, 61)
    options = {"normalize": normalize, "backend": backend}
    cost = token_cost(
        problems.poisoned(text, rows.unsqueeze(-1)),
        problems.poisoned(video, cols.unsqueeze(-1)),
        problems.poisoned(attention, keep),
        problems.poisoned(frame_index.expand(3, 61), cols),
        problems.poisoned(positions.expand(3, 61, 2), cols.unsqueeze(-1)),
        row_mask=rows,
        col_mask=cols,
        **options,
    )
    assert (cost[~keep] == 0).all()
    for b in range(3):
        r, c = rows[b], cols[b]
        small = token_cost(
            text[b : b + 1, r],
            video[b : b + 1, c],
            attention[b : b + 1][:, :, r][..., c],
            frame_index[c],
            positions[c],
            **options,
        )
        assert torch.allclose(cost[b][:, r][..., c], small[0], atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_invariances(backend):
    frame_index, positions = token_grid(3, 4, 4)
    text, video, attention = token_problem(2, 3, 5, 49)
    cost = token_cost(text, video, attention, frame_index, positions, backend=backend)
    others = {
        "length of features": token_cost(3 * text, 0.1 * video, attention, frame_index, positions, backend=backend),
        "scale of attention": token_cost(text, video, 0.5 * attention, frame_index, positions, backend=backend),
        "unit of time": token_cost(text, video, attention, frame_index.double() / 24 + 7, positions, backend=backend),
        "strides": token_cost(
            problems.strided(text), problems.strided(video), problems.strided(attention), frame_index, positions,
            backend=backend,
        ),
    }  # fmt: skip
    for name, other in others.items():
        assert torch.allclose(other, cost, atol=1e-10), name
    order = torch.randperm(49)
    mixed = token_cost(
        text, video[:, order], attention[..., order], frame_index[order], positions[order], backend=backend
    )
    assert torch.allclose(mixed, cost[..., order], atol=1e-10)
    assert not torch.allclose(cost, cost[..., order], atol=1e-3)
    per_sample = token_cost(
        text, video, attention, frame_index.expand(2, 49), positions.expand(2, 49, 2), backend=backend
    )
    assert torch.equal(per_sample, cost)


def test_threads_and_constant_cost():
    frame_index, positions = token_grid(3, 4, 4)
    text, video, attention = token_problem(5, 3, 5, 49, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(token_cost(text, video, attention, frame_index, positions))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
    same = torch.ones(1, 4, 6, dtype=torch.float32)
    flat = token_cost(same, same, torch.full((1, 2, 4, 4), 0.25), torch.zeros(4), torch.zeros(4, 2), backend="cpu")
    assert (flat.abs() < 1).all()  # rounding of a constant matrix is not blown up to [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_input_is_not_hidden(backend):
    frame_index, positions = token_grid(2, 2, 2)
    text, video, attention = token_problem(2, 2, 3, 9)
    text[1, 0, 0] = torch.nan
    cost = token_cost(text, video, attention, frame_index, positions, backend=backend)
    assert torch.isfinite(cost[0]).all()
    assert cost[1].isnan().any(-1).any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_times_of_any_origin_and_dtype(backend):
    frame_index, positions = token_grid(3, 4, 4)
    inputs = token_problem(2, 3, 5, 49, dtype=torch.float32)
    cost = token_cost(*inputs, frame_index, positions, backend=backend)
    since_1970 = 1.7e9 + frame_index.double() / 24
    assert len(since_1970.float().unique()) == 1  # what float32 would make of it
    later = token_cost(*inputs, since_1970, positions, backend=backend)
    assert torch.allclose(later, cost, rtol=0, atol=2e-6)
    ticks = token_cost(*inputs, 90_000 * frame_index.long() + 2**40, positions, backend=backend)
    assert torch.allclose(ticks, cost, rtol=0, atol=1e-6)
    corners = (4 * positions).round().long().clamp(0, 1)
    same = token_cost(*inputs, frame_index, corners, backend=backend)
    assert torch.equal(same, token_cost(*inputs, frame_index, corners.float(), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_that_removes_everything(backend):
    frame_index, positions = token_grid(2, 2, 2)
    inputs = token_problem(2, 2, 3, 9)
    wanted = token_cost(*inputs, frame_index, positions, backend=backend)
    for name, size in (("row_mask", 3), ("col_mask", 9)):
        mask = torch.tensor([[False] * size, [True] * size])
        cost = token_cost(*inputs, frame_index, positions, **{name: mask}, backend=backend)
        assert (cost[0] == 0).all()
        assert torch.allclose(cost[1], wanted[1], atol=1e-14)
    assert token_cost(*(t[:0] for t in inputs), frame_index, positions, backend=backend).shape == (0, 2, 3, 9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text": torch.rand(2, 5)}, ValueError, "text has shape"),
        ({"text": torch.ones(2, 5, 8, dtype=torch.int32)}, TypeError, "text has dtype"),
        ({"video": torch.rand(2, 9, 7)}, ValueError, r"expected \(2, M, 8\)"),
        ({"video": torch.rand(2, 9, 8, device="meta")}, ValueError, "video is on meta, expected cpu"),
        ({"video": [[1.0]]}, TypeError, "video is a list"),
        ({"attention": torch.rand(2, 3, 5, 8)}, ValueError, r"expected \(2, H, 5, 9\)"),
        ({"attention": torch.rand(2, 0, 5, 9)}, ValueError, "expected sizes >= 1"),
        ({"text": torch.rand(2, 0, 8), "attention": torch.rand(2, 3, 0, 9)}, ValueError, "expected sizes >= 1"),
        ({"video": torch.rand(2, 0, 8), "attention": torch.rand(2, 3, 5, 0)}, ValueError, "expected sizes >= 1"),
        ({"frame_index": torch.zeros(8)}, ValueError, r"frame_index has shape \(8,\), expected \(2, 9\)"),
        ({"frame_index": torch.zeros(9, dtype=torch.complex64)}, TypeError, "frame_index has dtype torch.complex64"),
        ({"frame_index": torch.zeros(9, device="meta")}, ValueError, "frame_index is on meta, expected cpu"),
        ({"positions": torch.zeros(9, 2, dtype=torch.bool)}, TypeError, "positions has dtype torch.bool"),
        ({"positions": torch.zeros(9, 3)}, ValueError, "positions has shape"),
        ({"positions": torch.zeros(9, 1)}, ValueError, r"positions has shape \(9, 1\), expected \(2, 9, 2\)"),
        ({"gamma": float("nan")}, ValueError, "gamma is nan"),
        ({"row_mask": torch.ones(2, 5)}, TypeError, "row_mask is torch.float32"),
        ({"col_mask": torch.ones(2, 8, dtype=torch.bool)}, ValueError, r"col_mask has shape \(2, 8\)"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda'|CUDA"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "text": torch.rand(2, 5, 8),
        "video": torch.rand(2, 9, 8),
        "attention": torch.rand(2, 3, 5, 9),
        "frame_index": torch.zeros(9),
        "positions": torch.zeros(9, 2),
        **change,
    }
    with pytest.raises(error, match=message):
        token_cost(**arguments)

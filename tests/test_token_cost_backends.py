"""The compiled token cost and its gradient against the reference: every instruction set, geometries, sizes, threads."""

from __future__ import annotations

from collections.abc import Iterator

import problems
import pytest
import torch
from problems import random_mask, token_grid, token_problem
from torch import Tensor

from pisces_kernels import _dispatch, reference, token_cost, transport_attention


def geometries() -> dict[str, tuple[Tensor, Tensor]]:
    """Frame index [M] and positions [M, 2] in float64: tokens of a frame in runs or not, places repeated or not."""
    grid, places = (t.double() for t in token_grid(3, 4, 5))
    wide, wide_places = (t.double() for t in token_grid(2, 24, 25, cls=False))
    registers = torch.cat([torch.tensor([-1.0, -1.0, -1.0]), *(torch.full((34,), float(f)) for f in range(4))])
    in_frame = torch.cat([torch.full((4, 2), -1.0), torch.rand(30, 2)]).double()
    order = torch.randperm(len(grid))
    return {
        "grid": (grid, places),
        "frames longer than a block": (wide, wide_places),
        "registers in every frame": (
            registers.double(),
            torch.cat([-torch.ones(3, 2).double(), in_frame.repeat(4, 1)]),
        ),
        "two sizes of frames": (torch.arange(4.0).repeat_interleave(torch.tensor([19, 19, 40, 19])), torch.rand(97, 2)),
        "same places, backwards in time": (
            torch.arange(3.0, 0.0, -1.0).repeat_interleave(33),
            places[1:12].repeat(9, 1),
        ),
        "shuffled": (grid[order], places[order]),
        "a time of its own for every token": (torch.rand(150), torch.rand(150, 2)),
        "far origin": (grid / 24 + 1.7e9, places),
        "one frame": (torch.zeros(70), torch.rand(70, 2)),
        "one token": (torch.zeros(1), torch.zeros(1, 2)),
        "two tokens": (torch.tensor([0.0, 1.0]), torch.zeros(2, 2)),
    }


def instruction_sets() -> Iterator[str]:
    """Each that this machine runs, while it is in use."""
    module = _dispatch.extension()
    try:
        for name in module.build_info()["instruction_sets"]:
            module.use_instruction_set(name)
            yield name
    finally:
        module.use_instruction_set(None)


def cost_and_gradients(inputs, geometry, weight, **options) -> tuple[Tensor, ...]:
    leaves = tuple(t.detach().clone().requires_grad_() for t in inputs)
    cost = token_cost(*leaves, *geometry, **options)
    return cost.detach(), *torch.autograd.grad(cost, leaves, weight.to(cost.dtype))


def assert_close(got, want, dtype, note):
    # Relative to the largest entry. A cost is a difference of numbers near 1, and its gradient is divided by its range.
    limits = (3e-6, 2e-5, 2e-5, 2e-5) if dtype == torch.float32 else (1e-12, 1e-11, 1e-11, 1e-11)
    for g, w, limit, name in zip(got, want, limits, ("cost", "text", "video", "attention"), strict=True):
        worst = (g.double() - w).abs().max().item()
        assert worst <= limit * max(w.abs().max().item(), 1e-3), (*note, dtype, name, worst)


@pytest.mark.parametrize("name", geometries())
def test_equals_the_reference_on_every_instruction_set(name):
    geometry = geometries()[name]
    n_cols = len(geometry[0])
    for n_rows, heads, dim, normalize in ((5, 3, 17, True), (1, 1, 3, False), (13, 2, 40, True)):
        inputs = token_problem(2, heads, n_rows, n_cols, dim)
        weight = torch.randn(2, heads, n_rows, n_cols, dtype=torch.float64)
        options = {"gamma": 0.3, "eta": 0.4, "normalize": normalize}
        want = cost_and_gradients(inputs, geometry, weight, backend="reference", **options)
        for instruction_set in instruction_sets():
            for dtype in (torch.float32, torch.float64):
                if dtype == torch.float32 and n_cols < 3:
                    continue  # the range of so few entries may be tiny: its rounding is all there is
                got = cost_and_gradients([t.to(dtype) for t in inputs], geometry, weight, backend="cpu", **options)
                assert_close(got, want, dtype, (instruction_set, n_rows))


@pytest.mark.parametrize("dim", [3, 513, 1030, 2100])
def test_any_width_of_features(dim):
    """Features longer than what a tile reads at a time, with and without a rest."""
    geometry = tuple(t.double() for t in token_grid(3, 4, 5))
    inputs = token_problem(1, 2, 7, 61, dim)
    weight = torch.randn(1, 2, 7, 61, dtype=torch.float64)
    want = cost_and_gradients(inputs, geometry, weight, backend="reference")
    for instruction_set in instruction_sets():
        for dtype in (torch.float32, torch.float64):
            got = cost_and_gradients([t.to(dtype) for t in inputs], geometry, weight, backend="cpu")
            assert_close(got, want, dtype, (instruction_set, dim))


@pytest.mark.parametrize("normalize", [True, False])
def test_masked_tokens_hold_anything(normalize):
    for name, (frame_index, positions) in geometries().items():
        n_cols = len(frame_index)
        inputs = token_problem(3, 2, 7, n_cols)
        rows, cols = random_mask(3, 7), random_mask(3, n_cols)
        cols[1, n_cols // 2 :] = n_cols == 1  # a video that is shorter than the others
        cols[1, 0] = True
        keep = (rows.unsqueeze(-1) & cols.unsqueeze(-2)).unsqueeze(1)
        real = (rows.unsqueeze(-1), cols.unsqueeze(-1), keep)
        poisoned = [problems.poisoned(t, k.expand_as(t)) for t, k in zip(inputs, real, strict=True)]
        times = problems.poisoned(frame_index.double().expand(3, -1), cols)
        places = problems.poisoned(positions.double().expand(3, -1, 2), cols.unsqueeze(-1))
        weight = torch.randn(3, 2, 7, n_cols, dtype=torch.float64)
        options = {"row_mask": rows, "col_mask": cols, "normalize": normalize}
        want = cost_and_gradients(inputs, (frame_index, positions), weight, backend="reference", **options)
        got = cost_and_gradients(
            poisoned, (times, places), problems.poisoned(weight, keep.expand_as(weight)), backend="cpu", **options
        )
        assert_close(got, want, torch.float64, (name,))
        for value, exists in zip(got[1:], real, strict=True):
            assert (value.masked_select(~exists.expand_as(value)) == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_entries_that_tie_at_an_extreme_share_its_gradient(backend):
    """Unit vectors along axes: every cosine is 0 or 1, so that every entry is at one of the two extremes."""
    axes = torch.eye(4, dtype=torch.float64)
    text, video = axes[torch.randint(4, (2, 5))], axes[torch.randint(4, (2, 37))]
    text[:, :2], video[:, :2] = axes[:2], axes[:2]
    attention = torch.rand(2, 3, 5, 37, dtype=torch.float64)
    geometry = (torch.arange(37.0).double(), torch.rand(37, 2).double())
    weight = torch.randn_like(attention)
    got = cost_and_gradients((text, video, attention), geometry, weight, gamma=0.0, eta=0.0, backend=backend)
    leaves = tuple(t.clone().requires_grad_() for t in (text, video, attention))
    shared = (geometry[0].expand(2, -1), geometry[1].expand(2, -1, 2))
    cost = reference.token_cost(*leaves, *shared, gamma=0.0, eta=0.0)
    assert set(cost.unique().tolist()) == {0.0, 1.0}
    for one, other in zip(got[1:], torch.autograd.grad(cost, leaves, weight), strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    assert got[1].abs().max() > 1e-2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_constant_cost_has_finite_gradients(backend):
    same = torch.ones(1, 4, 6)
    leaves = (same, torch.ones(1, 9, 6), torch.full((1, 2, 4, 9), 1 / 9))
    weight = torch.randn(1, 2, 4, 9)
    cost, *grads = cost_and_gradients(leaves, (torch.zeros(9), torch.zeros(9, 2)), weight, backend=backend)
    assert torch.isfinite(cost).all()
    for grad in grads:
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_reaches_the_gradients_of_its_head(bad):
    frame_index, positions = token_grid(2, 3, 3)
    text, video, attention = token_problem(2, 2, 3, 19)
    attention[1, 1, 2, 5] = bad
    weight = torch.ones(2, 2, 3, 19)
    cost, by_text, by_video, by_attention = cost_and_gradients(
        (text, video, attention), (frame_index, positions), weight, backend="cpu"
    )
    for value in (cost[0], by_text[0], by_video[0], by_attention[0], cost[1, 0], by_attention[1, 0]):
        assert torch.isfinite(value).all()
    for value in (cost[1, 1], by_text[1], by_video[1], by_attention[1, 1]):
        assert value.isnan().all()


@pytest.mark.parametrize(
    "shape", [(1, 3, 9, 1100, 700), (5, 2, 7, 1100, 300), (1, 1, 5, 60001, 8), (3, 1, 40, 301, 512)]
)
def test_thread_count_does_not_change_a_bit(shape):
    """Long enough for threads: one sample or head split among all, and several that do not divide."""
    batch, heads, n_rows, n_cols, _ = shape
    inputs = tuple(t.requires_grad_() for t in token_problem(*shape, dtype=torch.float32))
    geometry = (torch.arange(n_cols) // 100, torch.rand(100, 2).repeat(n_cols // 100 + 1, 1)[:n_cols])
    weight = torch.randn(batch, heads, n_rows, n_cols)
    rows = random_mask(batch, n_rows)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            cost = token_cost(*inputs, *geometry)
            refined, plan = transport_attention(*inputs, *geometry, row_mask=rows, max_iters=20, return_plan=True)
            grads = torch.autograd.grad(cost, inputs, weight)
            results.append((cost, refined, plan, *grads, *torch.autograd.grad(refined, inputs[2], weight)))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one, other)

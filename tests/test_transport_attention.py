"""Laws of `transport_attention`: official formula head by head, composition, rows left alone, bad input."""

from __future__ import annotations

import math

import problems
import pytest
import torch
from problems import random_mask, token_grid, token_problem

from pisces_kernels import reference, sinkhorn, token_cost, transport_attention

BACKENDS = ["reference", "cpu"]


def official_head(text, video, attention, frame_index, positions, *, epsilon=0.05, damping=0.9, iters=200, tol=1e-3):
    """One head by the published formulas: counting reference measure, both log-scalings damped by the same exponent."""
    text, video = text / text.norm(dim=-1, keepdim=True), video / video.norm(dim=-1, keepdim=True)
    rows = attention / attention.sum(-1, keepdim=True)
    time = ((rows @ frame_index)[:, None] - frame_index).abs() / (frame_index.max() - frame_index.min())
    place = torch.cdist(rows @ positions, positions) / math.sqrt(2)
    cost = 1 - text @ video.T + 0.2 * time + 0.2 * place
    cost = (cost - cost.min()) / (cost.max() - cost.min())
    n_rows, n_cols = cost.shape
    log_kernel = -cost / epsilon
    log_u, log_v = torch.zeros(n_rows, dtype=cost.dtype), torch.zeros(n_cols, dtype=cost.dtype)
    for _ in range(iters):
        new_u = damping * (-math.log(n_rows) - torch.logsumexp(log_kernel + log_v, 1))
        new_v = damping * (-math.log(n_cols) - torch.logsumexp(log_kernel.T + new_u, 1))
        change = max((new_u - log_u).abs().max(), (new_v - log_v).abs().max())
        log_u, log_v = new_u, new_v
        if change < tol:
            break
    plan = torch.exp(log_u[:, None] + log_kernel + log_v)
    prior = plan / plan.sum(1, keepdim=True)
    return torch.softmax((attention + 1e-6).log() + (prior + 1e-6).log(), -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_official_formula_of_one_head_equals_the_batched_call(backend, dtype):
    frame_index, positions = token_grid(4, 5, 5)
    query, key, attention = token_problem(3, 4, 9, 101, dtype=dtype)
    lexical = random_mask(3, 9)
    tol = 1e-10 if dtype == torch.float64 else 1e-6
    inputs = (query, key, attention, frame_index, positions)
    got = transport_attention(*inputs, row_mask=lexical, max_iters=500, tol=tol, backend=backend)
    damped = transport_attention(
        query, key, attention, frame_index, positions, row_mask=lexical, tau=0.7, backend=backend
    )
    limit = 1e-9 if dtype == torch.float64 else 2e-5
    for b in range(3):
        r = lexical[b]
        for h in range(4):
            want = official_head(
                query[b, r].double(), key[b].double(), attention[b, h, r].double(), frame_index.double(),
                positions.double(), iters=500, tol=1e-12,
            )  # fmt: skip
            assert (got[b, h, r].double() - want).abs().max() < limit
            assert (damped[b, h, r].double() - want).abs().max() > 10 * limit  # the comparison can fail


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [{"tau": 0.9}, {"tau": 1.0}, {"mass": 0.63}])
def test_equals_the_composition_of_the_three_steps(backend, kind):
    frame_index, positions = token_grid(3, 4, 4)
    query, key, attention = token_problem(2, 3, 6, 49)
    lexical = random_mask(2, 6)
    options = {"epsilon": 0.03, "max_iters": 80, "tol": 1e-6, **kind}
    refined, plan = transport_attention(
        query, key, attention, frame_index, positions, row_mask=lexical, return_plan=True, backend=backend, **options
    )
    cost = token_cost(query, key, attention, frame_index, positions, row_mask=lexical, backend="reference")
    result = sinkhorn(cost, row_mask=lexical.unsqueeze(1), backend="reference", **options)
    assert torch.allclose(plan, result.plan(), atol=1e-12)
    assert torch.allclose(refined, reference.fuse(attention, plan, lexical), atol=1e-12)
    if "mass" in kind:
        assert torch.allclose(plan.sum((-2, -1)), torch.full((2, 3), 0.63, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(3, 3, 5, False), (1, 4, 4, True), (4, 1, 1, True), (1, 1, 1, False)])
@pytest.mark.parametrize("n_rows", [1, 5])
def test_any_geometry_and_strides(backend, grid, n_rows):
    frame_index, positions = token_grid(*grid[:3], cls=grid[3])
    inputs = token_problem(2, 3, n_rows, len(frame_index))
    refined = transport_attention(*inputs, frame_index, positions, backend=backend)
    strided = transport_attention(*(problems.strided(t) for t in inputs), frame_index, positions, backend=backend)
    assert torch.allclose(strided, refined, atol=1e-12)
    assert torch.allclose(refined.sum(-1), torch.ones(2, 3, n_rows, dtype=torch.float64))
    per_sample = (frame_index.expand(2, -1), positions.expand(2, -1, 2))
    assert torch.equal(transport_attention(*inputs, *per_sample, backend=backend), refined)
    in_seconds = transport_attention(*inputs, 1.7e9 + frame_index.double() / 24, positions, backend=backend)
    assert torch.allclose(in_seconds, refined, atol=1e-4)
    if len(frame_index) > 1:
        order = torch.arange(len(frame_index)).roll(1)
        query, key, attention = inputs
        mixed = transport_attention(
            query, key[:, order], attention[..., order], frame_index[order], positions[order], backend=backend
        )
        assert torch.allclose(mixed, refined[..., order], atol=1e-10)
        assert not torch.allclose(mixed, refined, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_iterations_that_were_not_enough_give_the_iterate_they_reached(backend):
    frame_index, positions = token_grid(3, 4, 4)
    inputs = (*token_problem(2, 3, 6, 49), frame_index, positions)
    options = {"epsilon": 0.02, "max_iters": 2, "tol": 1e-9, "backend": backend}
    refined, plan = transport_attention(*inputs, return_plan=True, **options)
    solution = sinkhorn(token_cost(*inputs), tau=0.9, **options)
    assert not solution.converged.any()
    assert torch.allclose(plan, solution.plan(), atol=1e-12)
    assert torch.isfinite(refined).all()
    enough = transport_attention(*inputs, **{**options, "max_iters": 500})
    assert not torch.allclose(refined, enough, atol=1e-3)


@pytest.mark.parametrize("differentiable_plan", [False, True])
def test_autocast_changes_nothing(differentiable_plan):
    frame_index, positions = token_grid(3, 4, 4)
    inputs = (*token_problem(2, 3, 6, 49, dtype=torch.float32), frame_index, positions)
    refined = transport_attention(*inputs, differentiable_plan=differentiable_plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = transport_attention(*inputs, differentiable_plan=differentiable_plan)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, refined)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_that_are_not_selected_come_back_bit_for_bit(backend, dtype):
    frame_index, positions = token_grid(3, 4, 4)
    query, key, attention = token_problem(3, 2, 6, 49, dtype=dtype)
    lexical = random_mask(3, 6)
    lexical[2] = False  # a prompt without lexical words
    before = attention.clone()
    refined, plan = transport_attention(
        query, key, attention, frame_index, positions, row_mask=lexical, return_plan=True, backend=backend
    )
    assert refined.dtype == dtype
    assert torch.equal(attention, before)
    chosen = lexical[:, None, :].expand(3, 2, 6)
    assert torch.equal(refined[~chosen], attention[~chosen])
    assert (plan[~chosen] == 0).all()
    assert not torch.equal(refined[chosen], attention[chosen])
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    assert torch.allclose(refined.float().sum(-1), torch.ones(3, 2, 6), atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_selected_have_no_say(backend):
    frame_index, positions = token_grid(3, 4, 4)
    query, key, attention = token_problem(2, 3, 6, 49)
    lexical = random_mask(2, 6)
    lexical[:, 1] = False
    refined = transport_attention(query, key, attention, frame_index, positions, row_mask=lexical, backend=backend)
    poisoned = problems.poisoned(query, lexical.unsqueeze(-1))
    again = transport_attention(poisoned, key, attention, frame_index, positions, row_mask=lexical, backend=backend)
    assert torch.allclose(again, refined, atol=1e-12)
    nobody = transport_attention(
        query, key, attention, frame_index, positions, row_mask=torch.zeros(2, 6, dtype=torch.bool), backend=backend
    )
    assert torch.equal(nobody, attention)


@pytest.mark.parametrize("epsilon", [0.5, 0.05, 0.01, 0.002])
def test_float32_equals_float64_reference(epsilon):
    frame_index, positions = token_grid(4, 8, 8)
    query, key, attention = token_problem(2, 3, 9, 257, dim=32)
    options = {"epsilon": epsilon, "max_iters": 60, "tol": 0.0}
    want = transport_attention(query, key, attention, frame_index, positions, backend="reference", **options)
    got = transport_attention(query.float(), key.float(), attention.float(), frame_index, positions, **options)
    assert (got.double() - want).abs().max() < max(5e-6, 5e-8 / epsilon)  # float32 costs are good to about 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_whose_plan_underflows_are_refined_all_the_same(backend, dtype):
    frame_index, positions = token_grid(3, 4, 4)
    query, key, attention = token_problem(2, 3, 6, 49, dtype=dtype)
    query[:, 0] = -key.mean(1)  # a word that no patch is like
    options = {"tau": 0.1, "epsilon": 5e-4 if dtype == torch.float32 else 5e-5, "tol": 1e-6, "backend": backend}
    inputs = (query, key, attention, frame_index, positions)
    refined, plan = transport_attention(*inputs, return_plan=True, **options)
    assert (plan.sum(-1) == 0).any()  # rows that carry less than the smallest number
    assert torch.isfinite(plan).all()
    cost = token_cost(*(t.double() for t in inputs), backend="reference")
    solution = sinkhorn(cost, epsilon=options["epsilon"], tau=0.1, tol=1e-12, backend="reference")
    rows = torch.softmax((solution.g.unsqueeze(-2) - cost) / options["epsilon"], -1)
    want = (attention.double() + 1e-6) * (rows + 1e-6)
    want = want / want.sum(-1, keepdim=True)
    assert (refined.double() - want).abs().max() < (1e-3 if dtype == torch.float32 else 1e-5)
    composed = transport_attention(*inputs, differentiable_plan=True, **options)
    assert (composed.double() - want).abs().max() < (1e-3 if dtype == torch.float32 else 1e-5)


def test_overflow_is_not_hidden():
    frame_index, positions = token_grid(2, 2, 2)
    inputs = (*token_problem(1, 2, 3, 9, dtype=torch.float32), frame_index, positions)
    for backend in BACKENDS:
        assert transport_attention(*inputs, epsilon=1e-42, backend=backend).isnan().all()


def test_thread_count_does_not_change_a_bit():
    frame_index, positions = token_grid(3, 4, 4)
    query, key, attention = token_problem(3, 4, 6, 49, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(transport_attention(query, key, attention, frame_index, positions))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_input_is_not_hidden(backend):
    frame_index, positions = token_grid(2, 2, 2)
    query, key, attention = token_problem(2, 2, 3, 9)
    key[1, 0, 0] = torch.nan
    refined = transport_attention(query, key, attention, frame_index, positions, backend=backend)
    assert torch.isfinite(refined[0]).all()
    assert refined[1].isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.rand(2, 5)}, ValueError, "query has shape"),
        ({"key": torch.rand(2, 9, 7)}, ValueError, r"key has shape \(2, 9, 7\), expected \(2, M, 8\)"),
        ({"attention": torch.rand(2, 3, 9, 5)}, ValueError, r"expected \(2, H, 5, 9\)"),
        ({"query": torch.rand(2, 0, 8), "attention": torch.rand(2, 3, 0, 9)}, ValueError, "expected sizes >= 1"),
        ({"key": torch.rand(2, 9, 8, device="meta")}, ValueError, "key is on meta, expected cpu"),
        ({"attention": torch.ones(2, 3, 5, 9, dtype=torch.int64)}, TypeError, "attention has dtype torch.int64"),
        ({"epsilon": -1.0}, ValueError, "epsilon is -1.0"),
        ({"tau": 0.0}, ValueError, "tau is 0.0"),
        ({"mass": 2.0}, ValueError, "mass is 2.0"),
        (
            {"row_mask": torch.ones(2, 6, dtype=torch.bool)},
            ValueError,
            r"row_mask has shape \(2, 6\)",
        ),
        ({"row_mask": torch.ones(2, 5)}, TypeError, "row_mask is torch.float32"),
        ({"max_iters": 0}, ValueError, "max_iters is 0"),
        ({"tol": float("nan")}, ValueError, "tol is nan"),
        ({"epsilon": float("inf")}, ValueError, "epsilon is inf"),
        ({"eta": float("nan")}, ValueError, "eta is nan"),
        ({"backend": "fpga"}, ValueError, "backend is 'fpga'"),
        ({"frame_index": [0] * 9}, TypeError, "frame_index is a list"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "query": torch.rand(2, 5, 8),
        "key": torch.rand(2, 9, 8),
        "attention": torch.rand(2, 3, 5, 9),
        "frame_index": torch.zeros(9),
        "positions": torch.zeros(9, 2),
        **change,
    }
    with pytest.raises(error, match=message):
        transport_attention(**arguments)

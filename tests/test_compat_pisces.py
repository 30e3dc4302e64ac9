"""`pisces_kernels.compat.pisces` against the released formulas, written out in float64 for one pair and one head."""

from __future__ import annotations

import math

import pytest
import torch
from problems import random_mask, token_grid, token_problem

from pisces_kernels import sinkhorn, transport_attention
from pisces_kernels.compat import pisces

BACKENDS = ["reference", "cpu"]
FRAMES, PATCHES, HEADS, QUERIES = 3, 16, 3, 8
TOKENS = 1 + FRAMES * PATCHES
LEXICAL = torch.tensor([1, 2, 4, 6])


def official_cost(text, video, attention, frames, places, gamma=0.2, eta=0.2):
    """Cost of one head, entry by entry where it is cheap to be."""
    n_rows, n_cols = attention.shape
    span = max((frames.max() - frames.min()).item(), 1.0)
    cost = torch.zeros(n_rows, n_cols, dtype=torch.float64)
    for i in range(n_rows):
        row = attention[i] / max(attention[i].sum().item(), 1e-6)
        time, place = (row * frames).sum(), (row[:, None] * places).sum(0)
        for j in range(n_cols):
            cosine = torch.dot(text[i], video[j]) / (text[i].norm() * video[j].norm())
            away = math.dist(place.tolist(), places[j].tolist()) / math.sqrt(2)
            cost[i, j] = 1 - cosine + gamma * abs(time - frames[j]) / span + eta * away
    return (cost - cost.min()) / max((cost.max() - cost.min()).item(), 1e-6)


def official_plan(cost, epsilon=0.05, m=0.9, max_iterations=200, tolerance=1e-3):
    """Counting reference measure; both log-scalings damped by m; stops when none of them changes by the tolerance."""
    n_rows, n_cols = cost.shape
    exponent = 1.0 if m >= 0.999 else m
    log_u, log_v = torch.zeros(n_rows, dtype=cost.dtype), torch.zeros(n_cols, dtype=cost.dtype)
    n_iters = 0
    for _ in range(max_iterations):
        n_iters += 1
        new_u = exponent * (-math.log(n_rows) - torch.logsumexp(log_v - cost / epsilon, 1))
        new_v = exponent * (-math.log(n_cols) - torch.logsumexp(new_u[:, None] - cost / epsilon, 0))
        change = max((new_u - log_u).abs().max(), (new_v - log_v).abs().max())
        log_u, log_v = new_u, new_v
        if change < tolerance:
            break
    return torch.exp(log_u[:, None] + log_v - cost / epsilon), n_iters


def official_fusion(attention, prior, eps=1e-6):
    product = attention.clamp_min(eps) * prior.clamp_min(eps)
    return product / product.sum(-1, keepdim=True)


def official_head(text, video, attention, frames, places, **options):
    plan, _ = official_plan(official_cost(text, video, attention, frames, places), **options)
    return plan / plan.sum(-1, keepdim=True)


def problem(batch, dtype=torch.float64):
    """Arguments of `apply_partial_ot_attention` without valid_tokens, and the video features."""
    query, video, attention = token_problem(batch, HEADS, QUERIES, TOKENS, dim=4 * HEADS, dtype=dtype)
    attention[..., 5] = 0  # below the floor of the fusion
    attention = attention / attention.sum(-1, keepdim=True)
    keys = video.unflatten(-1, (HEADS, 4)).transpose(1, 2)  # [B, H, M, D / H]
    return attention, query, keys, video


@pytest.mark.parametrize(("cls", "grid"), [(True, (4, 4)), (False, (4, 4)), (True, (3, 5)), (False, (1, 7))])
def test_geometry(cls, grid):
    size = grid[0] * grid[1]
    want = token_grid(3, *grid, cls=cls)
    for patches in (grid, size) if grid == (4, 4) else (grid,):
        frames, places = pisces.build_video_token_geometry(3 * size + cls, patches_per_frame=patches, cls=cls)
        assert frames.dtype == torch.int64
        assert torch.equal(frames.float(), want[0])
        assert torch.equal(places, want[1])
    assert frames.tolist().count(-1) == cls


@pytest.mark.parametrize("backend", BACKENDS)
def test_cost_of_one_head_equals_the_formula(backend):
    attention, query, _, video = problem(1)
    geometry = pisces.build_video_token_geometry(TOKENS, patches_per_frame=PATCHES)
    rows = attention[0, 1, LEXICAL]
    options = {"temporal_weight": 0.3, "spatial_weight": 0.1, "backend": backend}
    got = pisces.compute_spatiotemporal_cost(query[0, LEXICAL], video[0], rows, *geometry, **options)
    inputs = (query[0, LEXICAL], video[0], rows, geometry[0].double(), geometry[1].double())
    assert torch.allclose(got, official_cost(*inputs, 0.3, 0.1), rtol=0, atol=1e-12)
    assert not torch.allclose(got, official_cost(*inputs), rtol=0, atol=1e-3)  # the comparison can fail
    heads = pisces.compute_spatiotemporal_cost(
        query[0, LEXICAL], video[0], attention[0][:, LEXICAL], *geometry, **options
    )
    assert heads.shape == (HEADS, 4, TOKENS)
    assert torch.allclose(heads[1], got, rtol=0, atol=1e-14)
    batch = pisces.compute_spatiotemporal_cost(query[:, LEXICAL], video, attention[:, :, LEXICAL], *geometry, **options)
    assert torch.equal(batch[0], heads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-9])
@pytest.mark.parametrize("m", [0.9, 0.5, 0.998, 0.999, 1.0])
def test_plan_equals_the_released_iteration_wherever_it_stops(backend, tolerance, m):
    cost = torch.rand(3, 5, 37, dtype=torch.float64)
    options = {"epsilon": 0.05, "max_iterations": 60, "tolerance": tolerance}
    got = pisces.solve_partial_ot(cost, transported_mass=m, backend=backend, **options)
    for p in range(3):
        want, n_iters = official_plan(cost[p], m=m, **options)
        assert torch.allclose(got[p], want, rtol=1e-10, atol=1e-15)
        if 1 < n_iters < 60:  # one iteration less is another plan: the stop test is the released one
            early, _ = official_plan(cost[p], epsilon=0.05, m=m, max_iterations=n_iters - 1, tolerance=tolerance)
            assert not torch.allclose(got[p], early, rtol=1e-11, atol=0)
    # From 0.999 on the problem is balanced: the side that was updated last has its marginal exactly.
    columns = got.sum(-2) * 37
    assert torch.allclose(columns, torch.ones_like(columns), rtol=1e-9) == (m >= 0.999)


def test_product_measure_differs_in_scale_only():
    cost = torch.rand(5, 37, dtype=torch.float64)
    counting = pisces.solve_partial_ot(cost, tolerance=1e-12, max_iterations=500)
    product = sinkhorn(cost, epsilon=0.05, tau=0.9, tol=1e-12, max_iters=500).plan()
    assert torch.allclose(counting, product * (5 * 37) ** (0.1 / 1.9), rtol=1e-9)
    assert not torch.allclose(counting, product, rtol=1e-2)
    rows = pisces.normalize_transport_rows(counting)
    assert torch.allclose(rows, pisces.normalize_transport_rows(product), rtol=1e-9)
    assert torch.allclose(rows.sum(-1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(pisces.normalize_transport_rows(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_prior_and_attention_of_one_pair_equal_the_formulas_head_by_head(backend):
    attention, query, keys, video = problem(1)
    frames, places = (t.double() for t in token_grid(FRAMES, 4, 4))
    options = {"patches_per_frame": PATCHES, "backend": backend}
    prior = pisces.build_partial_ot_prior(query, keys, attention, LEXICAL, **options)
    fused = pisces.apply_partial_ot_attention(attention, query, keys, LEXICAL, **options)
    assert prior.shape == (HEADS, 4, TOKENS)
    for h in range(HEADS):
        rows = attention[0, h, LEXICAL]
        want = official_head(query[0, LEXICAL], video[0], rows, frames, places)
        assert torch.allclose(prior[h], want, rtol=1e-9, atol=1e-13)
        assert torch.allclose(fused[0, h, LEXICAL], official_fusion(rows, want), rtol=1e-9, atol=1e-13)
        other = official_head(query[0, LEXICAL], video[0], rows, frames, places, m=0.8)
        assert not torch.allclose(prior[h], other, rtol=1e-2, atol=0)
    single = pisces.apply_partial_ot_attention(
        *(t.float() for t in (attention, query, keys)), valid_tokens=LEXICAL, **options
    )
    assert single.dtype == torch.float32
    assert (single - fused).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_with_its_own_tokens_equals_a_loop_of_pairs(backend):
    attention, query, keys, _ = problem(3)
    mask = random_mask(3, QUERIES)
    mask[0] = True
    geometry = (torch.rand(3, TOKENS), torch.rand(3, TOKENS, 2))
    options = {"geometry": geometry, "backend": backend}
    fused = pisces.apply_partial_ot_attention(attention, query, keys, mask, **options)
    prior = pisces.build_partial_ot_prior(query, keys, attention, mask, **options)
    assert prior.shape == attention.shape
    assert (prior.transpose(1, 2)[~mask] == 0).all()
    for b in range(3):
        pair = (query[b : b + 1], keys[b : b + 1], attention[b : b + 1], mask[b].nonzero().squeeze(1))
        one = {"geometry": (geometry[0][b], geometry[1][b]), "backend": backend}
        assert torch.allclose(prior[b][:, mask[b]], pisces.build_partial_ot_prior(*pair, **one), rtol=1e-9, atol=1e-14)
        alone = pisces.apply_partial_ot_attention(pair[2], *pair[:2], pair[3], **one)
        assert torch.allclose(fused[b : b + 1], alone, rtol=1e-9, atol=1e-14)
    same = pisces.build_partial_ot_prior(query, keys, attention, LEXICAL, **options)
    assert same.shape == (3, HEADS, 4, TOKENS)
    everywhere = torch.zeros(QUERIES, dtype=torch.bool)
    everywhere[LEXICAL] = True
    as_mask = pisces.build_partial_ot_prior(query, keys, attention, everywhere, **options)
    assert torch.allclose(as_mask[:, :, LEXICAL], same, rtol=1e-9, atol=1e-14)
    assert not torch.allclose(prior[0], prior[1], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_sum_to_one_and_the_others_are_the_same_bits(dtype):
    attention, query, keys, _ = problem(2, dtype)
    mask = random_mask(2, QUERIES)
    mask[1] = False  # a prompt without lexical words
    before = attention.clone()
    for tokens in (mask, LEXICAL):
        chosen = mask if tokens is mask else torch.isin(torch.arange(QUERIES), LEXICAL).expand(2, QUERIES)
        fused = pisces.apply_partial_ot_attention(attention, query, keys, tokens, patches_per_frame=PATCHES)
        assert fused.dtype == dtype
        assert torch.equal(attention, before)
        rows, untouched = fused.transpose(1, 2), attention.transpose(1, 2)
        assert torch.equal(rows[~chosen], untouched[~chosen])
        assert not torch.equal(rows[chosen], untouched[chosen])
        total = fused.float().sum(-1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_gradient_runs_through_the_attention_only():
    attention, query, keys, _ = (t.requires_grad_() for t in problem(2))
    fused = pisces.apply_partial_ot_attention(attention, query, keys, LEXICAL, patches_per_frame=PATCHES)
    weight = torch.randn_like(fused)
    to_attention, to_query, to_keys = torch.autograd.grad(fused, (attention, query, keys), weight, allow_unused=True)
    assert to_query is None
    assert to_keys is None
    prior = pisces.build_partial_ot_prior(query, keys, attention, LEXICAL, patches_per_frame=PATCHES)
    assert not prior.requires_grad
    rows = attention[:, :, LEXICAL]
    want = torch.autograd.grad((official_fusion(rows, prior) * weight[:, :, LEXICAL]).sum(), attention)[0]
    others = torch.isin(torch.arange(QUERIES), LEXICAL, invert=True)
    want[:, :, others] = weight[:, :, others]
    assert torch.allclose(to_attention, want, rtol=1e-8, atol=1e-10)
    cost = torch.rand(1, 3, 7, dtype=torch.float64, requires_grad=True)
    options = {"epsilon": 0.3, "tolerance": 1e-13, "max_iterations": 500}
    assert torch.autograd.gradcheck(lambda c: pisces.solve_partial_ot(c, **options), cost)


def test_one_call_kernel_is_the_same_but_for_the_floor():
    attention, query, keys, video = problem(2)
    mask = random_mask(2, QUERIES)
    clamped = pisces.apply_partial_ot_attention(attention, query, keys, mask, patches_per_frame=PATCHES)
    added = transport_attention(query, video, attention, *token_grid(FRAMES, 4, 4), row_mask=mask)
    assert (clamped - added).abs().max() < 2e-3  # each factor differs by at most its floor, and the stop by tol
    assert not torch.equal(clamped, added)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_input_is_not_hidden(backend):
    attention, query, keys, _ = problem(2)
    query[1, 2, 0] = torch.nan
    fused = pisces.apply_partial_ot_attention(
        attention, query, keys, LEXICAL, patches_per_frame=PATCHES, backend=backend
    )
    assert torch.isfinite(fused[0]).all()
    assert fused[1][:, LEXICAL].isnan().all()


def test_empty_cost_gives_an_empty_plan():
    for shape in [(0, 4), (2, 4, 0), (0, 3, 4)]:
        assert pisces.solve_partial_ot(torch.zeros(shape)).shape == shape
    cost, nobody = torch.rand(2, 3, 4), torch.tensor([[False] * 3, [True] * 3])
    plan = pisces.solve_partial_ot(cost, row_mask=nobody)
    assert (plan[0] == 0).all()
    assert torch.equal(plan[1], pisces.solve_partial_ot(cost)[1])


def test_compiles_into_one_graph_and_reads_no_value():
    attention, query, keys, _ = problem(2, torch.float32)
    inputs = (attention, query, keys, random_mask(2, QUERIES))

    def refine(*arguments):
        return pisces.apply_partial_ot_attention(*arguments, patches_per_frame=PATCHES)

    compiled = torch.compile(refine, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*inputs), refine(*inputs))
    assert refine(*(t.to("meta") for t in inputs)).shape == attention.shape  # a meta tensor has no values to read


ONE = torch.ones(1, 2, 4, 9) / 9


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pisces.build_video_token_geometry(9, patches_per_frame=5), ValueError, "expected a square"),
        (lambda: pisces.build_video_token_geometry(9, patches_per_frame=0), ValueError, "at least one patch"),
        (lambda: pisces.build_video_token_geometry(8, patches_per_frame=4), ValueError, "a multiple of 2 x 2"),
        (lambda: pisces.build_video_token_geometry(1), ValueError, "a multiple of 16 x 16"),
        (
            lambda: pisces.compute_spatiotemporal_cost(
                torch.ones(2, 4, 3), torch.ones(9, 3), ONE[0], torch.zeros(9), torch.zeros(9, 2)
            ),
            ValueError,
            r"\[B, H, N, M\] for a batch",
        ),
        (
            lambda: pisces.compute_spatiotemporal_cost(
                torch.ones(4, 3), torch.ones(9, 3), ONE[0], torch.zeros(9), torch.zeros(9, 2), eps=1e-3
            ),
            ValueError,
            "eps is 0.001",
        ),
        (lambda: pisces.solve_partial_ot(torch.ones(3)), ValueError, "cost has shape"),
        (lambda: pisces.solve_partial_ot(torch.ones(3, 3), epsilon=0.0), ValueError, "epsilon is 0.0"),
        (lambda: pisces.solve_partial_ot(torch.ones(3, 3), transported_mass=1.1), ValueError, "transported_mass is"),
        (lambda: pisces.solve_partial_ot(torch.ones(3, 3), max_iterations=0), ValueError, "max_iter"),
        (lambda: pisces.solve_partial_ot(torch.ones(3, 3, dtype=torch.int64)), TypeError, "cost has dtype"),
        (
            lambda: pisces.build_partial_ot_prior(torch.ones(1, 4, 7), torch.ones(1, 2, 9, 3), ONE, LEXICAL),
            ValueError,
            "key_layer has shape",
        ),
        (
            lambda: pisces.build_partial_ot_prior(torch.ones(1, 4, 6), torch.ones(1, 2, 8, 3), ONE, LEXICAL),
            ValueError,
            r"attention_probs has shape \(1, 2, 4, 9\), expected \(1, 2, 4, 8\)",
        ),
        (
            lambda: pisces.fuse_attention_with_partial_ot(ONE, ONE, torch.tensor([0, 4])),
            ValueError,
            r"outside of \[0, 4\)",
        ),
        (
            lambda: pisces.fuse_attention_with_partial_ot(ONE, ONE, torch.tensor([], dtype=torch.int64)),
            ValueError,
            "valid_tokens has shape",
        ),
        (lambda: pisces.fuse_attention_with_partial_ot(ONE, ONE, torch.tensor([1.0])), TypeError, "valid_tokens is"),
        (
            lambda: pisces.fuse_attention_with_partial_ot(ONE, ONE, torch.tensor([1, 2])),
            ValueError,
            r"expected \(1, 2, 2, 9\)",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()

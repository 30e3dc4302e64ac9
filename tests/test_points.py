"""Laws of `sinkhorn_points`: equal to `sinkhorn` on the explicit cost, values and gradients, without its memory."""

from __future__ import annotations

import functools
import itertools
import math
import warnings

import pytest
import torch
from clouds import COSTS, clouds, explicit_cost, relative
from meter import memory_meter
from problems import KINDS, poisoned, random_mask
from torch import Tensor

from pisces_kernels import _points_result, _streaming, sinkhorn, sinkhorn_points

pytestmark = [pytest.mark.filterwarnings("error::RuntimeWarning")]

TIGHT = {"max_iters": 5000, "tol": 1e-11}
WEIGHT_PROBLEMS = ["none", "masks", "zeros"]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param


@pytest.fixture
def solve_points(backend):
    """`sinkhorn_points` on each back end that has it."""
    return functools.partial(sinkhorn_points, backend=backend)


def derived(result, weights: list[Tensor]) -> dict[str, Tensor]:
    """Scalar functions of a solution, each with a gradient of its own path."""
    rows, cols = result.marginals()
    potentials = (result.f * weights[0]).sum() + (result.g * weights[1]).sum()
    marginals = (rows * weights[0]).sum() + (cols * weights[1]).sum()
    if isinstance(result, _points_result.PointsResult):
        image = result.apply(weights[2])
    else:
        image = result.plan() @ weights[2]
    return {
        "potentials": potentials,
        "marginals": marginals,
        "value": result.value.sum(),
        "transport_cost": result.transport_cost.sum(),
        "apply": (image * weights[3]).sum(),
        "plan": (result.plan() * weights[4]).sum(),
    }


@pytest.mark.parametrize("shape", [(11, 7), (6, 13)])
@pytest.mark.parametrize("special", WEIGHT_PROBLEMS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_equals_dense(kind, cost, special, shape, solve_points):
    x, y, a, b = clouds(2, *shape)
    options = {**KINDS[kind], **TIGHT}
    if special == "masks":
        options.update(row_mask=random_mask(2, shape[0]), col_mask=random_mask(2, shape[1]))
        a, b = torch.where(options["row_mask"], a, 0.0), torch.where(options["col_mask"], b, 0.0)
    elif special == "zeros":
        a[:, 2] = 0.0
        b[:, 4] = 0.0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    epsilon = torch.tensor([0.05, 0.2], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, y, a, b, epsilon)]
    if kind == "mass":
        options["mass"] = torch.full((2,), 0.63, dtype=torch.float64, requires_grad=True)
        leaves.append(options["mass"])
    streamed = solve_points(x, y, a, b, cost=cost, epsilon=epsilon, **options)
    dense = sinkhorn(explicit_cost(x, y, cost), a, b, epsilon=epsilon, backend="reference", **options)
    assert streamed.converged.all()
    # At 1e-11 rounding decides now and then which of two iterations is the last; at 1e-6 it does not.
    loose = {**options, "tol": 1e-6}
    stopped = solve_points(x, y, a, b, cost=cost, epsilon=epsilon, **loose)
    expected = sinkhorn(explicit_cost(x, y, cost), a, b, epsilon=epsilon, backend="reference", **loose)
    assert torch.equal(stopped.n_iters, expected.n_iters) or kind == "mass"
    for name in ("f", "g", "value", "transport_cost"):
        assert relative(getattr(streamed, name), getattr(dense, name)) < 1e-9, name
    assert relative(streamed.plan(), dense.plan()) < 1e-9
    assert torch.equal(streamed.log_plan().isneginf(), dense.log_plan().isneginf())
    weights = [torch.randn_like(t) for t in (a, b)]
    weights += [torch.randn(*t.shape, 2, dtype=torch.float64) for t in (b, a)]
    weights.append(torch.randn(2, *shape, dtype=torch.float64))
    ours, theirs = derived(streamed, weights), derived(dense, weights)
    for name in ours:
        assert relative(ours[name], theirs[name]) < 1e-8, name
        got = torch.autograd.grad(ours[name], leaves, retain_graph=True)
        expected = torch.autograd.grad(theirs[name], leaves, retain_graph=True)
        for leaf, (one, other) in enumerate(zip(got, expected, strict=True)):
            # Relative to 0.01 of the largest gradient: those of balanced marginals are zero but for rounding.
            scale = other.abs().max() + 0.01
            assert ((one - other).abs().max() / scale).item() < 1e-6, (name, leaf)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cost", COSTS)
def test_float32_stays_close_to_float64(kind, cost, solve_points):
    x, y, a, b = clouds(2, 40, 57, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, y, a, b)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    options = {"cost": cost, "epsilon": 0.1, **KINDS[kind]}
    single = solve_points(*leaves, acceleration="anderson", max_iters=200, tol=3e-6, **options)
    # Weights rounded to float32 have no balanced solution to the last digit of float64.
    exact = solve_points(*doubles, acceleration="anderson", max_iters=200, tol=1e-11, **options)
    assert single.f.dtype == torch.float32
    assert relative(single.value.double(), exact.value) < 2e-6
    assert relative(single.transport_cost.double(), exact.transport_cost) < 5e-6
    assert (single.f.double() - exact.f).abs().max() < 5e-6
    weight = torch.randn_like(exact.f)
    for loss in (lambda r: r.value.sum(), lambda r: (r.f * weight.to(r.f.dtype)).sum()):
        got, expected = torch.autograd.grad(loss(single), leaves), torch.autograd.grad(loss(exact), doubles)
        for one, other in zip(got, expected, strict=True):
            assert relative(one.double(), other) < 2e-4
    half = solve_points(x.detach().bfloat16(), y.detach().bfloat16(), epsilon=0.1)
    rounded = solve_points(x.detach().bfloat16().float(), y.detach().bfloat16().float(), epsilon=0.1)
    assert half.f.dtype == torch.float32
    assert torch.equal(half.f, rounded.f)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("epsilon", [1.0, 0.05, 0.005, 0.001])
def test_float32_precision_at_every_epsilon(epsilon, cost, solve_points):
    x, y, a, b = clouds(1, 150, 203, dim=16)
    if cost == "sqeuclidean":
        x, y = x / 4, y / 4  # costs in [0, 1]
    singles = [t.float() for t in (x, y, a, b)]
    options = {"cost": cost, "epsilon": epsilon, "tau": 0.9, "max_iters": 60, "tol": 0.0}
    single = solve_points(*singles, **options)
    exact = solve_points(*(t.double() for t in singles), **options)
    assert (single.f.double() - exact.f).abs().max() < 2e-6
    assert (single.g.double() - exact.g).abs().max() < 2e-6
    assert relative(single.plan().double(), exact.plan()) < max(1e-5, 3e-7 / epsilon)
    assert relative(single.value.double(), exact.value) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_the_origin_nothing_is_lost(dtype, solve_points):
    x, y, a, b = clouds(1, 60, 45, dtype=dtype)
    x, y = x + 1e3, y + 1e3  # float32 rounds the points to 6e-5 here: the oracle gets the rounded ones
    oracle = sinkhorn(
        explicit_cost(x.double(), y.double(), "sqeuclidean"), a.double(), b.double(), epsilon=0.05, **TIGHT
    )
    double = dtype == torch.float64
    result = solve_points(x.requires_grad_(), y, a, b, epsilon=0.05, max_iters=2000, tol=1e-9 if double else 1e-5)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-6
    assert (result.f.double() - oracle.f).abs().max() < tolerance
    assert (result.barycentric().double() - oracle.plan() @ y.double() / a.double().unsqueeze(-1)).abs().max() < 1e-4
    (grad,) = torch.autograd.grad(result.value.sum(), x)
    plan = oracle.plan()
    expected = 2 * (x.double() * plan.sum(-1, keepdim=True) - plan @ y.double())
    assert relative(grad.double(), expected) < 20 * tolerance
    if dtype == torch.float32:  # the same tiles without centring
        everything = slice(None)
        raw = _streaming.Points.of(x.detach(), y, "sqeuclidean").cost(everything, everything, everything)
        centred = _streaming.Points.of(*_streaming.prepare(x.detach(), y, "sqeuclidean"), "sqeuclidean")
        expected = explicit_cost(x.double(), y.double(), "sqeuclidean")
        assert (raw.double() - expected).abs().max() > 0.05
        assert (centred.cost(everything, everything, everything).double() - expected).abs().max() < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_do_not_change_the_answer(kind, monkeypatch):
    x, y, a, b = clouds(3, 37, 29)
    x.requires_grad_()
    weight = torch.randn_like(a)

    def run() -> list[Tensor]:
        result = sinkhorn_points(x, y, a, b, epsilon=0.1, max_iters=10, tol=0.0, backend="reference", **KINDS[kind])
        (grad,) = torch.autograd.grad((result.f * weight).sum() + result.value.sum(), x)
        return [result.f, result.value, result.barycentric(), grad]

    whole = run()
    for tile, width in ((100, 10), (600, 16), (2500, 16)):
        monkeypatch.setattr(_streaming, "TILE", tile)
        monkeypatch.setattr(_streaming, "WIDTH", width)
        for one, other in zip(run(), whole, strict=True):
            assert relative(one, other) < 1e-9
    tiles = _streaming.Points.tiles

    def forgetful(points):
        for problems, rows in tiles(points):
            yield problems, [(i, cols[:-1] or cols) for i, cols in rows]

    monkeypatch.setattr(_streaming, "TILE", 600)
    monkeypatch.setattr(_streaming.Points, "tiles", forgetful)
    wrong = sinkhorn_points(x, y, a, b, epsilon=0.1, max_iters=10, tol=0.0, backend="reference", **KINDS[kind])
    assert relative(wrong.value, whole[1]) > 1e-3  # the comparison can fail


def test_tiles_cover_every_entry_once_within_the_limit(monkeypatch):
    for tile, width in ((1, 1), (64, 8), (50, 100), (1 << 20, 4096)):
        monkeypatch.setattr(_streaming, "TILE", tile)
        monkeypatch.setattr(_streaming, "WIDTH", width)
        for shape in ((1, 1, 1), (3, 5, 7), (2, 1, 30), (2, 30, 1)):
            seen = torch.zeros(shape, dtype=torch.int64)
            points = _streaming.Points.of(torch.zeros(*shape[:2], 1), torch.zeros(shape[0], shape[2], 1), "cosine")
            for p, rows in points.tiles():
                for i, cols in rows:
                    for j in cols:
                        seen[p, i, j] += 1
                        assert seen[p, i, j].numel() <= tile
            assert (seen == 1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cost", COSTS)
def test_masked_is_removed_whatever_is_there(kind, cost, solve_points):
    x, y, a, b = clouds(1, 12, 15)
    rows, cols = random_mask(1, 12), random_mask(1, 15)
    rows[0, -1] = cols[0, -1] = False
    a, b = a / a[rows].sum(), b / b[cols].sum()
    options = {"cost": cost, "epsilon": 0.1, **KINDS[kind], **TIGHT}
    px, py = (poisoned(t, mask.unsqueeze(-1)).requires_grad_() for t, mask in ((x, rows), (y, cols)))
    pa, pb = (torch.where(mask, t, 0.0).requires_grad_() for t, mask in ((a, rows), (b, cols)))
    masked = solve_points(px, py, pa, pb, row_mask=rows, col_mask=cols, **options)
    bare = [t.detach().requires_grad_() for t in (x[:, rows[0]], y[:, cols[0]], a[:, rows[0]], b[:, cols[0]])]
    removed = solve_points(*bare, **options)
    assert torch.allclose(masked.f[rows], removed.f[0], atol=1e-10)
    assert (masked.f[~rows] == 0).all()
    assert (masked.g[~cols] == 0).all()
    assert torch.allclose(masked.value, removed.value, atol=1e-12)
    keep = rows.unsqueeze(-1) & cols.unsqueeze(-2)
    assert (masked.plan()[~keep] == 0).all()
    junk = torch.randn(1, 15, 2, dtype=torch.float64)
    image = masked.apply(poisoned(junk, cols.unsqueeze(-1)))
    assert (image[~rows] == 0).all()
    assert torch.allclose(image[rows], (removed.plan() @ junk[:, cols[0]])[0], atol=1e-10)
    weight = torch.randn_like(a)
    got = torch.autograd.grad((masked.f * weight).sum() + masked.value.sum(), (px, py, pa, pb))
    expected = torch.autograd.grad((removed.f * weight[:, rows[0]]).sum() + removed.value.sum(), bare)
    for one, other, mask in zip(got, expected, (rows, cols, rows, cols), strict=True):
        assert torch.allclose(one[mask], other[0], atol=1e-7)
        assert (one[~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_loop_and_points_may_be_shared(kind, solve_points):
    _, y, a, b = clouds(6, 9, 14)
    x = torch.rand(9, 3, dtype=torch.float64)
    y, a, b = y.reshape(2, 3, 14, 3), a.reshape(2, 3, 9), b.reshape(2, 3, 14)
    epsilon = torch.tensor([[0.05, 0.1, 0.5], [0.02, 0.2, 1.0]], dtype=torch.float64)
    options = {"tol": 1e-6, "max_iters": 2000, **KINDS[kind]}
    result = solve_points(x, y, a, b, epsilon=epsilon, **options)
    assert result.f.shape == (2, 3, 9)
    assert result.plan().shape == (2, 3, 9, 14)
    for i, j in itertools.product(range(2), range(3)):
        one = solve_points(x, y[i, j], a[i, j], b[i, j], epsilon=float(epsilon[i, j]), **options)
        assert one.n_iters == result.n_iters[i, j]
        assert torch.allclose(one.f, result.f[i, j], atol=1e-12)
        assert torch.allclose(one.value, result.value[i, j], atol=1e-12)
        assert torch.allclose(one.barycentric(), result.barycentric()[i, j], atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_permutation_rotation_and_transpose(kind, solve_points):
    x, y, a, b = clouds(2, 8, 11)
    options = {"epsilon": 0.1, **KINDS[kind], **TIGHT}
    result = solve_points(x, y, a, b, **options)
    order = torch.randperm(8)
    assert torch.allclose(solve_points(x[:, order], y, a[:, order], b, **options).f, result.f[:, order], atol=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    moved = solve_points(x @ turn + 5.0, y @ turn + 5.0, a, b, **options)
    assert torch.allclose(moved.f, result.f, atol=1e-9)
    if kind == "semi":
        options["tau"] = options["tau"][::-1]
    turned = solve_points(y, x, b, a, **options)
    assert torch.allclose(turned.g, result.f, atol=1e-8)
    assert torch.allclose(turned.value, result.value, atol=1e-10)
    # the points alone, without their weights, are another problem
    assert not torch.allclose(solve_points(x.roll(1, dims=1), y, a, b, **options).value, result.value, atol=1e-6)


def test_closed_forms(solve_points):
    # One point each: nothing to choose.
    x, y = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([[4.0, 6.0]], dtype=torch.float64)
    one = solve_points(x, y, epsilon=0.3)
    assert one.value.item() == pytest.approx(25.0, abs=1e-12)
    assert one.transport_cost.item() == pytest.approx(25.0, abs=1e-12)
    assert torch.allclose(one.barycentric(), y)
    # One point each, relaxed: log p (epsilon + 2 rho) = epsilon log(ab) + rho log a + rho log b - cost.
    epsilon, rho, a, b = 0.5, 2.0, 0.8, 1.7
    x, y = x / 5, y / 5
    relaxed = solve_points(
        x, y, x.new_tensor([a]), x.new_tensor([b]), epsilon=epsilon, tau=rho / (rho + epsilon), **TIGHT
    )
    p = math.exp((epsilon * math.log(a * b) + rho * math.log(a * b) - 1.0) / (epsilon + 2 * rho))
    assert relaxed.marginals()[0].item() == pytest.approx(p, abs=1e-9)

    def kl(p, q):
        return p * math.log(p / q) - p + q

    assert relaxed.value.item() == pytest.approx(p + epsilon * kl(p, a * b) + rho * (kl(p, a) + kl(p, b)), abs=1e-9)
    # A zero vector has cosine 0 with everything, as F.normalize has it.
    zero = solve_points(torch.zeros(1, 3), torch.rand(4, 3), cost="cosine", epsilon=0.1)
    assert torch.allclose(zero.value, torch.tensor(1.0))


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_gaussians_meet_their_closed_form(epsilon, solve_points):
    # Weights of a fine grid: the trapezoidal rule is exact to rounding for Gaussians.
    mean, s, t = 0.7, 0.6, 1.1
    grid = torch.linspace(-8, 8, 401, dtype=torch.float64)
    a = torch.softmax(-(grid**2) / (2 * s * s), 0)
    b = torch.softmax(-((grid - mean) ** 2) / (2 * t * t), 0)
    result = solve_points(grid[:, None], grid[:, None], a, b, epsilon=epsilon, acceleration="anderson", **TIGHT)
    h = epsilon / 2  # sigma^2 of the paper
    d = math.sqrt(4 * s * s * t * t + h * h)
    expected = mean**2 + s * s + t * t - d + h * (1 - math.log(2 * h)) + h * math.log(d + h)
    assert result.value.item() == pytest.approx(expected, abs=1e-8)
    # The plan is Gaussian with covariance (d - h) / 2: the barycentric map is affine.
    slope = (d - h) / 2 / (s * s)
    inside = grid.abs() < 2
    assert torch.allclose(result.barycentric()[inside, 0], mean + slope * grid[inside], atol=1e-6)


def test_warm_start_acceleration_and_gradient_none(solve_points):
    x, y, a, b = clouds(2, 30, 40)
    x.requires_grad_()
    plain = solve_points(x, y, a, b, epsilon=0.02, max_iters=5000, tol=1e-8)
    fast = solve_points(x, y, a, b, epsilon=0.02, max_iters=5000, tol=1e-8, acceleration="anderson")
    assert (fast.n_iters < plain.n_iters).all()
    assert torch.allclose(fast.value, plain.value, atol=1e-9)
    again = solve_points(x, y, a, b, epsilon=0.02, tol=1e-6, f_init=plain.f, g_init=plain.g, gradient="none")
    assert (again.n_iters <= 2).all()
    assert not again.f.requires_grad
    assert again.value.requires_grad  # the envelope theorem needs no gradient of f and g


@pytest.mark.parametrize("cost", COSTS)
def test_problems_without_weight_or_with_broken_points_touch_nobody_else(cost, solve_points):
    x, y, a, b = clouds(5, 7, 6)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[0] = False  # nothing is there
    b[1] = 0.0  # no weight
    x[2, 3] = torch.nan
    y[3, 1, 0] = torch.inf
    leaves = [t.requires_grad_() for t in (x, y)]
    options = {"cost": cost, "epsilon": 0.2, "tau": 0.8, **TIGHT}
    result = solve_points(*leaves, a, b, row_mask=mask, **options)
    for k in (0, 1):
        assert result.converged[k]
        assert (result.f[k] == 0).all()
        assert result.plan()[k].abs().max() == 0
    for k in (2, 3):
        assert not result.converged[k]
        assert result.residual[k].isnan()
        assert result.f[k].isnan().all()
    alone = solve_points(x[4], y[4], a[4], b[4], **options)
    assert torch.allclose(result.f[4], alone.f, atol=1e-10)
    (result.f[[0, 1, 4]].sum() + result.value[[0, 1, 4]].sum()).backward()
    assert x.grad[[0, 1, 4]].isfinite().all()
    assert (x.grad[0] == 0).all()
    assert x.grad[4].abs().max() > 0


def test_full_precision_under_autocast(solve_points):
    x, y, a, b = clouds(1, 30, 20, dtype=torch.float32)
    x.requires_grad_()

    def run() -> list[Tensor]:
        result = solve_points(x, y, a, b, epsilon=0.1)
        (grad,) = torch.autograd.grad(result.value.sum() + result.f[0, 0], x)
        return [result.f, result.value, result.transport_cost, result.plan(), grad]

    outside = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
        assert (x @ y.mT).dtype == torch.bfloat16  # which is what a product would have been
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)


SIZE = 3000
MATRIX = 4 * SIZE * SIZE  # bytes of one float32 N x M matrix


@pytest.mark.parametrize("what", ["value", "potentials", "apply"])
def test_no_matrix_is_ever_made(what, solve_points):
    x, y = torch.rand(SIZE, 3, requires_grad=True), torch.rand(SIZE, 3, requires_grad=True)
    with memory_meter() as memory:
        result = solve_points(x, y, epsilon=1.0, max_iters=2, tol=0.0)
        if what == "value":
            result.value.backward()
        elif what == "potentials":
            result.f[0].backward()
        else:
            (result.barycentric() ** 2).sum().backward()
    assert x.grad is not None
    assert memory.peak < MATRIX / 3
    assert memory.largest <= 4 * _streaming.TILE


def test_the_meter_sees_a_matrix():
    x, y = torch.rand(SIZE, 3), torch.rand(SIZE, 3)
    with memory_meter() as memory:
        sinkhorn(torch.cdist(x, y), epsilon=1.0, max_iters=1, tol=0.0).plan()
    assert memory.peak > 2 * MATRIX
    assert memory.largest >= MATRIX
    with memory_meter() as memory:
        sinkhorn_points(x[:1000], y[:1000], epsilon=1.0, max_iters=1).plan()
    assert memory.largest == 4 * 1000 * 1000  # the plan is made when it is asked for


X, Y = torch.rand(2, 4, 3), torch.rand(2, 6, 3)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x is a list"),
        ({"y": torch.ones(2, 6, 3, dtype=torch.int64)}, TypeError, "Call .float"),
        ({"x": torch.rand(3)}, ValueError, r"expected \[..., N, D\]"),
        ({"y": torch.rand(2, 0, 3)}, ValueError, "at least one point"),
        ({"y": torch.rand(2, 6, 4)}, ValueError, r"expected \[..., M, 3\]"),
        ({"y": torch.rand(3, 6, 3)}, ValueError, "leading dimensions that broadcast"),
        ({"y": torch.rand(2, 6, 3, device="meta")}, ValueError, "y is on meta"),
        ({"cost": "euclidean"}, ValueError, "cost is 'euclidean', expected one of"),
        ({"b": torch.ones(2, 5)}, ValueError, r"b has shape \(2, 5\), expected \(2, 6\)"),
        ({"a": -torch.ones(2, 4)}, ValueError, "negative or non-finite"),
        ({"epsilon": 0.0}, ValueError, "epsilon is 0.0"),
        ({"mass": 1.2}, ValueError, r"expected in \(0, 1\]"),
        ({"mass": 0.5, "tau": 0.9}, ValueError, "exclude each other"),
        ({"row_mask": torch.ones(2, 4)}, TypeError, "expected a bool tensor"),
        ({"max_iters": 0}, ValueError, "max_iters is 0"),
        ({"gradient": "unrolled"}, ValueError, "gradient is 'unrolled'"),
        ({"acceleration": "magic"}, ValueError, "acceleration is 'magic'"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' (cannot run|wants tensors on cuda)"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
        ({"f_init": torch.zeros(2, 5)}, ValueError, "f_init has shape"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        sinkhorn_points(**{"x": X, "y": Y, "epsilon": 0.1, **kwargs})
    result = sinkhorn_points(X, Y, epsilon=0.1)
    with pytest.raises(ValueError, match=r"values has shape \(5, 2\)"):
        result.apply(torch.rand(5, 2))


def test_the_default_back_end_is_chosen_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sinkhorn_points(X, Y, epsilon=0.1).converged.all()

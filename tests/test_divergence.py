"""Laws of `sinkhorn_divergence`: zero for equal clouds, positive, limits, closed forms, geomloss, gradients."""

from __future__ import annotations

import functools
import math

import geomloss
import pytest
import torch
from meter import memory_meter
from problems import poisoned, random_mask, random_weights
from torch import Tensor

from pisces_kernels import sinkhorn_divergence, sinkhorn_points
from pisces_kernels._divergence import _self_transport_op

TIGHT = {"max_iters": 5000, "tol": 1e-11}
TAUS = [1.0, 0.8]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param


@pytest.fixture
def divergence(backend):
    """`sinkhorn_divergence` on each back end that has it."""
    return functools.partial(sinkhorn_divergence, backend=backend)


def clouds(problems: int, n_rows: int, n_cols: int, dim: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.rand(problems, n_rows, dim, dtype=torch.float64)
    y = torch.rand(problems, n_cols, dim, dtype=torch.float64) + 0.1
    return x, y, random_weights(problems, n_rows), random_weights(problems, n_cols)


def test_definition_term_by_term(divergence):
    x, y, a, b = clouds(3, 9, 12)
    a = a * 1.4
    options = {"epsilon": torch.tensor([0.05, 0.1, 0.5], dtype=torch.float64), "tau": 0.8, **TIGHT}
    result = divergence(x, y, a, b, **options)
    terms = [sinkhorn_points(p, q, v, w, **options).value for p, q, v, w in ((x, y, a, b), (x, x, a, a), (y, y, b, b))]
    gap = options["epsilon"] / 2 * (a.sum(-1) - b.sum(-1)) ** 2
    assert torch.allclose(result, terms[0] - terms[1] / 2 - terms[2] / 2 + gap, atol=1e-10)
    assert gap.min() > 1e-3  # each term matters


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("epsilon", [0.02, 0.3])
def test_zero_for_equal_clouds_and_positive_otherwise(cost, tau, epsilon, divergence):
    x, y, a, b = clouds(4, 15, 11)
    options = {"cost": cost, "epsilon": epsilon, "tau": tau, "acceleration": "anderson", "max_iters": 1000, "tol": 1e-8}
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
    y = y @ turn  # by 37 degrees: the clouds are apart for either cost
    order = torch.randperm(15)
    equal = divergence(x, x[:, order], a, a[:, order], **options)
    assert equal.abs().max() < 1e-10
    other = divergence(x, y, a, b, **options)
    assert (other > 1e-5).all()
    assert torch.allclose(other, divergence(y, x, b, a, **options), atol=1e-10)
    biased = sinkhorn_points(x, x, a, a, **options).value  # what the self terms take away
    assert (biased > 1e-3).all()


def test_diracs_and_limits(divergence):
    x, y = torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    assert divergence(x, y, epsilon=0.3).item() == pytest.approx(4.25, abs=1e-12)
    x, y, a, b = clouds(1, 12, 9)
    y = y + 1  # the means differ by more than what is left of the limit, of order 1 / epsilon
    means = ((a.unsqueeze(-1) * x).sum(1) - (b.unsqueeze(-1) * y).sum(1)).pow(2).sum()
    assert divergence(x, y, a, b, epsilon=1e4, **TIGHT).item() == pytest.approx(means.item(), rel=1e-3)
    # One dimension: the squared Wasserstein distance of sorted points.
    x, y = (torch.rand(10, 1, dtype=torch.float64).sort(0).values for _ in range(2))
    exact = ((x - y) ** 2).mean().item()
    near = divergence(x, y, epsilon=2e-3, acceleration="anderson", max_iters=20000, tol=1e-4).item()
    assert near == pytest.approx(exact, abs=2 * 2e-3 * math.log(10))


@pytest.mark.parametrize("epsilon", [0.1, 2.0])
def test_gaussians_meet_their_closed_form(epsilon, divergence):
    mean, s, t = 0.7, 0.6, 1.1
    grid = torch.linspace(-8, 8, 301, dtype=torch.float64)
    a = torch.softmax(-(grid**2) / (2 * s * s), 0)
    b = torch.softmax(-((grid - mean) ** 2) / (2 * t * t), 0)
    points = grid[:, None]
    result = divergence(points, points, a, b, epsilon=epsilon, acceleration="anderson", max_iters=2000, tol=1e-8)
    h = epsilon / 2

    def transport(s: float, t: float) -> float:
        d = math.sqrt(4 * s * s * t * t + h * h)
        return s * s + t * t - d + h * (1 - math.log(2 * h)) + h * math.log(d + h)

    expected = mean**2 + transport(s, t) - transport(s, s) / 2 - transport(t, t) / 2
    assert result.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("reach", "scale"), [(None, 1.0), (0.5, 1.0), (0.5, 1.6)])
def test_geomloss_agrees(reach, scale, divergence):
    x, y, a, b = (t[0] for t in clouds(1, 25, 18))
    y = y + 0.5  # a value near 0 has no relative error to speak of
    x, y, a, b = (t.requires_grad_() for t in (x, y, a, b))
    blur = 0.3
    theirs = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, reach=reach, scaling=0.998, backend="tensorized")
    epsilon, rho = blur**2, None if reach is None else reach**2
    tau = 1.0 if rho is None else rho / (rho + epsilon)
    ours = divergence(x, y, scale * a, b, epsilon=2 * epsilon, tau=tau, **TIGHT) / 2
    expected = theirs(scale * a, x, b, y)
    assert ours.item() == pytest.approx(expected.item(), rel=5e-4)
    wrong = divergence(x, y, scale * a, b, epsilon=epsilon, tau=tau, **TIGHT) / 2
    # geomloss 0.3.1 means to scale the unbalanced gradient by rho + epsilon, but autograd scales it as the value, by
    # rho + epsilon / 2. Ours is the derivative of the value: `test_gradcheck`.
    factor = 1.0 if rho is None else (rho + epsilon) / (rho + epsilon / 2)
    got, wanted, missed = (torch.autograd.grad(value, (x, y)) for value in (ours, expected, wrong))
    for one, other, bad in zip(got, wanted, missed, strict=True):
        assert torch.allclose(one, factor * other, atol=1e-2 * other.abs().max().item())
        # Negative control. The values of two epsilons can meet by chance, a whole gradient cannot.
        assert not torch.allclose(bad, factor * other, atol=1e-2 * other.abs().max().item())


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
def test_gradcheck(tau, cost, divergence):
    x, y, a, b = clouds(2, 5, 4)
    epsilon = torch.tensor([0.2, 0.5], dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 1] = False
    a = torch.where(mask, a, 0.0)
    a = a / a.sum(-1, keepdim=True)
    inputs = [t.requires_grad_() for t in ((x, y, epsilon) if tau == 1.0 else (x, y, epsilon, a, b))]

    def solve(x, y, epsilon, a=a, b=b):
        return divergence(x, y, a, b, cost=cost, epsilon=epsilon, tau=tau, row_mask=mask, **TIGHT)

    assert torch.autograd.gradcheck(solve, inputs, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("tau", TAUS)
def test_masked_is_removed_and_batch_equals_loop(tau, divergence):
    x, y, a, b = clouds(2, 10, 13)
    rows, cols = random_mask(2, 10), random_mask(2, 13)
    a, b = torch.where(rows, a, 0.0), torch.where(cols, b, 0.0)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    px, py = poisoned(x, rows.unsqueeze(-1)).requires_grad_(), poisoned(y, cols.unsqueeze(-1))
    result = divergence(px, py, a, b, epsilon=0.1, tau=tau, row_mask=rows, col_mask=cols, **TIGHT)
    result.sum().backward()
    assert (px.grad[~rows] == 0).all()
    for k in range(2):
        bare = x[k, rows[k]].requires_grad_()
        one = divergence(bare, y[k, cols[k]], a[k, rows[k]], b[k, cols[k]], epsilon=0.1, tau=tau, **TIGHT)
        assert torch.allclose(one, result[k], atol=1e-11)
        (grad,) = torch.autograd.grad(one, bare)
        assert torch.allclose(grad, px.grad[k, rows[k]], atol=1e-9)


def test_clouds_without_weight_and_broken_ones(divergence):
    x, y, a, b = clouds(4, 6, 5)
    a[0] = 0.0
    a[1], b[1] = 0.0, 0.0
    x[2, 0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="1 of 4 problems did not converge"):  # the one that is NaN
        result = divergence(x, y, a, b, epsilon=0.2, tau=0.8, **TIGHT)
    rho = 0.2 * 0.8 / 0.2
    alone = sinkhorn_points(y[0], y[0], b[0], b[0], epsilon=0.2, tau=0.8, **TIGHT).value
    assert result[0].item() == pytest.approx((rho - alone / 2 + 0.1).item(), abs=1e-9)  # all of b is destroyed
    tiny = divergence(x[0], y[0], torch.full((6,), 1e-14).double(), b[0], epsilon=0.2, tau=0.8, **TIGHT)
    assert tiny.item() == pytest.approx(result[0].item(), abs=1e-5)  # which is the limit of little weight
    assert result[1] == 0
    assert result[2].isnan()
    assert result[3] > 0


def test_self_terms_take_few_iterations(backend):
    x, _, a, _ = clouds(2, 40, 1)
    for epsilon in (0.1, 0.01, 0.001):
        f, n_iters, residual = _self_transport_op(
            x, a, torch.full((2,), epsilon, dtype=torch.float64), 1.0, None, 100, 1e-6, "sqeuclidean", backend
        )
        assert (residual < 1e-6).all()
        assert (n_iters < 40).all()
        plain = sinkhorn_points(x, x, a, epsilon=epsilon, b=a, f_init=f, g_init=f, max_iters=1)
        assert (plain.residual < 1e-5).all()  # f = g solves the two-sided equations


def test_no_matrix_is_ever_made(divergence):
    size = 4000
    x, y = torch.rand(size, 3, requires_grad=True), torch.rand(size, 3)
    with memory_meter() as memory, pytest.warns(RuntimeWarning, match="1 of 1 problems did not converge"):
        divergence(x, y, epsilon=1.0, max_iters=2).backward()
    assert memory.peak < 4 * size * size / 4
    with memory_meter() as memory:
        torch.cdist(x, y)
    assert memory.peak >= 4 * size * size  # the meter would see a matrix


def test_operators_vmap_and_compile(divergence, backend):
    x, y, a, b = clouds(3, 5, 4)
    mask = random_mask(3, 5)
    torch.library.opcheck(
        _self_transport_op, (x, a, torch.full((3,), 0.2).double(), 0.9, mask, 50, 1e-6, "cosine", backend)
    )

    def loss(x, y, a, b):
        return divergence(x, y, a, b, epsilon=0.2, tau=0.9, tol=1e-8).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, y, a, b), leaf)
    assert torch.allclose(torch.func.vmap(torch.func.grad(loss))(x, y, a, b), expected, atol=1e-12)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(torch.autograd.grad(compiled(leaf, y, a, b), leaf)[0], expected, atol=1e-12)


X, Y = torch.rand(2, 4, 3), torch.rand(2, 6, 3)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"x": None}, TypeError, "sinkhorn_divergence: x is a NoneType"),
        ({"cost": "l1"}, ValueError, "sinkhorn_divergence: cost is 'l1'"),
        ({"y": torch.rand(2, 6, 4)}, ValueError, r"expected \[..., M, 3\]"),
        ({"tau": (0.9, 0.5)}, ValueError, "tau is"),
        ({"tau": 0.0}, ValueError, "tau is 0.0"),
        ({"a": torch.full((2, 4), 0.5)}, ValueError, "expected equal masses with tau=1"),
        ({"epsilon": -1.0}, ValueError, "epsilon is -1.0"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' (cannot run|wants tensors on cuda)"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        sinkhorn_divergence(**{"x": X, "y": Y, "epsilon": 0.1, **kwargs})

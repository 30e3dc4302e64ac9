"""The C++ back end of `sinkhorn_points`: odd sizes, hard ranges, threads, instruction sets, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from clouds import COSTS, clouds, explicit_cost, relative
from problems import KINDS
from torch import Tensor

from pisces_kernels import _dispatch, sinkhorn, sinkhorn_divergence, sinkhorn_points
from pisces_kernels._compiled import points as compiled
from pisces_kernels._streaming import Points, prepare, products, soft_minimum

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

SHAPES = [(1, 1, 1), (1, 37, 3), (41, 1, 2), (7, 33, 1), (66, 65, 64), (31, 129, 257), (250, 193, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_equals_the_matrix(kind, cost, shape):
    x, y, a, b = clouds(2, *shape)
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    scale = shape[2] if cost == "sqeuclidean" else 1.0
    options = {"epsilon": 0.05 * scale, "max_iters": 50, "tol": 0.0, **KINDS[kind]}
    oracle = sinkhorn(explicit_cost(x, y, cost), a, b, backend="reference", **options)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        ours = sinkhorn_points(*(t.to(dtype) for t in (x, y, a, b)), cost=cost, backend="cpu", **options)
        assert (ours.f.double() - oracle.f).abs().max() < tolerance * scale
        assert (ours.g.double() - oracle.g).abs().max() < tolerance * scale
        assert abs(ours.n_iters - oracle.n_iters).max() == 0 or dtype == torch.float32 or kind == "mass"
        values = torch.randn(2, shape[1], 9, dtype=torch.float64)
        assert relative(ours.apply(values.to(dtype)).double(), oracle.plan() @ values) < 100 * tolerance
        for one, other in zip(ours.marginals(), oracle.marginals(), strict=True):
            assert relative(one.double(), other) < 100 * tolerance


@pytest.mark.parametrize("epsilon", [1.0, 0.05, 0.005, 0.001, 1e-4])
@pytest.mark.parametrize("tau", [1.0, 0.9, 0.3, (1.0, 0.2)])
def test_float32_at_every_epsilon(epsilon, tau):
    """Both ways of an iteration: one pass about the last potentials, and log-sums where that is out of range."""
    x, y, a, b = clouds(1, 205, 147, dim=16, dtype=torch.float32)
    x, y = x / 4, y / 4  # costs in [0, 1]
    a, b = a / a.sum(), b / b.sum()
    options = {"epsilon": epsilon, "tau": tau, "max_iters": 60, "tol": 0.0}
    single = sinkhorn_points(x, y, a, b, backend="cpu", **options)
    doubles = [t.double() for t in (x, y, a, b)]
    exact = sinkhorn(explicit_cost(*doubles[:2], "sqeuclidean"), *doubles[2:], backend="reference", **options)
    assert (single.f.double() - exact.f).abs().max() < 2e-6
    assert (single.g.double() - exact.g).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_extreme_weights_and_distant_clusters(dtype, tau):
    """Kernels and weights beyond the range of the dtype: exponents of -1e5, weights of 1e-37."""
    x, y, a, b = clouds(1, 60, 50, dtype=dtype)
    x[:, ::2] += 10.0
    y[:, ::3] += 10.0
    a[:, :7] *= 1e-37 if dtype == torch.float32 else 1e-200
    b[:, 5:9] *= 1e-30
    a, b = a / a.sum(), b / b.sum()
    options = {"epsilon": 3e-3, "tau": tau, "max_iters": 30, "tol": 0.0}
    ours = sinkhorn_points(x, y, a, b, backend="cpu", **options)
    doubles = [t.double() for t in (x, y, a, b)]
    exact = sinkhorn(explicit_cost(*doubles[:2], "sqeuclidean"), *doubles[2:], backend="reference", **options)
    largest = exact.f.abs().max() + 300.0  # the scale of rounding is that of the cost
    tolerance = 2e-7 if dtype == torch.float32 else 1e-15
    assert (ours.f.double() - exact.f).abs().max() < tolerance * largest
    assert (ours.g.double() - exact.g).abs().max() < tolerance * largest


def test_float32_settles():
    """Exponents on a grid: the iteration comes to rest instead of jittering at the last digit of cost / epsilon."""
    x, y, a, b = clouds(1, 90, 120, dtype=torch.float32)
    result = sinkhorn_points(x, y, a, b, epsilon=0.005, tau=0.8, max_iters=300, tol=1e-6, backend="cpu")
    assert result.converged.all()


def everything(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    found = []
    for kind in KINDS.values():
        result = sinkhorn_points(x, y, a, b, epsilon=0.2, max_iters=12, tol=0.0, acceleration="anderson", **kind)
        (grad,) = torch.autograd.grad(result.value.sum() + result.f[:, ::5].sum(), x)
        found += [result.f, result.g, result.residual, result.value, result.barycentric(), grad]
    found.append(sinkhorn_divergence(x, y, a, b, epsilon=0.5, tau=0.9))
    return [t.detach() for t in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    before = torch.get_num_threads()
    tall = [t / t.sum() if t.ndim == 2 else t for t in clouds(1, 701, 533, dtype=dtype)]  # one problem for all threads
    many = clouds(5, 40, 33, dtype=dtype)
    many[2:] = (t / t.sum(-1, keepdim=True) for t in many[2:])
    try:
        for problem in (tall, many):
            torch.set_num_threads(1)
            alone = everything(*problem)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                for one, other in zip(everything(*problem), alone, strict=True):
                    assert torch.equal(one, other)
    finally:
        torch.set_num_threads(before)


def test_every_instruction_set():
    module = _dispatch.extension()
    problem = clouds(2, 53, 70, dim=11)
    problem[2:] = (t / t.sum(-1, keepdim=True) for t in problem[2:])
    exact = everything(*problem)
    try:
        for name in module.build_info()["instruction_sets"]:
            module.use_instruction_set(name)
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
                for one, other in zip(everything(*(t.to(dtype) for t in problem)), exact, strict=True):
                    if one.numel() > 2:  # not the residual
                        assert relative(one.double(), other) < tolerance, (name, dtype)
    finally:
        module.use_instruction_set(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 17, 70])
@pytest.mark.parametrize("cost", COSTS)
def test_products_equal_the_matrix(cost, width, dtype):
    x, y, a, b = clouds(2, 103, 70, dim=6)
    x, y = prepare(x, y, cost)
    row, col, epsilon = torch.randn_like(a), torch.randn_like(b), torch.tensor([[0.3], [0.7]], dtype=torch.float64)
    right, left = (torch.randn(2, n, width, dtype=torch.float64) for n in (70, 103))
    coupling = tuple(torch.randn(2, n, 4, dtype=torch.float64) for n in (103, 70))
    kernel = (row.unsqueeze(-1) + col.unsqueeze(-2) - explicit_cost(x, y, cost) / epsilon.unsqueeze(-1)).exp()

    def cast(*tensors: Tensor) -> list[Tensor]:
        return [t.to(dtype) for t in tensors]

    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    points = Points.of(*cast(x, y), cost, "cpu")
    for factors in (None, coupling):
        matrix = kernel if factors is None else kernel * (factors[0] @ factors[1].mT)
        given = None if factors is None else tuple(cast(*factors))
        got = products(points, *cast(row, col, epsilon, right, left), given)
        for one, other in zip(got, (matrix @ right, matrix.mT @ left), strict=True):
            assert one.dtype == dtype
            assert relative(one.double(), other) < tolerance
    soft = soft_minimum(points, *cast(col, row[:, :70], epsilon))
    exponent = row[:, None, :70] + (col.unsqueeze(-2) - explicit_cost(x, y, cost)) / epsilon.unsqueeze(-1)
    assert relative(soft.double(), -epsilon * exponent.logsumexp(-1)) < tolerance


def test_what_is_not_finite_shows():
    x, y, a, b = (t[0:1] for t in clouds(1, 20, 15))
    ones = torch.ones(1, 15, 2, dtype=torch.float64)
    epsilon = torch.ones(1, 1, dtype=torch.float64)

    def product(x: Tensor, y: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return compiled.product(x, y, row, col, epsilon, ones, None, True)

    bad = x.clone()
    bad[0, 3, 1] = torch.nan
    rows = product(bad, y, a, b).isnan()
    assert rows[0, 3].all()
    assert rows.sum() == 2
    bad = y.clone()
    bad[0, 3, 1] = torch.inf
    assert product(x, bad, a, b).isnan().all()
    assert product(x, y, a, torch.full_like(b, torch.nan)).isnan().all()
    assert product(x, y, a, b).isfinite().all()
    assert compiled.soft_minimum(x, y, torch.full_like(b, torch.inf), b, epsilon, True).isnan().all()
    assert compiled.soft_minimum(x, bad, b, b, epsilon, True).isnan().all()
    for name in ("f_init", "g_init"):
        start = {"f_init": a.clone(), "g_init": b.clone()}
        start[name][0, 2] = torch.nan
        assert sinkhorn_points(x, y, a, b, epsilon=1.0, backend="cpu", **start).residual.isnan().all()
    overflow = sinkhorn_points(x.float() * 1e15, y.float(), epsilon=1e-25, backend="cpu")
    assert overflow.residual.isnan().all()


MEMORY = """
import resource, sys, torch
from pisces_kernels import sinkhorn_divergence, sinkhorn_points
torch.set_num_threads(2)
size = 8000
def run(n):
    x, y = torch.rand(n, 3, requires_grad=True), torch.rand(n, 3)
    result = sinkhorn_points(x, y, epsilon=5.0, max_iters=3, tol=0.0, backend="cpu")
    (result.value + (result.barycentric() ** 2).sum() + result.f[0]).backward()
run(100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(size)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * size * size))
"""


def test_the_process_never_holds_a_matrix():
    """Scratch memory is not PyTorch's: ask the system. The answer is in units of one float32 N x M matrix."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 0.1

"""Gradients of `sinkhorn_points`: finite differences, the linear solve where it is hard, torch.func, operators."""

from __future__ import annotations

import functools

import pytest
import torch
from clouds import COSTS, clouds, explicit_cost, relative
from problems import KINDS, random_mask

from pisces_kernels import _streamed_gradient, sinkhorn, sinkhorn_points
from pisces_kernels._points import _sinkhorn_points_backward_op, _sinkhorn_points_op
from pisces_kernels._points_result import (
    _cost_matrix_backward_op,
    _cost_matrix_op,
    _plan_product_backward_op,
    _plan_product_op,
)

pytestmark = [pytest.mark.filterwarnings("error::RuntimeWarning")]

TIGHT = {"max_iters": 5000, "tol": 1e-11}


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param


@pytest.fixture
def solve_points(backend):
    """`sinkhorn_points` on each back end that has it."""
    return functools.partial(sinkhorn_points, backend=backend)


@pytest.mark.parametrize(
    ("epsilon", "options"),
    [(0.01, {}), (0.002, {"tau": 0.9}), (0.002, {"tau": 0.5}), (0.003, {"tau": (0.3, 1.0)}), (0.003, {"mass": 0.63})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_solve_reaches_the_dense_gradient_at_small_epsilon(epsilon, options, dtype, solve_points):
    x, y, a, b = clouds(2, 31, 20, dim=2, dtype=dtype)
    a[:, 3] = 0.0
    a = a / a.sum(-1, keepdim=True)
    double = dtype == torch.float64
    # Both differentiate at the same potentials: their own error is another matter.
    start = solve_points(x, y, a, b, epsilon=epsilon, acceleration="anderson", max_iters=2000, tol=1e-6, **options)
    leaves = [t.requires_grad_() for t in (x, y, a, b)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    starts = {"f_init": start.f, "g_init": start.g, "max_iters": 2000}
    ours = solve_points(*leaves, epsilon=epsilon, tol=1e-10 if double else 1e-5, **starts, **options)
    cost = explicit_cost(*doubles[:2], "sqeuclidean")
    dense = sinkhorn(cost, *doubles[2:], epsilon=epsilon, tol=1e-10, **starts, **options)
    weights = [torch.randn_like(dense.f), torch.randn_like(dense.g)]
    got, expected = (
        torch.autograd.grad((r.f * weights[0].to(r.f.dtype)).sum() + (r.g * weights[1].to(r.f.dtype)).sum(), inputs)
        for r, inputs in ((ours, leaves), (dense, doubles))
    )
    for one, other in zip(got, expected, strict=True):
        assert relative(one.double(), other) < (1e-7 if double else 5e-3)


def test_a_linear_solve_that_does_not_finish_says_so(monkeypatch, solve_points):
    x, y, a, b = clouds(1, 15, 12)
    monkeypatch.setattr(_streamed_gradient, "MAX_STEPS", 2)
    result = solve_points(x.requires_grad_(), y, a, b, epsilon=0.02, **TIGHT)
    with pytest.warns(RuntimeWarning, match="not accurate after 2 steps"):
        (result.f * torch.randn_like(result.f)).sum().backward()


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, cost, solve_points):
    x, y, a, b = clouds(2, 5, 4, dim=2)
    epsilon = torch.tensor([0.2, 0.5], dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 1] = False
    mass = torch.tensor([0.55, 0.62], dtype=torch.float64)
    a = torch.where(mask, a, 0.0)
    a = a / a.sum(-1, keepdim=True)
    balanced = kind == "balanced"  # whose weights cannot move one by one
    inputs = [t.requires_grad_() for t in ((x, y, epsilon) if balanced else (x, y, epsilon, a, b))]
    if kind == "mass":
        inputs.append(mass.requires_grad_())

    def solve(x, y, epsilon, a=a, b=b, mass=None):
        options = {"mass": mass} if kind == "mass" else KINDS[kind]
        result = solve_points(x, y, a, b, cost=cost, epsilon=epsilon, row_mask=mask, **options, **TIGHT)
        return result.f, result.g, result.value, result.barycentric()

    assert torch.autograd.gradcheck(solve, inputs, atol=1e-5, fast_mode=True)


def test_second_derivatives_are_refused(solve_points):
    x, y, a, b = clouds(1, 5, 4)
    x.requires_grad_()
    for name in ("value", "f"):
        out = getattr(solve_points(x, y, a, b, epsilon=0.1), name).sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            grad.sum().backward()


def test_torch_func_and_compile(solve_points):
    x, y, a, b = clouds(3, 6, 5, dtype=torch.float32)

    def loss(x, y, a, b):
        result = solve_points(x, y, a, b, epsilon=0.2, tau=0.9, tol=1e-6)
        parts = (result.f**2, result.value, result.barycentric(), result.plan(), result.marginals()[1] ** 2)
        return sum(part.sum() for part in parts) + result.transport_cost.sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, y, a, b), leaf)
    assert torch.allclose(torch.func.grad(loss)(x, y, a, b), expected, atol=1e-6)
    assert torch.allclose(torch.func.vmap(torch.func.grad(loss))(x, y, a, b), expected, atol=1e-6)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(leaf, y, a, b), leaf)
    assert torch.allclose(grad, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["semi", "mass"])
def test_opcheck(kind, backend):
    x, y, a, b = (t.requires_grad_() for t in clouds(2, 4, 6))
    epsilon = torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
    mass = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True) if kind == "mass" else None
    taus = (1.0, 1.0) if kind == "mass" else (1.0, 0.5)
    mask = random_mask(2, 4)
    args = (x, y, a, b, epsilon, *taus, mass, mask, None, 50, 1e-6, None, None, None, "sqeuclidean", "float32", backend)
    torch.library.opcheck(_sinkhorn_points_op, args)
    f, g = torch.randn_like(a), torch.randn_like(b)
    values, grad = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    clean = [t.detach() for t in (x, y, a, b)]
    torch.library.opcheck(_plan_product_op, (x, y, a, b, f, g, epsilon, values.requires_grad_(), "cosine", backend))
    torch.library.opcheck(_cost_matrix_op, (x, y, "sqeuclidean"))
    partial = ("test_schema", "test_faketensor")  # they have no gradient of their own
    call = (torch.randn(2, 4, 6, dtype=torch.float64), *clean[:2], "cosine")
    torch.library.opcheck(_cost_matrix_backward_op, call, test_utils=partial)
    for wanted in (False, True):
        call = (grad, *clean, f, g, epsilon.detach(), values.detach(), "cosine", backend, wanted)
        torch.library.opcheck(_plan_product_backward_op, call, test_utils=partial)
    held = None if mass is None else mass.detach()
    call = (f.detach(), g.detach(), *clean, epsilon.detach(), f, g, held, mask, None, *taus, "sqeuclidean", backend)
    torch.library.opcheck(_sinkhorn_points_backward_op, call, test_utils=partial)


def test_masks_may_change_which_side_is_the_longer_one(solve_points):
    """The gradient of balanced weights is known up to a constant, which must not depend on what is masked."""
    x, y, a, b = clouds(1, 12, 15)
    cols = torch.arange(15) % 2 == 0  # 12 x 15 becomes 12 x 8
    b = torch.where(cols, b, 0.0)
    a, b = a / a.sum(), b / b.sum()
    weight = torch.randn(1, 12, dtype=torch.float64)
    results = []
    for masked in (True, False):
        leaves = [t.clone().requires_grad_() for t in ((x, y, a, b) if masked else (x, y[:, cols], a, b[:, cols]))]
        masks = {"col_mask": cols.unsqueeze(0)} if masked else {}
        solved = solve_points(*leaves, epsilon=0.1, tol=1e-11, max_iters=5000, **masks)
        results.append(torch.autograd.grad((solved.f * weight).sum(), leaves))
    (_, by_y, by_a, by_b), (_, other_y, other_a, other_b) = results
    assert torch.allclose(by_a, other_a, rtol=0, atol=1e-7)
    assert torch.allclose(by_b[:, cols], other_b, rtol=0, atol=1e-7)
    assert torch.allclose(by_y[:, cols], other_y, rtol=0, atol=1e-7)

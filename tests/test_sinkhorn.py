"""Laws of `sinkhorn`: fixed point, marginals, symmetry, masks, peers, precision, gradients, bad input."""

from __future__ import annotations

import itertools

import numpy as np
import ot
import problems
import pytest
import torch
from problems import KINDS, random_costs, random_mask, random_weights

from pisces_kernels import _dispatch, reference, sinkhorn
from pisces_kernels._sinkhorn import _sinkhorn_op

BACKENDS = ["reference", "cpu"]
TIGHT = {"max_iters": 3000, "tol": 1e-11}


pytestmark = pytest.mark.usefixtures("seed")


def fixed_point_error(result, cost, a, b, epsilon, tau_a, tau_b) -> float:
    """Largest violation of f = tau softmin(cost - g) and g = tau softmin(cost - f)."""
    f_next = -tau_a * epsilon * torch.logsumexp((result.g.unsqueeze(-2) - cost) / epsilon + b.log().unsqueeze(-2), -1)
    g_next = -tau_b * epsilon * torch.logsumexp((result.f.unsqueeze(-1) - cost) / epsilon + a.log().unsqueeze(-1), -2)
    return max((f_next - result.f).abs().max().item(), (g_next - result.g).abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["balanced", "tau", "semi"])
def test_solution_satisfies_the_fixed_point_equations(backend, kind):
    cost, a, b = random_costs(3, 9, 14), random_weights(3, 9), random_weights(3, 14)
    result = sinkhorn(cost, a, b, epsilon=0.1, backend=backend, **KINDS[kind], **TIGHT)
    assert result.converged.all()
    assert fixed_point_error(result, cost, a, b, 0.1, *result.tau) < 1e-10
    wrong = sinkhorn(cost + 0.1 * torch.rand_like(cost), a, b, epsilon=0.1, backend=backend, **KINDS[kind], **TIGHT)
    assert fixed_point_error(wrong, cost, a, b, 0.1, *result.tau) > 1e-3  # the check can fail


@pytest.mark.parametrize("backend", BACKENDS)
def test_marginals_of_each_kind(backend):
    cost, a, b = random_costs(3, 9, 14), random_weights(3, 9), random_weights(3, 14)
    rows, cols = sinkhorn(cost, a, b, epsilon=0.1, backend=backend, **TIGHT).marginals()
    assert torch.allclose(rows, a, atol=1e-9)
    assert torch.allclose(cols, b, atol=1e-9)
    semi = sinkhorn(cost, a, b, epsilon=0.1, tau=(1.0, 0.5), backend=backend, **TIGHT)
    rows, cols = semi.marginals()
    assert torch.allclose(rows, a, atol=1e-9)
    assert not torch.allclose(cols, b, atol=1e-3)
    rho = 0.1 * 0.5 / 0.5
    assert torch.allclose(cols, b * torch.exp(-semi.g / rho), atol=1e-9)  # optimality of the relaxed side


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mass", [0.05, 0.5, 0.93, 1.0])
def test_exact_mass_is_transported_within_the_marginals(backend, dtype, mass):
    cost, a, b = (
        random_costs(3, 9, 14, dtype=dtype),
        random_weights(3, 9, dtype=dtype),
        random_weights(3, 14, dtype=dtype),
    )
    tight = TIGHT if dtype == torch.float64 else {"max_iters": 3000, "tol": 2e-6}
    result = sinkhorn(cost, a, b, epsilon=0.05, mass=mass, backend=backend, **tight)
    assert result.converged.all()
    rows, cols = result.marginals()
    assert torch.allclose(rows.double().sum(-1), torch.tensor(mass, dtype=torch.float64), atol=1e-6, rtol=0)
    slack = 1e-9 if dtype == torch.float64 else 1e-6
    assert (rows <= a + slack).all()
    assert (cols <= b + slack).all()


def test_exact_mass_and_balanced_meet_pot():
    cost, a, b = random_costs(1, 8, 11)[0], random_weights(1, 8)[0], random_weights(1, 11)[0]
    result = sinkhorn(cost, a, b, epsilon=0.07, **TIGHT)
    expected = ot.bregman.sinkhorn_log(a.numpy(), b.numpy(), cost.numpy(), 0.07, stopThr=1e-14, numItermax=20000)
    np.testing.assert_allclose(result.plan().numpy(), expected, atol=1e-10)
    # POT's partial problem weighs entropy by the counting measure: the same plan with cost + epsilon log(a b).
    shifted = cost + 0.07 * (a[:, None] * b[None, :]).log()
    result = sinkhorn(shifted, a, b, epsilon=0.07, mass=0.7, **TIGHT)
    expected = ot.partial.entropic_partial_wasserstein(
        a.numpy(), b.numpy(), cost.numpy(), 0.07, m=0.7, stopThr=1e-15, numItermax=50000
    )
    np.testing.assert_allclose(result.plan().numpy(), expected, atol=1e-8)
    other = ot.partial.entropic_partial_wasserstein(a.numpy(), b.numpy(), cost.numpy(), 0.07, m=0.8)
    assert np.abs(result.plan().numpy() - other).max() > 1e-4  # the comparison can fail


def test_unbalanced_meets_pot():
    cost, a, b = random_costs(1, 8, 11)[0], random_weights(1, 8)[0], random_weights(1, 11)[0]
    epsilon, tau = 0.1, 0.8
    result = sinkhorn(cost, a, b, epsilon=epsilon, tau=tau, **TIGHT)
    rho = epsilon * tau / (1 - tau)
    expected = ot.unbalanced.sinkhorn_unbalanced(
        a.numpy(), b.numpy(), cost.numpy(), epsilon, rho, reg_type="kl", numItermax=20000, stopThr=1e-14
    )
    np.testing.assert_allclose(result.plan().numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms(backend):
    one = sinkhorn(torch.tensor([[0.3]], dtype=torch.float64), epsilon=0.1, backend=backend, **TIGHT)
    assert one.plan().item() == pytest.approx(1.0)
    assert one.value.item() == pytest.approx(0.3)
    flat = sinkhorn(torch.full((4, 7), 0.5, dtype=torch.float64), epsilon=0.1, backend=backend, **TIGHT)
    assert torch.allclose(flat.plan(), torch.full((4, 7), 1 / 28, dtype=torch.float64))
    # 2 x 2 with cost [[0, c], [c, 0]]: the plan is p/2 on the diagonal with p = 1 / (1 + exp(-c / epsilon)).
    c, epsilon = 0.2, 0.1
    two = sinkhorn(torch.tensor([[0.0, c], [c, 0.0]], dtype=torch.float64), epsilon=epsilon, backend=backend, **TIGHT)
    p = 1 / (1 + np.exp(-c / epsilon))
    assert two.plan()[0, 0].item() == pytest.approx(p / 2, abs=1e-12)
    # 1 x M balanced: the plan is b whatever the cost.
    b = random_weights(1, 6)[0]
    row = sinkhorn(random_costs(1, 1, 6)[0], None, b, epsilon=0.01, backend=backend, **TIGHT)
    assert torch.allclose(row.plan()[0], b, atol=1e-12)


def test_value_is_the_objective():
    cost, a, b = random_costs(2, 6, 9), random_weights(2, 6), random_weights(2, 9)

    def kl(p, q):
        return (torch.xlogy(p, p / q) - p + q).flatten(1).sum(-1)

    for kind in KINDS.values():
        result = sinkhorn(cost, a, b, epsilon=0.1, **kind, **TIGHT)
        plan, (rows, cols) = result.plan(), result.marginals()
        objective = result.transport_cost + 0.1 * kl(plan, a.unsqueeze(-1) * b.unsqueeze(-2))
        for tau, sums, weights in zip(result.tau, (rows, cols), (a, b), strict=True):
            if tau < 1:
                objective = objective + 0.1 * tau / (1 - tau) * kl(sums, weights)
        assert torch.allclose(result.value, objective, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_transpose_and_permutation(backend, kind):
    cost, a, b = random_costs(2, 7, 12), random_weights(2, 7), random_weights(2, 12)
    kwargs = dict(KINDS[kind])
    result = sinkhorn(cost, a, b, epsilon=0.1, backend=backend, **kwargs, **TIGHT)
    if kind == "semi":
        kwargs["tau"] = (0.5, 1.0)
    turned = sinkhorn(cost.mT, b, a, epsilon=0.1, backend=backend, **kwargs, **TIGHT)
    assert torch.allclose(turned.f, result.g, atol=1e-9)
    assert torch.allclose(turned.g, result.f, atol=1e-9)
    rows, cols = torch.randperm(7), torch.randperm(12)
    mixed = sinkhorn(
        cost[:, rows][:, :, cols], a[:, rows], b[:, cols], epsilon=0.1, backend=backend, **KINDS[kind], **TIGHT
    )
    assert torch.allclose(mixed.f, result.f[:, rows], atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_loop(kind):
    cost, a, b = (
        random_costs(6, 7, 12).reshape(2, 3, 7, 12),
        random_weights(6, 7).reshape(2, 3, 7),
        random_weights(1, 12)[0],
    )
    epsilon = torch.tensor([[0.05, 0.1, 0.5], [0.02, 0.2, 1.0]], dtype=torch.float64)
    result = sinkhorn(cost, a, b, epsilon=epsilon, tol=1e-6, max_iters=500, **KINDS[kind])
    assert result.n_iters.unique().numel() > 1  # problems stop one by one
    for i, j in itertools.product(range(2), range(3)):
        one = sinkhorn(cost[i, j], a[i, j], b, epsilon=float(epsilon[i, j]), tol=1e-6, max_iters=500, **KINDS[kind])
        assert torch.equal(one.f, result.f[i, j])
        assert torch.equal(one.g, result.g[i, j])
        assert one.n_iters == result.n_iters[i, j]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_is_removed_whatever_is_there(backend, kind, dtype):
    cost, a, b = (
        random_costs(3, 10, 21, dtype=dtype),
        random_weights(3, 10, dtype=dtype),
        random_weights(3, 21, dtype=dtype),
    )
    rows, cols = random_mask(3, 10), random_mask(3, 21)
    keep = rows.unsqueeze(-1) & cols.unsqueeze(-2)
    kwargs = dict(KINDS[kind])
    if kind == "balanced":  # unequal masses would be infeasible
        a = torch.where(rows, a, 0.0)
        b = torch.where(cols, b, 0.0)
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    if kind == "mass":
        kwargs["mass"] = 0.2
    result = sinkhorn(
        problems.poisoned(cost, keep), a, b, epsilon=0.05, row_mask=rows, col_mask=cols, backend=backend, **kwargs
    )
    assert torch.equal(result.plan() == 0, ~keep)
    assert (result.f[~rows] == 0).all()
    assert (result.g[~cols] == 0).all()
    assert torch.isneginf(result.log_plan()[~keep]).all()
    for p in range(3):
        r, c = rows[p], cols[p]
        small = sinkhorn(cost[p][r][:, c], a[p][r], b[p][c], epsilon=0.05, backend=backend, **kwargs)
        assert small.n_iters == result.n_iters[p]
        tolerance = {"atol": 1e-12, "rtol": 0} if dtype == torch.float64 else {"atol": 1e-6, "rtol": 0}
        assert torch.allclose(small.f, result.f[p][r], **tolerance)
        assert torch.allclose(small.g, result.g[p][c], **tolerance)


def test_tau_to_one_meets_balanced():
    cost = random_costs(2, 7, 12)
    balanced = sinkhorn(cost, epsilon=0.1, **TIGHT).plan()
    gaps = [
        (sinkhorn(cost, epsilon=0.1, tau=tau, max_iters=20000, tol=1e-12).plan() - balanced).abs().max().item()
        for tau in (0.9, 0.99, 0.999)
    ]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert gaps[2] < 1e-3


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.05, 0.01, 0.005, 0.001])
def test_fused_equals_the_float64_reference(epsilon):
    module = _dispatch.extension()
    try:
        for n_rows, n_cols in problems.SIZES:
            cost = random_costs(2, n_rows, n_cols)
            for kind in KINDS.values():
                options = {"epsilon": epsilon, "max_iters": 50, "tol": 0.0, **kind}
                expected = sinkhorn(cost, backend="reference", **options)
                for instruction_set in module.build_info()["instruction_sets"]:
                    module.use_instruction_set(instruction_set)
                    for dtype, limit in (
                        (torch.float32, problems.POTENTIAL_TOLERANCE),
                        (torch.float64, problems.DOUBLE_TOLERANCE),
                    ):
                        fused = sinkhorn(cost.to(dtype), backend="cpu", **options)
                        for got, want in ((fused.f, expected.f), (fused.g, expected.g)):
                            worst = (got.double() - want).abs().max().item()
                            assert worst < limit, (n_rows, n_cols, kind, instruction_set, dtype, worst)
                        assert (fused.n_iters == 50).all()
    finally:
        module.use_instruction_set(None)


def test_stopping_agrees_with_the_reference():
    cost = random_costs(4, 12, 40)
    for kind in KINDS.values():
        for tol in (1e-1, 1e-3, 1e-7):
            options = {"epsilon": 0.05, "max_iters": 300, "tol": tol, **kind}
            fused, expected = sinkhorn(cost, **options), sinkhorn(cost, backend="reference", **options)
            assert torch.equal(fused.n_iters, expected.n_iters)
            assert torch.allclose(fused.residual, expected.residual, atol=1e-9)
            assert torch.equal(fused.converged, fused.residual < tol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_damped_potentials_far_out_of_the_float32_range(backend):
    """Damped marginals as small as exp(-100) cannot be scalings in float32: the log domain has to take over."""
    cost = random_costs(2, 9, 40)
    cost[:, 3:] += 3.0
    options = {"epsilon": 0.004, "tau": 0.9, "max_iters": 200, "tol": 0.0}
    expected = sinkhorn(cost, backend="reference", **options)
    assert (expected.f / 0.004).abs().max() > 80
    result = sinkhorn(cost.float(), backend=backend, **options)
    assert (result.f.double() - expected.f).abs().max() < problems.POTENTIAL_TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_warm_start_from_the_solution_stops_at_once(backend, kind):
    cost = random_costs(3, 8, 15)
    options = {"epsilon": 0.05, "backend": backend, "max_iters": 2000, **KINDS[kind]}
    cold = sinkhorn(cost, tol=1e-10, **options)
    for start in ({"f_init": cold.f, "g_init": cold.g}, {"f_init": cold.f}):
        warm = sinkhorn(cost, tol=1e-8, **start, **options)
        assert (warm.n_iters == 1).all()
        assert torch.allclose(warm.f, cold.f, atol=1e-8)
    assert (cold.n_iters > 1).all()


def test_thread_count_does_not_change_a_bit():
    cost = random_costs(9, 13, 70, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([sinkhorn(cost, epsilon=0.02, **kind) for kind in KINDS.values()])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one.f, other.f)
            assert torch.equal(one.g, other.g)
            assert torch.equal(one.n_iters, other.n_iters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_broadcasting_and_half_precision(backend):
    cost = random_costs(2, 6, 11, dtype=torch.float32)
    plain = sinkhorn(cost, epsilon=0.1, backend=backend)
    assert torch.equal(sinkhorn(problems.strided(cost), epsilon=0.1, backend=backend).f, plain.f)
    expanded = sinkhorn(cost[:1].expand(3, 6, 11), epsilon=0.1, backend=backend)
    assert torch.equal(expanded.f, plain.f[:1].expand(3, 6))
    for dtype in (torch.float16, torch.bfloat16):
        half = sinkhorn(cost.to(dtype), epsilon=0.1, backend=backend)
        assert half.f.dtype == torch.float32
        assert torch.equal(half.f, sinkhorn(cost.to(dtype).float(), epsilon=0.1, backend=backend).f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sinkhorn(cost.requires_grad_(), epsilon=0.1, backend=backend)
        assert torch.equal(inside.f, plain.f)
        gradient = torch.autograd.grad(inside.f[..., 0].sum(), cost, retain_graph=True)[0]
    assert torch.equal(gradient, torch.autograd.grad(inside.f[..., 0].sum(), cost)[0])
    shadow = torch.rand(2, 4, 6, device="meta", requires_grad=True)
    assert torch.autograd.grad(sinkhorn(shadow, epsilon=0.1).f.sum(), shadow)[0].shape == shadow.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_weights_and_empty_problems(backend, kind):
    cost, a = random_costs(2, 6, 11), random_weights(2, 6)
    a[:, 2] = 0
    a = a / a.sum(-1, keepdim=True)
    options = {"epsilon": 0.1, "backend": backend, "max_iters": 2000, "tol": 1e-10, **KINDS[kind]}
    result = sinkhorn(cost, a, **options)
    others = [0, 1, 3, 4, 5]
    removed = sinkhorn(cost[:, others], a[:, others], **options)
    assert torch.allclose(result.g, removed.g, atol=1e-8)
    assert (result.plan()[:, 2] == 0).all()
    assert torch.isfinite(result.f).all()  # extended by the update to the row without weight
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    empty = sinkhorn(cost, row_mask=mask, **options)
    assert (empty.f[1] == 0).all()
    assert (empty.g[1] == 0).all()
    assert (empty.plan()[1] == 0).all()
    assert empty.converged.all()
    assert empty.n_iters.tolist()[1] == 0
    assert torch.allclose(empty.f[0], sinkhorn(cost[0], **options).f, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_zero_on_both_sides_overflow_nowhere(backend, kind):
    cost = torch.ones(5, 7)
    cost[0, 0] = 0  # in row 0 and column 0, which have no weight, exp((f + g - cost) / epsilon) is exp(2000)
    a, b = torch.full((5,), 0.25), torch.full((7,), 1 / 6)
    a[0] = b[0] = 0
    inputs = [t.requires_grad_() for t in (cost, a, b)]
    result = sinkhorn(*inputs, epsilon=0.001, backend=backend, **KINDS[kind])
    assert torch.isfinite(result.plan()).all()
    assert (result.plan()[0] == 0).all()
    weight = torch.randn(5, 7)
    for scalar in (result.f.sum() + result.g.square().sum(), (result.plan() * weight).sum(), result.value):
        for gradient in torch.autograd.grad(scalar, inputs, retain_graph=True):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_overflow_and_starts_that_are_not_finite_are_reported(backend, kind):
    options = {"epsilon": 0.1, "backend": backend, **KINDS[kind]}
    cost = torch.rand(2, 5, 8)
    beyond = torch.stack([cost[0], torch.linspace(1e38, 3e38, 40).view(5, 8)])  # cost / epsilon is beyond float32
    nan = torch.zeros(2, 8)
    nan[1, 3] = torch.nan
    inf = torch.zeros(2, 5)
    inf[1, 2] = torch.inf
    for values, start in ((beyond, {}), (cost, {"g_init": nan}), (cost, {"f_init": inf})):
        result = sinkhorn(values, **start, **options)
        assert result.converged.tolist() == [True, False]
        assert result.residual.isnan().tolist() == [False, True]
        assert result.f.isnan().all(-1).tolist() == [False, True]
        assert torch.isfinite(result.plan()[0]).all()
    masked = sinkhorn(cost, g_init=nan, col_mask=torch.isfinite(nan), **options)
    assert masked.converged.all()  # what is masked may hold anything


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_solved_is_reported(backend):
    cost = random_costs(3, 5, 8)
    cost[1, 2, 3] = torch.nan
    cost[2, 0, 0] = torch.inf
    result = sinkhorn(cost, epsilon=0.1, backend=backend)
    assert result.converged.tolist() == [True, False, False]
    assert result.residual.isnan().tolist() == [False, True, True]
    assert torch.isfinite(result.f[0]).all()
    assert result.f[1].isnan().all()
    few = sinkhorn(cost[0], epsilon=0.001, max_iters=3, tol=1e-9, backend=backend)
    assert not few.converged
    assert few.n_iters == 3
    unequal = sinkhorn(cost[0], torch.full((5,), 0.4, dtype=torch.float64), epsilon=0.1, backend=backend)
    assert not unequal.converged  # sum a = 2, sum b = 1: no balanced plan exists
    assert unequal.residual.item() == pytest.approx(np.log(2), abs=1e-6)
    none = sinkhorn(torch.rand(0, 5, 8), epsilon=np.float32(0.1), max_iters=np.int64(9), backend=backend)
    assert none.plan().shape == (0, 5, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(kind, masked):
    cost = random_costs(2, 4, 5).requires_grad_()
    a, b = random_weights(2, 4).requires_grad_(), random_weights(2, 5).requires_grad_()
    rows = torch.tensor([[True, True, False, True], [True] * 4]) if masked else None
    kwargs = dict(KINDS[kind])
    mass = None
    if kind == "mass":
        mass = torch.tensor([0.5, 0.6], dtype=torch.float64, requires_grad=True)
        del kwargs["mass"]

    def outputs(cost, a, b, mass=None):
        if rows is not None:
            a = torch.where(rows, a, 0.0)
        # Balanced problems exist only for equal masses: the scaling keeps the perturbed inputs feasible.
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
        result = sinkhorn(cost, a, b, epsilon=0.3, mass=mass, row_mask=rows, max_iters=500, tol=1e-12, **kwargs)
        return result.f, result.g, result.plan(), result.value, result.transport_cost

    inputs = (cost, a, b) if mass is None else (cost, a, b, mass)
    assert torch.autograd.gradcheck(outputs, inputs, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_implicit_gradient_equals_autograd_through_the_iterations(shape):
    cost = random_costs(2, *shape)
    weight = torch.randn(2, *shape, dtype=torch.float64)
    a = torch.full((2, shape[0]), 1 / shape[0], dtype=torch.float64)
    b = torch.full((2, shape[1]), 1 / shape[1], dtype=torch.float64)
    for kind, (tau_a, tau_b) in {"balanced": (1.0, 1.0), "tau": (0.9, 0.9), "semi": (1.0, 0.5)}.items():
        leaf = cost.clone().requires_grad_()
        (sinkhorn(leaf, epsilon=0.2, **KINDS[kind], **TIGHT).plan() * weight).sum().backward()
        unrolled = cost.clone().requires_grad_()
        eps = torch.full((2,), 0.2, dtype=torch.float64)
        f, g, _, _ = reference.sinkhorn(unrolled, a, b, eps, tau_a=tau_a, tau_b=tau_b, **TIGHT)
        plan = ((f.unsqueeze(-1) + g.unsqueeze(-2) - unrolled) / 0.2).exp() * a.unsqueeze(-1) * b.unsqueeze(-2)
        (plan * weight).sum().backward()
        assert torch.allclose(leaf.grad, unrolled.grad, atol=1e-8)
        assert leaf.grad.abs().max() > 1e-3


def test_gradient_none_and_value_gradient_is_the_plan():
    cost = random_costs(2, 5, 8).requires_grad_()
    assert not sinkhorn(cost, epsilon=0.1, gradient="none").f.requires_grad
    for kind in KINDS.values():
        result = sinkhorn(cost, epsilon=0.1, **kind, **TIGHT)
        (grad,) = torch.autograd.grad(result.value.sum(), cost)
        assert torch.allclose(grad, result.plan(), atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["semi", "mass"])
def test_opcheck(backend, kind):
    cost = random_costs(2, 4, 6).requires_grad_()
    a, b = random_weights(2, 4).requires_grad_(), random_weights(2, 6).requires_grad_()
    eps = torch.full((2,), 0.2, dtype=torch.float64)
    mass = torch.full((2,), 0.5, dtype=torch.float64) if kind == "mass" else None
    taus = KINDS[kind].get("tau", 1.0)
    tau_a, tau_b = taus if isinstance(taus, tuple) else (taus, taus)
    args = (cost, a, b, eps, tau_a, tau_b, mass, random_mask(2, 4), None, 50, 1e-6, None, None, backend)
    torch.library.opcheck(_sinkhorn_op, args)


COST = torch.rand(2, 4, 6)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"cost": [[1.0]]}, TypeError, "cost is a list"),
        ({"cost": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "Call .float"),
        ({"cost": torch.rand(6)}, ValueError, r"expected \[..., N, M\]"),
        ({"cost": torch.rand(2, 0, 6)}, ValueError, "N >= 1 and M >= 1"),
        ({"b": torch.ones(2, 5)}, ValueError, r"b has shape \(2, 5\), expected \(2, 6\)"),
        ({"a": -torch.ones(2, 4)}, ValueError, "negative or non-finite"),
        ({"a": torch.full((2, 4), torch.nan)}, ValueError, "negative or non-finite"),
        ({"epsilon": 0.0}, ValueError, "epsilon is 0.0"),
        ({"epsilon": torch.tensor([0.1, -1.0])}, ValueError, "epsilon has entries <= 0"),
        ({"epsilon": torch.tensor([0.1, torch.inf])}, ValueError, "expected finite numbers > 0"),
        ({"epsilon": torch.tensor([0.1, 0.1, 0.1])}, ValueError, "epsilon has shape"),
        ({"tau": 1.5}, ValueError, "tau is 1.5"),
        ({"tau": (0.9, 0.9, 0.9)}, ValueError, "tau has 3 entries"),
        ({"mass": 1.2}, ValueError, r"expected in \(0, 1\]"),
        ({"mass": -0.1}, ValueError, "mass is -0.1"),
        ({"mass": 0.5, "tau": 0.9}, ValueError, "exclude each other"),
        ({"row_mask": torch.ones(2, 4)}, TypeError, "expected a bool tensor"),
        ({"col_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"expected \(2, 6\)"),
        ({"max_iters": 0}, ValueError, "max_iters is 0"),
        ({"max_iters": 2**31}, ValueError, "max_iters is 2147483648"),
        ({"tol": -1.0}, ValueError, "tol is -1.0"),
        ({"gradient": "magic"}, ValueError, "expected 'implicit' or 'none'"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
        ({"f_init": torch.zeros(2, 5)}, ValueError, "f_init has shape"),
        ({"a": torch.ones(2, 4, device="meta")}, ValueError, "a is on meta"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    arguments = {"cost": COST, "epsilon": 0.1, **kwargs}
    with pytest.raises(error, match=message):
        sinkhorn(arguments.pop("cost"), **arguments)

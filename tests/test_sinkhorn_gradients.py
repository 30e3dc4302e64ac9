"""Gradients of `sinkhorn`: against finite differences, autograd and one another, transformed and compiled."""

from __future__ import annotations

import pytest
import torch
from problems import KINDS, random_costs, random_mask, random_weights
from torch.func import grad, jacrev, vmap

from pisces_kernels import reference, sinkhorn
from pisces_kernels._sinkhorn import _sinkhorn_op

BACKENDS = ["reference", "cpu"]
TIGHT = {"max_iters": 3000, "tol": 1e-11}


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
    problem = (cost, a, b, eps, tau_a, tau_b, mass, random_mask(2, 4), None, 50, 1e-6)
    for acceleration, gradient in ((None, "implicit"), ("anderson", "implicit"), (None, "unrolled")):
        torch.library.opcheck(_sinkhorn_op, (*problem, acceleration, None, None, gradient, backend))


GRADIENTS = ["implicit", "unrolled"]


def differentiable_problem(kind, masked):
    """Two problems as leaves, and the function that solves them: inputs, function(..., which outputs)."""
    cost = random_costs(2, 3, 4)
    if kind == "mass":
        cost[:, 1:] += 1.0  # most of the mass at a small epsilon: the first row is full, others are not
    cost.requires_grad_()
    a, b = random_weights(2, 3).requires_grad_(), random_weights(2, 4).requires_grad_()
    epsilon = torch.tensor([0.1, 0.15] if kind == "mass" else [0.3, 0.4], dtype=torch.float64, requires_grad=True)
    mass = torch.tensor([0.9, 0.93], dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[True, False, True], [True] * 3]) if masked else None
    inputs = (cost, a, b, epsilon, mass) if kind == "mass" else (cost, a, b, epsilon)

    def solve(cost, a, b, epsilon, mass=None, *, gradient, **stop):
        if rows is not None:
            a = torch.where(rows, a, 0.0)
        # Balanced problems exist only for equal masses: the scaling keeps the perturbed inputs feasible.
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
        problem = {"mass": mass} if kind == "mass" else KINDS[kind]
        return sinkhorn(cost, a, b, epsilon=epsilon, row_mask=rows, gradient=gradient, **stop, **problem)

    return inputs, solve


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives(gradient, kind, masked):
    inputs, solve = differentiable_problem(kind, masked)

    stop = {"max_iters": 2000, "tol": 1e-13} if gradient == "implicit" else {"max_iters": 4, "tol": 0.0}

    def value(*inputs):
        return solve(*inputs, gradient=gradient, **stop).value

    def others(*inputs):
        result = solve(*inputs, gradient=gradient, **stop)
        return result.f, result.g, result.plan(), result.transport_cost

    for outputs in (value, others):
        # The slow cases compare random projections of the second derivatives instead of each entry.
        fast = gradient == "unrolled" or kind == "mass" or outputs is others
        assert torch.autograd.gradcheck(outputs, inputs, atol=1e-6)
        assert torch.autograd.gradgradcheck(outputs, inputs, atol=1e-5, rtol=1e-3, fast_mode=fast)


def test_a_wrong_second_derivative_is_noticed():
    """Negative control of the test above: potentials held constant give the right first derivative only."""
    cost = random_costs(1, 3, 4).requires_grad_()

    def value(cost):
        return sinkhorn(cost, epsilon=0.3, gradient="none", **TIGHT).value

    assert torch.autograd.gradcheck(value, cost, atol=1e-6)
    with pytest.raises(RuntimeError):
        torch.autograd.gradgradcheck(value, cost, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_implicit_equals_unrolled_at_convergence(kind, masked):
    inputs, solve = differentiable_problem(kind, masked)
    weight = torch.randn(2, 3, 4, dtype=torch.float64)

    def gradients(gradient, **stop):
        result = solve(*inputs, gradient=gradient, **stop)
        scalar = (result.plan() * weight).sum() + result.f.square().sum() + result.value.sum()
        return torch.autograd.grad(scalar, inputs)

    implicit = gradients("implicit", max_iters=3000, tol=1e-13)
    unrolled = gradients("unrolled", max_iters=3000, tol=1e-13)
    early = gradients("unrolled", max_iters=1, tol=0.0)
    if kind == "mass":
        f = solve(*inputs, gradient="none", max_iters=3000, tol=1e-13).f
        assert (f < f.amax(-1, keepdim=True) - 1e-3).any()  # a marginal is full
    for one, other in zip(implicit, unrolled, strict=True):
        assert torch.allclose(one, other, atol=1e-8)
    assert (implicit[0] - early[0]).abs().max() > 1e-4  # the comparison can fail


@pytest.mark.parametrize("kind", KINDS)
def test_unrolled_is_autograd_through_the_iterations_that_ran(kind):
    """Problems that stop after different numbers of iterations, far from convergence, warm starts included."""
    cost = random_costs(3, 5, 8)
    epsilons = torch.tensor([0.02, 1.0, 0.1], dtype=torch.float64)
    a, b = random_weights(3, 5), random_weights(3, 8)
    start_f, start_g = 0.1 * torch.randn(3, 5, dtype=torch.float64), 0.1 * torch.randn(3, 8, dtype=torch.float64)
    weight = torch.randn(3, 5, 8, dtype=torch.float64)
    kwargs = dict(KINDS[kind])
    tau = kwargs.get("tau", 1.0)
    tau_a, tau_b = tau if isinstance(tau, tuple) else (tau, tau)
    mass = torch.full((3,), kwargs["mass"], dtype=torch.float64) if kind == "mass" else None
    for starts in ({}, {"f_init": start_f}, {"f_init": start_f, "g_init": start_g}):
        leaves = [t.clone().requires_grad_() for t in (cost, a, b, *starts.values())]
        warm = dict(zip(starts, leaves[3:], strict=True))
        stop = {"max_iters": 9, "tol": 2e-2}
        result = sinkhorn(*leaves[:3], epsilon=epsilons, gradient="unrolled", **stop, **warm, **kwargs)
        assert len(set(result.n_iters.tolist())) > 1 or starts
        ours = torch.autograd.grad((result.plan() * weight).sum(), leaves)
        f, g, n_iters, _ = reference.sinkhorn(
            *leaves[:3], epsilons, tau_a=tau_a, tau_b=tau_b, mass=mass, **stop, **warm
        )
        assert torch.equal(n_iters, result.n_iters)
        exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - leaves[0]) / epsilons[:, None, None]
        plan = exponent.exp() * leaves[1].unsqueeze(-1) * leaves[2].unsqueeze(-2)
        theirs = torch.autograd.grad((plan * weight).sum(), leaves, allow_unused=True)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, torch.zeros_like(one) if other is None else other, atol=1e-10)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_transforms_of_torch_func(gradient):
    cost = random_costs(3, 4, 5)
    mask = random_mask(3, 4)

    def value(cost, mask=None):
        return sinkhorn(cost, epsilon=0.1, row_mask=mask, max_iters=60, tol=0.0, gradient=gradient).value

    def plan(cost):
        return sinkhorn(cost, epsilon=0.1, max_iters=60, tol=0.0, gradient=gradient).plan()

    leaf = cost.clone().requires_grad_()
    (expected,) = torch.autograd.grad(value(leaf).sum(), leaf)
    assert torch.allclose(vmap(value)(cost), value(cost))
    assert torch.allclose(vmap(value)(cost, mask), value(cost, mask))
    assert torch.allclose(vmap(plan, in_dims=1)(cost.transpose(0, 1)), plan(cost))
    assert torch.allclose(vmap(grad(value))(cost), expected)
    assert torch.allclose(grad(lambda c: vmap(value)(c).sum())(cost), expected)
    assert torch.allclose(torch.autograd.grad(vmap(value)(leaf).sum(), leaf)[0], expected)
    jacobian = jacrev(lambda c: plan(c).flatten())(cost[0])  # [20, 4, 5]
    leaf = cost[0].clone().requires_grad_()
    assert torch.allclose(jacobian[7], torch.autograd.grad(plan(leaf).flatten()[7], leaf)[0])
    epsilons = torch.tensor([0.1, 0.3], dtype=torch.float64)
    per_epsilon = vmap(lambda e: sinkhorn(cost, epsilon=e, gradient=gradient).f)(epsilons)
    assert torch.allclose(per_epsilon[1], sinkhorn(cost, epsilon=0.3, gradient=gradient).f)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(value, (cost,), (cost,))  # never a silent zero


@pytest.mark.parametrize(
    ("compiler", "gradient"), [("aot_eager", "implicit"), ("aot_eager", "unrolled"), ("inductor", "implicit")]
)
def test_compiles_into_one_graph(compiler, gradient):
    cost = random_costs(2, 4, 6).requires_grad_()

    def loss(cost):
        result = sinkhorn(cost, epsilon=0.1, tau=0.9, gradient=gradient)
        value = result.value.sum() if compiler == "aot_eager" else 0.0  # inductor takes long enough without it
        return (result.plan() ** 2).sum() + value

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)(cost)
    (ours,) = torch.autograd.grad(compiled, cost)
    (theirs,) = torch.autograd.grad(loss(cost), cost)
    assert torch.allclose(compiled, loss(cost))
    assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.timeout(120)
def test_gradient_of_a_batch_after_the_number_of_threads_was_set():
    """Batched LU factors of this size never come back then."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cost = random_costs(2, 150, 200).requires_grad_()
        result = sinkhorn(cost, epsilon=0.05, tau=0.9)
        (gradient,) = torch.autograd.grad(result.f.sum(), cost)
    finally:
        torch.set_num_threads(threads)
    assert torch.isfinite(gradient).all()

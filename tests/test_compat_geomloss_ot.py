"""`compat.geomloss.ot` against geomloss itself, run until it has converged, against closed forms and SciPy."""

from __future__ import annotations

import functools
import math
from typing import Any

import geomloss
import numpy as np
import pytest
import torch
from geomloss.ot._implementations import matrix as geomloss_matrix
from geomloss.ot._implementations import sample as geomloss_sample
from problems import random_weights
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pisces_kernels.compat import _geomloss_solver as solver
from pisces_kernels.compat.geomloss import LinearOperator, OTResult, ot

TIGHT = {"tol": 1e-11}
RHOS = [None, 0.4]


@pytest.fixture
def without_annealing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make geomloss iterate at the final temperature only, so that enough iterations converge."""
    for module in (geomloss_matrix, geomloss_sample):
        constant = functools.partial(module.annealing_parameters, scaling=1)
        monkeypatch.setattr(module, "annealing_parameters", constant)


def problem(
    batch: tuple[int, ...] = (), *, rho: float | None = None, mass: float = 1.4
) -> tuple[Tensor, Tensor, Tensor]:
    """(cost [..., 6, 9], a, b), unequal masses when they may be."""
    count = math.prod(batch)
    a = mass * random_weights(count, 6).reshape(*batch, 6)
    b = (mass if rho is None else 0.5 * mass) * random_weights(count, 9).reshape(*batch, 9)
    return torch.rand(*batch, 6, 9, dtype=torch.float64), a, b


def assert_same(ours: Any, theirs: Any, *, balanced: bool, tolerance: float = 1e-8) -> None:
    """All attributes that both have agree, balanced potentials up to a constant."""
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for name in ("value", "plan", "density", "marginal_a", "marginal_b"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert type(mine) is type(other), name
        assert mine.shape == other.shape, name
        assert mine.dtype == other.dtype, name
        close(mine, other, msg=lambda m, n=name: f"{n}: {m}")
    f, g = torch.as_tensor(ours.potential_a), torch.as_tensor(ours.potential_b)
    f_other, g_other = torch.as_tensor(theirs.potential_a), torch.as_tensor(theirs.potential_b)
    shift = (f_other - f).mean(-1, keepdim=True) if balanced else 0.0
    close(f + shift, f_other)
    close(g - shift, g_other)
    for name in ("lazy_plan", "lazy_density", "a_to_b", "b_to_a"):
        assert getattr(ours, name) is None
        assert getattr(theirs, name) is None
    assert ours.value_linear is None
    assert "feydy2019interpolating" in ours.citation


@pytest.mark.usefixtures("without_annealing")
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("library", ["torch", "numpy", "lists"])
def test_converged_geomloss_has_the_same_results(rho: float | None, batch: tuple[int, ...], library: str) -> None:
    name = "solve_batch" if batch else "solve"
    cost, a, b = problem(batch, rho=rho)
    if library != "torch":
        cost, a, b = (t.numpy() if library == "numpy" else t.tolist() for t in (cost, a, b))
    options = {"reg": 0.3, "unbalanced": rho}
    for weights in ({"a": a, "b": b}, {}):
        ours = getattr(ot, name)(cost, **weights, **options, **TIGHT)
        theirs = getattr(geomloss.ot, name)(cost, **weights, **options, max_iter=300)
        assert_same(ours, theirs, balanced=rho is None)
        assert np.all(np.asarray(ours.converged))
        vectors = np.random.default_rng(0).normal(size=(*batch, 9, 2))
        vectors = torch.from_numpy(vectors) if library == "torch" else vectors
        for operator in ("plan_operator", "density_operator"):
            mine, other = getattr(ours, operator), getattr(theirs, operator)
            assert mine.shape == other.shape
            torch.testing.assert_close(mine @ vectors, other @ vectors, rtol=1e-7, atol=1e-7)
            dense = torch.as_tensor(ours.plan if operator == "plan_operator" else ours.density)
            back = mine.T @ (mine @ vectors)  # geomloss 0.3.1's plan_operator.T is an AssertionError
            torch.testing.assert_close(torch.as_tensor(back), dense.mT @ (dense @ torch.as_tensor(vectors)))


@pytest.mark.usefixtures("without_annealing")
def test_float32_is_solved_in_float64() -> None:
    cost, a, b = (t.float() for t in problem())
    ours = ot.solve(cost, a=a, b=b, reg=0.3, **TIGHT)
    assert_same(ours, geomloss.ot.solve(cost, a=a, b=b, reg=0.3, max_iter=300), balanced=True, tolerance=1e-4)
    exact = ot.solve(cost.double(), a=a.double(), b=b.double(), reg=0.3, **TIGHT)
    assert bool((ours.plan == exact.plan.float()).all())


@pytest.mark.parametrize("rho", RHOS)
def test_geomloss_tends_to_ours_with_max_iter(rho: float | None) -> None:
    cost, a, b = problem((4,), rho=rho)
    options = {"a": a, "b": b, "reg": 0.05, "unbalanced": rho}
    exact = ot.solve_batch(cost, **options, **TIGHT).plan
    plans = [geomloss.ot.solve_batch(cost, **options, max_iter=n).plan for n in (10, 100, 2000)]
    errors = [float((plan - exact).norm() / exact.norm()) for plan in plans]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < min(0.03, errors[0] / 10)
    # Negative control: 0.8 of the temperature is another plan.
    other = ot.solve_batch(cost, **{**options, "reg": 0.04}, **TIGHT).plan
    assert float((other - exact).norm() / exact.norm()) > 2 * errors[2]


def test_max_iter_does_not_change_the_answer() -> None:
    cost, a, b = problem()
    exact = ot.solve(cost, a=a, b=b, reg=0.05, **TIGHT)
    for max_iter in (1, 2, 7, 1000):
        found = ot.solve(cost, a=a, b=b, reg=0.05, max_iter=max_iter, **TIGHT)
        torch.testing.assert_close(found.plan, exact.plan, rtol=0, atol=1e-9)
    loose = ot.solve(cost, a=a, b=b, reg=0.05, tol=1e-2, max_iter=1)
    assert float(loose.residual) > float(exact.residual)
    assert int(loose.n_iters) < int(exact.n_iters)


@pytest.mark.usefixtures("without_annealing")
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # geomloss reads the range of the cost
@pytest.mark.parametrize("rho", RHOS)
def test_gradient_of_the_value_with_respect_to_the_cost_is_the_plan(rho: float | None) -> None:
    """geomloss's is 2 plan, or (2 rho + epsilon) / (rho + epsilon) plan; its own differences say who is right."""
    cost, a, b = problem(rho=rho)
    cost.requires_grad_()
    options = {"a": a, "b": b, "reg": 0.3, "unbalanced": rho}
    ours = ot.solve(cost, **options, **TIGHT)
    (gradient,) = torch.autograd.grad(ours.value, cost)
    torch.testing.assert_close(gradient, ours.plan.detach(), rtol=1e-7, atol=1e-9)

    def geomloss_value(cost: Tensor) -> Tensor:
        return geomloss.ot.solve(cost, **options, max_iter=300).value

    (other,) = torch.autograd.grad(geomloss_value(cost), cost)
    factor = 2.0 if rho is None else (2 * rho + 0.3) / (rho + 0.3)
    torch.testing.assert_close(other, factor * gradient, rtol=1e-5, atol=1e-8)
    step = 1e-5 * torch.randn_like(cost)
    with torch.no_grad():
        change = (geomloss_value(cost + step) - geomloss_value(cost - step)) / 2
    torch.testing.assert_close(change, (gradient * step).sum(), rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize("rho", RHOS)
def test_every_result_has_the_gradient_of_the_optimum(rho: float | None) -> None:
    inputs = problem((2,), rho=rho)
    steps = [1e-5 * torch.randn_like(t) for t in inputs]
    if rho is None:  # keep the masses equal
        steps[1:] = [step - step.mean(-1, keepdim=True) for step in steps[1:]]

    def results(side: float) -> dict[str, Tensor]:
        cost, a, b = (t + side * step for t, step in zip(inputs, steps, strict=True))
        solved = ot.solve_batch(cost, a=a, b=b, reg=0.3, unbalanced=rho, tol=1e-13)
        names = ("value", "transport_cost", "plan", "density", "marginal_a", "marginal_b", "potential_a", "potential_b")
        return {name: getattr(solved, name) for name in names}

    ahead, behind = results(1.0), results(-1.0)
    for t in inputs:
        t.requires_grad_()
    for name, result in results(0.0).items():
        weights = torch.randn_like(result)
        slopes = torch.autograd.grad((weights * result).sum(), inputs, retain_graph=True)
        slope = sum((g * step).sum() for g, step in zip(slopes, steps, strict=True))
        change = (weights * (ahead[name] - behind[name])).sum() / 2
        torch.testing.assert_close(change, slope, rtol=1e-3, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("without_annealing")
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_point_clouds(rho: float | None, debias: bool, library: str) -> None:
    _, a, b = problem(rho=rho)
    x, y = torch.rand(6, 2, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    if library == "numpy":
        a, b, x, y = (t.numpy() for t in (a, b, x, y))
    options = {"a": a, "b": b, "debias": debias, "reg": 0.3, "unbalanced": rho}
    ours = ot.solve_sample(x, y, **options, **TIGHT)
    theirs = geomloss.ot.solve_sample(x, y, **options, max_iter=400)
    assert_same(ours, theirs, balanced=rho is None)
    if debias:
        for name in ("potential_aa", "potential_bb"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-7, atol=1e-8)
    else:
        with pytest.raises(ValueError, match="debias=True"):
            _ = ours.potential_aa


def test_lengths_stand_for_temperatures() -> None:
    x, y = torch.rand(6, 2, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    by_length = ot.solve_sample(x, y, blur=0.3, reach=0.8, **TIGHT)
    by_number = ot.solve_sample(x, y, reg=2 * 0.3**2, unbalanced=2 * 0.8**2, **TIGHT)
    torch.testing.assert_close(by_length.plan, by_number.plan)
    theirs = geomloss.ot.solve_sample(x, y, blur=0.3, reach=0.8, max_iter=3000)
    torch.testing.assert_close(by_length.value, theirs.value, rtol=1e-3, atol=0)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return torch.cdist(x, y)

    by_length = ot.solve_sample(x, y, cost=distance, blur=0.3, reach=0.8, **TIGHT)
    by_number = ot.solve(distance(x, y), reg=0.3, unbalanced=0.8, **TIGHT)
    torch.testing.assert_close(by_length.plan, by_number.plan)


def test_batches_are_loops() -> None:
    x, y = torch.rand(3, 6, 2, dtype=torch.float64), torch.rand(3, 9, 2, dtype=torch.float64)
    together = ot.solve_sample_batch(x, y, blur=0.3, debias=True, **TIGHT)
    for i in range(3):
        alone = ot.solve_sample(x[i], y[i], blur=0.3, debias=True, **TIGHT)
        torch.testing.assert_close(together.value[i], alone.value)
        torch.testing.assert_close(together.plan[i], alone.plan)


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_large_clouds_are_streamed(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, a, b = problem()
    x, y = torch.rand(6, 2, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    values = torch.randn(9, 3, dtype=torch.float64)
    if library == "numpy":
        a, b, x, y, values = (t.numpy() for t in (a, b, x, y, values))
    stored = ot.solve_sample(x, y, a=a, b=b, reg=0.3, debias=True, **TIGHT)
    expected = {name: getattr(stored, name) for name in ("plan_operator", "density_operator", "plan", "density")}
    matrix = solver.half_squared_distances
    monkeypatch.setattr(solver, "LARGEST_MATRIX", 0)
    monkeypatch.setattr(solver, "half_squared_distances", None)  # whoever asks for the matrix fails
    streamed = ot.solve_sample(x, y, a=a, b=b, reg=0.3, debias=True, **TIGHT)
    for name in ("value", "transport_cost", "potential_a", "potential_aa", "marginal_a", "marginal_b"):
        torch.testing.assert_close(getattr(streamed, name), getattr(stored, name), rtol=1e-8, atol=1e-9)
    for operator in ("plan_operator", "density_operator"):
        mine, other = getattr(streamed, operator), expected[operator]
        torch.testing.assert_close(mine @ values, other @ values, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(mine.T @ (mine @ values), other.T @ (other @ values), rtol=1e-7, atol=1e-7)
    with pytest.raises(TypeError):
        _ = streamed.density
    monkeypatch.setattr(solver, "half_squared_distances", matrix)
    torch.testing.assert_close(streamed.density, expected["density"], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(streamed.plan, expected["plan"], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize("reg", [0.01, 0.1, 1.0])
def test_transposed_problems_have_transposed_results(rho: float | None, reg: float) -> None:
    cost, a, b = problem((2,), rho=rho)
    for max_iter in (1, 50):
        options = {"reg": reg, "unbalanced": rho, "max_iter": max_iter}
        forward = ot.solve_batch(cost, a=a, b=b, **options)
        backward = ot.solve_batch(cost.mT, a=b, b=a, **options)
        torch.testing.assert_close(forward.value, backward.value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(forward.plan, backward.plan.mT, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(forward.potential_a, backward.potential_b, rtol=1e-3, atol=1e-4)


def test_blocks_without_exchange_have_symmetric_potentials() -> None:
    """The shift between the blocks' potentials is beyond float64: both orders must choose the same."""
    cost = 20.0 * (1 - torch.block_diag(torch.ones(2, 3), torch.ones(3, 2)).double()) + torch.rand(5, 5).double()
    a = torch.tensor([0.2, 0.3, 0.1, 0.3, 0.1], dtype=torch.float64)
    b = torch.tensor([0.1, 0.15, 0.25, 0.2, 0.3], dtype=torch.float64)
    for max_iter in (1, 20):
        forward = ot.solve(cost, a=a, b=b, reg=0.01, max_iter=max_iter)
        backward = ot.solve(cost.mT, a=b, b=a, reg=0.01, max_iter=max_iter)
        torch.testing.assert_close(forward.potential_a, backward.potential_b, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(forward.plan, backward.plan.mT, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rho", RHOS)
def test_scaled_costs_and_temperatures_scale_the_value(rho: float | None) -> None:
    cost, a, b = problem(rho=rho)
    base = ot.solve(cost, a=a, b=b, reg=0.05, unbalanced=rho, **TIGHT)
    for scale in (0.01, 100.0):
        other = ot.solve(scale * cost, a=a, b=b, reg=scale * 0.05, unbalanced=rho and scale * rho, **TIGHT)
        torch.testing.assert_close(other.value, scale * base.value)
        torch.testing.assert_close(other.plan, base.plan)
    if rho is None:
        shifted = ot.solve(cost + 5.0, a=a, b=b, reg=0.05, **TIGHT)
        torch.testing.assert_close(shifted.value, base.value + 5.0 * a.sum())


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_diracs(library: str) -> None:
    cost = 200 * torch.rand(5, 1, 1, dtype=torch.float64) - 100
    result = ot.solve_batch(cost if library == "torch" else cost.numpy(), reg=0.01)
    torch.testing.assert_close(torch.as_tensor(result.value), cost.flatten())
    torch.testing.assert_close(torch.as_tensor(result.potential_a), cost.squeeze(-1) / 2)
    torch.testing.assert_close(torch.as_tensor(result.plan), torch.ones_like(cost))


def test_unbalanced_diracs_have_the_full_objective_as_value() -> None:
    a, b, cost = 0.3 + torch.rand(3, 6, 1, dtype=torch.float64)
    epsilon, rho = 0.2, 0.7
    mass = (((epsilon + rho) * (a * b).log() - cost) / (epsilon + 2 * rho)).exp()
    value = epsilon * a * b + rho * (a + b) - (epsilon + 2 * rho) * mass
    result = ot.solve_batch(cost.unsqueeze(-1), a=a, b=b, reg=epsilon, unbalanced=rho, **TIGHT)
    torch.testing.assert_close(result.value, value.squeeze(-1))
    torch.testing.assert_close(result.plan, mass.unsqueeze(-1))


def test_two_by_two() -> None:
    """Plan [[t, 1/2 - t], [1/2 - t, t]] with log(t / (1/2 - t)) = gap / (2 epsilon)."""
    cost = torch.rand(2, 2, dtype=torch.float64)
    gap = cost[0, 1] + cost[1, 0] - cost[0, 0] - cost[1, 1]
    t = 0.5 * torch.sigmoid(gap / (2 * 0.1))
    result = ot.solve(cost, reg=0.1, **TIGHT)
    torch.testing.assert_close(result.plan, torch.stack([torch.stack([t, 0.5 - t]), torch.stack([0.5 - t, t])]))
    torch.testing.assert_close(result.transport_cost, (result.plan * cost).sum())


@pytest.mark.parametrize("size", [1, 4, 10])
def test_permutations(size: int) -> None:
    cost = 5.0 + 15.0 * torch.rand(3, size, size, dtype=torch.float64)
    plan = torch.stack([torch.eye(size, dtype=torch.float64)[torch.randperm(size)] for _ in range(3)])
    cost = torch.where(plan > 0, -20.0 * torch.rand_like(cost), cost)
    result = ot.solve_batch(cost, a=torch.ones(3, size).double(), b=torch.ones(3, size).double(), reg=0.1)
    torch.testing.assert_close(result.plan, plan, rtol=0, atol=1e-3)
    # Without its mass terms the entropy of a permutation of unit masses is zero: the value is the cost of the plan.
    torch.testing.assert_close(result.value, (plan * cost).sum((1, 2)), rtol=0, atol=1e-2)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_nearly_unregularised_assignment(size: int) -> None:
    """The transport cost exceeds the assignment's by epsilon size log size at most, and the solve ends."""
    cost, ones = 2 * torch.rand(4, size, size, dtype=torch.float64) - 1, torch.ones(4, size, dtype=torch.float64)
    result = ot.solve_batch(cost, a=ones, b=ones, reg=1e-3, max_iter=100)
    for i in range(4):
        rows, cols = linear_sum_assignment(cost[i].numpy())
        best = float(cost[i, rows, cols].sum())
        assert best - 1e-3 <= float(result.transport_cost[i]) <= best + 1e-3 * size * math.log(size) + 1e-3
    torch.testing.assert_close(result.marginal_a, ones, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dim", [1, 3])
def test_gradients_of_convex_functions_are_optimal_maps(dim: int) -> None:
    """Brenier: y = x + gradient of sum_k v_k |x - z_k| moves each point of a grid to its own image."""
    x = 0.5 * torch.ones(8, dim, dtype=torch.float64)
    x[:, 0] = torch.arange(8) / 8
    keys, strength = torch.rand(5, dim, dtype=torch.float64), 0.1 + torch.rand(5, 1, dtype=torch.float64)
    y = x + (strength * torch.nn.functional.normalize(x.unsqueeze(1) - keys, dim=-1)).sum(1)
    weights = random_weights(1, 8)[0]
    result = ot.solve(((x.unsqueeze(1) - y) ** 2).sum(-1) / 2, a=weights, b=weights, reg=1e-3)
    torch.testing.assert_close(result.transport_cost, (weights * ((x - y) ** 2).sum(-1) / 2).sum(), rtol=0, atol=1e-2)
    torch.testing.assert_close(result.plan.sum(1), weights, rtol=0, atol=1e-4)
    torch.testing.assert_close(result.plan, weights.diag(), rtol=0, atol=1e-1)


def test_gaussians() -> None:
    """Janati et al. 2020, theorem 1, in one dimension: value and plan between N(a, A) and N(b, B), epsilon = 2 s^2."""
    a, b, std_a, std_b = (
        float(t) for t in torch.rand(4) * torch.tensor([1, 1, 0.05, 0.05]) + torch.tensor([0, 0, 0.17, 0.17])
    )
    sigma = 0.1 + 0.4 * float(torch.rand(()))
    A, B, s2 = std_a**2, std_b**2, sigma**2
    D = math.sqrt(4 * A * B + s2**2)
    value = (a - b) ** 2 + A + B - D + s2 * (1 - math.log(2 * s2)) + s2 * math.log(D + s2)
    cross = D / 2 - s2 / 2
    x, y = torch.linspace(-1.2, 2.2, 90).double().unsqueeze(-1), torch.linspace(-1.2, 2.2, 101).double().unsqueeze(-1)
    weights = [(-((p - m) ** 2) / (2 * v)).exp().squeeze(-1) for p, m, v in ((x, a, A), (y, b, B))]
    weights = [w / w.sum() for w in weights]
    result = ot.solve_sample(x, y, *weights, blur=sigma)
    torch.testing.assert_close(float(result.value), value, rtol=1e-3, atol=1e-3)
    precision = torch.linalg.inv(torch.tensor([[A, cross], [cross, B]], dtype=torch.float64))
    offsets = torch.stack(torch.broadcast_tensors(x - a, y.T - b), -1)
    plan = (-0.5 * ((offsets @ precision) * offsets).sum(-1)).exp()
    torch.testing.assert_close(result.plan, plan / plan.sum(), rtol=0, atol=1e-5)


def test_documented_example() -> None:
    result = ot.solve([[0.0, 1.0, 4.0], [2.0, 1.0, 0.0]], a=[2, 2], b=[1, 1, 2], reg=0.001, max_iter=100)
    assert isinstance(result, OTResult)
    assert isinstance(result.plan, np.ndarray)
    np.testing.assert_allclose(result.plan, [[1, 1, 0], [0, 0, 2]], atol=1e-3)
    assert f"{result.value:.3f}" == "0.997"
    np.testing.assert_allclose(result.plan_operator @ np.array([-2.0, 1.0, 1.0]), [-1, 2], atol=1e-3)


def test_zero_weights_are_points_without_mass() -> None:
    cost, a, b = problem()
    a[2] = 0.0
    a, kept = a * b.sum() / a.sum(), [0, 1, 3, 4, 5]
    full = ot.solve(cost, a=a, b=b, reg=0.1, **TIGHT)
    without = ot.solve(cost[kept], a=a[kept], b=b, reg=0.1, **TIGHT)
    torch.testing.assert_close(full.value, without.value)
    torch.testing.assert_close(full.plan[kept], without.plan)
    assert bool((full.plan[2] == 0).all())


def test_operators_check_shapes() -> None:
    operator = LinearOperator.from_dense(torch.rand(2, 3))
    assert operator.shape == (2, 3)
    assert operator.T.shape == (3, 2)
    with pytest.raises(ValueError, match="expected"):
        operator @ torch.rand(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg": 0.0}, "reg"),
        ({"reg": None}, "reg"),
        ({"unbalanced": -1.0}, "unbalanced"),
        ({"unbalanced": (1.0, 2.0)}, "unbalanced"),
        ({"unbalanced_type": "TV"}, "unbalanced_type"),
        ({"method": "annealing"}, "method"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": 0.0}, "tol"),
        ({"a": torch.ones(5)}, "a has shape"),
        ({"a": torch.tensor([-1.0, 1, 1, 1])}, "negative"),
        ({"a": torch.full((4,), 0.3)}, "same masses"),
        ({"a": np.full(4, 0.25)}, "NumPy"),
        ({"C": torch.rand(2, 4, 3)}, "C has shape"),
        ({"C": torch.rand(0, 3)}, "C has shape"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"C": torch.rand(4, 3), "reg": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        ot.solve(arguments.pop("C"), **arguments)


def test_clouds_that_do_not_fit_are_refused() -> None:
    x, y = torch.rand(4, 2), torch.rand(3, 2)
    for clouds, options, message in [
        ((x, y), {"reg": 0.1, "blur": 0.1}, "say the same"),
        ((x, y), {"reg": 0.1, "unbalanced": 1.0, "reach": 1.0}, "say the same"),
        ((x, y), {}, "no reg"),
        ((x, y), {"reg": 0.1, "cost": "euclidean"}, "sqeuclidean"),
        ((x, torch.rand(3, 3)), {"reg": 0.1}, "X_a has shape"),
        ((x[None], y[None]), {"reg": 0.1}, "X_a has shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            ot.solve_sample(*clouds, **options)

"""Peers from published libraries, each imported when it is asked for: POT, geomloss, OTT-JAX, KeOps.

Each is set up as its documentation says it is fastest: float32 inputs in its own arrays, stop tests pushed out of the
way where a number of iterations is asked for, jit before the clock starts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contender import Prepared
from .problems import Clouds, Dense


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call without the warning that the iterations asked for did not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


# POT. Its functions return the plan: forming it is part of their time (one of n_iters + 2 passes over the cost).


def pot_each(problem: Dense, solve: Callable[..., Any]) -> Prepared:
    """One of POT's functions, one problem after the other, on NumPy arrays (its fastest back end on a CPU)."""
    costs, a, b = problem.cost.numpy(), problem.a[0].numpy(), problem.b[0].numpy()

    def call() -> list[Any]:
        return [quietly(solve, a, b, cost) for cost in costs]

    return Prepared(call, lambda plans: torch.stack([torch.as_tensor(plan) for plan in plans]))


def rho(problem: Dense) -> float:
    """Weight of the KL term, infinite when balanced."""
    return float("inf") if problem.tau == 1 else problem.epsilon * problem.tau / (1 - problem.tau)


def pot_stabilized(problem: Dense) -> Prepared:
    """Kernel products with absorption: ot.unbalanced.sinkhorn_stabilized_unbalanced, ot.bregman.sinkhorn_stabilized."""
    import ot

    def solve(a: Any, b: Any, cost: Any) -> Any:
        options: dict[str, Any] = {"numItermax": problem.n_iters, "stopThr": 0}
        if problem.tau == 1:
            return ot.bregman.sinkhorn_stabilized(a, b, cost, problem.epsilon, **options)
        options["tau"] = 1e8  # absorbs seldom; its formula for several absorptions loses accuracy
        return ot.unbalanced.sinkhorn_stabilized_unbalanced(a, b, cost, problem.epsilon, rho(problem), **options)

    return pot_each(problem, solve)


def pot_kernel(problem: Dense) -> Prepared:
    """ot.sinkhorn, or ot.unbalanced.sinkhorn_unbalanced: kernel products."""
    import ot

    def solve(a: Any, b: Any, cost: Any) -> Any:
        options = {"numItermax": problem.n_iters, "stopThr": 0}
        if problem.tau == 1:
            return ot.sinkhorn(a, b, cost, problem.epsilon, **options)
        return ot.unbalanced.sinkhorn_unbalanced(a, b, cost, problem.epsilon, rho(problem), **options)

    return pot_each(problem, solve)


def pot_batch(problem: Dense, method: str) -> Prepared:
    """ot.batch.solve_batch on torch tensors, all problems at once; balanced only."""
    import ot.batch

    options = {"max_iter": problem.n_iters, "tol": 0.0, "method": method, "grad": "detach"}

    def call() -> Tensor:
        return ot.batch.solve_batch(problem.cost, problem.epsilon, problem.a, problem.b, **options).plan

    return Prepared(call)


def pot_lazy(problem: Clouds) -> Prepared:
    """ot.bregman.empirical_sinkhorn(isLazy=True) on NumPy arrays, 1,024 rows at a time."""
    import ot

    x, y = problem.x.numpy(), problem.y.numpy()
    options = {"numIterMax": problem.n_iters, "stopThr": 0, "isLazy": True, "batchSize": 1024}

    def call() -> tuple[Any, Any]:
        return quietly(ot.bregman.empirical_sinkhorn, x, y, problem.epsilon, **options)

    def result(scalings: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        log_u, log_v = (torch.as_tensor(s).double() for s in scalings)  # counting measure, over epsilon
        return (log_u - log_u.new_tensor(1 / x.shape[0]).log()) * problem.epsilon, (
            log_v - log_v.new_tensor(1 / y.shape[0]).log()
        ) * problem.epsilon

    return Prepared(call, result)


# geomloss


def geomloss_batch(problem: Dense) -> Prepared:
    """geomloss.ot.solve_batch: all problems at once, log domain."""
    from geomloss import ot

    unbalanced = None if problem.tau == 1 else rho(problem)

    def call() -> tuple[Tensor, Tensor]:
        solution = ot.solve_batch(
            problem.cost, a=problem.a, b=problem.b, reg=problem.epsilon, unbalanced=unbalanced, max_iter=problem.n_iters
        )
        return solution.potential_a, solution.potential_b

    return Prepared(call, lambda fg: problem.plan_from(*fg))


# OTT-JAX


def ott_iterations(n_iters: int) -> dict[str, Any]:
    """Options for exactly that many iterations; they come in blocks of inner_iterations, 10 unless told."""
    return {"threshold": 0.0, "min_iterations": n_iters, "max_iterations": n_iters, "inner_iterations": n_iters}


def ott_solver(problem: Dense, lse_mode: bool, implicit: bool = True) -> Any:
    """cost [N, M] -> (f, g) in the counting measure, for exactly n_iters iterations."""
    from ott.geometry import geometry
    from ott.solvers import linear
    from ott.solvers.linear import implicit_differentiation

    options: dict[str, Any] = {
        "lse_mode": lse_mode, **ott_iterations(problem.n_iters),
        "implicit_diff": implicit_differentiation.ImplicitDiff() if implicit else None,
    }  # fmt: skip

    def solve(cost: Any) -> tuple[Any, Any]:
        geom = geometry.Geometry(cost_matrix=cost, epsilon=problem.epsilon)
        out = linear.solve(geom, tau_a=problem.tau, tau_b=problem.tau, **options)
        return out.f, out.g

    return solve


def ott_batched(problem: Dense, lse_mode: bool) -> Prepared:
    """ott.solvers.linear.solve under jax.jit(jax.vmap)."""
    import jax

    run = jax.jit(jax.vmap(ott_solver(problem, lse_mode)))
    cost = jax.numpy.asarray(problem.cost.numpy())

    def result(fg: Any) -> Tensor:
        return problem.plan_from_counting(*(torch.tensor(jax.device_get(side)) for side in fg))

    return Prepared(lambda: jax.block_until_ready(run(cost)), result)


def ott_log(problem: Dense) -> Prepared:
    """Log-sum-exp mode, its default."""
    return ott_batched(problem, lse_mode=True)


def ott_kernel(problem: Dense) -> Prepared:
    """Kernel mode, which its documentation calls faster and less stable."""
    return ott_batched(problem, lse_mode=False)


def ott_gradient(problem: Dense, implicit: bool) -> Prepared:
    """Gradient of sum(plan * cotangent): jit of the gradient of a vmap, implicit or through the iterations."""
    import jax
    from jax import numpy as jnp

    solve = ott_solver(problem, lse_mode=True, implicit=implicit)
    cost, cotangent = (jnp.asarray(t.numpy()) for t in (problem.cost, problem.cotangent))

    def loss(cost: Any) -> Any:
        f, g = jax.vmap(solve)(cost)
        plan = jnp.exp((f[:, :, None] + g[:, None, :] - cost) / problem.epsilon) * problem.counting_scale
        return (plan * cotangent).sum()

    run = jax.jit(jax.grad(loss))
    return Prepared(lambda: jax.block_until_ready(run(cost)), lambda grad: torch.tensor(jax.device_get(grad)))


def ott_online(problem: Clouds) -> Prepared:
    """PointCloud(batch_size=1024): the cost is computed again in every iteration."""
    import jax
    from ott.geometry import pointcloud
    from ott.solvers import linear

    def solve(x: Any, y: Any) -> tuple[Any, Any]:
        geom = pointcloud.PointCloud(x, y, epsilon=problem.epsilon, batch_size=1024)
        out = linear.solve(geom, **ott_iterations(problem.n_iters))
        return out.f, out.g

    run = jax.jit(solve)
    # It updates g first: the clouds are exchanged so that an iteration means the same to all.
    y, x = (jax.numpy.asarray(points.numpy()) for points in (problem.x, problem.y))

    def result(fg: Any) -> tuple[Tensor, Tensor]:
        g, f = (torch.tensor(jax.device_get(side)) for side in fg)  # counting measure
        size = torch.tensor(float(problem.x.shape[0]))
        return f + problem.epsilon * size.log(), g + problem.epsilon * size.log()

    return Prepared(lambda: jax.block_until_ready(run(x, y)), result)


# KeOps


def keops_clouds(problem: Clouds) -> Prepared:
    """pykeops LazyTensor log-sum-exp, compiled for these dimensions."""
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)
    x, y = problem.x.unsqueeze(1).contiguous(), problem.y.unsqueeze(0).contiguous()
    x_as_y, y_as_x = problem.x.unsqueeze(0).contiguous(), problem.y.unsqueeze(1).contiguous()

    def half_step(points: Tensor, others: Tensor, potential: Tensor) -> Tensor:
        squared = ((LazyTensor(points) - LazyTensor(others)) ** 2).sum(-1)
        exponent = (LazyTensor(potential.view(1, -1, 1)) - squared) / problem.epsilon
        return -problem.epsilon * (exponent.logsumexp(dim=1).squeeze(-1) - math.log(potential.shape[0]))

    def call() -> tuple[Tensor, Tensor]:
        g = torch.zeros(problem.y.shape[0])
        f = g
        for _ in range(problem.n_iters):
            f = half_step(x, y, g)
            g = half_step(y_as_x, x_as_y, f)
        return f, g

    return Prepared(call)

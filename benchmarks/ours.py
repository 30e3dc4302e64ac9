"""The public functions of `pisces_kernels` as contenders."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from pisces_kernels import SinkhornResult, sinkhorn, sinkhorn_points, token_cost, transport_attention

from .contender import Prepared
from .peers import with_backward
from .problems import Clouds, Dense, Tokens


def solve(problem: Dense) -> Prepared:
    """Potentials."""
    options: dict[str, Any] = {
        "epsilon": problem.epsilon, "tau": problem.tau, "max_iters": problem.n_iters, "tol": problem.tol,
        "acceleration": problem.acceleration, "gradient": "none",
    }  # fmt: skip

    def result(solution: SinkhornResult) -> Tensor:
        return problem.plan_from(solution.f, solution.g)

    return Prepared(lambda: sinkhorn(problem.cost, **options), result)


def solve_anderson(problem: Dense) -> Prepared:
    """Potentials, accelerated."""
    return solve(dataclasses.replace(problem, acceleration="anderson"))


def plan(problem: Dense) -> Prepared:
    """Potentials and plan."""
    inner = solve(problem)
    return Prepared(lambda: inner.call().plan())


def plan_gradient(problem: Dense, gradient: str) -> Prepared:
    """Gradient of sum(plan * cotangent) with respect to the cost."""
    cost = problem.cost.clone().requires_grad_()
    options: dict[str, Any] = {"epsilon": problem.epsilon, "tau": problem.tau, "max_iters": problem.n_iters}

    def call() -> Tensor:
        plan = sinkhorn(cost, tol=problem.tol, gradient=gradient, **options).plan()
        (result,) = torch.autograd.grad(plan, cost, problem.cotangent)
        return result

    return Prepared(call)


def small(problem: Dense) -> Prepared:
    """One call that records a gradient."""
    cost = problem.cost[0].clone().requires_grad_()

    def call() -> SinkhornResult:
        return sinkhorn(cost, epsilon=problem.epsilon, tau=problem.tau, tol=problem.tol, max_iters=problem.n_iters)

    def result(solution: SinkhornResult) -> Tensor:
        return problem.plan_from(solution.f.detach().unsqueeze(0), solution.g.detach().unsqueeze(0))

    return Prepared(call, result)


def cost(data: Tokens) -> Prepared:
    """Cost of all heads."""
    inputs = (data.text, data.video, data.attention, data.frame_index, data.positions)
    return Prepared(lambda: token_cost(*inputs), lambda cost: cost[0])


def cost_gradient(data: Tokens) -> Prepared:
    """Forward and backward of the cost."""
    inputs = tuple(t.clone().requires_grad_() for t in (data.text, data.video, data.attention))

    def call() -> tuple[Tensor, ...]:
        cost = token_cost(inputs[0], inputs[1], inputs[2], data.frame_index, data.positions)
        return torch.autograd.grad(cost, inputs, data.cotangent)

    return Prepared(call, lambda grads: tuple(grad[0] for grad in grads))


def attention(data: Tokens, backward: bool = False) -> Prepared:
    """Refined attention, with its gradient if asked for."""

    def refine(attention: Tensor) -> Tensor:
        return transport_attention(
            data.text, data.video, attention, data.frame_index, data.positions, epsilon=data.epsilon, tau=data.tau,
            tol=data.tol,
        )  # fmt: skip

    return with_backward(refine, data) if backward else Prepared(lambda: refine(data.attention))


def clouds(problem: Clouds) -> Prepared:
    """Potentials between point clouds."""

    def call() -> tuple[Tensor, Tensor]:
        solution = sinkhorn_points(
            problem.x, problem.y, epsilon=problem.epsilon, max_iters=problem.n_iters, tol=problem.tol,
            acceleration=problem.acceleration, gradient="none",
        )  # fmt: skip
        return solution.f, solution.g

    return Prepared(call)


def clouds_anderson(problem: Clouds) -> Prepared:
    """Potentials between point clouds, accelerated."""
    return clouds(dataclasses.replace(problem, acceleration="anderson"))

"""Errors of results against float64 truths, and the errors that come out of the truths themselves."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pisces_kernels import reference

from . import peers
from .problems import Dense, Tokens, largest_relative, plan_error


def worst(*errors: float) -> float:
    """Largest error, NaN if one is NaN."""
    return torch.tensor(errors, dtype=torch.float64).max().item()


def dense_error(problem: Dense, plan: Tensor) -> float:
    """Worst row of the plan, total variation."""
    return plan_error(plan, problem.truth())


def gradient_error(problem: Dense, gradient: Tensor) -> float:
    """Largest error as a share of the largest entry."""
    return largest_relative(gradient, problem.true_gradient())


def cost_error(data: Tokens, cost: Tensor) -> float:
    """Largest difference of a cost in [0, 1]."""
    return (cost.double() - reference.token_cost(*data.double())[0]).abs().max().item()


@lru_cache(maxsize=1)
def true_cost_gradients(data: Tokens) -> tuple[Tensor, ...]:
    """Gradients of sum(cost * cotangent) with respect to text, video and attention, float64."""
    text, video, attention, index, places = data.double()
    inputs = tuple(t.requires_grad_() for t in (text, video, attention))
    cost = reference.token_cost(inputs[0], inputs[1], inputs[2], index, places)
    return tuple(grad[0] for grad in torch.autograd.grad(cost, inputs, data.cotangent.double()))


def cost_gradient_error(data: Tokens, gradients: tuple[Tensor, ...]) -> float:
    """Largest error of the three gradients, each as a share of its largest entry."""
    errors = [largest_relative(grad, true) for grad, true in zip(gradients, true_cost_gradients(data), strict=True)]
    return worst(*errors)


@lru_cache(maxsize=1)
def attention_truth(data: Tokens) -> tuple[Tensor, Tensor]:
    """(refined attention at the fixed point, its gradient with respect to the attention), float64."""
    cost = reference.token_cost(*data.double())[0]
    solved = Dense(cost, data.epsilon, data.tau).truth().unsqueeze(0)
    attention = data.attention.double().requires_grad_()
    refined = reference.fuse(attention, solved)
    (gradient,) = torch.autograd.grad(refined, attention, data.cotangent.double())
    return refined.detach(), gradient


def attention_error(data: Tokens, result: Any) -> float:
    """Worst row of the refined attention, total variation; with a gradient also its largest relative error."""
    refined, gradient = attention_truth(data)
    if not isinstance(result, tuple):
        return plan_error(result, refined)
    # Gradients are large where the attention is nearly 0 (they divide by it): a row's largest entry is its measure.
    scale = gradient.abs().amax(-1, keepdim=True)
    return worst(plan_error(result[0], refined), ((result[1].double() - gradient).abs() / scale).max().item())


def stop_error(problem: Dense, share: float = 1.0) -> float:
    """Error at which the official loop stops, or a share of it."""
    at_stop = dataclasses.replace(problem, tol=1e-3, n_iters=200)
    prepared = peers.official_solve(at_stop)
    return share * dense_error(problem, prepared.result(prepared.call()))


def plain_iteration(problem: Dense, n_iters: int, tol: float = 0.0) -> Tensor:
    """Plan after n_iters exact iterations, or when no log-scaling changes by tol, [P, N, M].

    Products in float64, which holds exp(-100) with room to spare.
    """
    kernel = (problem.cost.double() / -problem.epsilon).exp_() / problem.cost[0].numel()
    u, v = problem.a.double().fill_(1), problem.b.double().fill_(1)
    for _ in range(n_iters):
        old_u, old_v = u, v
        u, v = peers.batched_matvec_step(kernel, v, problem.tau)
        if max((u / old_u).log().abs().max(), (v / old_v).log().abs().max()) < tol:
            break
    return kernel * u.unsqueeze(2) * v.unsqueeze(1)


def fixed_count_error(problem: Dense) -> float:
    """Half as much again as the error of n_iters exact iterations, and what float32 adds.

    Contenders that start with the other side are half an iteration ahead or behind.
    """
    return 1.5 * dense_error(problem, plain_iteration(problem, problem.n_iters)) + 1e-5


def plain_error(problem: Dense, tol: float) -> float:
    """Error of the exact plain iteration where its largest change falls below tol."""
    return dense_error(problem, plain_iteration(problem, 1000, tol))

"""The plan of solved dense problems and its sums: plain formulas, and operators with a kernel behind them.

Everything is flat here, P problems in one dimension. With G the gradient of a function of the plan and its sums with
respect to one entry, and h = density G,

    a_bar = sum_j h b,   b_bar = sum_i h a,   f_bar = a a_bar / epsilon,   g_bar = b b_bar / epsilon,
    cost_bar = -a b h / epsilon (+ plan for each unit of transport cost),   epsilon_bar = -sum a b h exponent / epsilon.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch, reference
from ._autograd import differentiable
from ._formulas import differentiable_by
from ._precision import without_autocast
from ._vmap import fold_into_problems


def clean(cost: Tensor, row_mask: Tensor | None, col_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cost with 0 where masked, and which entries exist. [..., N, M]"""
    keep = torch.ones_like(cost, dtype=torch.bool)
    if row_mask is not None:
        keep = keep & row_mask.unsqueeze(-1)
    if col_mask is not None:
        keep = keep & col_mask.unsqueeze(-2)
    return torch.where(keep, cost, 0.0), keep


def exponent(cost: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
    """(f + g - cost) / epsilon, bounded where the weights are zero. [..., N, M]"""
    ratio = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon.to(f.dtype)[..., None, None]
    return reference.bounded(ratio, (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2))


def _gradients(
    grad_plan: Tensor | None,
    grad_rows: Tensor | None,
    grad_cols: Tensor | None,
    grad_energy: Tensor | None,
    cost: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients with respect to cost, f, g, a, b and epsilon.

    Args:
        grad_plan: [P, N, M], gradient with respect to the plan, or None: 0.
        grad_rows: [P, N], the same for its sums over columns.
        grad_cols: [P, M], for its sums over rows.
        grad_energy: [P], for sum(plan * cost).
        cost: [P, N, M], and so on: see `reference.sinkhorn`.
    """
    cost, keep = clean(cost, row_mask, col_mask)
    eps = epsilon.to(cost.dtype)[:, None, None]
    log_density = exponent(cost, f, g, a, b, epsilon)
    density = torch.where(keep, log_density.exp(), 0.0)
    weights = a.unsqueeze(-1) * b.unsqueeze(-2)
    grad = torch.zeros_like(cost)
    if grad_plan is not None:
        grad = torch.where(keep, grad_plan, 0.0)
    if grad_rows is not None:
        grad = grad + grad_rows.unsqueeze(-1)
    if grad_cols is not None:
        grad = grad + grad_cols.unsqueeze(-2)
    if grad_energy is not None:
        grad = grad + grad_energy[:, None, None] * cost
    by_density = density * grad
    by_exponent = by_density * weights
    grad_cost = -by_exponent / eps
    if grad_energy is not None:
        grad_cost = grad_cost + grad_energy[:, None, None] * density * weights
    return (
        grad_cost,
        by_exponent.sum(-1) / eps.squeeze(-1),
        by_exponent.sum(-2) / eps.squeeze(-1),
        (by_density * b.unsqueeze(-2)).sum(-1),
        (by_density * a.unsqueeze(-1)).sum(-2),
        (-(by_exponent * log_density).sum((-2, -1)) / eps[:, 0, 0]).to(epsilon.dtype),
    )


@torch.library.custom_op("pisces_kernels::sinkhorn_plan_backward", mutates_args=())
def _backward_op(
    grad_plan: Tensor | None,
    grad_rows: Tensor | None,
    grad_cols: Tensor | None,
    grad_energy: Tensor | None,
    cost: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_gradients` by a kernel."""
    grads, solved = (grad_plan, grad_rows, grad_cols, grad_energy), (cost, f, g, a, b, epsilon, row_mask, col_mask)
    return _dispatch.kernel("plan_backward", backend)(*grads, *solved)


@_backward_op.register_fake
def _(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(value, memory_format=torch.contiguous_format) for value in inputs[4:10])


fold_into_problems(_backward_op)
plan_gradients = differentiable_by(_backward_op, lambda *inputs: _gradients(*inputs[:-1]))


@torch.library.custom_op("pisces_kernels::sinkhorn_plan", mutates_args=())
def _plan_op(
    cost: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    logarithm: bool,
    backend: str,
) -> Tensor:
    """The plan exp((f + g - cost) / epsilon) a b, 0 where masked, or its logarithm. [P, N, M]"""
    write = _dispatch.kernel("plan", backend)
    return write(cost, f, g, a, b, epsilon, row_mask, col_mask, logarithm=logarithm)


@_plan_op.register_fake
def _(cost: Tensor, *unused: Any) -> Tensor:
    return torch.empty_like(cost, memory_format=torch.contiguous_format)


@torch.library.custom_op("pisces_kernels::sinkhorn_plan_sums", mutates_args=())
def _sums_op(
    cost: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plan's sums over columns [P, N] and over rows [P, M], and sum(plan * cost) [P]."""
    return _dispatch.kernel("plan_sums", backend)(cost, f, g, a, b, epsilon, row_mask, col_mask)


@_sums_op.register_fake
def _(cost: Tensor, f: Tensor, g: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    n_problems, n_rows, n_cols = cost.shape
    return cost.new_empty(n_problems, n_rows), cost.new_empty(n_problems, n_cols), cost.new_empty(n_problems)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _plan_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.logarithm, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


@without_autocast
def _plan_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.logarithm:
        grads = _log_gradients(grad, *ctx.saved_tensors)
    else:
        grads = plan_gradients(grad, None, None, None, *ctx.saved_tensors, ctx.backend)
    return (*grads, None, None, None, None)


def _log_gradients(
    grad: Tensor,
    cost: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """The same for the logarithm of the plan, whose entries without weight are constants."""
    cost, keep = clean(cost, row_mask, col_mask)
    grad = torch.where(keep & (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2), grad, 0.0)
    eps = epsilon.to(cost.dtype).unsqueeze(-1)  # [P, 1]
    by_rows, by_cols = grad.sum(-1), grad.sum(-2)
    by_exponent = (grad * exponent(cost, f, g, a, b, epsilon)).sum((-2, -1))
    return (
        -grad / eps.unsqueeze(-1),
        by_rows / eps,
        by_cols / eps,
        torch.where(a > 0, by_rows / torch.where(a > 0, a, 1.0), 0.0),
        torch.where(b > 0, by_cols / torch.where(b > 0, b, 1.0), 0.0),
        (-by_exponent / eps.squeeze(-1)).to(epsilon.dtype),
    )


@without_autocast
def _sums_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return (*plan_gradients(None, *grads, *ctx.saved_tensors, ctx.backend), None, None, None)


fold_into_problems(_plan_op)
fold_into_problems(_sums_op)
plan = differentiable(_plan_op, _plan_backward, _plan_setup_context)
plan_sums = differentiable(_sums_op, _sums_backward, _setup_context)

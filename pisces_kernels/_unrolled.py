"""Gradient through exactly the iterations that ran, by recomputing them: memory O(iterations * (N + M)), no graph.

One half iteration is soft_i = -epsilon log sum_j b_j exp((g_j - cost_ij) / epsilon), then f = tau soft, or with an
exact mass `reference.saturate`. With R_ij = softmax_j((g_j - cost_ij) / epsilon + log b_j) and s the gradient of soft,

    cost_bar += s_i R_ij,    g_bar_j -= sum_i s_i R_ij,    b_bar_j -= epsilon sum_i s_i R_ij / b_j.

The formulas are differentiable torch code, which gives second derivatives; those do keep a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch, reference
from ._formulas import differentiable_by
from ._vmap import fold_into_problems


def _transform_vjp(
    cost: Tensor, other: Tensor, weight: Tensor, live: Tensor, epsilon: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a c-transform with respect to cost, the other potential, its weights and epsilon.

    Args:
        cost: [P, N, M], 0 where masked.
        other: [P, M], potential that is summed out.
        weight: [P, M].
        live: [P, N, 1] bool, False where a weight of zero stands in for a row, or for a whole problem.
        epsilon: [P, 1].
        grad: [P, N], gradient with respect to the transform.

    Returns:
        ([P, N, M], [P, M], [P, M], [P]).
    """
    log_weight = torch.where((weight > 0).any(-1, keepdim=True), reference.log_weights(weight), 0.0)
    exponent = (other.unsqueeze(-2) - cost) / epsilon.unsqueeze(-1)
    log_sum = torch.logsumexp(exponent + log_weight.unsqueeze(-2), -1, keepdim=True)
    density = reference.bounded(exponent - log_sum, live & (weight > 0).unsqueeze(-2)).exp()  # R / weight
    soft = density * weight.unsqueeze(-2)  # R
    by_epsilon = (grad * ((soft * exponent).sum(-1) - log_sum.squeeze(-1))).sum(-1)
    by_cost = grad.unsqueeze(-1) * soft
    return by_cost, -by_cost.sum(-2), -epsilon * (grad.unsqueeze(-1) * density).sum(-2), by_epsilon


def _saturate_vjp(
    soft: Tensor, weight: Tensor, level: Tensor, epsilon: Tensor, grad: Tensor, grad_level: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `reference.saturate` with respect to soft [P, N], weight [P, N], mass [P] and epsilon [P].

    min(soft - level, 0) follows soft where the marginal is full, and the level moves with the entries that are not:
    sum_open weight exp((level - soft) / epsilon) = mass - sum_full weight.
    """
    exponent = ((level - soft) / epsilon).clamp_max(0.0)
    full = (level > soft) & (weight > 0)
    fill = exponent.exp()  # share of its weight that an entry carries
    open_mass = torch.where(full, 0.0, weight * fill)
    total = open_mass.sum(-1, keepdim=True)
    share = torch.where(total > 0, open_mass / torch.where(total > 0, total, 1.0), 0.0)
    grad_full = torch.where(full, grad, 0.0)
    pull = grad_level - grad_full.sum(-1, keepdim=True)  # [P, 1], gradient with respect to the level
    per_mass = torch.where(total > 0, pull * epsilon / torch.where(total > 0, total, 1.0), 0.0)
    by_epsilon = (pull * share * exponent).sum(-1)
    return grad_full + pull * share, -per_mass * fill, per_mass.squeeze(-1), by_epsilon


def gradients(
    grad_f: Tensor,
    grad_g: Tensor,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    mass: Tensor | None,
    f_init: Tensor | None,
    g_init: Tensor | None,
    tau_a: float,
    tau_b: float,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    n_iters: Tensor,
    max_iters: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (f, g) after n_iters iterations.

    Args:
        grad_f: [P, N].
        grad_g: [P, M].
        cost: [P, N, M], and so on: see `reference.sinkhorn`.
        n_iters: [P] int32, iterations of each problem.
        max_iters: at least the largest of them.

    Returns:
        Gradients with respect to cost, a, b, epsilon, mass, f_init, g_init; of shape [P, 0] for what is None.
    """
    updates, broken = reference.dense(
        cost, a, b, epsilon, tau_a=tau_a, tau_b=tau_b, mass=mass, row_mask=row_mask, col_mask=col_mask
    )
    rows, cols, eps = updates.rows, updates.cols, updates.epsilon
    weight_a, weight_b = updates.a, updates.b
    alive = ((weight_a.sum(-1) > 0) & (weight_b.sum(-1) > 0) & ~broken & torch.isfinite(grad_f).all(-1)).unsqueeze(-1)
    keep = rows.unsqueeze(-1) & cols.unsqueeze(-2) & alive.unsqueeze(-1)
    clean = torch.where(keep, cost, 0.0)
    live_a = (weight_a > 0).unsqueeze(-1)
    live_b = (weight_b > 0).unsqueeze(-1)

    states = [updates.start(f_init, g_init)]
    # Reading the largest count costs nothing on a CPU; elsewhere it would stop the device.
    count = int(n_iters.max()) if n_iters.device.type == "cpu" and n_iters.numel() else max_iters
    for iteration in range(count):
        f, g, level = states[-1]
        running = (iteration < n_iters).unsqueeze(-1)
        f_new = updates.row_update(g)
        g_new, level_new = updates.col_update(f_new)
        states.append(
            (torch.where(running, f_new, f), torch.where(running, g_new, g), torch.where(running, level_new, level))
        )

    f, g, level = states[-1]
    bar_f, bar_g = torch.where(rows & alive, grad_f, 0.0), torch.where(cols & alive, grad_g, 0.0)
    bar_cost = torch.zeros_like(clean)
    bar_a, bar_b = torch.zeros_like(a), torch.zeros_like(b)
    bar_eps, bar_mass = torch.zeros_like(eps.squeeze(-1)), torch.zeros_like(eps.squeeze(-1))
    bar_level = torch.zeros_like(level)
    if mass is not None:  # f + level / 2, g + level / 2
        bar_level = (bar_f.sum(-1, keepdim=True) + bar_g.sum(-1, keepdim=True)) / 2
    elif tau_a == 1.0 and tau_b == 1.0:  # f - shift, g + shift with shift = (a f - b g) / (sum a + sum b)
        total = (weight_a.sum(-1) + weight_b.sum(-1)).clamp_min(torch.finfo(a.dtype).tiny).unsqueeze(-1)
        shift = ((weight_a * f).sum(-1, keepdim=True) - (weight_b * g).sum(-1, keepdim=True)) / total
        pull = (bar_g.sum(-1, keepdim=True) - bar_f.sum(-1, keepdim=True)) / total
        bar_a, bar_b = pull * (f - shift), -pull * (g + shift)
        bar_f, bar_g = bar_f + pull * weight_a, bar_g - pull * weight_b

    def rows_back(g: Tensor, bar: Tensor) -> Tensor:
        """Gradient with respect to g of the row update; the rest is added to what encloses it."""
        nonlocal bar_cost, bar_a, bar_b, bar_eps, bar_mass
        soft_bar = torch.where(rows, tau_a * bar, 0.0)
        if mass is not None:
            soft = updates.row_transform(g)
            level = reference.saturate(soft, weight_a, mass.unsqueeze(-1), eps)[1]
            soft_bar, by_weight, by_mass, by_eps = _saturate_vjp(soft, weight_a, level, eps, bar, torch.zeros_like(eps))
            soft_bar = torch.where(rows, soft_bar, 0.0)
            bar_a, bar_mass, bar_eps = bar_a + by_weight, bar_mass + by_mass, bar_eps + by_eps
        by_cost, by_g, by_b, by_eps = _transform_vjp(clean, g, weight_b, live_a, eps, soft_bar)
        bar_cost, bar_b, bar_eps = bar_cost + by_cost, bar_b + by_b, bar_eps + by_eps
        return torch.where(cols, by_g, 0.0)

    def cols_back(f: Tensor, level: Tensor, bar: Tensor, bar_level: Tensor) -> Tensor:
        """Gradient with respect to f of the column update."""
        nonlocal bar_cost, bar_a, bar_b, bar_eps, bar_mass
        soft_bar = torch.where(cols, tau_b * bar, 0.0)
        if mass is not None:
            soft = updates.col_transform(f)
            soft_bar, by_weight, by_mass, by_eps = _saturate_vjp(soft, weight_b, level, eps, bar, bar_level)
            soft_bar = torch.where(cols, soft_bar, 0.0)
            bar_b, bar_mass, bar_eps = bar_b + by_weight, bar_mass + by_mass, bar_eps + by_eps
        by_cost, by_f, by_a, by_eps = _transform_vjp(clean.transpose(-1, -2), f, weight_a, live_b, eps, soft_bar)
        bar_cost, bar_a, bar_eps = bar_cost + by_cost.transpose(-1, -2), bar_a + by_a, bar_eps + by_eps
        return torch.where(rows, by_f, 0.0)

    for iteration in reversed(range(count)):
        running = (iteration < n_iters).unsqueeze(-1)
        f, _, level = states[iteration + 1]
        active_g, active_level = torch.where(running, bar_g, 0.0), torch.where(running, bar_level, 0.0)
        to_f = torch.where(running, bar_f, 0.0) + cols_back(f, level, active_g, active_level)
        to_g = rows_back(states[iteration][1], to_f)
        bar_g = torch.where(running, to_g, bar_g)
        bar_f, bar_level = torch.where(running, 0.0, bar_f), torch.where(running, 0.0, bar_level)

    bar_start_f = a.new_zeros(a.shape[0], 0)
    if f_init is not None:
        f, _, level = states[0]
        bar_start_f = cols_back(f, level, bar_g, torch.zeros_like(level)) if g_init is None else torch.zeros_like(f)
    return (
        torch.where(keep, bar_cost, 0.0),
        torch.where(rows & alive, bar_a, 0.0),
        torch.where(cols & alive, bar_b, 0.0),
        torch.where(alive.squeeze(-1), bar_eps, 0.0).to(epsilon.dtype),
        a.new_zeros(a.shape[0], 0) if mass is None else torch.where(alive.squeeze(-1), bar_mass, 0.0).to(mass.dtype),
        bar_start_f,
        a.new_zeros(a.shape[0], 0) if g_init is None else torch.where(cols & alive, bar_g, 0.0),
    )


@torch.library.custom_op("pisces_kernels::sinkhorn_unrolled_backward", mutates_args=())
def _unrolled_backward_op(
    grad_f: Tensor,
    grad_g: Tensor,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    mass: Tensor | None,
    f_init: Tensor | None,
    g_init: Tensor | None,
    tau_a: float,
    tau_b: float,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    n_iters: Tensor,
    max_iters: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`gradients` as one opaque operator: its loop depends on data, which a traced graph cannot hold."""
    tensors = (grad_f, grad_g, cost, a, b, epsilon, mass, f_init, g_init)
    inputs: list[Any] = [*tensors, tau_a, tau_b, row_mask, col_mask, n_iters, max_iters]
    if not _dispatch.has_kernel("unrolled", backend):
        return gradients(*inputs)
    *results, sound = _dispatch.kernel("unrolled", backend)(*inputs[:-1])
    if not bool(sound.all()):  # weights of zero, or something that is not finite
        some = [value[~sound] if isinstance(value, Tensor) else value for value in inputs]
        for result, value in zip(results, gradients(*some), strict=True):
            result[~sound] = value
    to_cost, to_a, to_b, to_epsilon, to_mass, to_f, to_g = results
    return to_cost, to_a, to_b, to_epsilon, to_mass, to_f, to_g


@_unrolled_backward_op.register_fake
def _(grad_f: Tensor, grad_g: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(
        grad_f.new_empty(grad_f.shape[0], 0)
        if value is None
        else torch.empty_like(value, memory_format=torch.contiguous_format)
        for value in inputs[:7]
    )


fold_into_problems(_unrolled_backward_op)
unrolled_gradients = differentiable_by(_unrolled_backward_op, lambda *inputs: gradients(*inputs[:-1]))

"""Gradient of the potentials at the fixed point, exact and without a history of the iterations.

With R_ij = softmax_j((g_j - cost_ij)/epsilon + log b_j) and Q_ij = softmax_i((f_i - cost_ij)/epsilon + log a_i) the
fixed-point equations differentiate to

    df + tau_a R dg = tau_a (R (dcost - epsilon dlog b) + (R (g - cost) / epsilon - log-sum-exp) depsilon),

and the same with Q^T for dg, where R acts on dcost row by row.

The transposed system gives the gradient from the gradients of f and g; the longer side is eliminated, which leaves one
dense system of the shorter side per problem. Exact mass is the same with tau in {0, 1} per entry (0 where the cap on
the marginal is slack) and one more unknown, the multiplier of the mass.

The formulas are differentiable torch code: the reference, and what gives second derivatives of the compiled operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._formulas import differentiable_by
from ._vmap import fold_into_problems
from .reference import bounded, log_weights


def _solve(
    row_soft: Tensor, col_soft: Tensor, tau_a: Tensor, tau_b: Tensor, rhs_f: Tensor, rhs_g: Tensor, gauge: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Solve x + Q tau_b y = rhs_f and y + R^T tau_a x = rhs_g by eliminating the longer side.

    Args:
        row_soft: [P, N, M], R.
        col_soft: [P, N, M], Q.
        tau_a: [P, N].
        tau_b: [P, M].
        rhs_f: [P, N, K].
        rhs_g: [P, M, K].
        gauge: None, or [P, N, M] the plan of a balanced problem, whose system has the marginals as null vectors.

    Returns:
        (x [P, N, K], y [P, M, K]).
    """
    from_g = col_soft * tau_b.unsqueeze(-2)  # [P, N, M], Q tau_b
    from_f = (row_soft * tau_a.unsqueeze(-1)).transpose(-1, -2)  # [P, M, N], R^T tau_a
    rows_short = row_soft.shape[-2] <= row_soft.shape[-1]
    first, second = (from_g, from_f) if rows_short else (from_f, from_g)
    rhs, rest = (rhs_f, rhs_g) if rows_short else (rhs_g, rhs_f)
    size = first.shape[-2]
    system = torch.eye(size, dtype=torch.float64, device=first.device) - (first @ second).double()
    if gauge is not None:
        null = gauge.sum(-1 if rows_short else -2).double()  # [P, size]
        null = null / null.sum(-1, keepdim=True).clamp_min(1e-300)
        # Adding null 1^T moves only the null direction, along which the gradient does not change.
        system = system + null.unsqueeze(-1)
    target = (rhs - first @ rest).double()
    # Not torch.linalg.solve: its batched LU hangs on CPUs after torch.set_num_threads, MKL waiting inside a parallel
    # region for threads that it never gets (PyTorch 2.13). QR goes through the batch one matrix after the other.
    q, r = torch.linalg.qr(system)
    short = torch.linalg.solve_triangular(r, q.mT @ target, upper=True).to(first.dtype)
    long = rest - second @ short
    x, y = (short, long) if rows_short else (long, short)
    if gauge is None:
        return x, y
    # Of all solutions the one with sum x = sum y: it treats rows and columns alike, whichever are more.
    row_sums, col_sums = gauge.sum(-1).unsqueeze(-1), gauge.sum(-2).unsqueeze(-1)
    total = (row_sums.sum(1, keepdim=True) + col_sums.sum(1, keepdim=True)).clamp_min(torch.finfo(x.dtype).tiny)
    excess = (x.sum(1, keepdim=True) - y.sum(1, keepdim=True)) / total
    return x - excess * row_sums, y + excess * col_sums


def _full(potential: Tensor, mask: Tensor) -> Tensor:
    """1 where the exact mass fills a marginal, 0 where its cap is slack: at the largest potential, up to rounding."""
    top = torch.where(mask, potential, -torch.inf).amax(-1, keepdim=True)
    rounding = 4 * torch.finfo(potential.dtype).eps * torch.where(mask, potential.abs(), 0.0).amax(-1, keepdim=True)
    return (potential < top - rounding).to(potential.dtype)


def formulas(
    grad_f: Tensor,
    grad_g: Tensor,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    tau_a: float,
    tau_b: float,
    exact_mass: bool,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients with respect to cost, a, b, epsilon and mass, given those with respect to f and g.

    Args:
        grad_f: [P, N].
        grad_g: [P, M].
        cost: [P, N, M].
        a: [P, N].
        b: [P, M].
        epsilon: [P].
        f: [P, N], solution.
        g: [P, M], solution.
        tau_a: see `reference.sinkhorn`.
        tau_b: see `reference.sinkhorn`.
        exact_mass: a mass is given.
        row_mask: [P, N] bool or None.
        col_mask: [P, M] bool or None.

    Returns:
        (grad_cost [P, N, M], grad_a [P, N], grad_b [P, M], grad_epsilon [P], grad_mass [P], 0 without a mass).
    """
    rows = torch.ones_like(a, dtype=torch.bool) if row_mask is None else row_mask
    cols = torch.ones_like(b, dtype=torch.bool) if col_mask is None else col_mask
    weight_a, weight_b = torch.where(rows, a, 0.0), torch.where(cols, b, 0.0)
    alive = (weight_a.sum(-1, keepdim=True) > 0) & (weight_b.sum(-1, keepdim=True) > 0)  # [P, 1]
    rows, cols = rows & alive, cols & alive
    keep = rows.unsqueeze(-1) & cols.unsqueeze(-2)
    cost = torch.where(keep, cost, 0.0)
    grad_f, grad_g = torch.where(rows, grad_f, 0.0), torch.where(cols, grad_g, 0.0)
    eps = epsilon.to(cost.dtype).unsqueeze(-1)  # [P, 1]
    eps2 = eps.unsqueeze(-1)
    log_a = torch.where(alive, log_weights(weight_a), 0.0)
    log_b = torch.where(alive, log_weights(weight_b), 0.0)

    row_exponent = (g.unsqueeze(-2) - cost) / eps2  # [P, N, M]
    col_exponent = (f.unsqueeze(-1) - cost) / eps2
    row_lse = torch.logsumexp(row_exponent + log_b.unsqueeze(-2), -1, keepdim=True)
    col_lse = torch.logsumexp(col_exponent + log_a.unsqueeze(-1), -2, keepdim=True)
    weighted = (weight_a > 0).unsqueeze(-1) & (weight_b > 0).unsqueeze(-2)
    row_density = torch.where(keep, bounded(row_exponent - row_lse, weighted).exp(), 0.0)  # R / b: finite where b is 0
    col_density = torch.where(keep, bounded(col_exponent - col_lse, weighted).exp(), 0.0)  # Q / a
    row_soft = row_density * weight_b.unsqueeze(-2)
    col_soft = col_density * weight_a.unsqueeze(-1)

    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    grad_mass = torch.zeros_like(epsilon)
    balanced = not exact_mass and tau_a == 1.0 and tau_b == 1.0
    plan: Tensor | None = None
    if balanced or exact_mass:
        plan = row_soft * (weight_a * ((f.unsqueeze(-1) / eps2 + row_lse).squeeze(-1)).exp()).unsqueeze(-1)
    if balanced:
        # Undo the choice sum a f = sum b g, made after the last iteration.
        total = (weight_a.sum(-1, keepdim=True) + weight_b.sum(-1, keepdim=True)).clamp_min(torch.finfo(a.dtype).tiny)
        drift = (grad_f.sum(-1, keepdim=True) - grad_g.sum(-1, keepdim=True)) / total
        grad_a = grad_a - torch.where(rows, drift * f, 0.0)
        grad_b = grad_b + torch.where(cols, drift * g, 0.0)
        grad_f, grad_g = grad_f - drift * weight_a, grad_g + drift * weight_b

    if not exact_mass:
        damp_a, damp_b = torch.full_like(a, tau_a), torch.full_like(b, tau_b)
        x, y = _solve(
            row_soft, col_soft, damp_a, damp_b, grad_f.unsqueeze(-1), grad_g.unsqueeze(-1), plan if balanced else None
        )
        x, y = x.squeeze(-1), y.squeeze(-1)
        omega = None
    else:
        damp_a, damp_b = _full(f, rows), _full(g, cols)
        assert plan is not None  # for the type checker: set above with an exact mass
        row_sum, col_sum = plan.sum(-1), plan.sum(-2)
        xs, ys = _solve(
            row_soft,
            col_soft,
            damp_a,
            damp_b,
            torch.stack([grad_f, row_sum], -1),
            torch.stack([grad_g, col_sum], -1),
            None,
        )
        # Border of the system, the mass: sum tau_a x + sum tau_b y + mass omega = half the sum of both gradients.
        border = (damp_a.unsqueeze(-1) * xs).sum(-2) + (damp_b.unsqueeze(-1) * ys).sum(-2)  # [P, 2]
        level_grad = (grad_f.sum(-1) + grad_g.sum(-1)) / 2
        denominator = row_sum.sum(-1) - border[:, 1]
        omega = (level_grad - border[:, 0]) / torch.where(denominator == 0, 1.0, denominator)
        x, y = xs[..., 0] - omega[:, None] * xs[..., 1], ys[..., 0] - omega[:, None] * ys[..., 1]
        grad_mass = epsilon * omega.to(epsilon.dtype)

    x, y = damp_a * x, damp_b * y
    grad_cost = row_soft * x.unsqueeze(-1) + col_soft * y.unsqueeze(-2)
    grad_b = grad_b - eps * (row_density * x.unsqueeze(-1)).sum(-2)
    grad_a = grad_a - eps * (col_density * y.unsqueeze(-2)).sum(-1)
    grad_epsilon = (x * ((row_soft * row_exponent).sum(-1) - row_lse.squeeze(-1))).sum(-1)
    grad_epsilon = grad_epsilon + (y * ((col_soft * col_exponent).sum(-2) - col_lse.squeeze(-2))).sum(-1)
    if omega is not None and plan is not None:
        grad_cost = grad_cost + omega[:, None, None] * plan
        exponent = bounded((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / eps2, weighted)
        density = torch.where(keep, exponent.exp(), 0.0)
        grad_epsilon = grad_epsilon + omega * (plan * exponent).sum((-2, -1))
        grad_a = grad_a - eps * omega[:, None] * (density * weight_b.unsqueeze(-2)).sum(-1)
        grad_b = grad_b - eps * omega[:, None] * (density * weight_a.unsqueeze(-1)).sum(-2)
    return grad_cost, grad_a, grad_b, grad_epsilon.to(epsilon.dtype), grad_mass


@torch.library.custom_op("pisces_kernels::sinkhorn_implicit_backward", mutates_args=())
def _implicit_backward_op(
    grad_f: Tensor,
    grad_g: Tensor,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    tau_a: float,
    tau_b: float,
    exact_mass: bool,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`formulas` by a kernel; what it cannot hold (sums of the plan beyond float64, NaN) is left to the formulas."""
    tensors, options = (grad_f, grad_g, cost, a, b, epsilon, f, g), (tau_a, tau_b, exact_mass)
    *results, sound = _dispatch.kernel("implicit", backend)(*tensors, *options, row_mask, col_mask)
    if backend == "cpu" and not bool(sound.all()):  # on GPUs all are, and nothing waits for the device
        inputs: list[Any] = [*tensors, *options, row_mask, col_mask]
        some = [value[~sound] if isinstance(value, Tensor) else value for value in inputs]
        for result, value in zip(results, formulas(*some), strict=True):
            result[~sound] = value
    grad_cost, grad_a, grad_b, grad_epsilon, grad_mass = results
    return grad_cost, grad_a, grad_b, grad_epsilon, grad_mass


@_implicit_backward_op.register_fake
def _(grad_f: Tensor, grad_g: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    cost, a, b, epsilon = inputs[:4]
    results = (cost, a, b, epsilon, epsilon)
    return tuple(torch.empty_like(value, memory_format=torch.contiguous_format) for value in results)


fold_into_problems(_implicit_backward_op)
_by_kernel = differentiable_by(_implicit_backward_op, lambda *inputs: formulas(*inputs[:-1]))


def potentials_gradient(*inputs: Any, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`formulas` on the back end of the forward solve; same arguments and results."""
    *_, exact_mass, _, _ = inputs
    has_kernel = _dispatch.has_kernel("implicit", backend) and not (exact_mass and backend != "cpu")
    return _by_kernel(*inputs, backend) if has_kernel else formulas(*inputs)

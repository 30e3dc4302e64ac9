"""Gradient of the potentials of two point clouds at the fixed point: `_implicit` without a matrix.

The system x + Q tau_b y = grad_f, y + R^T tau_a x = grad_g is the one of `_implicit`. With the plan, its row sums r and
column sums c, Q = plan / c and R = plan / r whether or not the iteration has converged, so that the operator that is
left after one side is eliminated, I - Q tau_b R^T tau_a for the rows, is symmetric and positive in the inner product
with weights tau_a / r: conjugate gradients apply, and every step is two products with a streamed matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks
from ._streaming import Points, log_or_zero, over_weight, products, soft_minimum, weighted_sums
from .reference import log_weights

# Most steps of the linear solve. With q the contraction of one plain iteration at the fixed point a digit takes about
# 1.2 / sqrt(1 - q) steps, so where the forward loop converges in its default 200 iterations this is plenty.
MAX_STEPS = 200
# The solve stops when no entry of its residual is larger than this part of the largest entry of the right-hand side.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


@dataclass(frozen=True)
class _Side:
    """One side of the linear system.

    Attributes:
        operator: [P, m, K] -> [P, n, K], from the other side's unknown to this one's equations: Q or R^T.
        target: [P, n, K], right-hand side.
        tau: [P, n].
        log_sum: [P, n], log of the plan's sums.
        weighted: [P, n] bool, the entries with a weight; for the others the operator gives 0.
    """

    operator: Callable[[Tensor], Tensor]
    target: Tensor
    tau: Tensor
    log_sum: Tensor
    weighted: Tensor


def _solve(short: _Side, long: _Side, singular: bool) -> tuple[Tensor, Tensor]:
    """Solve z + A tau w = target, w + B tau z = target by conjugate gradients on z.

    Vectors and dot products are float64, A and B work in the dtype of the target. Dot products weigh entries by tau
    over the plan's sums, which may span many orders of magnitude; the stop test does not.

    Args:
        short: the side of z.
        long: the side of w.
        singular: the problem is balanced: the plan's sums are a null vector, along which the gradient does not change.

    Returns:
        (tau z, tau w), [P, n, K] and [P, m, K].
    """
    dtype, device = short.target.dtype, short.target.device
    tau, tau_long = short.tau.double().unsqueeze(-1), long.tau.double().unsqueeze(-1)

    def across(z: Tensor) -> Tensor:
        return long.operator((tau * z).to(dtype)).double()

    def back(w: Tensor) -> Tensor:
        return short.operator((tau_long * w).to(dtype)).double()

    free = (short.weighted & (short.tau > 0)).unsqueeze(-1)  # the other entries are known, or have no influence
    log_sum = short.log_sum.double().unsqueeze(-1)
    least = torch.where(free, log_sum, torch.inf).amin(1, keepdim=True)
    inner = torch.where(free, tau * (least - log_sum).clamp_min(-600.0).exp(), 0.0)  # [P, n, 1]
    most = torch.where(free, log_sum, -torch.inf).amax(1, keepdim=True)
    null = torch.where(free, (log_sum - most).exp(), 0.0)
    null = null / null.sum(1, keepdim=True).clamp_min(1.0)

    def gauged(residual: Tensor) -> Tensor:
        residual = torch.where(free, residual, 0.0)
        return residual - null * residual.sum(1, keepdim=True) if singular else residual

    target, target_long = short.target.double(), long.target.double()
    z = torch.where(free, 0.0, target)
    right_hand_side = target - back(target_long - across(z))
    residual = gauged(right_hand_side - z)
    allowed = TOLERANCE[dtype] * right_hand_side.abs().amax(1, keepdim=True)  # [P, 1, K]
    step = residual
    energy = (inner * residual * residual).sum(1, keepdim=True)
    running = residual.abs().amax(1, keepdim=True) > allowed
    for _ in range(MAX_STEPS):
        if device.type == "cpu" and not bool(running.any()):
            break  # elsewhere reading the flag would stop the device once a step
        image = torch.where(free, step - back(across(step)), 0.0)
        curvature = (inner * step * image).sum(1, keepdim=True)
        length = torch.where(running & (curvature > 0), energy / torch.where(curvature > 0, curvature, 1.0), 0.0)
        z, residual = z + length * step, gauged(residual - length * image)
        next_energy = (inner * residual * residual).sum(1, keepdim=True)
        step = residual + torch.where(energy > 0, next_energy / torch.where(energy > 0, energy, 1.0), 0.0) * step
        energy = next_energy
        running = running & (length > 0) & (residual.abs().amax(1, keepdim=True) > allowed)
    # Rounding may end the recursion (length 0) somewhat above what is allowed.
    if _checks.readable(residual) and bool((residual.abs().amax(1, keepdim=True) > 100.0 * allowed).any()):
        warnings.warn(
            f"sinkhorn_points: the gradient of f and g is not accurate after {MAX_STEPS} steps of its linear solve. "
            "Use a larger epsilon, or differentiate `value`, which needs no linear solve.",
            RuntimeWarning,
            stacklevel=2,
        )
    if singular:
        z = z - null * z.sum(1, keepdim=True)  # rounding may have grown along it
    w = target_long - across(z)
    return (tau * z).to(dtype), (tau_long * w).to(dtype)


def streamed_gradient(
    grad_f: Tensor,
    grad_g: Tensor,
    points: Points,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    *,
    tau_a: float,
    tau_b: float,
    mass: Tensor | None,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients with respect to x, y, a, b, epsilon and mass, given those with respect to f and g.

    Args:
        grad_f: [P, N].
        grad_g: [P, M].
        points: the clouds, zero where masked.
        a: [P, N], and the others: see `_implicit.potentials_gradient`.

    Returns:
        (grad_x [P, N, D], grad_y [P, M, D], grad_a [P, N], grad_b [P, M], grad_epsilon [P], grad_mass [P] or None).
    """
    rows = torch.ones_like(a, dtype=torch.bool) if row_mask is None else row_mask
    cols = torch.ones_like(b, dtype=torch.bool) if col_mask is None else col_mask
    a, b = torch.where(rows, a, 0.0), torch.where(cols, b, 0.0)
    alive = (a.sum(-1, keepdim=True) > 0) & (b.sum(-1, keepdim=True) > 0)  # [P, 1]
    rows, cols = rows & alive, cols & alive
    grad_f, grad_g = torch.where(rows, grad_f, 0.0), torch.where(cols, grad_g, 0.0)
    eps = epsilon.to(a.dtype).unsqueeze(-1)  # [P, 1]
    log_a, log_b = torch.where(alive, log_weights(a), 0.0), torch.where(alive, log_weights(b), 0.0)
    soft_f, soft_g = soft_minimum(points, g, log_b, eps), soft_minimum(points.mT, f, log_a, eps)
    (la, has_a), (lb, has_b) = log_or_zero(a), log_or_zero(b)
    row_soft = (soft_f / eps, g / eps + lb)  # exponents of R, but for the cost
    col_soft = (f / eps + la, soft_g / eps)  # of Q

    def apply_q(u: Tensor) -> Tensor:
        result, _ = products(points, *col_soft, eps, u, None)
        assert result is not None  # for the type checker
        return has_a.unsqueeze(-1) * result

    def apply_rt(v: Tensor) -> Tensor:
        _, result = products(points, *row_soft, eps, None, v)
        assert result is not None  # for the type checker
        return has_b.unsqueeze(-1) * result

    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    balanced = mass is None and tau_a == 1.0 and tau_b == 1.0
    if balanced:
        # Undo the choice sum a f = sum b g, made after the last iteration.
        total = (a.sum(-1, keepdim=True) + b.sum(-1, keepdim=True)).clamp_min(torch.finfo(a.dtype).tiny)
        drift = (grad_f.sum(-1, keepdim=True) - grad_g.sum(-1, keepdim=True)) / total
        grad_a = grad_a - torch.where(rows, drift * f, 0.0)
        grad_b = grad_b + torch.where(cols, drift * g, 0.0)
        grad_f, grad_g = grad_f - drift * a, grad_g + drift * b

    log_r, log_c = (f - soft_f) / eps + log_a, (g - soft_g) / eps + log_b  # log of the plan's sums
    if mass is None:
        damp_a, damp_b = torch.full_like(a, tau_a), torch.full_like(b, tau_b)
        targets = grad_f.unsqueeze(-1), grad_g.unsqueeze(-1)
    else:
        damp_a = (f < torch.where(rows, f, -torch.inf).amax(-1, keepdim=True)).to(a.dtype)
        damp_b = (g < torch.where(cols, g, -torch.inf).amax(-1, keepdim=True)).to(b.dtype)
        # The second system is the border's: the sums of the plan.
        sums = torch.where(has_a > 0, log_r.exp(), 0.0), torch.where(has_b > 0, log_c.exp(), 0.0)
        targets = torch.stack([grad_f, sums[0]], -1), torch.stack([grad_g, sums[1]], -1)
    row_side = _Side(apply_q, targets[0], damp_a, log_r, has_a > 0)
    col_side = _Side(apply_rt, targets[1], damp_b, log_c, has_b > 0)
    if a.shape[-1] <= b.shape[-1]:
        vs, us = _solve(row_side, col_side, balanced)
    else:
        us, vs = _solve(col_side, row_side, balanced)
    v, u = vs[..., 0], us[..., 0]  # tau_a x [P, N], tau_b y [P, M]
    if balanced:  # of all solutions the one with sum x = sum y, as in `_implicit`
        row_sums, col_sums = torch.where(has_a > 0, log_r.exp(), 0.0), torch.where(has_b > 0, log_c.exp(), 0.0)
        total = (row_sums.sum(-1, keepdim=True) + col_sums.sum(-1, keepdim=True)).clamp_min(torch.finfo(a.dtype).tiny)
        excess = (v.sum(-1, keepdim=True) - u.sum(-1, keepdim=True)) / total
        v, u = v - excess * row_sums, u + excess * col_sums
    grad_mass = None
    if mass is not None:
        # Border of the system: sum tau_a x + sum tau_b y + mass omega = half the sum of both gradients.
        border = vs.sum(1) + us.sum(1)  # [P, 2]
        room = targets[0][..., 1].sum(-1) - border[:, 1]
        omega = (grad_f.sum(-1) + grad_g.sum(-1)) / 2 - border[:, 0]
        omega = (omega / torch.where(room == 0, 1.0, room)).unsqueeze(-1)  # [P, 1]
        v, u = v - omega * vs[..., 1], u - omega * us[..., 1]
        grad_mass = (eps * omega).squeeze(-1)

    # The gradient of the cost is v R + Q u (+ omega plan), never formed.
    by_r = weighted_sums(points, *row_soft, eps, v, has_b, None, g)
    by_q = weighted_sums(points, *col_soft, eps, has_a, u, f, None)
    grad_a, grad_b = grad_a - eps * over_weight(by_q.rows, a), grad_b - eps * over_weight(by_r.cols, b)
    grad_x, grad_y = by_r.grad_x + by_q.grad_x, by_r.grad_y + by_q.grad_y
    energy = by_r.energy + by_q.energy + (v * soft_f).sum(-1) + (u * soft_g).sum(-1)
    if mass is not None:
        by_plan = weighted_sums(points, f / eps + la, g / eps + lb, eps, has_a * omega, has_b, f, g)
        grad_a = grad_a - eps * omega * over_weight(by_plan.rows, a)
        grad_b = grad_b - eps * over_weight(by_plan.cols, b)
        grad_x, grad_y, energy = grad_x + by_plan.grad_x, grad_y + by_plan.grad_y, energy + by_plan.energy
    return grad_x, grad_y, grad_a, grad_b, energy / eps.squeeze(-1), grad_mass

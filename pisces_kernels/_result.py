"""What a solve returns: potentials, diagnostics, and everything that follows from them on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._precision import without_autocast


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Solution:
    """Potentials and diagnostics of a batch of transport problems, and the problems themselves.

    Attributes:
        f: [..., N] row potential in units of the cost; 0 where masked. float32 or float64.
        g: [..., M] column potential.
        n_iters: [...] int32, iterations that ran.
        residual: [...], largest change of f/epsilon or g/epsilon in the last iteration. NaN says that the
            problem's cost or start has a non-finite entry, or that its potentials overflowed (they are NaN then).
        converged: [...] bool, residual < tol; with tol = 0: residual == 0. False is a documented answer: max_iters was
            reached, the problem is infeasible (balanced with unequal masses), or the residual is NaN.
        a: [..., N], b: [..., M], epsilon: [...], tau: (tau_a, tau_b), mass: [...] or None, row_mask, col_mask,
            gradient: the problem that was solved.
    """

    f: Tensor
    g: Tensor
    n_iters: Tensor
    residual: Tensor
    converged: Tensor
    a: Tensor
    b: Tensor
    epsilon: Tensor
    tau: tuple[float, float]
    mass: Tensor | None
    row_mask: Tensor | None
    col_mask: Tensor | None
    gradient: str

    def __repr__(self) -> str:
        shapes = f"f={list(self.f.shape)}, g={list(self.g.shape)}"
        return f"{type(self).__name__}({shapes}, dtype={self.f.dtype}, tau={self.tau})"


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SinkhornResult(Solution):
    """Solution of `sinkhorn`.

    Attributes:
        f: [..., N] row potential in units of the cost; 0 where masked. float32 or float64.
        g: [..., M] column potential.
        n_iters: [...] int32, iterations that ran.
        residual: [...], largest change of f/epsilon or g/epsilon in the last iteration. NaN says that the
            problem's cost or start has a non-finite entry, or that its potentials overflowed (they are NaN then).
        converged: [...] bool, residual < tol; with tol = 0: residual == 0. False is a documented answer: max_iters was
            reached, the problem is infeasible (balanced with unequal masses), or the residual is NaN.
        cost: [..., N, M], a: [..., N], b: [..., M], epsilon: [...], tau: (tau_a, tau_b), mass: [...] or None, row_mask,
            col_mask, gradient: the problem that was solved.
    """

    cost: Tensor

    def _clean_cost(self) -> tuple[Tensor, Tensor]:
        """Cost in the working dtype with 0 where masked, and which entries exist. [..., N, M]"""
        keep = torch.ones_like(self.cost, dtype=torch.bool)
        if self.row_mask is not None:
            keep = keep & self.row_mask.unsqueeze(-1)
        if self.col_mask is not None:
            keep = keep & self.col_mask.unsqueeze(-2)
        return torch.where(keep, self.cost.to(self.f.dtype), 0.0), keep

    def log_plan(self) -> Tensor:
        """Logarithm of the plan, (f + g - cost) / epsilon + log a + log b; -inf where masked or without weight.

        Returns:
            [..., N, M].
        """
        cost, keep = self._clean_cost()
        logs = reference.log_weights(self.a).unsqueeze(-1) + reference.log_weights(self.b).unsqueeze(-2)
        exponent = _exponent(cost, self.f, self.g, self.a, self.b, self.epsilon)
        return torch.where(keep, exponent + logs, -torch.inf)

    def plan(self) -> Tensor:
        """Transport plan exp((f + g - cost) / epsilon) * a * b; 0 where masked. Differentiable.

        Returns:
            [..., N, M].
        """
        cost, keep = self._clean_cost()
        density = _exponent(cost, self.f, self.g, self.a, self.b, self.epsilon).exp()
        return torch.where(keep, density * self.a.unsqueeze(-1) * self.b.unsqueeze(-2), 0.0)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Sums of the plan over columns and over rows.

        Returns:
            ([..., N], [..., M]).
        """
        plan = self.plan()
        return plan.sum(-1), plan.sum(-2)

    @property
    def transport_cost(self) -> Tensor:
        """sum(plan * cost), [...]; its gradient goes through the plan."""
        return (self.plan() * self._clean_cost()[0]).sum((-2, -1))

    @property
    def value(self) -> Tensor:
        """Optimal value of the problem, [...].

        The objective is
        sum(plan * cost) + epsilon KL(plan | a b^T) + rho_a KL(plan 1 | a) + rho_b KL(plan^T 1 | b)
        with KL(p | q) = sum(p log(p/q) - p + q) and rho = epsilon tau / (1 - tau); a side with tau = 1, and both
        sides with an exact mass, are constrained instead. It is computed from the potentials (the dual).

        Gradient: with respect to cost, a, b, epsilon and mass by the envelope theorem (for cost it is the plan, for
        epsilon (value - transport_cost) / epsilon), which is exact at convergence and costs one pass over the plan. Its
        own gradient, the second derivative of the value, goes through the potentials. With gradient="unrolled" the
        value is differentiated through the iterations that ran.
        """
        cost, keep = self._clean_cost()
        inputs = (cost, self.a, self.b, self.epsilon, self.mass, self.f, self.g)
        masks = (keep, self.row_mask, self.col_mask)
        if self.gradient == "unrolled":
            return _dense_dual(*inputs, self.tau, *masks)
        return _Value.apply(*inputs, self.tau, *masks)


def _exponent(cost: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, epsilon: Tensor) -> Tensor:
    """(f + g - cost) / epsilon, bounded where the weights are zero. [..., N, M]"""
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon.to(f.dtype)[..., None, None]
    return reference.bounded(exponent, (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2))


def _top(potential: Tensor, mask: Tensor | None) -> Tensor:
    """Largest potential of the entries that exist; 0 when there are none. [...]"""
    if mask is not None:
        potential = torch.where(mask, potential, -torch.inf)
    top = potential.amax(-1)
    return torch.where(torch.isneginf(top), 0.0, top)


def _caps(
    f: Tensor, g: Tensor, mass: Tensor | None, row_mask: Tensor | None, col_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Potentials without the multiplier of the mass, and the multiplier [...] (None without a mass)."""
    if mass is None:
        return f, g, None
    top_f, top_g = _top(f, row_mask), _top(g, col_mask)
    return f - top_f.unsqueeze(-1), g - top_g.unsqueeze(-1), top_f + top_g


def dual_value(
    total: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    mass: Tensor | None,
    f: Tensor,
    g: Tensor,
    tau: tuple[float, float],
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> Tensor:
    """Return the dual objective, epsilon (sum a sum b - total) + gains of both sides + mass * multiplier.

    A side's gain is sum(weight * potential) when it is constrained, else sum(-weight rho expm1(-potential / rho)). When
    one side has no weight at all nothing is transported, and a relaxed side pays rho for each unit of its own.

    Args:
        total: [...], sum of the plan.
        a: [..., N], and so on: see `Solution`.

    Returns:
        [...].
    """
    eps = epsilon.to(f.dtype)
    f, g, level = _caps(f, g, mass, row_mask, col_mask)
    value = eps * (a.sum(-1) * b.sum(-1) - total)
    alone = ((a.sum(-1) <= 0) | (b.sum(-1) <= 0)).unsqueeze(-1)
    if mass is not None and level is not None:
        value = value + mass.to(f.dtype) * level
    for weight, potential, damping in ((a, f, tau[0]), (b, g, tau[1])):
        gain = potential
        if damping != 1.0 and mass is None:
            rho = (eps * damping / (1.0 - damping)).unsqueeze(-1)
            gain = torch.where(alone, rho, -rho * torch.expm1(-potential / rho))
        value = value + (weight * gain).sum(-1)
    return value


def _envelope(
    total: Tensor,
    row_density: Tensor,
    col_density: Tensor,
    energy: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    mass: Tensor | None,
    f: Tensor,
    g: Tensor,
    tau: tuple[float, float],
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the partial derivatives of `dual_value` at constant potentials.

    With density = exp((f + g - cost) / epsilon), so that plan = density * a * b.

    Args:
        total: [...], sum of the plan.
        row_density: [..., N], sum_j density_ij b_j.
        col_density: [..., M], sum_i density_ij a_i.
        energy: [...], sum(plan * (f + g - cost)) / epsilon.
        a: [..., N], and so on: see `Solution`.

    Returns:
        Derivatives with respect to (a [..., N], b [..., M], epsilon [...], mass [...] or None).
    """
    eps = epsilon.to(f.dtype)
    f, g, level = _caps(f, g, mass, row_mask, col_mask)
    by_epsilon = a.sum(-1) * b.sum(-1) - total + energy
    alone = ((a.sum(-1) <= 0) | (b.sum(-1) <= 0)).unsqueeze(-1)
    sides = []
    for weight, potential, damping, other, density in (
        (a, f, tau[0], b, row_density),
        (b, g, tau[1], a, col_density),
    ):
        gain = potential
        if damping != 1.0 and mass is None:
            ratio = damping / (1.0 - damping)  # rho / epsilon
            scaled = potential / (ratio * eps.unsqueeze(-1))
            lost = torch.where(alone, 1.0, -torch.expm1(-scaled))  # share of the weight that is not transported
            gain = ratio * eps.unsqueeze(-1) * lost
            by_rho = torch.where(alone, lost, lost - scaled * torch.exp(-scaled))
            by_epsilon = by_epsilon + ratio * (weight * by_rho).sum(-1)
        sides.append(eps.unsqueeze(-1) * (other.sum(-1, keepdim=True) - density) + gain)
    return sides[0], sides[1], by_epsilon, level


def _dense_dual(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    mass: Tensor | None,
    f: Tensor,
    g: Tensor,
    tau: tuple[float, float],
    keep: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> Tensor:
    density = torch.where(keep, _exponent(cost, f, g, a, b, epsilon).exp(), 0.0)
    total = (density * a.unsqueeze(-1) * b.unsqueeze(-2)).sum((-2, -1))
    return dual_value(total, a, b, epsilon, mass, f, g, tau, row_mask, col_mask)


class _Value(torch.autograd.Function):
    """Dual value whose gradient is the envelope theorem's and is itself differentiable, potentials included."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _dense_dual(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        cost, a, b, epsilon, mass, f, g, tau, keep, row_mask, col_mask = inputs
        ctx.save_for_backward(cost, a, b, epsilon, mass, f, g, keep, row_mask, col_mask)
        ctx.tau = tau

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cost, a, b, epsilon, mass, f, g, keep, row_mask, col_mask = ctx.saved_tensors
        exponent = _exponent(cost, f, g, a, b, epsilon)
        density = torch.where(keep, exponent.exp(), 0.0)
        row_density = (density * b.unsqueeze(-2)).sum(-1)
        col_density = (density * a.unsqueeze(-1)).sum(-2)
        plan = density * a.unsqueeze(-1) * b.unsqueeze(-2)
        energy = (plan * exponent).sum((-2, -1))
        total = plan.sum((-2, -1))
        by_a, by_b, by_epsilon, by_mass = _envelope(
            total, row_density, col_density, energy, a, b, epsilon, mass, f, g, ctx.tau, row_mask, col_mask
        )
        return (
            grad[..., None, None] * plan,
            grad.unsqueeze(-1) * by_a,
            grad.unsqueeze(-1) * by_b,
            (grad * by_epsilon).to(epsilon.dtype),
            None if by_mass is None or mass is None else (grad * by_mass).to(mass.dtype),
            *([None] * 6),
        )

"""What a solve returns: potentials, diagnostics, and everything that follows from them on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _dispatch, _plan, reference
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
        tol: residual below which a problem has converged.
        a: [..., N], b: [..., M], epsilon: [...], tau: (tau_a, tau_b), mass: [...] or None, row_mask, col_mask,
            gradient: the problem that was solved.
    """

    f: Tensor
    g: Tensor
    n_iters: Tensor
    residual: Tensor
    tol: float
    a: Tensor
    b: Tensor
    epsilon: Tensor
    tau: tuple[float, float]
    mass: Tensor | None
    row_mask: Tensor | None
    col_mask: Tensor | None
    gradient: str

    @property
    def converged(self) -> Tensor:
        """[...] bool, residual < tol; with tol = 0: residual == 0.

        False is a documented answer: max_iters was reached, the problem is infeasible (balanced with unequal masses),
        or the residual is NaN.
        """
        return self.residual.double() < self.tol if self.tol > 0 else self.residual == 0

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
        tol: residual below which a problem has converged.
        cost: [..., N, M], a: [..., N], b: [..., M], epsilon: [...], tau: (tau_a, tau_b), mass: [...] or None, row_mask,
            col_mask, gradient: the problem that was solved.
    """

    cost: Tensor

    _backend: str = "reference"  # computes what follows from the potentials; not part of the result

    def _clean_cost(self) -> tuple[Tensor, Tensor]:
        """Cost in the working dtype with 0 where masked, and which entries exist. [..., N, M]"""
        return _plan.clean(self.cost.to(self.f.dtype), self.row_mask, self.col_mask)

    def _flat(self) -> tuple[Any, ...]:
        """Arguments of the operators of `_plan`, the problems in one dimension."""
        cost, masks = self.cost.to(self.f.dtype), (self.row_mask, self.col_mask)
        return _flat((cost, self.f, self.g, self.a, self.b, self.epsilon, *masks), self.epsilon.ndim)

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the plan over columns and over rows, and sum(plan * cost)."""
        if _dispatch.has_kernel("plan_sums", self._backend):
            rows, cols, energy = _plan.plan_sums(*self._flat(), self._backend)
            return rows.reshape(self.f.shape), cols.reshape(self.g.shape), energy.reshape(self.epsilon.shape)
        plan = self.plan()
        return plan.sum(-1), plan.sum(-2), (plan * self._clean_cost()[0]).sum((-2, -1))

    def log_plan(self) -> Tensor:
        """Logarithm of the plan, (f + g - cost) / epsilon + log a + log b; -inf where masked or without weight.

        Returns:
            [..., N, M].
        """
        if _dispatch.has_kernel("plan", self._backend):
            return _plan.plan(*self._flat(), True, self._backend).reshape(self.cost.shape)
        cost, keep = self._clean_cost()
        logs = reference.log_weights(self.a).unsqueeze(-1) + reference.log_weights(self.b).unsqueeze(-2)
        exponent = _plan.exponent(cost, self.f, self.g, self.a, self.b, self.epsilon)
        return torch.where(keep, exponent + logs, -torch.inf)

    def plan(self) -> Tensor:
        """Transport plan exp((f + g - cost) / epsilon) * a * b; 0 where masked. Differentiable.

        Returns:
            [..., N, M].
        """
        if _dispatch.has_kernel("plan", self._backend):
            return _plan.plan(*self._flat(), False, self._backend).reshape(self.cost.shape)
        cost, keep = self._clean_cost()
        density = _plan.exponent(cost, self.f, self.g, self.a, self.b, self.epsilon).exp()
        return torch.where(keep, density * self.a.unsqueeze(-1) * self.b.unsqueeze(-2), 0.0)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Sums of the plan over columns and over rows.

        Returns:
            ([..., N], [..., M]).
        """
        rows, cols, _ = self._sums()
        return rows, cols

    @property
    def transport_cost(self) -> Tensor:
        """sum(plan * cost), [...]; its gradient goes through the plan."""
        return self._sums()[2]

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
        inputs = (self.cost.to(self.f.dtype), self.a, self.b, self.epsilon, self.mass, self.f, self.g)
        options = (self.tau, self.row_mask, self.col_mask, self._backend)
        if self.gradient == "unrolled":
            return _dense_dual(*inputs, *options)
        return _Value.apply(*inputs, *options)


def _flat(tensors: tuple[Tensor | None, ...], n_dims: int) -> tuple[Any, ...]:
    """The first n_dims dimensions of each tensor as one."""
    return tuple(
        None if tensor is None else tensor.reshape(tensor.shape[:n_dims].numel(), *tensor.shape[n_dims:])
        for tensor in tensors
    )


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
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    backend: str,
) -> Tensor:
    if _dispatch.has_kernel("plan_sums", backend):
        rows, _, _ = _plan.plan_sums(*_flat((cost, f, g, a, b, epsilon, row_mask, col_mask), epsilon.ndim), backend)
        total = rows.sum(-1).reshape(epsilon.shape)
    else:
        cost, keep = _plan.clean(cost, row_mask, col_mask)
        density = torch.where(keep, _plan.exponent(cost, f, g, a, b, epsilon).exp(), 0.0)
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
        *tensors, tau, row_mask, col_mask, backend = inputs
        ctx.save_for_backward(*tensors, row_mask, col_mask)
        ctx.options = tau, backend

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cost, a, b, epsilon, mass, f, g, row_mask, col_mask = ctx.saved_tensors
        tau, backend = ctx.options
        rest = (a, b, epsilon, mass, f, g, tau, row_mask, col_mask)
        if _dispatch.has_kernel("plan_backward", backend):
            # The value is -epsilon sum(plan) and what does not depend on the cost. One pass gives the first part's.
            by_rows = -(epsilon.to(f.dtype) * grad).unsqueeze(-1).expand(a.shape)
            batch = epsilon.shape
            by_rows, *inputs = _flat((by_rows, cost, f, g, a, b, epsilon, row_mask, col_mask), len(batch))
            to_cost, to_f, _, to_a, to_b, to_epsilon = _plan.plan_gradients(None, by_rows, None, None, *inputs, backend)
            nothing = torch.zeros_like(grad)
            by_a, by_b, by_epsilon, by_mass = _envelope(
                nothing, torch.zeros_like(a), torch.zeros_like(b), nothing, *rest
            )
            grad_cost = to_cost.reshape(cost.shape)
            grad_a = to_a.reshape(a.shape) + grad.unsqueeze(-1) * by_a
            grad_b = to_b.reshape(b.shape) + grad.unsqueeze(-1) * by_b
            # to_f sums to -grad sum(plan)
            grad_epsilon = (to_epsilon + to_f.sum(-1)).reshape(batch) + grad * by_epsilon
        else:
            cost, keep = _plan.clean(cost, row_mask, col_mask)
            exponent = _plan.exponent(cost, f, g, a, b, epsilon)
            density = torch.where(keep, exponent.exp(), 0.0)
            row_density = (density * b.unsqueeze(-2)).sum(-1)
            col_density = (density * a.unsqueeze(-1)).sum(-2)
            plan = density * a.unsqueeze(-1) * b.unsqueeze(-2)
            energy = (plan * exponent).sum((-2, -1))
            by_a, by_b, by_epsilon, by_mass = _envelope(plan.sum((-2, -1)), row_density, col_density, energy, *rest)
            grad_cost = grad[..., None, None] * plan
            grad_a, grad_b, grad_epsilon = grad.unsqueeze(-1) * by_a, grad.unsqueeze(-1) * by_b, grad * by_epsilon
        return (
            grad_cost,
            grad_a,
            grad_b,
            grad_epsilon.to(epsilon.dtype),
            None if by_mass is None or mass is None else (grad * by_mass).to(mass.dtype),
            *([None] * 6),
        )

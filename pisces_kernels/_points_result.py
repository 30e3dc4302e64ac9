"""What `sinkhorn_points` returns, and the operator behind it: the plan times a matrix, streamed and differentiable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._autograd import differentiable
from ._precision import full_precision, without_autocast
from ._result import SinkhornResult, Solution, dual_value
from ._streaming import (
    Points,
    cost_gradient,
    log_or_zero,
    over_weight,
    prepare,
    products,
    weighted_sums,
)
from ._vmap import fold_into_problems


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PointsResult(Solution):
    """Solution of `sinkhorn_points`. Nothing of size N x M is made, except by `plan` and `log_plan`.

    Attributes:
        f: [..., N] row potential in units of the cost; 0 where masked. float32 or float64.
        g: [..., M] column potential.
        n_iters: [...] int32, iterations that ran.
        residual: [...], largest change of f/epsilon or g/epsilon in the last iteration. NaN says that a point or a
            start of the problem is not finite, or that a cost or potential overflowed (the potentials are NaN then).
        tol: residual below which a problem has converged.
        x: [..., N, D], y: [..., M, D], cost: its name, a: [..., N], b: [..., M], epsilon: [...], tau: (tau_a, tau_b),
            mass: [...] or None, row_mask, col_mask, gradient: the problem that was solved.
        backend: what solved it, and computes everything that follows: one of `BACKENDS`.
    """

    x: Tensor
    y: Tensor
    cost: str
    backend: str

    def apply(self, values: Tensor) -> Tensor:
        """Product of the plan with a matrix, plan @ values, streamed.

        Gradient: with respect to values, and through the plan to everything it depends on, streamed too; first
        derivatives only.

        Args:
            values: [..., M, E] floating, that broadcasts to the batch; ignored where a column is masked.

        Returns:
            [..., N, E], 0 in masked rows.

        Raises:
            ValueError: the shape does not fit.
        """
        values = _checks.floating("PointsResult.apply", "values", values)
        if values.ndim < 2:
            raise ValueError(f"PointsResult.apply: values has shape {tuple(values.shape)}, expected [..., M, E].")
        wanted = (*self.b.shape, values.shape[-1])
        values = _checks.broadcast("PointsResult.apply", "values", values.to(self.f.dtype), wanted, "batch + (M, E)")
        if self.col_mask is not None:
            values = torch.where(self.col_mask.unsqueeze(-1), values, 0.0)
        return self._apply(values, self.f, self.g)

    def barycentric(self) -> Tensor:
        """Barycentric projection of the rows, the mean of y under each row of the plan: plan @ y / plan @ 1.

        Returns:
            [..., N, D]; 0 in rows without mass.
        """
        y = self.y.to(self.f.dtype).expand(*self.b.shape, self.y.shape[-1])
        if self.col_mask is not None:
            y = torch.where(self.col_mask.unsqueeze(-1), y, 0.0)
        shift = y.detach().amax(-2, keepdim=True)  # means of points far from the origin keep their digits
        moments = self.apply(torch.cat([y - shift, torch.ones_like(y[..., :1])], -1))
        total = moments[..., -1:]
        return torch.where(total > 0, shift + moments[..., :-1] / torch.where(total > 0, total, 1.0), 0.0)

    def marginals(self) -> tuple[Tensor, Tensor]:
        """Sums of the plan over columns and over rows, streamed; differentiable as `apply`.

        Returns:
            ([..., N], [..., M]).
        """
        rows = self._apply(torch.ones_like(self.b).unsqueeze(-1), self.f, self.g)
        cols = self._apply(torch.ones_like(self.a).unsqueeze(-1), self.f, self.g, turned=True)
        return rows.squeeze(-1), cols.squeeze(-1)

    def plan(self) -> Tensor:
        """Transport plan exp((f + g - cost) / epsilon) * a * b as a dense tensor; 0 where masked. Differentiable.

        Returns:
            [..., N, M].
        """
        return self._dense().plan()

    def log_plan(self) -> Tensor:
        """Logarithm of the plan as a dense tensor; -inf where masked or without weight.

        Returns:
            [..., N, M].
        """
        return self._dense().log_plan()

    @property
    def transport_cost(self) -> Tensor:
        """sum(plan * cost), [...], streamed; its gradient goes through the plan, as that of `apply`.

        The cost's terms are summed apart: in float32 the error is about 1e-7 of the largest cost.
        """
        x, y = self._prepared()
        points = Points.of(x, y, self.cost)
        ones = torch.ones_like(points.col)
        factors = torch.cat([y, points.col.unsqueeze(-1), ones.unsqueeze(-1)], -1)
        moments = self._apply(factors, self.f, self.g)
        per_row = moments[..., -2] + points.row * moments[..., -1] - points.scale * (x * moments[..., :-2]).sum(-1)
        return per_row.sum(-1)

    @property
    def value(self) -> Tensor:
        """Optimal value of the problem, [...], streamed.

        The objective is
        sum(plan * cost) + epsilon KL(plan | a b^T) + rho_a KL(plan 1 | a) + rho_b KL(plan^T 1 | b)
        with KL(p | q) = sum(p log(p/q) - p + q) and rho = epsilon tau / (1 - tau); a side with tau = 1, and both
        sides with an exact mass, are constrained instead. It is computed from the potentials (the dual).

        Gradient: with respect to x, y, a, b, epsilon and mass by the envelope theorem, exact at convergence, in one
        streamed pass; first derivatives only.
        """
        f, g = self.f.detach(), self.g.detach()
        total = self._apply(torch.ones_like(self.b).unsqueeze(-1), f, g).sum((-2, -1))
        return dual_value(total, self.a, self.b, self.epsilon, self.mass, f, g, self.tau, self.row_mask, self.col_mask)

    def _prepared(self) -> tuple[Tensor, Tensor]:
        """Points as the streamed cost wants them, expanded to the batch: [..., N, D], [..., M, D]."""
        dtype = self.f.dtype
        x, y = self.x.to(dtype), self.y.to(dtype)
        x, y = x.expand(*self.a.shape, x.shape[-1]), y.expand(*self.b.shape, y.shape[-1])
        return prepare(x, y, self.cost, self.row_mask, self.col_mask)

    def _flat(self, tensor: Tensor) -> Tensor:
        """The problems in one dimension."""
        batch = self.epsilon.shape
        return tensor.reshape(batch.numel(), *tensor.shape[len(batch) :])

    def _apply(self, values: Tensor, f: Tensor, g: Tensor, turned: bool = False) -> Tensor:
        """plan @ values, or its transpose @ values, with any potentials."""
        x, y, a, b, f, g = (self._flat(t) for t in (*self._prepared(), self.a, self.b, f, g))
        sides = (y, x, b, a, g, f) if turned else (x, y, a, b, f, g)
        result = _plan_product(*sides, self._flat(self.epsilon), self._flat(values), self.cost, self.backend)
        return result.reshape(*self.epsilon.shape, *result.shape[1:])

    def _dense(self) -> SinkhornResult:
        """The same solution with its cost as a matrix."""
        x, y = self._prepared()
        cost = _cost_matrix(self._flat(x), self._flat(y), self.cost).reshape(*self.a.shape, self.b.shape[-1])
        fields = {name: getattr(self, name) for name in Solution.__dataclass_fields__}
        return SinkhornResult(**fields, cost=cost)


def once_differentiable(operator: Any, who: str) -> Callable[..., Any]:
    """Return the function to call instead of a custom op that is itself a gradient and has none."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"{who}: second derivatives are not available for point clouds. Use sinkhorn(matrix, ...) for them."
        )

    return differentiable(operator, backward, lambda ctx, inputs, output: None)


@torch.library.custom_op("pisces_kernels::points_cost", mutates_args=())
def _cost_matrix_op(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """Cost of two prepared clouds as a matrix, [P, N, M]."""
    every = slice(None)
    with full_precision(x.device):
        return Points.of(x, y, cost).cost(every, every, every)


@_cost_matrix_op.register_fake
def _(x: Tensor, y: Tensor, cost: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], y.shape[-2])


@torch.library.custom_op("pisces_kernels::points_cost_backward", mutates_args=())
def _cost_matrix_backward_op(grad: Tensor, x: Tensor, y: Tensor, cost: str) -> tuple[Tensor, Tensor]:
    """Gradients of the clouds."""
    with full_precision(x.device):
        return cost_gradient(Points.of(x, y, cost), grad.sum(-1), grad @ y, grad.sum(-2), grad.transpose(-1, -2) @ x)


@_cost_matrix_backward_op.register_fake
def _(grad: Tensor, x: Tensor, y: Tensor, cost: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _cost_matrix_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.cost = inputs[2]


def _cost_matrix_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_cost_gradients(grad, *ctx.saved_tensors, ctx.cost), None)


fold_into_problems(_cost_matrix_op)
fold_into_problems(_cost_matrix_backward_op)
_cost_gradients = once_differentiable(_cost_matrix_backward_op, "sinkhorn_points")
_cost_matrix = differentiable(_cost_matrix_op, _cost_matrix_gradient, _cost_matrix_context)


@torch.library.custom_op("pisces_kernels::plan_product", mutates_args=())
def _plan_product_op(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    epsilon: Tensor,
    values: Tensor,
    cost: str,
    backend: str,
) -> Tensor:
    """Plan of two prepared clouds times values [P, M, E]: [P, N, E]."""
    eps = epsilon.to(f.dtype).unsqueeze(-1)
    (la, has_a), (lb, has_b) = log_or_zero(a), log_or_zero(b)
    points = Points.of(x, y, cost, backend)
    with full_precision(x.device):
        result, _ = products(points, f / eps + la, g / eps + lb, eps, has_b.unsqueeze(-1) * values, None)
    assert result is not None  # for the type checker
    return has_a.unsqueeze(-1) * result


@_plan_product_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    epsilon: Tensor,
    values: Tensor,
    cost: str,
    backend: str,
) -> Tensor:
    return f.new_empty(*f.shape, values.shape[-1])


@torch.library.custom_op("pisces_kernels::plan_product_backward", mutates_args=())
def _plan_product_backward_op(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    epsilon: Tensor,
    values: Tensor,
    cost: str,
    backend: str,
    with_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, a, b, f, g, epsilon and, if they are wanted, values (else [P, M, 0])."""
    eps = epsilon.to(f.dtype).unsqueeze(-1)
    (la, has_a), (lb, has_b) = log_or_zero(a), log_or_zero(b)
    points, row, col = Points.of(x, y, cost, backend), f / eps + la, g / eps + lb
    to_values = values[..., :0].clone()
    with full_precision(x.device):
        # W = plan * (grad values^T) is minus epsilon times the gradient of the cost.
        sums = weighted_sums(points, row, col, eps, has_a, has_b, f, g, coupling=(grad, values))
        if with_values:
            _, product = products(points, row, col, eps, None, has_a.unsqueeze(-1) * grad)
            assert product is not None  # for the type checker
            to_values = has_b.unsqueeze(-1) * product
    eps3 = eps.unsqueeze(-1)
    return (
        -sums.grad_x / eps3,
        -sums.grad_y / eps3,
        over_weight(sums.rows, a),
        over_weight(sums.cols, b),
        has_a * sums.rows / eps,
        has_b * sums.cols / eps,
        (-sums.energy / eps.squeeze(-1) ** 2).to(epsilon.dtype),
        to_values,
    )


@_plan_product_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    f: Tensor,
    g: Tensor,
    epsilon: Tensor,
    values: Tensor,
    cost: str,
    backend: str,
    with_values: bool,
) -> tuple[Tensor, ...]:
    like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, y, a, b, f, g, epsilon)]
    return (*like, values.new_empty(*values.shape[:-1], values.shape[-1] if with_values else 0))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


@without_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[7]
    *grads, to_values = _gradients(grad, *ctx.saved_tensors, *ctx.options, wanted)
    return (*grads, to_values if wanted else None, None, None)


fold_into_problems(_plan_product_op)
fold_into_problems(_plan_product_backward_op)
_gradients = once_differentiable(_plan_product_backward_op, "sinkhorn_points")
_plan_product = differentiable(_plan_product_op, _backward, _setup_context)

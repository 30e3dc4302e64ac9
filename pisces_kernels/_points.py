"""Entropic optimal transport of point clouds, streamed: the public function, its checks, custom op and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, _problem, reference
from ._autograd import differentiable
from ._compiled._task import PRECISIONS
from ._points_result import PointsResult, once_differentiable
from ._precision import full_precision, without_autocast
from ._streamed_gradient import streamed_gradient
from ._streaming import COSTS, Points, prepare, soft_minimum
from ._vmap import fold_into_problems

WHO = "sinkhorn_points"
GRADIENTS = ("implicit", "none")


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: str = "sqeuclidean",
    epsilon: float | Tensor,
    tau: float | tuple[float, float] = 1.0,
    mass: float | Tensor | None = None,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    max_iters: int = 200,
    tol: float = 1e-3,
    acceleration: str | None = None,
    f_init: Tensor | None = None,
    g_init: Tensor | None = None,
    gradient: str = "implicit",
    precision: str = "float32",
    backend: str | None = None,
) -> PointsResult:
    """Solve entropic optimal transport between point clouds without ever storing their N x M cost.

    The problems, conventions and iteration are those of `sinkhorn` with
    cost_ij = |x_i - y_j|^2 ("sqeuclidean", without 1/2) or 1 - cos(x_i, y_j) ("cosine"; a zero vector has cosine 0).
    Every iteration computes the cost again, tile by tile: memory is O((N + M) D), forward and backward. Matrix products
    are computed in full float32 or float64, whatever TF32 or autocast say; the points are centred first, so that clouds
    far from the origin lose nothing.

    Args:
        x: [..., N, D] floating, finite. float16 and bfloat16 are solved in float32.
        y: [..., M, D]; the leading dimensions of x and y broadcast to the batch.
        a: [..., N], weights >= 0 that broadcast to the batch; None: uniform with sum 1 over the rows that exist.
        b: [..., M], as a.
        cost: "sqeuclidean" or "cosine".
        epsilon: entropic regularisation > 0 in units of the cost, one number or one per problem [...].
        tau: rho / (rho + epsilon) in (0, 1], or (tau_a, tau_b).
        mass: transported mass in (0, min(sum a, sum b)], one number or one per problem; excludes tau.
        row_mask: [..., N] bool, True where the row exists. A masked row is exactly as if it were not there.
        col_mask: [..., M] bool.
        max_iters: most iterations, >= 1.
        tol: a problem has converged when its residual is smaller; 0 runs all iterations. In float32 rounding
            may keep the residual above about 1e-7 * max|cost| / epsilon.
        acceleration: None (plain iterations) or "anderson".
        f_init: [..., N], potentials to start from (with `f_init` alone the iteration starts with g).
        g_init: [..., M].
        gradient: "implicit" (exact at the fixed point) or "none".
        precision: of the products of points during the solve, with backend "cuda" or "triton": "float32", or on tensor
            cores "tf32" (10 bits of mantissa) or "bf16" (7 bits), with sums in float32. The potentials inherit the
            rounding of the points: measure before you rely on them. Gradients and what follows from the result are in
            float32.
        backend: None (the best that can run), "reference", "cpu", "cuda" or "triton" (both float32, without mass and
            acceleration); also for everything that follows from the result.

    Returns:
        `PointsResult`, with `value`, `transport_cost`, `marginals`, `apply` (plan times a matrix) and `barycentric`,
        all streamed. Potentials are made unique as in `sinkhorn`.

    Gradient:
        f, g and what follows from them with respect to x, y, a, b, epsilon and mass by differentiating the fixed-point
        equations. The linear system of the shorter side is solved by conjugate gradients whose products are streamed:
        until no entry of the residual exceeds 1e-6 (float64: 1e-13) of the largest entry of the right-hand side, in at
        most 200 steps of about the price of an iteration; CPU tensors get a RuntimeWarning when that was not enough.
        `value` needs no linear solve (envelope theorem). First derivatives only.

    Raises:
        TypeError: a tensor is missing or has the wrong kind of dtype.
        ValueError: shapes, devices, names or ranges do not fit. Values of weights, epsilon and mass are read for CPU
            tensors only; points that are not finite are reported by a NaN residual.

    Example:
        >>> import torch
        >>> from pisces_kernels import sinkhorn_points
        >>> result = sinkhorn_points(torch.rand(500, 3), torch.rand(700, 3), epsilon=0.05)
        >>> result.barycentric().shape
        torch.Size([500, 3])

    Source: Feydy 2020, "Geometric data analysis, beyond convolutions", chapter 3 (streamed log-sum-exp).
    """
    x, y, shape = check_points(WHO, x, y, cost)
    leading = x.to(_checks.working_dtype(x, y))
    problem = _problem.check(
        WHO,
        leading,
        shape,
        ("batch + (N,)", "batch + (M,)"),
        gradients=GRADIENTS,
        a=a,
        b=b,
        epsilon=epsilon,
        tau=tau,
        mass=mass,
        row_mask=row_mask,
        col_mask=col_mask,
        max_iters=max_iters,
        tol=tol,
        acceleration=acceleration,
        f_init=f_init,
        g_init=g_init,
        gradient=gradient,
    )
    chosen = _dispatch.resolve(
        WHO, backend, x.device, problem.dtype, acceleration=acceleration, points_mass=problem.mass
    )
    if precision not in PRECISIONS:
        raise ValueError(f"{WHO}: precision is {precision!r}, expected one of {tuple(PRECISIONS)}.")
    if precision != "float32" and chosen not in ("cuda", "triton"):
        raise ValueError(
            f"{WHO}: precision {precision!r} is there with backend='cuda' or 'triton' only, got backend {chosen!r}."
        )
    flat, held = problem.flat, problem.constant_unless_differentiated
    rows, cols = (points.to(problem.dtype).expand(*problem.batch, *points.shape[-2:]) for points in (x, y))
    f, g, n_iters, residual = _solve(
        *(flat(held(points)) for points in prepare(rows, cols, cost, problem.row_mask, problem.col_mask)),
        flat(held(problem.a)),
        flat(held(problem.b)),
        flat(held(problem.epsilon)),
        *problem.tau,
        flat(held(problem.mass)),
        flat(problem.row_mask),
        flat(problem.col_mask),
        problem.max_iters,
        problem.tol,
        acceleration,
        *(None if start is None else flat(start.detach()) for start in (problem.f_init, problem.g_init)),
        cost,
        precision,
        chosen,
    )
    return PointsResult(**problem.solution(f, g, n_iters, residual), x=x, y=y, cost=cost, backend=chosen)


def check_points(who: str, x: Tensor, y: Tensor, cost: str) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Check two clouds and the name of their cost: (x, y, batch + (N, M))."""
    for name, points, wanted in (("x", x, "[..., N, D]"), ("y", y, "[..., M, D]")):
        _checks.floating(who, name, points)
        if points.ndim < 2:
            raise ValueError(f"{who}: {name} has shape {tuple(points.shape)}, expected {wanted}.")
        if points.shape[-2] == 0 or points.shape[-1] == 0:
            raise ValueError(
                f"{who}: {name} has shape {tuple(points.shape)}, expected {wanted} with at least one point and one "
                "feature. Mask points out instead."
            )
    _checks.same_device(who, x, y=y)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{who}: y has shape {tuple(y.shape)}, expected [..., M, {x.shape[-1]}]: the D of x, {tuple(x.shape)}."
        )
    if cost not in COSTS:
        raise ValueError(f"{who}: cost is {cost!r}, expected one of {COSTS}. For others use sinkhorn(matrix, ...).")
    try:
        batch = x.shape[:-2]
        if batch != y.shape[:-2]:
            batch = torch.broadcast_shapes(batch, y.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"{who}: y has shape {tuple(y.shape)}, expected leading dimensions that broadcast with those of x, "
            f"{tuple(x.shape)}."
        ) from None
    return x, y, (*batch, x.shape[-2], y.shape[-2])


@torch.library.custom_op("pisces_kernels::sinkhorn_points", mutates_args=())
def _sinkhorn_points_op(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    tau_a: float,
    tau_b: float,
    mass: Tensor | None,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    max_iters: int,
    tol: float,
    acceleration: str | None,
    f_init: Tensor | None,
    g_init: Tensor | None,
    cost: str,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve P problems between prepared clouds [P, N, D], [P, M, D]: (f, g, n_iters int32, residual)."""
    if _dispatch.has_kernel("points_solve", backend):
        return _dispatch.kernel("points_solve", backend)(
            x,
            y,
            a,
            b,
            epsilon,
            tau_a=tau_a,
            tau_b=tau_b,
            mass=mass,
            row_mask=row_mask,
            col_mask=col_mask,
            max_iters=max_iters,
            tol=tol,
            acceleration=acceleration,
            f_init=f_init,
            g_init=g_init,
            cost=cost,
            precision=precision,
        )
    broken = ~Points.of(x, y, cost).finite()
    x, y = (torch.where(broken[:, None, None], 0.0, points) for points in (x, y))
    points = Points.of(x, y, cost)
    rows = torch.ones_like(a, dtype=torch.bool) if row_mask is None else row_mask
    cols = torch.ones_like(b, dtype=torch.bool) if col_mask is None else col_mask
    a, b = torch.where(rows, a, 0.0), torch.where(cols, b, 0.0)
    # A problem without weight is given harmless ones so that no NaN arises; `alternate` returns zeros for it.
    empty = ((a.sum(-1) <= 0) | (b.sum(-1) <= 0)).unsqueeze(-1)
    log_a = torch.where(empty, 0.0, reference.log_weights(a))
    log_b = torch.where(empty, 0.0, reference.log_weights(b))
    eps = epsilon.to(a.dtype).unsqueeze(-1)
    updates = reference.Alternation(
        row_transform=lambda g: soft_minimum(points, g, log_b, eps),
        col_transform=lambda f: soft_minimum(points.mT, f, log_a, eps),
        a=a,
        b=b,
        epsilon=eps,
        rows=rows,
        cols=cols,
        tau_a=tau_a,
        tau_b=tau_b,
        mass=mass,
    )
    with full_precision(x.device):
        return reference.alternate(
            updates, broken, max_iters=max_iters, tol=tol, acceleration=acceleration, f_init=f_init, g_init=g_init
        )


@_sinkhorn_points_op.register_fake
def _(x: Tensor, y: Tensor, a: Tensor, b: Tensor, *unused: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(b, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[0], dtype=torch.int32),
        x.new_empty(x.shape[0]),
    )


@torch.library.custom_op("pisces_kernels::sinkhorn_points_backward", mutates_args=())
def _sinkhorn_points_backward_op(
    grad_f: Tensor,
    grad_g: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    mass: Tensor | None,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    tau_a: float,
    tau_b: float,
    cost: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, a, b, epsilon and mass (zeros without one)."""
    with full_precision(x.device):
        *grads, grad_epsilon, grad_mass = streamed_gradient(
            grad_f,
            grad_g,
            Points.of(x, y, cost, backend),
            a,
            b,
            epsilon,
            f,
            g,
            tau_a=tau_a,
            tau_b=tau_b,
            mass=mass,
            row_mask=row_mask,
            col_mask=col_mask,
        )
    to_mass = torch.zeros_like(epsilon) if grad_mass is None else grad_mass.to(epsilon.dtype)
    grad_x, grad_y, grad_a, grad_b = grads
    return grad_x, grad_y, grad_a, grad_b, grad_epsilon.to(epsilon.dtype), to_mass


@_sinkhorn_points_backward_op.register_fake
def _(
    grad_f: Tensor, grad_g: Tensor, x: Tensor, y: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, *unused: object
) -> tuple[Tensor, ...]:
    like = (x, y, a, b, epsilon, epsilon)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in like)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, a, b, epsilon, tau_a, tau_b, mass, row_mask, col_mask, *_, cost, _precision, backend = inputs
    f, g, n_iters, residual = output
    ctx.mark_non_differentiable(n_iters, residual)
    ctx.save_for_backward(x, y, a, b, epsilon, f, g, mass, row_mask, col_mask)
    ctx.options = (tau_a, tau_b, cost, backend)


@without_autocast
def _backward(ctx: Any, grad_f: Tensor, grad_g: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    mass = ctx.saved_tensors[7]
    *grads, grad_mass = _gradients(grad_f, grad_g, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None if mass is None else grad_mass.to(mass.dtype), *([None] * 10))


fold_into_problems(_sinkhorn_points_op)
fold_into_problems(_sinkhorn_points_backward_op)
_gradients = once_differentiable(_sinkhorn_points_backward_op, WHO)
_solve = differentiable(_sinkhorn_points_op, _backward, _setup_context)

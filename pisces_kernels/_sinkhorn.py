"""Entropic optimal transport of batched dense problems: the public function, its checks, custom op and gradient."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, _problem, reference
from ._autograd import differentiable
from ._implicit import potentials_gradient
from ._precision import without_autocast
from ._result import SinkhornResult
from ._unrolled import unrolled_gradients
from ._vmap import lead_with_mapped

WHO = "sinkhorn"
GRADIENTS = ("implicit", "unrolled", "none")


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
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
    backend: str | None = None,
) -> SinkhornResult:
    """Solve entropic optimal transport for a batch of dense problems.

    plan = exp((f + g - cost) / epsilon) * a * b minimises
    sum(plan * cost) + epsilon KL(plan | a b^T) + rho_a KL(plan 1 | a) + rho_b KL(plan^T 1 | b)
    with rho = epsilon tau / (1 - tau). tau = 1 keeps a marginal exactly (balanced);
    `mass` asks instead for marginals of at most a and b and a total of exactly mass. One
    iteration updates f, then g. Problems stop one by one.

    Args:
        cost: [..., N, M] floating, any strides, finite. float16 and bfloat16 are solved in float32.
        a: [..., N], weights >= 0 that broadcast to the batch; None: uniform with sum 1 over the rows that exist.
        b: [..., M], as a.
        epsilon: entropic regularisation > 0 in units of the cost, one number or one per problem [...].
        tau: rho / (rho + epsilon) in (0, 1], or (tau_a, tau_b).
        mass: transported mass in (0, min(sum a, sum b)], one number or one per problem; excludes tau.
        row_mask: [..., N] bool, True where the row exists. A masked row is exactly as if it were not there.
        col_mask: [..., M] bool.
        max_iters: most iterations, >= 1.
        tol: a problem has converged when its residual is smaller; 0 runs all iterations. In float32 rounding
            may keep the residual above about 1e-7 * max|cost| / epsilon.
        acceleration: None, or "anderson": extrapolates the row potential from the last five iterations and falls back
            to plain ones where that does not help. It pays where plain iterations converge slowly: small epsilon, tau
            near 1. The answer is the same; `residual` is still that of a plain iteration, and the last one is plain.
            Problems with fewer than 8 rows or columns always run plain ones.
        f_init: [..., N], potentials to start from (with `f_init` alone the iteration starts with g).
        g_init: [..., M].
        gradient: how the potentials are differentiated: "implicit" (at the fixed point: exact when converged),
            "unrolled" (through the iterations that ran: exact whenever they stopped) or "none" (they are constants).
        backend: None (the best that can run: on a GPU "cuda", else "triton", else "reference"), or one of these or
            "cpu". The kernels for GPUs are float32 and without acceleration; a wish that they cannot meet raises.

    Returns:
        `SinkhornResult`. Balanced potentials are fixed by sum(a f) = sum(b g); with `mass` the multiplier of the mass
        is split evenly, max f = max g. A problem without weight on one side gives zeros, n_iters 0 and converged.

    Gradient:
        f, g and the plan with respect to cost, a, b, epsilon and mass. "implicit" differentiates the fixed-point
        equations: one N x N or M x M solve in float64, whichever is smaller; saved: the inputs, f and g. "unrolled"
        recomputes the iterations by log-sum-exp and goes back through them, f_init and g_init included; saved: the
        inputs; memory in the backward pass: iterations * (N + M) and a few N x M per problem. `value` has the
        envelope theorem's gradient (see there). Second derivatives are right for all of them; with "unrolled" they keep
        a graph of the recomputed iterations. torch.func.grad, vjp and vmap work; forward mode (jvp) raises.

    Raises:
        TypeError: a tensor is missing or has the wrong kind of dtype.
        ValueError: shapes, devices or ranges do not fit. Values of weights, epsilon and mass are read for CPU tensors
            only (elsewhere a bad value shows as a NaN residual); a non-finite cost is reported by the residual.

    Example:
        >>> import torch
        >>> from pisces_kernels import sinkhorn
        >>> result = sinkhorn(torch.rand(4, 20, 300), epsilon=0.05, tau=0.9)
        >>> result.plan().shape
        torch.Size([4, 20, 300])

    Source: Cuturi 2013; Chizat et al. 2018 (damped updates); Benamou et al. 2015, section 5.1 (exact mass).
    """
    cost = _checks.floating(WHO, "cost", cost)
    if cost.ndim < 2:
        raise ValueError(f"{WHO}: cost has shape {tuple(cost.shape)}, expected [..., N, M].")
    if cost.shape[-2] == 0 or cost.shape[-1] == 0:
        raise ValueError(
            f"{WHO}: cost has shape {tuple(cost.shape)}, expected N >= 1 and M >= 1. Mask rows out instead."
        )
    problem = _problem.check(
        WHO,
        cost,
        cost.shape,
        ("cost.shape[:-2] + (N,)", "cost.shape[:-2] + (M,)"),
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
    chosen = _dispatch.resolve(WHO, backend, cost.device, problem.dtype, acceleration=acceleration)
    as_stored = chosen in ("cuda", "triton") or cost.dtype == problem.dtype  # those read 16-bit costs themselves
    held = problem.constant_unless_differentiated
    with_start = gradient == "unrolled"  # the fixed point does not depend on where the iteration starts
    f_start, g_start = (
        start if start is None or with_start else start.detach() for start in (problem.f_init, problem.g_init)
    )
    f, g, n_iters, residual = _solve(
        held(cost if as_stored else cost.to(problem.dtype)),
        held(problem.a),
        held(problem.b),
        held(problem.epsilon),
        *problem.tau,
        held(problem.mass),
        problem.row_mask,
        problem.col_mask,
        problem.max_iters,
        problem.tol,
        acceleration,
        f_start,
        g_start,
        gradient,
        chosen,
    )
    return SinkhornResult(**problem.solution(f, g, n_iters, residual), cost=cost, _backend=chosen)


def _reference(cost: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """`reference.sinkhorn`, with any leading dimensions."""
    batch = cost.shape[:-2]

    def flat(value: Any) -> Any:
        return _problem.flat(value, batch) if isinstance(value, Tensor) else value

    results = reference.sinkhorn(*map(flat, (cost, *others)), **{name: flat(value) for name, value in options.items()})
    return tuple(result.reshape(batch + result.shape[1:]) for result in results)


@torch.library.custom_op("pisces_kernels::sinkhorn", mutates_args=())
def _sinkhorn_op(
    cost: Tensor,
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
    gradient: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve [..., N, M] problems on one back end: (f, g, n_iters int32, residual)."""
    solve = _dispatch.kernel("sinkhorn", backend) if _dispatch.has_kernel("sinkhorn", backend) else _reference
    f, g, n_iters, residual = solve(
        cost,
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
    )
    return f, g, n_iters, residual


@_sinkhorn_op.register_fake
def _(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, *unused: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(b, memory_format=torch.contiguous_format),
        a.new_empty(cost.shape[:-2], dtype=torch.int32),
        a.new_empty(cost.shape[:-2]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost, a, b, epsilon, tau_a, tau_b, mass, row_mask, col_mask, max_iters, _, _, *starts, gradient, backend = inputs
    f, g, n_iters, residual = output
    ctx.mark_non_differentiable(n_iters, residual)
    ctx.options = (tau_a, tau_b, max_iters, gradient, backend)
    if gradient == "unrolled":
        ctx.save_for_backward(cost, a, b, epsilon, mass, row_mask, col_mask, *starts, n_iters)
    else:
        ctx.save_for_backward(cost, a, b, epsilon, mass, row_mask, col_mask, f, g)


@without_autocast
def _backward(ctx: Any, grad_f: Tensor, grad_g: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    stored, a, b, epsilon, mass, row_mask, col_mask, *rest = ctx.saved_tensors
    tau_a, tau_b, max_iters, gradient, backend = ctx.options
    cost = stored.to(a.dtype)
    grad_f_init = grad_g_init = None
    if gradient == "unrolled":
        f_init, g_init, n_iters = rest
        *grads, to_mass, to_f, to_g = unrolled_gradients(
            grad_f, grad_g, cost, a, b, epsilon, mass, f_init, g_init, tau_a, tau_b, row_mask, col_mask, n_iters,
            max_iters, backend,
        )  # fmt: skip
        grad_mass = None if mass is None else to_mass
        grad_f_init, grad_g_init = None if f_init is None else to_f, None if g_init is None else to_g
    else:
        f, g = rest
        *grads, to_mass = potentials_gradient(
            grad_f, grad_g, cost, a, b, epsilon, f, g, tau_a, tau_b, mass is not None, row_mask, col_mask,
            backend=backend,
        )  # fmt: skip
        grad_mass = None if mass is None else to_mass.to(mass.dtype)
    grad_cost, grad_a, grad_b, grad_epsilon = grads
    return (
        grad_cost.to(stored.dtype), grad_a, grad_b, grad_epsilon.to(epsilon.dtype), None, None, grad_mass,
        None, None, None, None, None, grad_f_init, grad_g_init, None, None,
    )  # fmt: skip


def _any_batch(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let formulas for problems in one dimension serve any leading dimensions."""

    def run(ctx: Any, grad_f: Tensor, grad_g: Tensor, *unused: Tensor) -> Any:
        batch = grad_f.shape[:-1]
        if len(batch) == 1:
            return backward(ctx, grad_f, grad_g)
        grads = _problem.flat(grad_f, batch), _problem.flat(grad_g, batch)
        saved = (None if tensor is None else _problem.flat(tensor, batch) for tensor in ctx.saved_tensors)
        results = backward(SimpleNamespace(saved_tensors=tuple(saved), options=ctx.options), *grads)
        return tuple(None if result is None else result.reshape(batch + result.shape[1:]) for result in results)

    return run


lead_with_mapped(_sinkhorn_op)
_solve = differentiable(_sinkhorn_op, _any_batch(_backward), _setup_context)

"""Entropic optimal transport of batched dense problems: the public function, its checks, custom op and gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, reference
from ._implicit import potentials_gradient

WHO = "sinkhorn"


@dataclass(frozen=True, eq=False, repr=False)
class SinkhornResult:
    """Solution of `sinkhorn`: potentials, diagnostics, and everything that follows from them on request.

    Attributes:
        f: [..., N] row potential in units of the cost; 0 where masked. float32 or float64.
        g: [..., M] column potential.
        n_iters: [...] int32, iterations that ran.
        residual: [...], largest change of f/epsilon or g/epsilon in the last iteration. NaN says that the
            problem's cost or start has a non-finite entry, or that its potentials overflowed (they are NaN then).
        converged: [...] bool, residual < tol; with tol = 0: residual == 0. False is a documented answer: max_iters was
            reached, the problem is infeasible (balanced with unequal masses), or the residual is NaN.
        cost: [..., N, M], a: [..., N], b: [..., M], epsilon: [...], tau: (tau_a, tau_b), mass: [...] or None, row_mask,
            col_mask: the problem that was solved.
    """

    f: Tensor
    g: Tensor
    n_iters: Tensor
    residual: Tensor
    converged: Tensor
    cost: Tensor
    a: Tensor
    b: Tensor
    epsilon: Tensor
    tau: tuple[float, float]
    mass: Tensor | None
    row_mask: Tensor | None
    col_mask: Tensor | None

    def __repr__(self) -> str:
        return f"SinkhornResult(f={list(self.f.shape)}, g={list(self.g.shape)}, dtype={self.f.dtype}, tau={self.tau})"

    def _keep(self) -> Tensor:
        """[..., N, M] bool: entries that exist."""
        keep = torch.ones_like(self.cost, dtype=torch.bool)
        if self.row_mask is not None:
            keep = keep & self.row_mask.unsqueeze(-1)
        if self.col_mask is not None:
            keep = keep & self.col_mask.unsqueeze(-2)
        return keep

    def _exponent(self, f: Tensor, g: Tensor, keep: Tensor) -> Tensor:
        cost = torch.where(keep, self.cost.to(f.dtype), 0.0)
        exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / self.epsilon.to(f.dtype)[..., None, None]
        return reference.bounded(exponent, (self.a > 0).unsqueeze(-1) & (self.b > 0).unsqueeze(-2))

    def _dense(self, f: Tensor, g: Tensor) -> Tensor:
        """exp((f + g - cost) / epsilon) * a * b, 0 where masked. [..., N, M]"""
        keep = self._keep()
        dense = self._exponent(f, g, keep).exp() * self.a.unsqueeze(-1) * self.b.unsqueeze(-2)
        return torch.where(keep, dense, 0.0)

    def log_plan(self) -> Tensor:
        """Logarithm of the plan, (f + g - cost) / epsilon + log a + log b; -inf where masked or without weight.

        Returns:
            [..., N, M].
        """
        keep = self._keep()
        logs = reference.log_weights(self.a).unsqueeze(-1) + reference.log_weights(self.b).unsqueeze(-2)
        return torch.where(keep, self._exponent(self.f, self.g, keep) + logs, -torch.inf)

    def plan(self) -> Tensor:
        """Transport plan exp((f + g - cost) / epsilon) * a * b; 0 where masked. Differentiable.

        Returns:
            [..., N, M].
        """
        return self._dense(self.f, self.g)

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
        return (self.plan() * torch.where(self._keep(), self.cost.to(self.f.dtype), 0.0)).sum((-2, -1))

    @property
    def value(self) -> Tensor:
        """Optimal value of the problem, [...].

        The objective is
        sum(plan * cost) + epsilon KL(plan | a b^T) + rho_a KL(plan 1 | a) + rho_b KL(plan^T 1 | b)
        with KL(p | q) = sum(p log(p/q) - p + q) and rho = epsilon tau / (1 - tau); a side with tau = 1, and both
        sides with an exact mass, are constrained instead. It is computed from the potentials (the dual).

        Gradient: with respect to cost, a, b and mass by the envelope theorem (for cost it is the plan); exact at
        convergence, first derivatives only.
        """
        f, g = self.f.detach(), self.g.detach()
        eps = self.epsilon.to(f.dtype)
        result = eps * (self.a.sum(-1) * self.b.sum(-1) - self._dense(f, g).sum((-2, -1)))
        if self.mass is not None:
            top_f, top_g = self._top(f, self.row_mask), self._top(g, self.col_mask)
            f, g = f - top_f.unsqueeze(-1), g - top_g.unsqueeze(-1)
            result = result + self.mass * (top_f + top_g)
        for weight, potential, tau in ((self.a, f, self.tau[0]), (self.b, g, self.tau[1])):
            if tau == 1.0 or self.mass is not None:
                gain = potential
            else:
                rho = (eps * tau / (1.0 - tau)).unsqueeze(-1)
                gain = -rho * torch.expm1(-potential / rho)
            result = result + (weight * gain).sum(-1)
        return result

    @staticmethod
    def _top(potential: Tensor, mask: Tensor | None) -> Tensor:
        """Largest potential of the entries that exist; 0 when there are none. [...]"""
        if mask is not None:
            potential = torch.where(mask, potential, -torch.inf)
        top = potential.amax(-1)
        return torch.where(torch.isneginf(top), 0.0, top)


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
        tol: a problem has converged when its residual is smaller; 0 runs all iterations. In float32 the residual
            cannot fall below about 1e-7 * max|cost| / epsilon.
        f_init: [..., N], potentials to start from (with `f_init` alone the iteration starts with g).
        g_init: [..., M].
        gradient: "implicit" (exact at the fixed point) or "none".
        backend: None (the best that can run), "reference", "cpu" or "cuda". The CUDA kernel is compiled, not yet
            executed on a GPU, and therefore never chosen unless it is named.

    Returns:
        `SinkhornResult`. Balanced potentials are fixed by sum(a f) = sum(b g); with `mass` the multiplier of the mass
        is split evenly, max f = max g. A problem without weight on one side gives zeros, n_iters 0 and converged.

    Gradient:
        f, g and the plan with respect to cost, a, b and mass by differentiating the fixed-point equations (one N x N or
        M x M solve, whichever is smaller); saved: the inputs, f and g. Not with respect to epsilon.

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
    *batch, n_rows, n_cols = cost.shape
    if n_rows == 0 or n_cols == 0:
        raise ValueError(
            f"{WHO}: cost has shape {tuple(cost.shape)}, expected N >= 1 and M >= 1. Mask rows out instead."
        )
    for name, value in (("a", a), ("b", b), ("f_init", f_init), ("g_init", g_init)):
        if value is not None:
            _checks.floating(WHO, name, value)
    _checks.same_device(WHO, cost, a=a, b=b, row_mask=row_mask, col_mask=col_mask, f_init=f_init, g_init=g_init)
    dtype = _checks.working_dtype(cost, a, b)
    max_iters, tol = _checks.stopping(WHO, max_iters, tol)
    if gradient not in ("implicit", "none"):
        raise ValueError(f"{WHO}: gradient is {gradient!r}, expected 'implicit' or 'none'.")
    taus = tuple(tau) if isinstance(tau, tuple | list) else (tau, tau)
    if len(taus) != 2:
        raise ValueError(f"{WHO}: tau has {len(taus)} entries, expected a number or (tau_a, tau_b).")
    tau_a, tau_b = (_checks.unit_interval(WHO, "tau", t) for t in taus)
    if mass is not None and (tau_a, tau_b) != (1.0, 1.0):
        raise ValueError(f"{WHO}: got tau={tau} and mass={mass}, which exclude each other. Pass one of them.")
    chosen = _dispatch.resolve(WHO, backend, cost.device, _dispatch.BACKENDS)

    n_problems = 1
    for size in batch:
        n_problems *= size
    row_shape, col_shape = (*batch, n_rows), (*batch, n_cols)
    row_mask = _checks.mask(WHO, "row_mask", row_mask, row_shape, "cost.shape[:-2] + (N,)")
    col_mask = _checks.mask(WHO, "col_mask", col_mask, col_shape, "cost.shape[:-2] + (M,)")
    a = _weights("a", a, row_shape, "cost.shape[:-2] + (N,)", row_mask, dtype, cost.device)
    b = _weights("b", b, col_shape, "cost.shape[:-2] + (M,)", col_mask, dtype, cost.device)
    eps = _per_problem("epsilon", epsilon, batch, cost.device)
    total = None if mass is None else _per_problem("mass", mass, batch, cost.device)
    if eps.requires_grad:
        raise ValueError(f"{WHO}: epsilon requires grad, which has no gradient here. Pass epsilon.detach().")
    if total is not None and _checks.readable(a, b, total):
        room = torch.minimum(a.sum(-1), b.sum(-1)).double()
        possible = (total > 0) & (total <= room * (1 + 1e-6)) | (room == 0)
        if not bool(possible.all()):
            raise ValueError(
                f"{WHO}: mass is {mass}, expected in (0, {room.min().item():.6g}] = (0, min(sum a, sum b)]."
            )
    if f_init is not None:
        f_init = _checks.broadcast(WHO, "f_init", f_init.to(dtype), row_shape, "cost.shape[:-2] + (N,)")
    if g_init is not None:
        g_init = _checks.broadcast(WHO, "g_init", g_init.to(dtype), col_shape, "cost.shape[:-2] + (M,)")

    def flat(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.reshape(n_problems, *tensor.shape[len(batch) :])

    inputs = [cost.to(dtype), a, b, total]
    if gradient == "none":
        inputs = [t if t is None else t.detach() for t in inputs]
    f, g, n_iters, residual = _sinkhorn_op(
        *(flat(t) for t in inputs[:3]),
        flat(eps),
        tau_a,
        tau_b,
        flat(inputs[3]),
        flat(row_mask),
        flat(col_mask),
        max_iters,
        tol,
        None if f_init is None else flat(f_init.detach()),
        None if g_init is None else flat(g_init.detach()),
        chosen,
    )
    residual = residual.reshape(batch)
    return SinkhornResult(
        f=f.reshape(row_shape),
        g=g.reshape(col_shape),
        n_iters=n_iters.reshape(batch),
        residual=residual,
        converged=residual.double() < tol if tol > 0 else residual == 0,
        cost=cost,
        a=a,
        b=b,
        epsilon=eps,
        tau=(tau_a, tau_b),
        mass=None if total is None else total.to(dtype),
        row_mask=row_mask,
        col_mask=col_mask,
    )


def _weights(
    name: str,
    value: Tensor | None,
    shape: tuple[int, ...],
    meaning: str,
    mask: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Weights of one side in the working dtype, zero where masked; uniform over what exists by default."""
    if value is None:
        if mask is None:
            return torch.full(shape, 1.0 / shape[-1], dtype=dtype, device=device)
        return mask.to(dtype) / mask.sum(-1, keepdim=True).clamp_min(1).to(dtype)
    value = _checks.broadcast(WHO, name, value.to(dtype), shape, meaning)
    if mask is not None:
        value = torch.where(mask, value, 0.0)
    _checks.weights(WHO, name, value)
    return value


def _per_problem(name: str, value: float | Tensor, batch: list[int], device: torch.device) -> Tensor:
    """One positive float64 number a problem."""
    if not isinstance(value, Tensor):
        return torch.full(batch, _checks.positive(WHO, name, value), dtype=torch.float64, device=device)
    value = _checks.broadcast(WHO, name, value.to(device, torch.float64), batch, "cost.shape[:-2]")
    if _checks.readable(value) and not bool(((value > 0) & torch.isfinite(value)).all()):
        raise ValueError(f"{WHO}: {name} has entries <= 0 or non-finite ones, expected finite numbers > 0.")
    return value


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
    f_init: Tensor | None,
    g_init: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve [P, N, M] problems on one back end: (f, g, n_iters int32, residual)."""
    solve: Any = reference.sinkhorn
    if backend == "cpu":
        from ._cpu import sinkhorn as solve
    elif backend == "cuda":
        from ._cuda import sinkhorn as solve
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
        f_init=f_init,
        g_init=g_init,
    )
    return f, g, n_iters, residual


@_sinkhorn_op.register_fake
def _(cost: Tensor, a: Tensor, b: Tensor, epsilon: Tensor, *unused: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_problems = cost.shape[0]
    return (
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(b, memory_format=torch.contiguous_format),
        cost.new_empty(n_problems, dtype=torch.int32),
        cost.new_empty(n_problems),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cost, a, b, epsilon, tau_a, tau_b, mass, row_mask, col_mask = inputs[:9]
    f, g, n_iters, residual = output
    ctx.mark_non_differentiable(n_iters, residual)
    ctx.save_for_backward(cost, a, b, epsilon, f, g, mass, row_mask, col_mask)
    ctx.taus = (tau_a, tau_b)


@_checks.full_precision
def _backward(ctx: Any, grad_f: Tensor, grad_g: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    cost, a, b, epsilon, f, g, mass, row_mask, col_mask = ctx.saved_tensors
    grad_cost, grad_a, grad_b, grad_mass = potentials_gradient(
        grad_f,
        grad_g,
        cost,
        a,
        b,
        epsilon,
        f,
        g,
        tau_a=ctx.taus[0],
        tau_b=ctx.taus[1],
        mass=mass,
        row_mask=row_mask,
        col_mask=col_mask,
    )
    if grad_mass is not None:
        grad_mass = grad_mass.to(mass.dtype)
    return grad_cost, grad_a, grad_b, None, None, None, grad_mass, *([None] * 7)


_sinkhorn_op.register_autograd(_backward, setup_context=_setup_context)

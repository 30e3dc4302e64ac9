"""Debiased entropic transport between point clouds, streamed: the public function and the solver of its self terms."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import _checks, _dispatch, reference
from ._points import check_points, sinkhorn_points
from ._points_result import PointsResult
from ._precision import full_precision
from ._streaming import Points, prepare, soft_minimum
from ._vmap import fold_into_problems

WHO = "sinkhorn_divergence"


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost: str = "sqeuclidean",
    epsilon: float | Tensor,
    tau: float = 1.0,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    max_iters: int = 200,
    tol: float = 1e-3,
    acceleration: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the Sinkhorn divergence of two weighted point clouds: entropic transport without its bias.

    S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + epsilon / 2 (sum a - sum b)^2,
    OT the `value` of `sinkhorn_points`. S(x, x) = 0; with "sqeuclidean" S >= 0, zero only for equal clouds, and S goes
    from the squared Wasserstein distance (epsilon to 0) to the squared distance of the means (epsilon to infinity).
    Everything is streamed in O((N + M) D) memory. The two self terms iterate f <- (f + tau T(f)) / 2 with T the one
    transform that they need, which takes about 10 iterations whatever epsilon is.

    geomloss has cost |x - y|^2 / 2: its `SamplesLoss("sinkhorn", p=2, blur, reach)` is half of this function at
    epsilon = 2 blur^2 and tau = reach^2 / (reach^2 + blur^2).

    Args:
        x: [..., N, D] floating, finite.
        y: [..., M, D].
        a: [..., N], weights >= 0; None: uniform with sum 1 over the rows that exist.
        b: [..., M].
        cost: "sqeuclidean" or "cosine".
        epsilon: entropic regularisation > 0 in units of the cost, one number or one per problem [...].
        tau: rho / (rho + epsilon) in (0, 1], the same for both sides; 1 wants equal masses, sum a = sum b.
        row_mask: [..., N] bool, True where the point exists.
        col_mask: [..., M] bool.
        max_iters: most iterations of each term.
        tol: each term stops when its residual is smaller. The error of the result is of second order in it.
        acceleration: None or "anderson", for OT(x, y).
        backend: None (the best that can run), "reference", "cpu", "cuda" or "triton" (float32).

    Returns:
        [...]. NaN for problems with a point that is not finite. CPU tensors get a RuntimeWarning when a term has not
        converged; elsewhere reading that would stop the device: `sinkhorn_points` has the flags.

    Gradient:
        x, y, a, b and epsilon by the envelope theorem, streamed; no linear solve. First derivatives only.

    Raises:
        TypeError: a tensor is missing or has the wrong kind of dtype.
        ValueError: shapes, devices, names or ranges do not fit; on CPU tensors also unequal masses with tau = 1.

    Example:
        >>> import torch
        >>> from pisces_kernels import sinkhorn_divergence
        >>> x = torch.rand(300, 2)
        >>> bool(sinkhorn_divergence(x, x, epsilon=0.1).abs() < 1e-5)
        True

    Source: Feydy et al. 2019, "Interpolating between optimal transport and MMD using Sinkhorn divergences" (definition,
    self terms); Sejourne et al. 2019 (unequal masses).
    """
    x, y, _ = check_points(WHO, x, y, cost)
    tau = _checks.unit_interval(WHO, "tau", tau)
    cross = sinkhorn_points(
        x,
        y,
        a,
        b,
        cost=cost,
        epsilon=epsilon,
        tau=tau,
        row_mask=row_mask,
        col_mask=col_mask,
        max_iters=max_iters,
        tol=tol,
        acceleration=acceleration,
        gradient="none",
        backend=backend,
    )
    mass_x, mass_y = cross.a.sum(-1), cross.b.sum(-1)
    if tau == 1.0 and _checks.readable(mass_x, mass_y):
        gap = (mass_x - mass_y).abs()
        if bool((gap > 1e-3 * torch.maximum(mass_x, mass_y)).any()):
            raise ValueError(
                f"{WHO}: sum a and sum b differ by up to {gap.max().item():.6g}, expected equal masses with tau=1. "
                "Normalise the weights, or pass tau < 1."
            )
    value = cross.value
    solved = cross.converged
    for points, weights, mask in ((x, cross.a, cross.row_mask), (y, cross.b, cross.col_mask)):
        own = _self_transport(points, weights, mask, cross, max_iters, tol)
        value, solved = value - own.value / 2.0, solved & own.converged
    if _checks.readable(solved) and not bool(solved.all()):
        warnings.warn(
            f"{WHO}: {int((~solved).sum())} of {solved.numel()} problems did not converge to tol={tol} in {max_iters} "
            "iterations. Raise max_iters, pass acceleration='anderson', or use a larger epsilon.",
            RuntimeWarning,
            stacklevel=2,
        )
    return value + cross.epsilon.to(value.dtype) / 2.0 * (mass_x - mass_y) ** 2


def _self_transport(
    points: Tensor, weights: Tensor, mask: Tensor | None, like: PointsResult, max_iters: int, tol: float
) -> PointsResult:
    """Solve transport from a cloud [..., N, D] to itself, with the cost, epsilon and tau of another result."""
    batch = like.epsilon.shape
    expanded = points.detach().to(like.f.dtype).expand(*weights.shape, points.shape[-1])
    prepared, _ = prepare(expanded, expanded, like.cost, mask, mask)

    def flat(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(batch.numel(), *tensor.shape[len(batch) :])

    f, n_iters, residual = _self_transport_op(
        flat(prepared),
        flat(weights),
        flat(like.epsilon),
        like.tau[0],
        None if mask is None else flat(mask),
        max_iters,
        tol,
        like.cost,
        like.backend,
    )
    f, residual = f.reshape(weights.shape), residual.reshape(batch)
    return PointsResult(
        f=f,
        g=f,
        n_iters=n_iters.reshape(batch),
        residual=residual,
        tol=tol,
        a=weights,
        b=weights,
        epsilon=like.epsilon,
        tau=like.tau,
        mass=None,
        row_mask=mask,
        col_mask=mask,
        gradient="none",
        x=points,
        y=points,
        cost=like.cost,
        backend=like.backend,
    )


@torch.library.custom_op("pisces_kernels::self_transport", mutates_args=())
def _self_transport_op(
    x: Tensor,
    a: Tensor,
    epsilon: Tensor,
    tau: float,
    mask: Tensor | None,
    max_iters: int,
    tol: float,
    cost: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Potential f = g of P clouds [P, N, D] with themselves: (f [P, N], n_iters int32, residual); no gradient."""
    if _dispatch.has_kernel("points_self", backend):
        return _dispatch.kernel("points_self", backend)(x, a, epsilon, tau, mask, max_iters, tol, cost)
    broken = ~Points.of(x, x, cost).finite()
    x = torch.where(broken[:, None, None], 0.0, x)
    points = Points.of(x, x, cost)
    real = torch.ones_like(a, dtype=torch.bool) if mask is None else mask
    a = torch.where(real, a, 0.0)
    empty = a.sum(-1) <= 0
    log_a = torch.where(empty.unsqueeze(-1), 0.0, reference.log_weights(a))
    eps = epsilon.to(a.dtype).unsqueeze(-1)
    f = torch.zeros_like(a)
    residual = torch.full_like(eps.squeeze(-1), torch.inf)
    n_iters = torch.zeros_like(residual, dtype=torch.int32)
    running = ~(empty | broken)
    with full_precision(x.device):
        for _ in range(max_iters):
            if running.device.type == "cpu" and not bool(running.any()):
                break  # reading the flag costs nothing on a CPU; elsewhere it would stop the device once an iteration
            image = torch.where(real, tau * soft_minimum(points, f, log_a, eps), 0.0)
            change = (image - f).abs().amax(-1) / eps.squeeze(-1)
            f = torch.where(running.unsqueeze(-1), (f + image) / 2.0, f)
            residual = torch.where(running, change, residual)
            n_iters = n_iters + running.int()
            running = running & ~(change < tol)
    residual = torch.where(empty, 0.0, torch.where(broken, torch.nan, residual))
    return torch.where(broken.unsqueeze(-1) & real, torch.nan, f), n_iters, residual


@_self_transport_op.register_fake
def _(x: Tensor, a: Tensor, epsilon: Tensor, *unused: object) -> tuple[Tensor, Tensor, Tensor]:
    f = torch.empty_like(a, memory_format=torch.contiguous_format)
    return f, a.new_empty(a.shape[0], dtype=torch.int32), a.new_empty(a.shape[0])


fold_into_problems(_self_transport_op)

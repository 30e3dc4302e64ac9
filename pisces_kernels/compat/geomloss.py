"""Drop-in for geomloss 0.3.1: `SamplesLoss("sinkhorn")` and the functions of `geomloss.ot`, solved to a tolerance.

    from pisces_kernels.compat.geomloss import SamplesLoss, ot      # instead of: from geomloss import SamplesLoss, ot

Same arguments, conventions and values; the docstrings of `SamplesLoss` and `solve` say what differs on purpose:
geomloss stops after an annealing schedule, here a tolerance decides, and gradients are those of the optimum. Refused by
name: the kernel and Hausdorff losses, cluster labels, the multiscale back end and KeOps formulas of `SamplesLoss`. Not
here: images, grids and barycenters. geomloss itself is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from . import _geomloss_ot as ot
from . import _geomloss_solver as solver
from ._geomloss_ot import LinearOperator, OTResult, solve, solve_batch, solve_sample, solve_sample_batch

__all__ = [
    "LinearOperator",
    "OTResult",
    "SamplesLoss",
    "ot",
    "solve",
    "solve_batch",
    "solve_sample",
    "solve_sample_batch",
]

WHO = "SamplesLoss"
BACKENDS = ("auto", "tensorized", "online")


class SamplesLoss(torch.nn.Module):
    """`geomloss.SamplesLoss("sinkhorn", ...)`: Sinkhorn divergence between weighted point clouds.

    With C(x, y) = |x - y|^2 / 2 (p = 2) or |x - y| (p = 1, at least 1e-4), epsilon = blur^p and rho = reach^p, OT is
    the minimum of sum(plan * C) + epsilon KL(plan | a b^T), with the marginals a and b, or plus rho KL(plan 1 | a) +
    rho KL(plan^T 1 | b). The loss is

        OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + epsilon/2 (sum a - sum b)^2        with debias
        OT(a, b) - epsilon (sum a sum b - (sum a + sum b) / 2)                      without

    where the last term, zero for probability vectors, is what geomloss's formulas leave out.

    Calls: loss(x, y), loss(a, x, b, y) with x [N, D], y [M, D] -> [], or with batches x [B, N, D], y [B, M, D] -> [B];
    weights a [N], [N, 1], [B, N] or [B, N, 1]; without them uniform with sum 1. With potentials=True the result is
    (F [1, N] or [B, N], G [1, M] or [B, M]): F = f_ab - f_aa and G = g_ab - g_bb with debias, f_ab and g_ab without.

    Agrees with geomloss 0.3.1: calls, units, defaults, values, shapes of results. Differs on purpose:

    - geomloss stops after its annealing schedule, a few per cent off at scaling=0.5, and tends to this loss as
      scaling tends to 1. Here the annealing chooses the start of a solve that goes on until the residual is below
      `tol`: scaling and diameter change the time, not the answer. A RuntimeWarning tells when `max_iters` was reached.
    - Gradients of unbalanced losses are those of the value; geomloss's are (rho + epsilon/2) / (rho + epsilon) of them
      (for the points, and with debias), because the factor of its backward pass does not reach autograd. Balanced ones
      agree.
    - Potentials are differentiable. Balanced ones, unique up to a constant, satisfy sum(a f) = sum(b g).
    - Everything is computed in float64 and returned in the dtype of x.
    - Balanced losses of unequal masses (by more than 0.1 %) have no solution and raise ValueError.
    - cost(x, y) is called once per pair of clouds and taken to be symmetric, cost(x, y) = cost(y, x)^T.

    Args:
        loss: "sinkhorn".
        p: 1 or 2; with `cost`, the power of blur and reach only, any number > 0.
        blur: length > 0, epsilon = blur^p.
        reach: length > 0, rho = reach^p; None for balanced transport.
        diameter: length that annealing starts from; None: diagonal of the box of all points.
        scaling: ratio in (0, 1) of successive lengths in the annealing, never finer than halving epsilon.
        truncate: for geomloss's multiscale back end alone, as cluster_scale and verbose; no effect, as on its others.
        cost: function of [B, N, D] and [B, M, D] that returns [B, N, M] and replaces the distance.
        kernel: for geomloss's kernel losses alone.
        cluster_scale: see truncate.
        debias: see above.
        potentials: return potentials instead of the loss.
        verbose: see truncate.
        backend: "tensorized" (the matrix is stored), "online" (streamed, O((N + M) D) memory, p = 2 without `cost`) or
            "auto": tensorized up to N M = 5000^2, and always for p = 1 or a `cost`.
        tol: residual at which a problem has converged, see `sinkhorn`; not in geomloss.
        max_iters: most iterations at the final epsilon; not in geomloss.

    Gradient:
        With respect to x, y, a and b, exact at convergence; second derivatives too.

    Raises:
        TypeError: a point or weight is not a floating torch tensor.
        ValueError: shapes or ranges do not fit, or the option is one of geomloss's that is not here.

    Example:
        >>> import torch
        >>> from pisces_kernels.compat.geomloss import SamplesLoss
        >>> x, y = torch.rand(30, 2, requires_grad=True), torch.rand(40, 2)
        >>> SamplesLoss("sinkhorn", p=2, blur=0.1)(x, y).backward()
        >>> x.grad.shape
        torch.Size([30, 2])

    Source: Feydy et al. 2019; Sejourne et al. 2019, proposition 12 (unbalanced values).
    """

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: float = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Callable[[Tensor, Tensor], Tensor] | None = None,
        kernel: Any = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
        *,
        tol: float = 1e-3,
        max_iters: int = 5000,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.p = p
        self.blur = blur
        self.reach = reach
        self.diameter = diameter
        self.scaling = scaling
        self.truncate = truncate
        self.cost = cost
        self.kernel = kernel
        self.cluster_scale = cluster_scale
        self.debias = debias
        self.potentials = potentials
        self.verbose = verbose
        self.backend = backend
        self.tol = tol
        self.max_iters = max_iters
        self._check_options()

    def _check_options(self) -> None:
        """Raise for options that do not fit; attributes may be changed between calls, as geomloss's."""
        if self.loss != "sinkhorn":
            raise ValueError(f"{WHO}: loss is {self.loss!r}, expected 'sinkhorn'. Use geomloss for the other losses.")
        if isinstance(self.cost, str):
            raise ValueError(f"{WHO}: cost is the KeOps formula {self.cost!r}, expected a function of (x, y).")
        if self.cost is None and self.p not in (1, 2):
            raise ValueError(f"{WHO}: p is {self.p!r}, expected 1 or 2. Pass another distance as cost=.")
        if self.backend == "multiscale":
            raise ValueError(f"{WHO}: backend 'multiscale' is not here. Use 'online', which computes the same loss.")
        if self.backend not in BACKENDS:
            raise ValueError(f"{WHO}: backend is {self.backend!r}, expected one of {BACKENDS}.")
        if self.backend == "online" and (self.cost is not None or self.p != 2):
            raise ValueError(f"{WHO}: backend 'online' streams p=2 only. Use 'tensorized' for p=1 or a cost.")
        for name in ("p", "blur", "reach", "diameter"):
            value = getattr(self, name)
            if value is not None:
                _checks.positive(WHO, name, value)
        if not 0.0 < self.scaling < 1.0:
            raise ValueError(f"{WHO}: scaling is {self.scaling!r}, expected a number in (0, 1).")
        _checks.stopping(WHO, self.max_iters, self.tol)

    def forward(self, *args: Any) -> Any:
        """Return the loss of (x, y) or (a, x, b, y), or the potentials."""
        self._check_options()
        a, x, b, y = _measures(args)
        dtype, batched = x.dtype, x.ndim == 3
        x, y = (points if batched else points.unsqueeze(0) for points in (x, y))
        a = _weights("a", a, x, batched)
        b = _weights("b", b, y, batched)

        epsilon = self.blur**self.p
        length = solver.diameter(x, y) if self.diameter is None else self.diameter
        temperatures = solver.descent(length**self.p, epsilon, self.scaling**self.p)
        rho = None if self.reach is None else self.reach**self.p
        tol = self.tol if rho is not None else solver.check_masses(WHO, a, b, self.tol)
        setting = solver.Setting(temperatures, rho, tol, self.max_iters)

        results = [(solver.converge(WHO, self._problem(x, y), a, b, setting), 1.0)]
        if self.debias:
            results += [
                (solver.converge(WHO, self._problem(points, points), weights, weights, setting, with_itself=True), -0.5)
                for points, weights in ((x, a), (y, b))
            ]
        if self.potentials:
            f, g = results[0][0].f, results[0][0].g
            if self.debias:
                f, g = (side - (own.f + own.g) / 2 for side, (own, _) in zip((f, g), results[1:], strict=True))
            return f.to(dtype), g.to(dtype)
        loss = sum(sign * solver.value(result, mass_terms=False) for result, sign in results)
        return (loss if batched else loss.squeeze(0)).to(dtype)

    def _problem(self, x: Tensor, y: Tensor) -> solver.Solver:
        """Problems between two clouds [B, N, D] and [B, M, D]."""
        if self.cost is not None:
            return solver.dense(self.cost(x, y))
        if self.p == 1:
            return solver.dense(solver.distances(x, y))
        if self.backend == "online" or (self.backend == "auto" and x.shape[1] * y.shape[1] > solver.LARGEST_MATRIX):
            return solver.streamed(x, y, 0.5)
        return solver.dense(solver.half_squared_distances(x, y))


def _measures(args: tuple[Any, ...]) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """(a, x, b, y) from the arguments of a call, checked but for the weights."""
    if len(args) == 6:
        labels_x, *measure_x, labels_y, b, y = args
        if labels_x is not None or labels_y is not None:
            raise ValueError(f"{WHO}: cluster labels (l_x, l_y) are for the multiscale back end, which is not here.")
        args = (*measure_x, b, y)
    if len(args) == 2:
        args = (None, args[0], None, args[1])
    if len(args) != 4:
        raise ValueError(f"{WHO}: got {len(args)} arguments, expected (x, y) or (a, x, b, y).")
    a, x, b, y = args
    for name, points in (("x", x), ("y", y)):
        if _checks.floating(WHO, name, points).ndim not in (2, 3) or 0 in points.shape:
            raise ValueError(f"{WHO}: {name} has shape {tuple(points.shape)}, expected (N, D) or (B, N, D), none 0.")
    _checks.same_device(WHO, x, y=y, a=a, b=b)
    if x.ndim != y.ndim or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{WHO}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}, expected the same batch and dimension."
        )
    return a, x, b, y


def _weights(name: str, value: Tensor | None, points: Tensor, batched: bool) -> Tensor:
    """[B, N] weights in float64 for points [B, N, D], uniform by default."""
    shape = points.shape[:-1]
    if value is None:
        return torch.full(shape, 1.0 / shape[-1], dtype=torch.float64, device=points.device)
    wanted = tuple(shape if batched else shape[1:])
    if tuple(_checks.floating(WHO, name, value).shape) not in (wanted, (*wanted, 1)):
        raise ValueError(f"{WHO}: {name} has shape {tuple(value.shape)}, expected {wanted} or {(*wanted, 1)}.")
    weights = value.double().reshape(shape)
    _checks.weights(WHO, name, weights)
    return weights

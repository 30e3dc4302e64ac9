"""The functions of `geomloss.ot`: transport problems with a given cost matrix or between point clouds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from . import _geomloss_solver as solver
from ._arrays import Origin
from ._geomloss_result import LinearOperator, OTResult

__all__ = ["LinearOperator", "OTResult", "solve", "solve_batch", "solve_sample", "solve_sample_batch"]

TOLERANCE = 1e-6
MAX_ITERS = 20_000


def solve(
    C: Any,
    *,
    reg: float,
    a: Any = None,
    b: Any = None,
    unbalanced: float | None = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
) -> OTResult:
    """`geomloss.ot.solve`: entropic transport with a cost matrix.

    The plan minimises sum(plan * C) + reg KL(plan | a b^T) and has the marginals a and b, or with rho = unbalanced
    pays rho KL(plan 1 | a) + rho KL(plan^T 1 | b) instead, where KL(p | q) = sum(p log(p/q) - p + q). With the
    potentials f and g, plan = exp((f + g - C) / reg) * a * b and

        value = sum(a f) + sum(b g)                          balanced: the minimum less reg (m^2 - m), m = sum a
        value = the minimum                                  unbalanced

    Agrees with geomloss 0.3.1: arguments, defaults, attributes, conventions; NumPy arrays and lists in, NumPy out;
    torch in, torch out. Differs on purpose:

    - geomloss anneals to `reg` in max_iter steps and stops, however far the plan is from its marginals. Here the same
      annealing only chooses the start of a solve that goes on until its residual is below `tol`; geomloss's results
      tend to these with growing max_iter. A RuntimeWarning tells when 20,000 more iterations were not enough.
    - Gradients are those of the optimum: the plan with respect to C. geomloss's are twice that when balanced and
      (2 rho + reg) / (rho + reg) times it when unbalanced, because both potentials are differentiated and the factor of
      their backward pass does not reach autograd.
    - Everything is computed in float64 and returned in the dtype of the input.

    Args:
        C: [N, M] cost, NumPy array, nested list or torch tensor.
        reg: epsilon > 0.
        a: [N] weights >= 0; None: 1/N each.
        b: [M]; None: 1/M each.
        unbalanced: rho > 0, or None for exact marginals.
        unbalanced_type: "KL".
        method: "auto".
        max_iter: most temperatures of the annealing, >= 1, geometric from max C - min C to reg; no more are used than
            halving takes. None: as many (geomloss's own None is an error).
        tol: largest residual, see `sinkhorn`; None: 1e-6 (geomloss refuses any other value).

    Returns:
        `OTResult`.

    Raises:
        ValueError: shapes or ranges do not fit, masses differ by more than 0.1 % in a balanced problem, or an option is
            one that geomloss names and nobody implements.

    Example:
        >>> from pisces_kernels.compat.geomloss import ot
        >>> result = ot.solve([[0.0, 1.0, 4.0], [2.0, 1.0, 0.0]], a=[2, 2], b=[1, 1, 2], reg=0.001)
        >>> result.plan.round(3)
        array([[1., 1., 0.],
               [0., 0., 2.]])

    Source: Feydy 2020, "Geometric data analysis, beyond convolutions", section 3.3; Sejourne et al. 2019.
    """
    return _matrix("solve", 2, C, a, b, reg, unbalanced, unbalanced_type, method, max_iter, tol)


def solve_batch(
    C: Any,
    *,
    reg: float,
    a: Any = None,
    b: Any = None,
    unbalanced: float | None = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
) -> OTResult:
    """`geomloss.ot.solve_batch`: `solve` for C [B, N, M], a [B, N] and b [B, M].

    Args:
        C: [B, N, M] costs.
        reg: see `solve`; the same for all problems, as the other options.
        a: [B, N].
        b: [B, M].
        unbalanced: see `solve`.
        unbalanced_type: see `solve`.
        method: see `solve`.
        max_iter: see `solve`; the annealing starts from the range of all costs.
        tol: see `solve`.

    Returns:
        `OTResult` with a leading batch dimension.

    Raises:
        ValueError: see `solve`.

    Example:
        >>> import torch
        >>> from pisces_kernels.compat.geomloss import ot
        >>> ot.solve_batch(torch.rand(8, 20, 30), reg=0.1).value.shape
        torch.Size([8])
    """
    return _matrix("solve_batch", 3, C, a, b, reg, unbalanced, unbalanced_type, method, max_iter, tol)


def solve_sample(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    cost: str | Callable[[Any, Any], Any] = "sqeuclidean",
    debias: bool = False,
    reg: float | None = None,
    unbalanced: float | None = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
    blur: float | None = None,
    reach: float | None = None,
) -> OTResult:
    """`geomloss.ot.solve_sample`: entropic transport between point clouds, with the cost |x - y|^2 (not halved).

    With debias the value is OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + reg/2 (sum a - sum b)^2, the Sinkhorn divergence;
    plan, density, marginals and potential_a, potential_b stay those of a against b. See `solve` for the rest, also for
    what agrees and what differs on purpose; besides, a function as `cost` works here (geomloss 0.3.1 documents it and
    raises NotImplementedError).

    Args:
        X_a: [N, D] points.
        X_b: [M, D] points.
        a: see `solve`.
        b: see `solve`.
        cost: "sqeuclidean", or a function of two clouds [N, D] and [M, D] that returns [N, M] (torch tensors, also
            for NumPy input).
        debias: subtract the problems of each cloud with itself from the value.
        reg: epsilon > 0; give it or `blur`.
        unbalanced: see `solve`; or `reach`.
        unbalanced_type: see `solve`.
        method: see `solve`.
        max_iter: see `solve`; the annealing starts from the squared diagonal of the box of all points (its length for a
            function as cost).
        tol: see `solve`.
        blur: length; reg = 2 blur^2 for "sqeuclidean", reg = blur for a function.
        reach: length; unbalanced = 2 reach^2, or reach.

    Returns:
        `OTResult`.

    Gradient:
        With respect to X_a, X_b, a and b; geomloss's for the points is twice as large (see `solve`).

    Raises:
        ValueError: see `solve`.

    Example:
        >>> from pisces_kernels.compat.geomloss import ot
        >>> result = ot.solve_sample([[0, 0], [0, 2]], [[2, 1], [2, 2]], reg=0.001)
        >>> round(float(result.value), 3)
        4.501
    """
    return _sample(
        "solve_sample", 2, X_a, X_b, a, b, cost, debias, reg, unbalanced, unbalanced_type, method, max_iter, tol, blur,
        reach,
    )  # fmt: skip


def solve_sample_batch(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    cost: str | Callable[[Any, Any], Any] = "sqeuclidean",
    debias: bool = False,
    reg: float | None = None,
    unbalanced: float | None = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
    blur: float | None = None,
    reach: float | None = None,
) -> OTResult:
    """`solve_sample` for batches of clouds; geomloss 0.3.1 has the name and raises NotImplementedError.

    Args:
        X_a: [B, N, D] points.
        X_b: [B, M, D] points.
        a: [B, N] weights.
        b: [B, M] weights.
        cost: see `solve_sample`; a function gets [B, N, D] and [B, M, D] and returns [B, N, M].
        debias: see `solve_sample`, as everything below.
        reg: epsilon > 0.
        unbalanced: rho > 0.
        unbalanced_type: "KL".
        method: "auto".
        max_iter: most temperatures of the annealing.
        tol: largest residual.
        blur: length.
        reach: length.

    Returns:
        `OTResult` with a leading batch dimension.

    Raises:
        ValueError: see `solve`.

    Example:
        >>> import torch
        >>> from pisces_kernels.compat.geomloss import ot
        >>> ot.solve_sample_batch(torch.rand(8, 20, 2), torch.rand(8, 30, 2), blur=0.1, debias=True).value.shape
        torch.Size([8])
    """
    return _sample(
        "solve_sample_batch", 3, X_a, X_b, a, b, cost, debias, reg, unbalanced, unbalanced_type, method, max_iter, tol,
        blur, reach,
    )  # fmt: skip


def _options(
    who: str,
    reg: float | None,
    unbalanced: float | None,
    unbalanced_type: str,
    method: str,
    max_iter: int | None,
    tol: float | None,
) -> tuple[float, float | None, float]:
    """Checked (epsilon, rho, tolerance)."""
    if unbalanced_type != "KL":
        raise ValueError(f"{who}: unbalanced_type is {unbalanced_type!r}, expected 'KL', the only one in geomloss too.")
    if method != "auto":
        raise ValueError(f"{who}: method is {method!r}, expected 'auto', the only one in geomloss too.")
    if max_iter is not None:
        _checks.stopping(who, max_iter, 0.0)
    if reg is None:
        raise ValueError(f"{who}: got no reg. Pass reg, or blur for point clouds.")
    epsilon = _checks.positive(who, "reg", reg)
    rho = None if unbalanced is None else _checks.positive(who, "unbalanced", unbalanced)
    return epsilon, rho, TOLERANCE if tol is None else _checks.positive(who, "tol", tol)


def _weights(who: str, name: str, value: Any, shape: torch.Size, origin: Origin, device: torch.device) -> Tensor:
    """[N] or [B, N] in float64, uniform by default."""
    if value is None:
        return torch.full(shape, 1.0 / shape[-1], dtype=torch.float64, device=device)
    weights = origin.tensor(value).double()
    if weights.shape != shape:
        raise ValueError(f"{who}: {name} has shape {tuple(weights.shape)}, expected {tuple(shape)}.")
    _checks.weights(who, name, weights)
    return weights


def _setting(
    who: str, a: Tensor, b: Tensor, start: float, epsilon: float, rho: float | None, max_iter: int | None, tol: float
) -> solver.Setting:
    if rho is None:
        tol = solver.check_masses(who, a, b, tol)
    temperatures = solver.descent(start, epsilon, solver.FINEST_RATIO, max_iter)
    return solver.Setting(temperatures, rho, tol, MAX_ITERS)


def _matrix(
    who: str,
    ndim: int,
    C: Any,
    a: Any,
    b: Any,
    reg: float,
    unbalanced: float | None,
    unbalanced_type: str,
    method: str,
    max_iter: int | None,
    tol: float | None,
) -> OTResult:
    epsilon, rho, tol = _options(who, reg, unbalanced, unbalanced_type, method, max_iter, tol)
    origin = Origin.of(who, C=C, a=a, b=b)
    cost = origin.tensor(C).double()
    if cost.ndim != ndim or 0 in cost.shape:
        wanted = "(N, M)" if ndim == 2 else "(B, N, M)"
        raise ValueError(f"{who}: C has shape {tuple(cost.shape)}, expected {wanted}, none of them 0.")
    a = _weights(who, "a", a, cost.shape[:-1], origin, cost.device)
    b = _weights(who, "b", b, cost.shape[:-2] + cost.shape[-1:], origin, cost.device)
    start = float(cost.detach().amax() - cost.detach().amin())
    setting = _setting(who, a, b, start, epsilon, rho, max_iter, tol)
    ab = solver.converge(who, solver.dense(cost), a, b, setting)
    return OTResult(origin, lambda: cost, ab, None, None, mass_terms=rho is not None)


def _sample(
    who: str,
    ndim: int,
    X_a: Any,
    X_b: Any,
    a: Any,
    b: Any,
    cost: str | Callable[[Any, Any], Any],
    debias: bool,
    reg: float | None,
    unbalanced: float | None,
    unbalanced_type: str,
    method: str,
    max_iter: int | None,
    tol: float | None,
    blur: float | None,
    reach: float | None,
) -> OTResult:
    if cost != "sqeuclidean" and not callable(cost):
        raise ValueError(f"{who}: cost is {cost!r}, expected 'sqeuclidean' or a function of two clouds.")
    power = 2 if cost == "sqeuclidean" else 1
    if blur is not None:
        if reg is not None:
            raise ValueError(f"{who}: got reg={reg} and blur={blur}, which say the same. Pass one of them.")
        reg = power * _checks.positive(who, "blur", blur) ** power
    if reach is not None:
        if unbalanced is not None:
            raise ValueError(f"{who}: got unbalanced={unbalanced} and reach={reach}, which say the same. Pass one.")
        unbalanced = power * _checks.positive(who, "reach", reach) ** power
    epsilon, rho, tol = _options(who, reg, unbalanced, unbalanced_type, method, max_iter, tol)
    origin = Origin.of(who, X_a=X_a, X_b=X_b, a=a, b=b)
    x, y = origin.tensor(X_a), origin.tensor(X_b)
    fits = x.ndim == y.ndim == ndim and x.shape[:-2] == y.shape[:-2] and x.shape[-1] == y.shape[-1]
    if not fits or 0 in x.shape + y.shape:
        wanted = "(N, D) and (M, D)" if ndim == 2 else "(B, N, D) and (B, M, D)"
        raise ValueError(f"{who}: X_a has shape {tuple(x.shape)}, X_b {tuple(y.shape)}, expected {wanted}, none 0.")
    a = _weights(who, "a", a, x.shape[:-1], origin, x.device)
    b = _weights(who, "b", b, y.shape[:-1], origin, y.device)
    setting = _setting(who, a, b, solver.diameter(x, y) ** power, epsilon, rho, max_iter, tol)

    def matrix(x: Tensor, y: Tensor) -> Tensor:
        return cost(x, y).double() if callable(cost) else 2 * solver.half_squared_distances(x, y)

    def problem(x: Tensor, y: Tensor) -> solver.Solver:
        if not callable(cost) and x.shape[-2] * y.shape[-2] > solver.LARGEST_MATRIX:
            return solver.streamed(x, y, 1.0)
        return solver.dense(matrix(x, y))

    ab = solver.converge(who, problem(x, y), a, b, setting)
    aa = solver.converge(who, problem(x, x), a, a, setting, with_itself=True) if debias else None
    bb = solver.converge(who, problem(y, y), b, b, setting, with_itself=True) if debias else None
    return OTResult(origin, lambda: matrix(x, y), ab, aa, bb, mass_terms=rho is not None and not debias)

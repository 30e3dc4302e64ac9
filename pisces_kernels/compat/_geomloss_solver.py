"""Annealed start, solution to a tolerance, and geomloss's definition of the value: what its two interfaces share."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._points import sinkhorn_points
from .._points_result import PointsResult
from .._result import SinkhornResult
from .._sinkhorn import sinkhorn

# geomloss's own limit for matrices: above it, point clouds with a squared distance are streamed.
LARGEST_MATRIX = 5000**2
# Annealing of random 10 x 10 costs, of clouds and of assignment problems: temperatures closer than halves save nothing
# in the iterations that follow. A call costs as much as tens of iterations, so each temperature gets a few.
FINEST_RATIO = 0.5
ITERATIONS_PER_TEMPERATURE = 10
# Means of both sides (see `_anneal`) at the last temperature before the solve.
MEANS = 8
# geomloss accepts balanced problems whose masses differ by this, relative to their sum.
MASS_TOLERANCE = 1e-3
# Smallest squared distance under the root of p = 1, as in geomloss: the distance of a point to itself is 1e-4.
SQUARE_FLOOR = 1e-8


class Setting(NamedTuple):
    """How problems are solved.

    Attributes:
        temperatures: values of epsilon, the last one is the problem's.
        rho: strength of both marginal penalties, None for exact marginals.
        tol: residual at which a problem has converged.
        max_iters: most iterations at the last temperature.
    """

    temperatures: Sequence[float]
    rho: float | None
    tol: float
    max_iters: int


class Solver(NamedTuple):
    """A batch of problems: (a, b, **options) -> result, and the same with rows and columns exchanged.

    Attributes:
        rows_first: `sinkhorn` or `sinkhorn_points` with its cost.
        cols_first: the same for the transposed cost; takes (b, a).
    """

    rows_first: Callable[..., Any]
    cols_first: Callable[..., Any]


def half_squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 / 2 in float64 from [..., N, D] and [..., M, D]: [..., N, M]."""
    x, y = x.double(), y.double()
    # The distance does not change with the origin, the rounding of the expanded square does.
    centre = x.detach().mean(-2, keepdim=True)
    x, y = x - centre, y - centre
    squares = (x * x).sum(-1).unsqueeze(-1) + (y * y).sum(-1).unsqueeze(-2)
    return squares / 2 - x @ y.transpose(-1, -2)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j| in float64 from [..., N, D] and [..., M, D], at least 1e-4: [..., N, M]."""
    return (2 * half_squared_distances(x, y)).clamp_min(SQUARE_FLOOR).sqrt()


def diameter(x: Tensor, y: Tensor) -> float:
    """Diagonal of the smallest box that holds all points of both clouds of all problems."""
    points = torch.cat([x.detach().flatten(0, -2), y.detach().flatten(0, -2)]).double()
    return float((points.amax(0) - points.amin(0)).norm())


def descent(start: float, end: float, ratio: float, most: int | None = None) -> list[float]:
    """Temperatures from start to end, geometric, with steps near a ratio in (0, 1) and `most` of them at most."""
    if not start > end:  # also when there is nothing to measure: the cost is constant, or not finite
        return [end]
    steps = 2 + math.floor(math.log(end / start) / math.log(min(ratio, FINEST_RATIO)))
    if most is not None:
        steps = min(steps, most)
    return [start * (end / start) ** (k / (steps - 1)) for k in range(steps - 1)] + [end]


def dense(cost: Tensor) -> Solver:
    """Problems with a cost [..., N, M], in float64 whatever its dtype.

    In float32 the residual cannot fall below about 1e-7 cost / epsilon: 1e-3 in the unit square at blur 0.01.
    """
    cost = cost.double()
    return Solver(functools.partial(sinkhorn, cost), functools.partial(sinkhorn, cost.transpose(-1, -2)))


def streamed(x: Tensor, y: Tensor, scale: float) -> Solver:
    """Problems with the cost scale * |x_i - y_j|^2 in float64, which is never stored."""
    x, y = x.double() * math.sqrt(scale), y.double() * math.sqrt(scale)
    return Solver(functools.partial(sinkhorn_points, x, y), functools.partial(sinkhorn_points, y, x))


def converge(who: str, solver: Solver, a: Tensor, b: Tensor, setting: Setting, *, with_itself: bool = False) -> Any:
    """Anneal, then iterate at the last temperature until the residual is below the tolerance.

    The annealing only chooses where the last solve starts, so it changes the number of its iterations and not its
    answer. Without it, nearly unregularised assignment problems would not end.

    Args:
        who: name of the calling function, for the warning.
        solver: the problems.
        a: [..., N] in float64.
        b: [..., M].
        setting: how to solve.
        with_itself: both sides are the same points with the same weights, so that f = g.

    Returns:
        The `SinkhornResult` or `PointsResult` of the last solve.
    """
    epsilon = setting.temperatures[-1]
    start = _anneal(solver, a.detach(), b.detach(), setting, with_itself)
    result = solver.rows_first(
        a,
        b,
        epsilon=epsilon,
        tau=damping(epsilon, setting.rho),
        max_iters=setting.max_iters,
        tol=setting.tol,
        acceleration="anderson",
        f_init=start[0],
        g_init=start[1],
    )
    if _checks.readable(result.converged) and not bool(result.converged.all()):
        worst = float(result.residual.max())
        warnings.warn(
            f"{who}: residual {worst:.1e} after {setting.max_iters} iterations, wanted {setting.tol:.1e}. "
            "Raise epsilon (blur, reg), max_iters or tol.",
            RuntimeWarning,
            stacklevel=4,
        )
    return result


def _anneal(solver: Solver, a: Tensor, b: Tensor, setting: Setting, with_itself: bool) -> tuple[Tensor, Tensor]:
    """Potentials to start from: means of the iterations that begin with the rows and with the columns.

    Where the plan is nearly the identity, as between a cloud and itself or one close to it, alternating crawls. With x
    in [0, 1], near 1 there, the errors of f and g after an iteration are -x and x^2 times the last one when f and g err
    alike; their mean is at most 1/8 of it. What errs in opposite directions stays, but does not arise: the mean treats
    both sides alike. So transposed problems have transposed potentials even where the plan does not determine them to
    working precision (blocks without exchange).
    """
    last = setting.temperatures[-1]
    schedule = [(last, 1)] * MEANS
    if not with_itself:  # the mean converges at any temperature
        schedule = [(epsilon, ITERATIONS_PER_TEMPERATURE) for epsilon in setting.temperatures] + schedule
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for epsilon, iterations in schedule:
        options: dict[str, Any] = {
            "epsilon": epsilon,
            "tau": damping(epsilon, setting.rho),
            "max_iters": iterations,
            "tol": 0.0,
            "gradient": "none",
        }
        rows = solver.rows_first(a, b, g_init=g, **options)
        if with_itself:
            f = g = (rows.f + rows.g) / 2
        else:
            cols = solver.cols_first(b, a, g_init=f, **options)
            f, g = (rows.f + cols.g) / 2, (rows.g + cols.f) / 2
    return f, g


def damping(epsilon: float, rho: float | None) -> float:
    """tau of `sinkhorn`: rho / (rho + epsilon)."""
    return 1.0 if rho is None else rho / (rho + epsilon)


def check_masses(who: str, a: Tensor, b: Tensor, tol: float) -> float:
    """Raise unless balanced problems have equal masses; return the tolerance that is within their reach.

    Masses that differ by rounding (or by up to 1e-3, which geomloss accepts) keep the residual above their log-ratio.
    """
    mass_a, mass_b = a.detach().sum(-1), b.detach().sum(-1)
    gap = float(((mass_a - mass_b).abs() / (mass_a + mass_b)).max())
    if gap > MASS_TOLERANCE:
        raise ValueError(
            f"{who}: a and b sum to {mass_a.tolist()} and {mass_b.tolist()}, expected the same masses for balanced "
            "transport. Normalise them, or solve an unbalanced problem."
        )
    return max(tol, 8.0 * gap)


def value(result: SinkhornResult | PointsResult, *, mass_terms: bool) -> Tensor:
    """Value of one problem in geomloss's convention, [...].

    With all terms it is the primal objective, `SinkhornResult.value`. Without, it is sum(a f) + sum(b g) for balanced
    problems and (rho + epsilon/2) (sum a (1 - exp(-f/rho)) + sum b (1 - exp(-g/rho))) for unbalanced ones: less by
    epsilon (sum a sum b - (sum a + sum b) / 2), which is zero for probability vectors. In
    value(x, y) - value(x, x) / 2 - value(y, y) / 2 these terms make up the epsilon/2 (sum a - sum b)^2 of the
    Sinkhorn divergence.

    Gradient: that of the value. Balanced values are constant up to the mass that both sides share; with respect to a
    and b the gradients are f and g, as geomloss's.
    """
    if mass_terms:
        return result.value
    mass_a, mass_b = result.a.sum(-1), result.b.sum(-1)
    masses = mass_a + mass_b
    half = masses - masses.detach() / 2 if result.tau == (1.0, 1.0) else masses / 2
    return result.value - result.epsilon * (mass_a * mass_b - half)

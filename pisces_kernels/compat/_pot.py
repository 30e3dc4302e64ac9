"""POT's problems in terms of `sinkhorn`: reference measures, potentials, order of updates, stopping and logs.

POT writes a plan as u_i K_ij v_j with K = exp(-M/reg) (times a reference measure c where a problem has one);
`sinkhorn` writes it as exp((f_i + g_j - cost_ij)/epsilon) a_i b_j. Equating the two gives every translation here.
Shapes: N rows, M columns, H histograms (one unless b is a matrix); the solver sees a batch of H problems.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._sinkhorn import sinkhorn as solve
from ..reference import log_weights
from ._arrays import Origin

METHODS = ("sinkhorn", "sinkhorn_log", "greenkhorn", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling")
LOSS_METHODS = ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized")
UNBALANCED_METHODS = (
    "sinkhorn",
    "sinkhorn_stabilized",
    "sinkhorn_translation_invariant",
    "sinkhorn_reg_scaling",
)
PARTIAL_METHODS = ("sinkhorn", "sinkhorn_log")

PLAIN = ("sinkhorn", "sinkhorn_log")
_COST_UNITS = ("sinkhorn_stabilized", "sinkhorn_epsilon_scaling")  # their warm starts are reg * log(u), reg * log(v)
_LOG_ZERO = math.log(1e-300)  # POT's logarithm of a scaling that is zero
_FREE = 1e-30  # tau of a side with reg_m = 0: its potential vanishes
_ROUNDING_CAP = 1e-3  # a residual above it is never taken for rounding


@dataclass(frozen=True)
class Run:
    """How a call iterates and what it tells: POT's arguments of these names, and `acceleration` of `sinkhorn`."""

    numItermax: int
    stopThr: float
    verbose: bool
    log: bool
    acceleration: str | None = "anderson"

    @classmethod
    def of(cls, numItermax: int, stopThr: float, verbose: bool, log: bool, method: str, kwargs: dict[str, Any]) -> Run:
        """The methods whose iterates are POT's are plain, the others accelerated, unless the keyword says otherwise."""
        default = None if method in PLAIN else "anderson"
        return cls(numItermax, stopThr, verbose, log, kwargs.get("acceleration", default))


def balanced(
    who: str,
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    method: str,
    run: Run,
    *,
    warn: bool,
    warmstart: Any,
    loss: bool,
) -> Any:
    """`ot.sinkhorn` and its relatives: the plan, or the losses where `loss` or b is a matrix; with log a pair.

    POT updates v, then u. The solver updates rows, then columns, so it is given the transposed problem: its rows are
    POT's columns. The columns' weights are scaled to the mass of a, which changes no iterate of the plan and gives
    problems with unequal masses, and gradients that perturb them, the limit that POT's iteration has.
    """
    origin = Origin.of(who, M=M, a=a, b=b)
    cost = _matrix(who, origin, M)
    weights_a = _weights(who, "a", origin, a, cost.shape[0])  # [N]
    targets, several = _histograms(who, origin, b, cost.shape[1])  # [H, M]
    epsilon = _positive(who, "reg", reg, zero=True)
    if _read(epsilon) == 0.0:  # POT answers with a warning and NaN, as for any M / reg that is not finite
        cost, epsilon = cost / 0.0, 1.0
    weights_b = targets * _ratio(weights_a.sum(), targets.sum(-1, keepdim=True))
    size = float(torch.linalg.vector_norm(weights_b.detach()))
    start_u, start_v = _scalings(warmstart, origin, len(targets), listed=several and method == "sinkhorn_log")
    if start_u is None:
        start_u = torch.zeros_like(weights_a)
    elif method in _COST_UNITS:
        start_u, start_v = start_u / epsilon, start_v / epsilon
    result = solve(
        cost.mT.expand(len(targets), -1, -1),
        weights_b,
        weights_a,
        epsilon=epsilon,
        f_init=None if start_v is None else _potential(start_v, weights_b, epsilon),
        g_init=_potential(start_u, weights_a, epsilon),
        max_iters=_count(who, run.numItermax),
        tol=_tolerance(run.stopThr, size, cost, epsilon),
        acceleration=run.acceleration,
    )
    plan = result.plan().mT  # [H, N, M]
    error = torch.linalg.vector_norm((plan.sum(-2) - targets).detach())
    n_iters = max(int(result.n_iters.max()) - 1, 0)
    _report(run.verbose, n_iters, error)
    if not bool(torch.isfinite(result.residual).all()):
        warnings.warn(f"Warning: numerical errors at iteration {n_iters}: M / reg is not finite.", stacklevel=3)
    elif warn and not float(error) < run.stopThr:
        warnings.warn(
            f"Sinkhorn did not converge: the marginal error is {float(error):.3g}, stopThr {run.stopThr:.3g}. You "
            "might want to increase the number of iterations `numItermax` or the regularization parameter `reg`.",
            stacklevel=3,
        )
    answer = (plan * cost).sum((-2, -1)) if loss or several else plan
    answer = origin.array(answer if several else answer[0])
    if not run.log:
        return answer
    log_u, log_v = (result.g / epsilon + log_weights(weights_a)).mT, (result.f / epsilon + log_weights(weights_b)).mT
    if not several:
        log_u, log_v = log_u[:, 0], log_v[:, 0]
    named: dict[str, Any] = {"err": [origin.array(error)], "niter": n_iters, "n_iter": n_iters}
    return answer, {**named, **_balanced_log(origin, log_u, log_v, epsilon, method)}


def _balanced_log(origin: Origin, log_u: Tensor, log_v: Tensor, epsilon: Any, method: str) -> dict[str, Any]:
    """The scalings under the names that POT's methods give them, for [N], [M] or [N, H], [M, H]."""
    values = {"u": log_u.exp(), "v": log_v.exp(), "alpha": epsilon * log_u, "beta": epsilon * log_v}
    values |= {"log_u": log_u, "log_v": log_v, "logu": log_u, "logv": log_v}
    named: dict[str, Any] = {name: origin.array(value) for name, value in values.items()}
    start = ("alpha", "beta") if method in _COST_UNITS else ("log_u", "log_v")
    named["warmstart"] = (named[start[0]], named[start[1]])
    if method == "sinkhorn_log" and log_u.ndim == 2:
        named["warmstart"] = [(named["log_u"][:, k], named["log_v"][:, k]) for k in range(log_u.shape[1])]
    return named


def unbalanced(
    who: str,
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    reg_m: Any,
    method: str,
    run: Run,
    *,
    reg_type: str,
    c: Any,
    warmstart: Any,
    loss: str | None,
) -> Any:
    """`ot.unbalanced.sinkhorn_unbalanced` and `..2`: the plan, or the losses where `loss` or b is a matrix.

    With the reference measure c, sum(P M) + reg KL(P|c) is sum(P cost) + reg KL(P|a b^T) up to terms without P for
    cost = M + reg log(a b^T / c), and POT's u, v are exp(f/reg), exp(g/reg). POT updates u, then v, as the solver does.
    Entries with c = 0 get the smallest number instead: nothing that is not rounding is transported there.
    """
    origin = Origin.of(who, M=M, a=a, b=b, c=c)
    matrix = _matrix(who, origin, M)
    weights_a = _weights(who, "a", origin, a, matrix.shape[0])  # [N]
    weights_b, several = _histograms(who, origin, b, matrix.shape[1])  # [H, M]
    epsilon = _positive(who, "reg", reg)
    if isinstance(epsilon, Tensor):
        raise ValueError(f"{who}: reg requires grad, which has no gradient here. Pass a number.")
    rho_a, rho_b = _pair(who, reg_m)
    tau_a, tau_b = (1.0 if rho == math.inf else max(rho / (rho + epsilon), _FREE) for rho in (rho_a, rho_b))
    if reg_type.lower() not in ("kl", "entropy"):
        raise ValueError(f"{who}: reg_type is {reg_type!r}, expected 'kl' or 'entropy'.")
    counting = several or reg_type.lower() == "entropy"
    if counting and c is not None:
        why = "With several histograms" if several else "If reg_type = entropy"
        warnings.warn(f"{why}, then the matrix c is overwritten by the one matrix.", stacklevel=3)
        c = None
    sources = weights_a.expand(len(weights_b), -1)  # [H, N]
    if rho_a == rho_b == math.inf:  # v is last: what converges has its mass
        sources = sources * _ratio(weights_b.sum(-1, keepdim=True), sources.sum(-1, keepdim=True))
    cost = matrix + epsilon * _log(sources).unsqueeze(-1) + epsilon * _log(weights_b).unsqueeze(-2)  # [H, N, M]
    if counting:
        reference = torch.ones_like(matrix)
    elif c is not None:
        reference = _reference(who, origin, c, matrix)
        cost = cost - epsilon * _log(reference, zero=math.log(torch.finfo(matrix.dtype).tiny))
    else:
        reference = weights_a.unsqueeze(-1) * weights_b.unsqueeze(-2)
        cost = matrix + epsilon * (_log(sources) - _log(weights_a)).unsqueeze(-1)
    start_u, start_v = _scalings(warmstart, origin, len(weights_b))
    result = solve(
        cost,
        sources,
        weights_b,
        epsilon=epsilon,
        tau=(tau_a, tau_b),
        f_init=None if start_u is None else start_u * epsilon,
        g_init=None if start_v is None else start_v * epsilon,
        max_iters=_count(who, run.numItermax),
        tol=_tolerance(run.stopThr, 1.0, matrix, epsilon),
        acceleration=run.acceleration,
    )
    plan = result.plan()  # [H, N, M]
    error = -torch.expm1(-result.residual.detach()).amax()
    n_iters = int(result.n_iters.max())
    _report(run.verbose, n_iters - 1, error)
    if not bool(torch.isfinite(result.residual).all()):
        warnings.warn(f"Numerical errors at iteration {n_iters}: M / reg is not finite.", stacklevel=3)
    elif method == "sinkhorn_stabilized" and float(error) > run.stopThr:
        warnings.warn(
            "Stabilized Unbalanced Sinkhorn did not converge. Try a larger entropy `reg` or a lower mass `reg_m`.",
            stacklevel=3,
        )
    linear = (plan * matrix).sum((-2, -1))  # [H]
    total = None
    if not several and (run.log or loss == "total"):
        total = linear + epsilon * _kl(plan, reference).sum((-2, -1))
        for rho, sums, weights in ((rho_a, plan.sum(-1), weights_a), (rho_b, plan.sum(-2), weights_b)):
            if rho != math.inf:
                total = total + rho * _kl(sums, weights).sum(-1)
    if several or loss == "linear":
        answer = linear
    else:
        answer = total if loss == "total" else plan
    answer = origin.array(answer if several else answer[0])
    if not run.log:
        return answer
    log_u = torch.where(sources > 0, result.f / epsilon, _LOG_ZERO).mT  # [N, H]
    log_v = torch.where(weights_b > 0, result.g / epsilon, _LOG_ZERO).mT
    named: dict[str, Any] = {"err": [origin.array(error)]}
    for name, value in (("logu", log_u), ("logv", log_v)):
        named[name] = origin.array(value if several else value[:, 0])
    if total is not None:
        named.update(cost=origin.array(linear[0]), total_cost=origin.array(total[0]))
    return answer, named


def partial(who: str, a: Any, b: Any, M: Any, reg: Any, m: Any, run: Run) -> Any:
    """`ot.partial.entropic_partial_wasserstein`: the plan, and with log a pair.

    POT's entropy sum(P log P) has the counting measure for reference: cost = M + reg log(a b^T), as in `unbalanced`.
    """
    origin = Origin.of(who, M=M, a=a, b=b)
    matrix = _matrix(who, origin, M)
    weights_a = _weights(who, "a", origin, a, matrix.shape[0])
    weights_b = _weights(who, "b", origin, b, matrix.shape[1])
    epsilon = _positive(who, "reg", reg)
    room = torch.minimum(weights_a.sum(), weights_b.sum())
    mass = room if m is None else origin.tensor(m).reshape(())
    if _read(mass) < 0:
        raise ValueError(f"{who}: problem infeasible, m is {_read(mass):g}. Parameter m should be greater than 0.")
    slack = 1 + sum(matrix.shape) * torch.finfo(matrix.dtype).eps  # sums in another order differ by rounding
    if _read(mass) > _read(room) * slack:
        raise ValueError(
            f"{who}: problem infeasible, m is {_read(mass):g}. Parameter m should be lower or equal than "
            f"min(|a|_1, |b|_1) = {_read(room):g}."
        )
    mass = torch.minimum(mass, room)
    if _read(mass) == 0:
        plan, error, n_iters = torch.zeros_like(matrix), torch.zeros_like(room), 0
    else:
        # A cycle changes f, g and the level, each by at most the residual: log P by three times as much.
        result = solve(
            matrix + epsilon * (_log(weights_a).unsqueeze(-1) + _log(weights_b)),
            weights_a,
            weights_b,
            epsilon=epsilon,
            mass=mass,
            max_iters=_count(who, run.numItermax),
            tol=_tolerance(run.stopThr, _read(mass), matrix, epsilon, steps=3),
            acceleration=run.acceleration,
        )
        plan = result.plan()
        error = torch.expm1(3 * result.residual.detach()) * torch.linalg.vector_norm(plan.detach())
        n_iters = int(result.n_iters)
    _report(run.verbose, n_iters - 1, error)
    if not bool(torch.isfinite(error)):
        warnings.warn(f"Numerical errors at iteration {n_iters}: M / reg is not finite.", stacklevel=3)
    if not run.log:
        return origin.array(plan)
    return origin.array(plan), {
        "err": [origin.array(error)],
        "partial_w_dist": origin.array((matrix * plan).sum()),
    }


def method_name(who: str, method: str, known: tuple[str, ...]) -> str:
    """Return the method in lower case if it is known, as POT compares it."""
    if not isinstance(method, str) or method.lower() not in known:
        raise ValueError(f"{who}: Unknown method {method!r}, expected one of {known}.")
    return method.lower()


def _matrix(who: str, origin: Origin, M: Any) -> Tensor:
    cost = origin.tensor(M)
    if cost.ndim != 2 or 0 in cost.shape:
        raise ValueError(f"{who}: M has shape {tuple(cost.shape)}, expected (dim_a, dim_b).")
    return cost


def _weights(who: str, name: str, origin: Origin, value: Any, size: int) -> Tensor:
    """Weights of one side, uniform for [] as in POT. [size]"""
    if value is None or len(value) == 0:
        return origin.tensor([1.0 / size] * size)
    weights = origin.tensor(value)
    if weights.shape != (size,):
        side = {"a": 0, "b": 1}[name]
        raise ValueError(
            f"{who}: {name} has shape {tuple(weights.shape)}, expected ({size},) = (M.shape[{side}],). "
            "Pass [] for uniform weights."
        )
    return weights


def _histograms(who: str, origin: Origin, b: Any, size: int) -> tuple[Tensor, bool]:
    """One histogram a row, [H, size], and whether b is a matrix of columns; H is 1 when it is not."""
    columns = None if b is None or len(b) == 0 else origin.tensor(b)
    if columns is None or columns.ndim < 2:
        return _weights(who, "b", origin, b, size).unsqueeze(0), False
    if columns.ndim != 2 or columns.shape[0] != size or columns.shape[1] == 0:
        raise ValueError(f"{who}: b has shape {tuple(columns.shape)}, expected ({size},) or ({size}, n_hists).")
    return columns.mT, True


def _reference(who: str, origin: Origin, c: Any, matrix: Tensor) -> Tensor:
    reference = origin.tensor(c)
    if reference.shape != matrix.shape:
        raise ValueError(f"{who}: c has shape {tuple(reference.shape)}, expected {tuple(matrix.shape)} = M.shape.")
    return reference


def _positive(who: str, name: str, value: Any, *, zero: bool = False) -> Any:
    """A finite number > 0 (>= 0 with `zero`), or a torch tensor with one, which may require grad."""
    number = _read(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{who}: {name} is {number}, expected a finite number > 0.")
    return value if isinstance(value, Tensor) and value.requires_grad else number


def _pair(who: str, reg_m: Any) -> tuple[float, float]:
    """The two marginal penalties from a number or one or two of them; inf keeps a marginal exactly."""
    values = [float(value) for value in torch.as_tensor(reg_m, dtype=torch.float64).flatten()]
    if len(values) not in (1, 2) or not all(value >= 0 for value in values):
        raise ValueError(f"{who}: reg_m is {reg_m}, expected a number >= 0, inf, or one or two of them.")
    return values[0], values[-1]


def _read(value: Any) -> float:
    """The number on the host."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def _count(who: str, numItermax: int) -> int:
    if int(numItermax) != numItermax or numItermax < 1:
        raise ValueError(f"{who}: numItermax is {numItermax}, expected an int >= 1.")
    return int(numItermax)


def _tolerance(stopThr: float, size: float, cost: Tensor, epsilon: Any, *, steps: int = 1) -> float:
    """Largest change r of the potentials for which an error of at most size * (exp(steps * r) - 1) is below stopThr.

    Balanced: after an iteration whose last change is r, the sums of the plan miss weights of norm `size` by at most
    size * (exp(r) - 1), because the next change cannot be larger. Never below what rounding lets a residual reach.
    """
    if not stopThr > 0:
        return 0.0
    spread = float(cost.detach().abs().max()) / _read(epsilon)
    rounding = min(torch.finfo(cost.dtype).eps * max(1.0, spread), _ROUNDING_CAP)
    return max(math.log1p(stopThr / size) / steps if size > 0 else 0.0, rounding)


def _scalings(
    warmstart: Any, origin: Origin, n_hists: int, *, listed: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """A warm start as ([H, N], [H, M]): a pair of vectors or of matrices of columns, or a list of H pairs."""
    if warmstart is None:
        return None, None
    if listed:
        pairs = [[origin.tensor(side) for side in pair] for pair in warmstart]
        return torch.stack([pair[0] for pair in pairs]).detach(), torch.stack([pair[1] for pair in pairs]).detach()
    log_u, log_v = (origin.tensor(side).detach() for side in warmstart)
    if log_u.ndim == 2:
        return log_u.mT, log_v.mT
    return log_u.expand(n_hists, -1), log_v.expand(n_hists, -1)


def _potential(log_scaling: Tensor, weights: Tensor, epsilon: Any) -> Tensor:
    """Potential of a balanced scaling u = exp(f/epsilon) a; anything where the weight is zero."""
    return torch.where(weights > 0, (log_scaling - _log(weights)) * epsilon, 0.0).detach()


def _log(weights: Tensor, *, zero: float = 0.0) -> Tensor:
    """log(weights); `zero` and no gradient where they are zero."""
    positive = weights > 0
    return torch.where(positive, torch.where(positive, weights, 1.0).log(), zero)


def _ratio(wanted: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, wanted / torch.where(total > 0, total, 1.0), 1.0)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """p log(p/q + 1e-16), entry by entry, as POT's total cost has it; 0 where q is 0."""
    return p * (p / torch.where(q > 0, q, 1.0) + 1e-16).log()


def _report(verbose: bool, iteration: int, error: Tensor) -> None:
    if verbose:
        print(f"{'It.':5s}|{'Err':12s}\n{'-' * 19}\n{iteration:5d}|{float(error):8e}|")

"""POT's entropic solvers (signatures of POT 0.9.7) on this package's solver; POT itself is not imported.

    from pisces_kernels.compat import pot
    plan = pot.sinkhorn(a, b, M, reg)          # was ot.sinkhorn(a, b, M, reg)

What holds for every function here:

- NumPy arrays and lists give NumPy arrays, torch tensors give torch tensors on the same device, differentiable, in the
  dtype of the inputs (whole numbers become floats; half precision is computed in float32). Other array libraries and
  mixtures raise ValueError, as do wrong shapes (POT on torch: RuntimeError). [] stands for uniform weights.
- One solver serves all values of `method`, right for every reg: no call underflows, where POT warns of numerical errors
  and returns the last good iterate. The method decides the units of a warm start and whether iterations are plain or
  accelerated. Keywords that tune one of POT's methods (tau, print_period, epsilon0, ...) are accepted, without effect.
- Plain iterates ("sinkhorn", "sinkhorn_log") are POT's: a run that is cut short by numItermax returns POT's plan. The
  other methods and the partial problem use Anderson acceleration: the same solution in fewer iterations, other
  iterates. A keyword acceleration="anderson" or None, which POT ignores, chooses for one call.
- `stopThr` is translated into a change of the potentials that guarantees POT's own criterion, and that is looked at in
  every iteration, not in every tenth: runs are shorter or, as the translation is a bound, a few iterations longer.
  A run also ends where rounding keeps the potentials from settling further; stopThr = 0 runs all iterations.
- `log["err"]` has one entry, the error at the end.
- Gradients are those of the solution (implicit differentiation), not of the iterations that ran: no graph is kept.
  They agree with POT's where its iteration has converged.
"""

from __future__ import annotations

from typing import Any

from . import _pot

__all__ = [
    "entropic_partial_wasserstein",
    "entropic_partial_wasserstein_logscale",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_log",
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
]


def sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """Transport plan of entropic optimal transport, as `ot.sinkhorn`.

    plan = argmin sum(P M) + reg sum(P log P) subject to P 1 = a, P^T 1 = b; plan_ij = u_i exp(-M_ij/reg) v_j.

    Same as POT: plans, losses and, where a run is cut short, iterates; log["u"], log["v"] and their logarithms up to a
    constant that moves from one to the other (the solver fixes it, POT's depends on the path); rows that have
    the mass of a where the masses differ; the warning when the marginal error norm(P^T 1 - b) is not below stopThr.
    Different: "greenkhorn" counts whole iterations, not single coordinates; "sinkhorn_epsilon_scaling" solves for
    reg at once; b may be a matrix with every method; iterates of the methods that are accelerated.

    Args:
        a: (dim_a,) weights >= 0; [] for uniform ones.
        b: (dim_b,) weights >= 0, or (dim_b, n_hists) for several problems with the same M, solved as one batch.
        M: (dim_a, dim_b) finite costs.
        reg: regularisation > 0 in units of M. 0 gives NaN and a warning, as in POT.
        method: "sinkhorn", "sinkhorn_log", "greenkhorn", "sinkhorn_stabilized" or "sinkhorn_epsilon_scaling", synonyms.
        numItermax: most iterations, >= 1.
        stopThr: bound on norm(P^T 1 - b), over all histograms together.
        verbose: print the final iteration and its error.
        log: return also a dictionary.
        warn: warn when the error is not below stopThr.
        warmstart: (log u, log v); for "sinkhorn_stabilized" and "sinkhorn_epsilon_scaling" (reg log u, reg log v); for
            "sinkhorn_log" with several histograms a list of pairs. log["warmstart"] has the form that fits the method.
        **kwargs: acceleration; options of POT's methods, without effect.

    Returns:
        The plan (dim_a, dim_b), or the losses sum(P M) (n_hists,) if b is a matrix. With log also a dictionary with
        POT's names of all methods: err, niter = n_iter (index of the last iteration, from 0), u, v, log_u = logu,
        log_v = logv, alpha = reg log u, beta = reg log v, warmstart.

    Gradient:
        Of the plan, the losses and the logarithms with respect to a, b, M and (as a tensor) reg, for torch tensors.

    Raises:
        ValueError: unknown method, shapes that do not fit, reg < 0, negative weights, mixed array libraries.

    Example:
        >>> from pisces_kernels.compat import pot
        >>> pot.sinkhorn([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1).round(4).tolist()
        [[0.3655, 0.1345], [0.1345, 0.3655]]

    Source: Cuturi 2013; Schmitzer 2016 (absorption).
    """
    method = _pot.method_name("sinkhorn", method, _pot.METHODS)
    run = _pot.Run.of(numItermax, stopThr, verbose, log, method, kwargs)
    return _pot.balanced("sinkhorn", a, b, M, reg, method, run, warn=warn, warmstart=warmstart, loss=False)


def sinkhorn2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """Transport cost of the plan of `sinkhorn`, sum(P M) without the entropy, as `ot.sinkhorn2`.

    Same as POT, and different, as `sinkhorn`; as in POT the methods are "sinkhorn", "sinkhorn_log" and
    "sinkhorn_stabilized", and warn is off unless asked for.

    Args:
        a, b, M, reg, numItermax, stopThr, verbose, log, warn, warmstart: see `sinkhorn`.
        method: "sinkhorn", "sinkhorn_log" or "sinkhorn_stabilized", synonyms.
        **kwargs: acceleration; options of POT's methods, without effect.

    Returns:
        One number, or (n_hists,) if b is a matrix. With log also the dictionary of `sinkhorn`.

    Gradient:
        As `sinkhorn`: through the plan, as POT's, which for M is not the plan itself.

    Raises:
        ValueError: as `sinkhorn`.

    Example:
        >>> from pisces_kernels.compat import pot
        >>> round(float(pot.sinkhorn2([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1)), 6)
        0.268941

    Source: Cuturi 2013.
    """
    method = _pot.method_name("sinkhorn2", method, _pot.LOSS_METHODS)
    run = _pot.Run.of(numItermax, stopThr, verbose, log, method, kwargs)
    return _pot.balanced("sinkhorn2", a, b, M, reg, method, run, warn=warn, warmstart=warmstart, loss=True)


def sinkhorn_log(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """Transport plan of entropic optimal transport, as `ot.bregman.sinkhorn_log`.

    `sinkhorn` with method="sinkhorn_log". Different from POT: several histograms are one batch, stop together and obey
    warn, and their dictionary has err and niter too.

    Args:
        a, b, M, reg, numItermax, stopThr, verbose, log, warn: see `sinkhorn`.
        warmstart: (log u, log v), or a list of such pairs for several histograms.
        **kwargs: acceleration; others are ignored, as in POT.

    Returns:
        As `sinkhorn`.

    Gradient:
        As `sinkhorn`.

    Raises:
        ValueError: as `sinkhorn`.

    Example:
        >>> from pisces_kernels.compat import pot
        >>> plan, log = pot.sinkhorn_log([], [], [[0.0, 1.0], [1.0, 0.0]], 0.01, log=True)
        >>> plan.round(9).tolist(), log["niter"]
        ([[0.5, 0.0], [0.0, 0.5]], 0)

    Source: Cuturi 2013; Feydy et al. 2019.
    """
    run = _pot.Run.of(numItermax, stopThr, verbose, log, "sinkhorn_log", kwargs)
    return _pot.balanced("sinkhorn_log", a, b, M, reg, "sinkhorn_log", run, warn=warn, warmstart=warmstart, loss=False)


def sinkhorn_unbalanced(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """Transport plan of KL-unbalanced entropic transport, as `ot.unbalanced.sinkhorn_unbalanced`.

    plan = argmin sum(P M) + reg KL(P|c) + reg_m1 KL(P 1|a) + reg_m2 KL(P^T 1|b); plan_ij = u_i exp(-M_ij/reg) c_ij v_j.

    Same as POT: plans, losses, iterates of method="sinkhorn" (also for reg_m = inf with unequal masses: the columns
    then have the mass of b), log["logu"], log["logv"] (with reg_m = inf on both sides up to a constant that moves from
    one to the other), cost and total_cost (POT's formula, which leaves out the masses in KL and is therefore 0 at
    the optimum for finite reg_m); several histograms use the counting measure and ignore c, whatever reg_type says.
    Only "sinkhorn_stabilized" warns when numItermax is reached.
    Different: zero weights are right with every reference measure (POT: NaN with the default); a c that is ignored is
    warned of only when one is passed; an unknown reg_type is an error, not "kl"; "sinkhorn_translation_invariant" with
    two different finite reg_m gives the plan of the other methods, which POT's does not; log["err"] bounds POT's
    error, the largest relative change of u and v in the last iteration.

    Args:
        a: (dim_a,) weights >= 0; [] for uniform ones.
        b: (dim_b,) weights >= 0, or (dim_b, n_hists) for several problems with the same M, solved as one batch.
        M: (dim_a, dim_b) finite costs.
        reg: regularisation > 0 in units of M.
        reg_m: marginal penalty >= 0, one number, or one or two of them (a, b); inf keeps a marginal exactly, 0 leaves
            it free.
        method: "sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant" or "sinkhorn_reg_scaling", synonyms.
        reg_type: "kl": c = a b^T unless c is given; "entropy": c = 1 everywhere.
        c: (dim_a, dim_b) reference measure >= 0.
        warmstart: (log u, log v), vectors or matrices of columns.
        numItermax: most iterations, >= 1.
        stopThr: bound on POT's error.
        verbose: print the final iteration and its error.
        log: return also a dictionary.
        **kwargs: acceleration; options of POT's methods, without effect.

    Returns:
        The plan (dim_a, dim_b), or the losses sum(P M) (n_hists,) if b is a matrix. With log also a dictionary: err,
        logu, logv and, for one histogram, cost = sum(P M) and total_cost.

    Gradient:
        Of everything returned but err with respect to a, b, c and M, for torch tensors; reg is a number here.

    Raises:
        ValueError: unknown method or reg_type, shapes that do not fit, reg <= 0, more than two reg_m, negative weights.

    Example:
        >>> from pisces_kernels.compat import pot
        >>> pot.sinkhorn_unbalanced([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1, 1).round(4).tolist()
        [[0.3221, 0.1185], [0.1185, 0.3221]]

    Source: Chizat et al. 2018; Séjourné et al. 2022 (the translation-invariant iteration that one method names).
    """
    method = _pot.method_name("sinkhorn_unbalanced", method, _pot.UNBALANCED_METHODS)
    run = _pot.Run.of(numItermax, stopThr, verbose, log, method, kwargs)
    return _pot.unbalanced(
        "sinkhorn_unbalanced", a, b, M, reg, reg_m, method, run, reg_type=reg_type, c=c, warmstart=warmstart, loss=None
    )


def sinkhorn_unbalanced2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    returnCost: str = "linear",
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """Cost of the plan of `sinkhorn_unbalanced`, as `ot.unbalanced.sinkhorn_unbalanced2`.

    Same as POT, and different, as `sinkhorn_unbalanced`; several histograms always give sum(P M).

    Args:
        a, b, M, reg, reg_m, method, reg_type, c, warmstart, numItermax, stopThr, verbose, log: see
            `sinkhorn_unbalanced`.
        returnCost: "linear": sum(P M); "total": also POT's terms of the regularisation and of the marginals.
        **kwargs: acceleration; options of POT's methods, without effect.

    Returns:
        One number, or (n_hists,) if b is a matrix. With log also the dictionary of `sinkhorn_unbalanced`.

    Gradient:
        As `sinkhorn_unbalanced`.

    Raises:
        ValueError: as `sinkhorn_unbalanced`; unknown returnCost.

    Example:
        >>> from pisces_kernels.compat import pot
        >>> M = [[0.0, 1.0], [1.0, 0.0]]
        >>> round(float(pot.sinkhorn_unbalanced2([0.5, 0.1], [0.5, 0.5], M, 1.0, 1.0, stopThr=1e-9)), 6)
        0.196001

    Source: Chizat et al. 2018.
    """
    if returnCost not in ("linear", "total"):
        raise ValueError(f"sinkhorn_unbalanced2: Unknown returnCost = {returnCost}, expected 'linear' or 'total'.")
    method = _pot.method_name("sinkhorn_unbalanced2", method, _pot.UNBALANCED_METHODS)
    run = _pot.Run.of(numItermax, stopThr, verbose, log, method, kwargs)
    return _pot.unbalanced(
        "sinkhorn_unbalanced2",
        a,
        b,
        M,
        reg,
        reg_m,
        method,
        run,
        reg_type=reg_type,
        c=c,
        warmstart=warmstart,
        loss=returnCost,
    )


def entropic_partial_wasserstein(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    m: Any = None,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-100,
    verbose: bool = False,
    log: bool = False,
) -> Any:
    """Entropic plan that transports the mass m within the marginals, as `ot.partial.entropic_partial_wasserstein`.

    plan = argmin sum(P M) + reg sum(P log P) subject to P 1 <= a, P^T 1 <= b, sum(P) = m.

    Same as POT: the solution, and partial_w_dist = sum(P M). Different: the iteration solves each side together
    with the mass and is not POT's Dykstra, so that it takes other, usually fewer, iterations; small reg and zero
    weights give the solution, not NaN; m = 0 gives a plan of zeros; a stopThr below rounding, as
    the default, means rounding;
    log["err"] bounds POT's error, the norm of the plan's change in the last iteration.

    Args:
        a: (dim_a,) weights >= 0; [] for uniform ones.
        b: (dim_b,) weights >= 0.
        M: (dim_a, dim_b) finite costs.
        reg: regularisation > 0 in units of M.
        m: transported mass in [0, min(sum a, sum b)]; None: all of it.
        method: "sinkhorn" or "sinkhorn_log", synonyms.
        numItermax: most iterations, >= 1.
        stopThr: bound on POT's error.
        verbose: print the final iteration and its error.
        log: return also a dictionary.

    Returns:
        The plan (dim_a, dim_b). With log also a dictionary: err, partial_w_dist.

    Gradient:
        Of the plan and partial_w_dist with respect to a, b, M and (as tensors) reg and m, for torch tensors.

    Raises:
        ValueError: unknown method, shapes that do not fit, reg <= 0, m out of range, negative weights.

    Example:
        >>> from pisces_kernels.compat import pot
        >>> pot.entropic_partial_wasserstein([0.1, 0.2], [0.1, 0.1], [[0.0, 1.0], [2.0, 3.0]], 1, 0.1).round(2).tolist()
        [[0.06, 0.02], [0.01, 0.0]]

    Source: Benamou et al. 2015, section 5.1.
    """
    _pot.method_name("entropic_partial_wasserstein", method, _pot.PARTIAL_METHODS)
    run = _pot.Run(numItermax, stopThr, verbose, log)
    return _pot.partial("entropic_partial_wasserstein", a, b, M, reg, m, run)


def entropic_partial_wasserstein_logscale(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    m: Any = None,
    numItermax: int = 1000,
    stopThr: float = 1e-100,
    verbose: bool = False,
    log: bool = False,
) -> Any:
    """`entropic_partial_wasserstein`, as `ot.partial.entropic_partial_wasserstein_logscale`: the same solver here.

    Args:
        a, b, M, reg, m, numItermax, stopThr, verbose, log: see `entropic_partial_wasserstein`.

    Returns:
        As `entropic_partial_wasserstein`.

    Raises:
        ValueError: as `entropic_partial_wasserstein`.

    Example:
        >>> from pisces_kernels.compat import pot
        >>> pot.entropic_partial_wasserstein_logscale([], [], [[0.0, 5.0], [5.0, 0.0]], 0.01, 0.5).sum().round(6).item()
        0.5

    Source: Benamou et al. 2015, section 5.1.
    """
    return entropic_partial_wasserstein(
        a, b, M, reg, m, numItermax=numItermax, stopThr=stopThr, verbose=verbose, log=log
    )

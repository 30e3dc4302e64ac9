"""`pisces_kernels.compat.pot` against POT: balanced problems, array types, warnings and errors."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import warnings

import numpy as np
import ot
import pytest
import torch
from pot_peer import PEERS, REG, TIGHT, close, problem, quietly

from pisces_kernels.compat import _pot, pot


@pytest.mark.parametrize("name", PEERS)
def test_signatures_are_those_of_pot(name):
    ours, theirs = inspect.signature(getattr(pot, name)), inspect.signature(PEERS[name])
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


def test_pot_is_not_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)  # importing it raises
    for name in ("pot", "_pot", "_arrays"):
        monkeypatch.delitem(sys.modules, f"pisces_kernels.compat.{name}")
    fresh = importlib.import_module("pisces_kernels.compat.pot")
    assert fresh is not pot
    with pytest.raises(ImportError):
        importlib.import_module("ot")


@pytest.mark.parametrize("method", _pot.METHODS)
def test_balanced_plans_and_dictionaries_are_those_of_pot(method):
    a, b, M = problem()
    options = {"method": method, "log": True, **TIGHT}
    theirs, their_log = ot.sinkhorn(a, b, M, REG, **options)
    ours, log = pot.sinkhorn(a, b, M, REG, tau=50.0, print_period=3, **options)
    close(ours, theirs)
    assert set(their_log) <= set(log)
    K = np.exp(-M / REG)
    close(log["u"][:, None] * K * log["v"], ours, atol=1e-14)
    close(log["log_u"], np.log(log["u"]), atol=1e-12)
    close(log["alpha"], REG * log["logu"], atol=1e-14)
    close(log["err"], [np.linalg.norm(ours.sum(0) - b)], atol=1e-16)
    # The potentials are POT's up to one constant, which moves from one side to the other.
    shift = np.log(log["u"] / their_log["u"]) if "u" in their_log else log["logu"] - their_log.get("alpha") / REG
    assert np.ptp(shift) < 1e-8
    other = ot.sinkhorn(a, b, M, 1.1 * REG, method="sinkhorn", **TIGHT)
    assert np.abs(ours - other).max() > 1e-5  # the comparison can fail


@pytest.mark.parametrize("n_iters", [1, 2, 5])
@pytest.mark.parametrize("method", _pot.PLAIN)
def test_a_run_cut_short_returns_the_iterate_of_pot(method, n_iters):
    a, b, M = problem()
    cut = {"method": method, "stopThr": 0, "numItermax": n_iters}
    warm = (torch.randn(len(a), dtype=torch.float64).numpy(), torch.randn(len(b), dtype=torch.float64).numpy())
    for start in (None, warm):
        for mass in (1.0, 1.7):  # with unequal masses as well, where nothing converges
            with pytest.warns(UserWarning, match="did not converge"):
                ours, log = pot.sinkhorn(mass * a, b, M, REG, warmstart=start, log=True, **cut)
            close(ours, quietly(ot.sinkhorn, mass * a, b, M, REG, warmstart=start, **cut), atol=1e-14)
            assert log["niter"] == n_iters - 1
    starts = {"kl": (None, warm), "entropy": (None,)}
    for reg_type, options in starts.items():
        for start in options:
            for reg_m in (0.5, math.inf):
                cut = {"reg_type": reg_type, "stopThr": 0, "numItermax": n_iters, "warmstart": start}
                theirs = quietly(ot.unbalanced.sinkhorn_unbalanced, a, 2 * b, M, REG, reg_m, **cut)
                close(pot.sinkhorn_unbalanced(a, 2 * b, M, REG, reg_m, **cut), theirs, atol=1e-14)


def test_acceleration_is_a_matter_of_iterations_only():
    a, b, M = problem(20, 30)
    options = {"log": True, "stopThr": 1e-12, "numItermax": 20000}
    plain, log = pot.sinkhorn(a, b, M, 0.01, acceleration=None, **options)
    for method in ("sinkhorn_stabilized", "sinkhorn"):
        fast, log_fast = pot.sinkhorn(a, b, M, 0.01, method=method, acceleration="anderson", **options)
        close(fast, plain)
        assert log_fast["niter"] < log["niter"]
        assert np.linalg.norm(fast.sum(0) - b) < 1e-12
    loose = pot.sinkhorn_unbalanced(a, 2 * b, M, 0.1, 5.0, stopThr=1e-12, numItermax=20000)
    for method in _pot.UNBALANCED_METHODS[1:]:
        close(pot.sinkhorn_unbalanced(a, 2 * b, M, 0.1, 5.0, method=method, stopThr=1e-12), loose)


def test_unequal_masses_keep_the_rows_as_pot_does():
    a, b, M = problem()
    ours = quietly(pot.sinkhorn, 2 * a, b, M, REG, **TIGHT)
    close(ours, quietly(ot.sinkhorn, 2 * a, b, M, REG, stopThr=0, numItermax=500))
    close(ours.sum(1), 2 * a, atol=1e-12)


@pytest.mark.parametrize("stopThr", [1e-2, 1e-4, 1e-7, 1e-10])
def test_the_criterion_of_pot_holds_on_return(stopThr):
    a, b, M = problem(30, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = pot.sinkhorn(a, b, M, 0.03, stopThr=stopThr, numItermax=20000)
    assert np.linalg.norm(plan.sum(0) - b) < stopThr
    loose = pot.sinkhorn(a, b, M, 0.03, stopThr=1.0)
    assert np.linalg.norm(loose.sum(0) - b) > 1e-10  # the threshold has an effect
    log_u, log_v = (
        pot.sinkhorn_unbalanced(a, 3 * b, M, 0.03, 0.5, log=True, stopThr=stopThr)[1][k] for k in ("logu", "logv")
    )
    log_u_next = 0.5 / 0.53 * (np.log(a) - np.log((np.exp(log_v - M / 0.03) * (a[:, None] * 3 * b)).sum(1)))
    assert np.abs(np.exp(log_u_next) - np.exp(log_u)).max() / max(1.0, np.exp(log_u).max()) < stopThr


@pytest.mark.parametrize("method", _pot.METHODS)
def test_warm_starts_return_at_once(method):
    a, b, M = problem()
    plan, log = pot.sinkhorn(a, b, M, REG, method=method, log=True, **TIGHT)
    again, log_again = pot.sinkhorn(a, b, M, REG, method=method, log=True, warmstart=log["warmstart"])
    close(again, plan)
    assert log_again["niter"] == 0 < log["niter"]
    theirs = quietly(ot.sinkhorn, a, b, M, REG, method=method, warmstart=log["warmstart"], stopThr=0, numItermax=1)
    if method != "sinkhorn_epsilon_scaling":  # which leaves the start for its first epsilon
        close(theirs, plan)  # POT understands the same units
    a, b, M = problem(n_hists=3)
    losses, log = pot.sinkhorn(a, b, M, REG, method=method, log=True, **TIGHT)
    again, log_again = pot.sinkhorn(a, b, M, REG, method=method, log=True, warmstart=log["warmstart"])
    close(again, losses)
    assert log_again["niter"] == 0 < log["niter"]


@pytest.mark.parametrize("method", _pot.LOSS_METHODS)
def test_several_histograms_are_those_of_pot(method):
    a, b, M = problem(n_hists=3)
    options = {"method": method, "log": True, **TIGHT}
    theirs, their_log = ot.sinkhorn2(a, b, M, REG, **options)
    for function in (pot.sinkhorn, pot.sinkhorn2):
        ours, log = function(a, b, M, REG, **options)
        close(ours, theirs)
        assert set(their_log) <= set(log)
        assert log["u"].shape == (len(a), 3)
        assert log["v"].shape == (len(b), 3)
    for k in range(3):
        close(ours[k], pot.sinkhorn2(a, b[:, k], M, REG, **TIGHT))
        plan = log["u"][:, k, None] * np.exp(-M / REG) * log["v"][:, k]
        close(plan, pot.sinkhorn(a, b[:, k], M, REG, **TIGHT))
    assert pot.sinkhorn(a, b[:, :1], M, REG).shape == (1,)


def test_uniform_weights_lists_and_whole_numbers():
    M = [[0, 2], [1, 0], [3, 1]]
    expected = ot.sinkhorn(np.full(3, 1 / 3), np.full(2, 0.5), np.array(M, float), 1.0)
    for a, b in (([], []), (None, np.array([])), ([1 / 3] * 3, [0.5, 0.5])):
        for cost in (M, np.array(M), np.asfortranarray(M)[:, ::-1][:, ::-1]):
            plan = pot.sinkhorn(a, b, cost, 1.0)
            assert plan.dtype == np.float64
            close(plan, expected, atol=1e-8)
    read_only = np.array(M, float)
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(pot.sinkhorn([], [], read_only, 1.0), expected, atol=1e-8)
    assert pot.sinkhorn([], [], torch.tensor(M), 1.0, warn=False).dtype == torch.float32
    assert pot.sinkhorn(torch.tensor([]), [], torch.tensor(M).double(), 1.0).dtype == torch.float64


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_arrays_come_back_as_they_went_in(name):
    a, b, M = problem()
    atol = {"float16": 2e-3, "float32": 2e-6, "float64": 1e-6}[name]
    plan = ot.sinkhorn(a, b, M, REG)
    part = ot.partial.entropic_partial_wasserstein(a, b, M, REG, m=0.6)
    loose = ot.unbalanced.sinkhorn_unbalanced(a, b, M, REG, 1.0, stopThr=1e-9)
    for arrays in (
        [x.astype(name) for x in (a, b, M)],
        [torch.tensor(x).to(getattr(torch, name)) for x in (a, b, M)],
    ):
        kind, dtype = type(arrays[2]), arrays[2].dtype
        for ours, theirs in (
            (pot.sinkhorn(*arrays, REG, warn=False, log=True), plan),
            (pot.sinkhorn2(*arrays, REG, log=True), (M * plan).sum()),
            (pot.sinkhorn_unbalanced(*arrays, REG, 1.0, log=True), loose),
            (pot.sinkhorn_unbalanced2(*arrays, REG, 1.0, log=True), (M * loose).sum()),
            (pot.entropic_partial_wasserstein(*arrays, REG, m=0.6, log=True), part),
        ):
            assert ours[0].dtype == dtype
            assert isinstance(ours[0], kind | np.generic)
            close(ours[0], theirs, atol=atol)
            for value in ours[1].values():
                value = value[0] if isinstance(value, list | tuple) else value
                assert isinstance(value, int) or value.dtype == dtype


def test_small_reg_gives_the_plan_where_pot_warns():
    a, b, M = problem(6, 6)
    M = M + 1.0
    with np.errstate(all="ignore"), pytest.warns(UserWarning, match="numerical errors"):
        broken = ot.sinkhorn(a, b, M, 1e-3)  # exp(-1000) is zero
    plan = pot.sinkhorn(a, b, M, 1e-3, numItermax=3000, warn=False)
    close(plan, ot.sinkhorn(a, b, M, 1e-3, method="sinkhorn_log", numItermax=3000, warn=False), atol=1e-9)
    assert not np.allclose(plan, broken, atol=1e-3)


def test_zero_weights_transport_nothing():
    a, b, M = problem()
    a[2], b[[0, 4]] = 0, 0
    rows, cols = a > 0, b > 0
    inside = np.ix_(rows, cols)
    plans = {
        "balanced": pot.sinkhorn(a, b * a.sum() / b.sum(), M, REG, log=True, **TIGHT),
        "kl": pot.sinkhorn_unbalanced(a, b, M, REG, 0.5, log=True, **TIGHT),
        "entropy": pot.sinkhorn_unbalanced(a, b, M, REG, 0.5, reg_type="entropy", log=True, **TIGHT),
        "partial": pot.entropic_partial_wasserstein(a, b, M, REG, 0.6, log=True),
    }
    a, b, part = a[rows], b[cols], M[inside]
    expected = {
        "balanced": ot.sinkhorn(a, b * a.sum() / b.sum(), part, REG, **TIGHT),
        "kl": ot.unbalanced.sinkhorn_unbalanced(a, b, part, REG, 0.5, **TIGHT),
        "entropy": quietly(ot.unbalanced.sinkhorn_unbalanced, a, b, part, REG, 0.5, reg_type="entropy", **TIGHT),
        "partial": ot.partial.entropic_partial_wasserstein(a, b, part, REG, 0.6),
    }
    for name, (plan, log) in plans.items():
        close(plan[inside], expected[name])
        assert plan[~rows].sum() + plan[:, ~cols].sum() == 0, name
        values = [x for value in log.values() for x in (value if isinstance(value, tuple) else (value,))]
        assert not any(np.isnan(x).any() for x in values), name
    assert (plans["balanced"][1]["u"][~rows] == 0).all()


def test_warnings():
    a, b, M = problem()
    for method in _pot.METHODS:
        with pytest.warns(UserWarning, match="did not converge"):
            pot.sinkhorn(a, b, M, REG, method=method, stopThr=0, numItermax=1)
    with pytest.warns(UserWarning, match="did not converge"):
        pot.sinkhorn_log(a, b, M, REG, numItermax=1)
    with pytest.warns(UserWarning, match="did not converge"):
        pot.sinkhorn_unbalanced(a, b, M, REG, 1.0, method="sinkhorn_stabilized", numItermax=1)
    with pytest.warns(UserWarning, match="matrix c is overwritten"):
        pot.sinkhorn_unbalanced(a, b, M, REG, 1.0, reg_type="entropy", c=M)
    M_bad = M.copy()
    M_bad[0, 0] = np.nan
    for call in (
        lambda: pot.sinkhorn(a, b, M, 0, warn=False),
        lambda: pot.sinkhorn(a, b, M_bad, REG, warn=False),
        lambda: pot.sinkhorn_unbalanced(a, b, M_bad, REG, 1.0),
        lambda: pot.entropic_partial_wasserstein(a, b, M_bad, REG, m=0.5),
    ):
        with pytest.warns(UserWarning, match=r"[Nn]umerical errors"):
            assert np.isnan(call()).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pot.sinkhorn(a, b, M, REG)
        pot.sinkhorn(a, b, M, REG, numItermax=1, warn=False)
        pot.sinkhorn2(a, b, M, REG, numItermax=1)
        pot.sinkhorn_unbalanced(a, b, M, REG, 1.0, reg_type="entropy", numItermax=1)
        pot.entropic_partial_wasserstein(a, b, M, REG, m=0.5, numItermax=1)


def test_verbose_prints_the_final_error(capsys):
    a, b, M = problem()
    _, log = pot.sinkhorn(a, b, M, REG, verbose=True, log=True)
    header, rule, line = capsys.readouterr().out.splitlines()
    assert header.startswith("It.")
    assert set(rule) == {"-"}
    assert line == f"{log['niter']:5d}|{log['err'][0]:8e}|"


BAD = {
    "a too long": lambda a, b, M: ("sinkhorn", (np.append(a, 0.1), b, M, REG), {}),
    "b too short": lambda a, b, M: ("sinkhorn_log", (a, b[1:], M, REG), {}),
    "histograms too short": lambda a, b, M: ("sinkhorn2", (a, np.stack([b, b], 1)[1:], M, REG), {}),
    "unbalanced a": lambda a, b, M: ("sinkhorn_unbalanced", (np.append(a, 0.1), b, M, REG, 1.0), {}),
    "partial b": lambda a, b, M: ("entropic_partial_wasserstein", (a, b[1:], M, REG), {"m": 0.5}),
    "three penalties": lambda a, b, M: ("sinkhorn_unbalanced", (a, b, M, REG, [1.0, 1.0, 1.0]), {}),
    "method": lambda a, b, M: ("sinkhorn", (a, b, M, REG), {"method": "newton"}),
    "method of a plan": lambda a, b, M: ("sinkhorn2", (a, b, M, REG), {"method": "greenkhorn"}),
    "method, unbalanced": lambda a, b, M: ("sinkhorn_unbalanced", (a, b, M, REG, 1.0), {"method": "newton"}),
    "method, partial": lambda a, b, M: ("entropic_partial_wasserstein", (a, b, M, REG, 0.5), {"method": "newton"}),
    "returnCost": lambda a, b, M: ("sinkhorn_unbalanced2", (a, b, M, REG, 1.0), {"returnCost": "plan"}),
    "m too large": lambda a, b, M: ("entropic_partial_wasserstein", (a, b, M, REG, 1.5), {}),
    "m negative": lambda a, b, M: ("entropic_partial_wasserstein_logscale", (a, b, M, REG, -0.1), {}),
    "mixed libraries": lambda a, b, M: ("sinkhorn", (torch.tensor(a), torch.tensor(b), M, REG), {}),
    "not arrays": lambda a, b, M: ("sinkhorn", ("a", b, M, REG), {}),
}
BAD_HERE = {  # where POT returns something that means nothing
    "reg negative": lambda a, b, M: ("sinkhorn", (a, b, M, -1.0), {}),
    "reg zero": lambda a, b, M: ("entropic_partial_wasserstein", (a, b, M, 0.0, 0.5), {}),
    "reg not a number": lambda a, b, M: ("sinkhorn_unbalanced", (a, b, M, math.nan, 1.0), {}),
    "penalty negative": lambda a, b, M: ("sinkhorn_unbalanced", (a, b, M, REG, -1.0), {}),
    "reg_type": lambda a, b, M: ("sinkhorn_unbalanced", (a, b, M, REG, 1.0), {"reg_type": "l2"}),
    "weights negative": lambda a, b, M: ("sinkhorn", (-a, b, M, REG), {}),
    "no iterations": lambda a, b, M: ("sinkhorn", (a, b, M, REG), {"numItermax": 0}),
    "c too small": lambda a, b, M: ("sinkhorn_unbalanced", (a, b, M, REG, 1.0), {"c": M[:1]}),
    "M a vector": lambda a, b, M: ("sinkhorn", (a, b, M[0], REG), {}),
}


@pytest.mark.parametrize("what", [*BAD, *BAD_HERE])
def test_bad_input(what):
    name, args, kwargs = {**BAD, **BAD_HERE}[what](*problem())
    with pytest.raises(ValueError):
        getattr(pot, name)(*args, **kwargs)
    if what in BAD:
        with pytest.raises(ValueError):  # the type of error is POT's
            quietly(PEERS[name], *args, **kwargs)

"""`pisces_kernels.compat.pot` against POT: unbalanced and partial problems, and the gradients of all of them."""

from __future__ import annotations

import math
import warnings

import numpy as np
import ot
import pytest
import torch
from pot_peer import PEERS, REG, TIGHT, close, problem, quietly

from pisces_kernels.compat import _pot, pot

PENALTIES = [0.6, [0.6], (0.5, 0.5), (0.4, math.inf), (math.inf, 0.4), np.array([0.5, 0.5])]


@pytest.mark.parametrize("reg_m", PENALTIES, ids=str)
@pytest.mark.parametrize("method", _pot.UNBALANCED_METHODS)
def test_unbalanced_plans_and_dictionaries_are_those_of_pot(method, reg_m):
    a, b, M = problem()
    reference = 0.1 + torch.rand(*M.shape, dtype=torch.float64).numpy()
    for reg_type, c in (("kl", None), ("kl", reference), ("entropy", None)):
        options = {"method": method, "reg_type": reg_type, "c": c, **TIGHT}
        theirs, their_log = quietly(ot.unbalanced.sinkhorn_unbalanced, a, 1.6 * b, M, REG, reg_m, log=True, **options)
        ours, log = pot.sinkhorn_unbalanced(a, 1.6 * b, M, REG, reg_m, log=True, **options)
        close(ours, theirs, atol=1e-9)
        assert set(their_log) == set(log)
        for name in ("logu", "logv", "cost", "total_cost"):
            close(log[name], their_log[name], atol=1e-8)
        for what in ("linear", "total"):
            value = quietly(ot.unbalanced.sinkhorn_unbalanced2, a, 1.6 * b, M, REG, reg_m, returnCost=what, **options)
            close(pot.sinkhorn_unbalanced2(a, 1.6 * b, M, REG, reg_m, returnCost=what, **options), value, atol=1e-8)
        again = pot.sinkhorn_unbalanced(
            a, 1.6 * b, M, REG, reg_m, warmstart=(log["logu"], log["logv"]), **{**options, "numItermax": 1}
        )
        close(again, ours)
        other = quietly(ot.unbalanced.sinkhorn_unbalanced, a, 1.6 * b, M, REG, 3.0, **options)
        assert np.abs(ours - other).max() > 1e-5  # the comparison can fail


def test_two_unequal_penalties_and_penalties_of_zero():
    a, b, M = problem()
    # POT's translation-invariant iteration has another fixed point when two finite penalties differ; ours is that of
    # POT's other methods.
    theirs = ot.unbalanced.sinkhorn_unbalanced(a, 2 * b, M, REG, (0.3, 2.0), **TIGHT)
    for method in _pot.UNBALANCED_METHODS:
        close(pot.sinkhorn_unbalanced(a, 2 * b, M, REG, (0.3, 2.0), method=method, **TIGHT), theirs)
    # A free side imposes nothing: with two of them the plan is the kernel.
    free = pot.sinkhorn_unbalanced(a, b, M, REG, 0)
    close(free, np.exp(-M / REG) * a[:, None] * b, atol=1e-14)
    for reg_m in (0.0, (0.0, 0.4), (0.4, 0.0)):
        close(
            pot.sinkhorn_unbalanced(a, b, M, REG, reg_m, **TIGHT),
            ot.unbalanced.sinkhorn_unbalanced(a, b, M, REG, reg_m, **TIGHT),
        )


def test_infinite_penalties_are_the_balanced_problem():
    a, b, M = problem()
    plan = pot.sinkhorn_unbalanced(a, b, M, REG, math.inf, **TIGHT)
    close(plan, ot.sinkhorn(a, b, M, REG, **TIGHT))
    uneven = pot.sinkhorn_unbalanced(a, 2 * b, M, REG, math.inf, **TIGHT)
    close(uneven, ot.unbalanced.sinkhorn_unbalanced(a, 2 * b, M, REG, math.inf, stopThr=0, numItermax=500))
    close(uneven.sum(0), 2 * b, atol=1e-12)
    close(uneven, 2 * plan)


@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_several_unbalanced_histograms_are_those_of_pot(reg_type):
    a, b, M = problem(n_hists=3)
    b = b * np.array([0.5, 1.0, 2.0])
    options = {"reg_type": reg_type, "log": True, **TIGHT}
    theirs, their_log = quietly(ot.unbalanced.sinkhorn_unbalanced, a, b, M, REG, 0.6, **options)
    for function in (pot.sinkhorn_unbalanced, pot.sinkhorn_unbalanced2):
        ours, log = function(a, b, M, REG, 0.6, **options)
        close(ours, theirs)
        assert set(their_log) == set(log)
        close(log["logu"], their_log["logu"], atol=1e-9)
        close(log["logv"], their_log["logv"], atol=1e-9)
    warm = pot.sinkhorn_unbalanced(a, b, M, REG, 0.6, warmstart=(log["logu"], log["logv"]), numItermax=1)
    close(warm, ours)


def test_a_reference_measure_forbids_where_it_is_zero():
    a, b, M = problem()
    c = np.where(torch.rand(*M.shape).numpy() < 0.3, 0.0, 1.0)
    c[:, 0] = c[0] = 1.0
    ours = pot.sinkhorn_unbalanced(a, b, M, REG, 0.5, c=c, **TIGHT)
    close(ours, ot.unbalanced.sinkhorn_unbalanced(a, b, M, REG, 0.5, c=c, **TIGHT))
    assert ours[c == 0].max() < 1e-100


@pytest.mark.parametrize("method", _pot.PARTIAL_METHODS)
@pytest.mark.parametrize("mass", [0.05, 0.6, 0.99, None])
def test_partial_plans_are_those_of_pot(mass, method):
    a, b, M = problem()
    options = {"m": mass, "method": method, "log": True, "numItermax": 3000, "stopThr": 1e-14}
    for scale in (1.0, 1.4):
        theirs, their_log = ot.partial.entropic_partial_wasserstein(a, scale * b, M, REG, **options)
        ours, log = pot.entropic_partial_wasserstein(a, scale * b, M, REG, **options)
        close(ours, theirs, atol=1e-9)
        assert set(their_log) == set(log)
        close(log["partial_w_dist"], their_log["partial_w_dist"], atol=1e-9)
    options.pop("method")
    same = pot.entropic_partial_wasserstein_logscale(a, scale * b, M, REG, **options)[0]
    assert (same == ours).all()
    other = ot.partial.entropic_partial_wasserstein(a, b, M, REG, m=0.3)
    assert np.abs(ours - other).max() > 1e-5  # the comparison can fail


def test_partial_laws_at_small_reg_and_without_mass():
    a, b, M = problem(20, 20)
    for reg in (1e-2, 3e-3):
        plan = pot.entropic_partial_wasserstein(a, b, M, reg, m=0.7, numItermax=20000)
        assert plan.sum() == pytest.approx(0.7, abs=1e-9)
        assert (plan.sum(1) <= a + 1e-9).all()
        assert (plan.sum(0) <= b + 1e-9).all()
    exact = ot.partial.partial_wasserstein2(a, b, M, m=0.7)
    plan = pot.entropic_partial_wasserstein(a, b, M, 1e-3, m=0.7, numItermax=20000)
    assert -1e-9 < (plan * M).sum() - exact < 1e-3 * np.log(400)
    assert (pot.entropic_partial_wasserstein(a, b, M, REG, m=0) == 0).all()


def gradients(function, arrays, loss):
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    loss(quietly(function, *tensors)).backward()
    return [t.grad.numpy() for t in tensors]


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("sinkhorn2", (), {"stopThr": 1e-14}),
        ("sinkhorn2", (), {"stopThr": 1e-14, "method": "sinkhorn_log"}),
        ("sinkhorn_unbalanced2", (0.5,), {"stopThr": 1e-14}),
        ("sinkhorn_unbalanced2", ((0.5, math.inf),), {"stopThr": 1e-14, "returnCost": "total"}),
        ("sinkhorn_unbalanced2", (0.5,), {"stopThr": 1e-14, "reg_type": "entropy"}),
        ("sinkhorn_unbalanced2", ((math.inf, 0.5),), {"stopThr": 1e-14}),
        ("sinkhorn_unbalanced2", (math.inf,), {"stopThr": 1e-14}),
    ],
    ids=str,
)
def test_gradients_are_those_of_pot(name, args, kwargs):
    a, b, M = problem()

    def run(module):
        return gradients(lambda *tensors: module(*tensors, REG, *args, **kwargs), (a, b, M), lambda value: value)

    theirs = run(PEERS[name])
    for ours, expected in zip(run(getattr(pot, name)), theirs, strict=True):
        close(ours, expected, atol=1e-9)
    assert np.abs(theirs[-1]).max() > 1e-4  # there is something to agree on


def test_gradients_with_respect_to_reg_are_those_of_pot():
    a, b, M = problem()
    tensors = [torch.tensor(x) for x in (a, b, M)]
    for ours, theirs, options in (
        (pot.sinkhorn2, ot.sinkhorn2, {"stopThr": 1e-14}),
        (
            lambda *t, **o: pot.entropic_partial_wasserstein(*t, **o)[1]["partial_w_dist"],
            lambda *t, **o: ot.partial.entropic_partial_wasserstein(*t, **o)[1]["partial_w_dist"],
            {"m": 0.6, "stopThr": 1e-14, "log": True},
        ),
    ):
        grads = []
        for function in (ours, theirs):
            reg = torch.tensor(REG, dtype=torch.float64, requires_grad=True)
            function(*tensors, reg, **options).backward()
            grads.append(reg.grad.item())
        close(*grads, atol=1e-9)
        assert abs(grads[0]) > 1e-3
    with pytest.raises(ValueError, match="reg requires grad"):
        pot.sinkhorn_unbalanced(*tensors, reg, 1.0)


def test_gradients_of_plans_and_histograms_are_those_of_pot():
    a, b, M = problem()
    weight = torch.rand(*M.shape, dtype=torch.float64)
    for ours, theirs in (
        (pot.sinkhorn, ot.sinkhorn),
        (
            lambda *t, **_: pot.entropic_partial_wasserstein(*t, m=0.6),
            lambda *t, **_: ot.partial.entropic_partial_wasserstein(*t, m=0.6, stopThr=1e-14, numItermax=3000),
        ),
    ):
        grads = [
            gradients(lambda *t, f=f: f(*t, REG, stopThr=1e-14), (a, b, M), lambda plan: (plan * weight).sum())
            for f in (ours, theirs)
        ]
        for mine, other in zip(*grads, strict=True):
            close(mine, other, atol=1e-9)
    a, b, M = problem(n_hists=2)
    grads = [
        gradients(lambda *t, f=f: f(*t, REG, stopThr=1e-14), (a, b, M), lambda losses: losses[0] + 3 * losses[1])
        for f in (pot.sinkhorn2, ot.sinkhorn2)
    ]
    for mine, other in zip(*grads, strict=True):
        close(mine, other, atol=1e-9)


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_unbalanced", "entropic_partial_wasserstein"])
def test_gradients_are_finite_with_zero_weights_and_nothing_is_warned_of(name):
    a, b, M = problem()
    a[3] = b[5] = 0
    tensors = [torch.tensor(x / x.sum() if x.ndim == 1 else x, requires_grad=True) for x in (a, b, M)]
    extra = {"sinkhorn": (), "sinkhorn_unbalanced": (0.5,), "entropic_partial_wasserstein": (0.6,)}[name]
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plan, log = getattr(pot, name)(*tensors, REG, *extra, log=True)
            numbers = [v for v in log.values() if isinstance(v, torch.Tensor) and v.ndim == 0]
            torch.stack([plan[0, 0], *numbers]).sum().backward()
    finally:
        torch.set_warn_always(False)
    assert all(torch.isfinite(t.grad).all() for t in tensors)
    assert not log["err"][0].requires_grad

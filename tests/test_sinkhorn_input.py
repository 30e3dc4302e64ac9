"""What `sinkhorn` takes, refuses and reports: strides, dtypes, zero weights, overflow, bad arguments."""

from __future__ import annotations

import numpy as np
import problems
import pytest
import torch
from problems import KINDS, random_costs, random_weights

from pisces_kernels import sinkhorn

BACKENDS = ["reference", "cpu"]
TIGHT = {"max_iters": 3000, "tol": 1e-11}


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_broadcasting_and_half_precision(backend):
    cost = random_costs(2, 6, 11, dtype=torch.float32)
    plain = sinkhorn(cost, epsilon=0.1, backend=backend)
    assert torch.equal(sinkhorn(problems.strided(cost), epsilon=0.1, backend=backend).f, plain.f)
    expanded = sinkhorn(cost[:1].expand(3, 6, 11), epsilon=0.1, backend=backend)
    assert torch.equal(expanded.f, plain.f[:1].expand(3, 6))
    for dtype in (torch.float16, torch.bfloat16):
        half = sinkhorn(cost.to(dtype), epsilon=0.1, backend=backend)
        assert half.f.dtype == torch.float32
        assert torch.equal(half.f, sinkhorn(cost.to(dtype).float(), epsilon=0.1, backend=backend).f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sinkhorn(cost.requires_grad_(), epsilon=0.1, backend=backend)
        assert torch.equal(inside.f, plain.f)
        gradient = torch.autograd.grad(inside.f[..., 0].sum(), cost, retain_graph=True)[0]
    assert torch.equal(gradient, torch.autograd.grad(inside.f[..., 0].sum(), cost)[0])
    shadow = torch.rand(2, 4, 6, device="meta", requires_grad=True)
    assert torch.autograd.grad(sinkhorn(shadow, epsilon=0.1).f.sum(), shadow)[0].shape == shadow.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_weights_and_empty_problems(backend, kind):
    cost, a = random_costs(2, 6, 11), random_weights(2, 6)
    a[:, 2] = 0
    a = a / a.sum(-1, keepdim=True)
    options = {"epsilon": 0.1, "backend": backend, "max_iters": 2000, "tol": 1e-10, **KINDS[kind]}
    result = sinkhorn(cost, a, **options)
    others = [0, 1, 3, 4, 5]
    removed = sinkhorn(cost[:, others], a[:, others], **options)
    assert torch.allclose(result.g, removed.g, atol=1e-8)
    assert (result.plan()[:, 2] == 0).all()
    assert torch.isfinite(result.f).all()  # extended by the update to the row without weight
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    empty = sinkhorn(cost, row_mask=mask, **options)
    assert (empty.f[1] == 0).all()
    assert (empty.g[1] == 0).all()
    assert (empty.plan()[1] == 0).all()
    assert empty.converged.all()
    assert empty.n_iters.tolist()[1] == 0
    assert torch.allclose(empty.f[0], sinkhorn(cost[0], **options).f, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_zero_on_both_sides_overflow_nowhere(backend, kind):
    cost = torch.ones(5, 7)
    cost[0, 0] = 0  # in row 0 and column 0, which have no weight, exp((f + g - cost) / epsilon) is exp(2000)
    a, b = torch.full((5,), 0.25), torch.full((7,), 1 / 6)
    a[0] = b[0] = 0
    inputs = [t.requires_grad_() for t in (cost, a, b)]
    result = sinkhorn(*inputs, epsilon=0.001, backend=backend, **KINDS[kind])
    assert torch.isfinite(result.plan()).all()
    assert (result.plan()[0] == 0).all()
    weight = torch.randn(5, 7)
    for scalar in (result.f.sum() + result.g.square().sum(), (result.plan() * weight).sum(), result.value):
        for gradient in torch.autograd.grad(scalar, inputs, retain_graph=True):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_overflow_and_starts_that_are_not_finite_are_reported(backend, kind):
    options = {"epsilon": 0.1, "backend": backend, **KINDS[kind]}
    cost = torch.rand(2, 5, 8)
    beyond = torch.stack([cost[0], torch.linspace(1e38, 3e38, 40).view(5, 8)])  # cost / epsilon is beyond float32
    nan = torch.zeros(2, 8)
    nan[1, 3] = torch.nan
    inf = torch.zeros(2, 5)
    inf[1, 2] = torch.inf
    for values, start in ((beyond, {}), (cost, {"g_init": nan}), (cost, {"f_init": inf})):
        result = sinkhorn(values, **start, **options)
        assert result.converged.tolist() == [True, False]
        assert result.residual.isnan().tolist() == [False, True]
        assert result.f.isnan().all(-1).tolist() == [False, True]
        assert torch.isfinite(result.plan()[0]).all()
    masked = sinkhorn(cost, g_init=nan, col_mask=torch.isfinite(nan), **options)
    assert masked.converged.all()  # what is masked may hold anything


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_solved_is_reported(backend):
    cost = random_costs(3, 5, 8)
    cost[1, 2, 3] = torch.nan
    cost[2, 0, 0] = torch.inf
    result = sinkhorn(cost, epsilon=0.1, backend=backend)
    assert result.converged.tolist() == [True, False, False]
    assert result.residual.isnan().tolist() == [False, True, True]
    assert torch.isfinite(result.f[0]).all()
    assert result.f[1].isnan().all()
    few = sinkhorn(cost[0], epsilon=0.001, max_iters=3, tol=1e-9, backend=backend)
    assert not few.converged
    assert few.n_iters == 3
    unequal = sinkhorn(cost[0], torch.full((5,), 0.4, dtype=torch.float64), epsilon=0.1, backend=backend)
    assert not unequal.converged  # sum a = 2, sum b = 1: no balanced plan exists
    assert unequal.residual.item() == pytest.approx(np.log(2), abs=1e-6)
    none = sinkhorn(torch.rand(0, 5, 8), epsilon=np.float32(0.1), max_iters=np.int64(9), backend=backend)
    assert none.plan().shape == (0, 5, 8)


COST = torch.rand(2, 4, 6)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"cost": [[1.0]]}, TypeError, "cost is a list"),
        ({"cost": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "Call .float"),
        ({"cost": torch.rand(6)}, ValueError, r"expected \[..., N, M\]"),
        ({"cost": torch.rand(2, 0, 6)}, ValueError, "N >= 1 and M >= 1"),
        ({"b": torch.ones(2, 5)}, ValueError, r"b has shape \(2, 5\), expected \(2, 6\)"),
        ({"a": -torch.ones(2, 4)}, ValueError, "negative or non-finite"),
        ({"a": torch.full((2, 4), torch.nan)}, ValueError, "negative or non-finite"),
        ({"epsilon": 0.0}, ValueError, "epsilon is 0.0"),
        ({"epsilon": torch.tensor([0.1, -1.0])}, ValueError, "epsilon has entries <= 0"),
        ({"epsilon": torch.tensor([0.1, torch.inf])}, ValueError, "expected finite numbers > 0"),
        ({"epsilon": torch.tensor([0.1, 0.1, 0.1])}, ValueError, "epsilon has shape"),
        ({"tau": 1.5}, ValueError, "tau is 1.5"),
        ({"tau": (0.9, 0.9, 0.9)}, ValueError, "tau has 3 entries"),
        ({"mass": 1.2}, ValueError, r"expected in \(0, 1\]"),
        ({"mass": -0.1}, ValueError, "mass is -0.1"),
        ({"mass": 0.5, "tau": 0.9}, ValueError, "exclude each other"),
        ({"row_mask": torch.ones(2, 4)}, TypeError, "expected a bool tensor"),
        ({"col_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"expected \(2, 6\)"),
        ({"max_iters": 0}, ValueError, "max_iters is 0"),
        ({"max_iters": 2**31}, ValueError, "max_iters is 2147483648"),
        ({"tol": -1.0}, ValueError, "tol is -1.0"),
        ({"gradient": "magic"}, ValueError, r"expected one of \('implicit', 'unrolled', 'none'\)"),
        ({"acceleration": "nesterov"}, ValueError, "expected None or 'anderson'"),
        ({"acceleration": "anderson", "gradient": "unrolled"}, ValueError, "differentiates plain iterations"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
        ({"f_init": torch.zeros(2, 5)}, ValueError, "f_init has shape"),
        ({"a": torch.ones(2, 4, device="meta")}, ValueError, "a is on meta"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    arguments = {"cost": COST, "epsilon": 0.1, **kwargs}
    with pytest.raises(error, match=message):
        sinkhorn(arguments.pop("cost"), **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_when_one_side_has_no_weight(backend):
    """Nothing can be transported: a relaxed side pays rho for each unit, the limit of a vanishing weight."""
    cost, a = random_costs(1, 4, 6)[0], random_weights(1, 4)[0].requires_grad_()
    none, little = torch.zeros(6, dtype=torch.float64), torch.full((6,), 1e-12, dtype=torch.float64)
    options = {"epsilon": 0.1, "tau": 0.8, "max_iters": 3000, "tol": 1e-10, "backend": backend}
    rho = 0.1 * 0.8 / (1 - 0.8)
    value = sinkhorn(cost, a, none, **options).value
    assert value.item() == pytest.approx(rho, abs=1e-12)
    assert sinkhorn(cost, a, little, **options).value.item() == pytest.approx(rho, abs=1e-4)
    assert torch.allclose(torch.autograd.grad(value, a)[0], torch.full_like(a, rho))

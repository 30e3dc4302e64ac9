"""The back ends of `sinkhorn` against the float64 reference: potentials, stopping, range, threads."""

from __future__ import annotations

import problems
import pytest
import torch
from problems import KINDS, random_costs

from pisces_kernels import _dispatch, sinkhorn

BACKENDS = ["reference", "cpu"]
TIGHT = {"max_iters": 3000, "tol": 1e-11}


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.05, 0.01, 0.005, 0.001])
def test_fused_equals_the_float64_reference(epsilon):
    module = _dispatch.extension()
    try:
        for n_rows, n_cols in problems.SIZES:
            cost = random_costs(2, n_rows, n_cols)
            for kind in KINDS.values():
                options = {"epsilon": epsilon, "max_iters": 50, "tol": 0.0, **kind}
                expected = sinkhorn(cost, backend="reference", **options)
                for instruction_set in module.build_info()["instruction_sets"]:
                    module.use_instruction_set(instruction_set)
                    for dtype, limit in (
                        (torch.float32, problems.POTENTIAL_TOLERANCE),
                        (torch.float64, problems.DOUBLE_TOLERANCE),
                    ):
                        fused = sinkhorn(cost.to(dtype), backend="cpu", **options)
                        for got, want in ((fused.f, expected.f), (fused.g, expected.g)):
                            worst = (got.double() - want).abs().max().item()
                            assert worst < limit, (n_rows, n_cols, kind, instruction_set, dtype, worst)
                        assert (fused.n_iters == 50).all()
    finally:
        module.use_instruction_set(None)


def test_stopping_agrees_with_the_reference():
    cost = random_costs(4, 12, 40)
    for kind in KINDS.values():
        for tol in (1e-1, 1e-3, 1e-7):
            options = {"epsilon": 0.05, "max_iters": 300, "tol": tol, **kind}
            fused, expected = sinkhorn(cost, **options), sinkhorn(cost, backend="reference", **options)
            assert torch.equal(fused.n_iters, expected.n_iters)
            assert torch.allclose(fused.residual, expected.residual, atol=1e-9)
            assert torch.equal(fused.converged, fused.residual < tol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_damped_potentials_far_out_of_the_float32_range(backend):
    """Damped marginals as small as exp(-100) cannot be scalings in float32: the log domain has to take over."""
    cost = random_costs(2, 9, 40)
    cost[:, 3:] += 3.0
    options = {"epsilon": 0.004, "tau": 0.9, "max_iters": 200, "tol": 0.0}
    expected = sinkhorn(cost, backend="reference", **options)
    assert (expected.f / 0.004).abs().max() > 80
    result = sinkhorn(cost.float(), backend=backend, **options)
    assert (result.f.double() - expected.f).abs().max() < problems.POTENTIAL_TOLERANCE


def test_thread_count_does_not_change_a_bit():
    cost = random_costs(9, 13, 70, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([sinkhorn(cost, epsilon=0.02, **kind) for kind in KINDS.values()])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one.f, other.f)
            assert torch.equal(one.g, other.g)
            assert torch.equal(one.n_iters, other.n_iters)

"""Anderson acceleration of `sinkhorn`: the same answer, an honest residual, and no more iterations than plain ones."""

from __future__ import annotations

import pytest
import torch
from problems import KINDS, random_costs, random_mask, random_weights

from pisces_kernels import sinkhorn

BACKENDS = ["reference", "cpu"]


def plain_residual(result, cost, epsilon) -> torch.Tensor:
    """Largest change of f/epsilon in one more plain iteration from the result. [P]"""
    again = sinkhorn(
        cost,
        result.a,
        result.b,
        epsilon=epsilon,
        tau=result.tau,
        f_init=result.f,
        g_init=result.g,
        max_iters=1,
        tol=0.0,
    )
    return again.residual


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_the_answer_is_that_of_plain_iterations(backend, kind, dtype, masked):
    cost = random_costs(4, 13, 21, dtype=dtype)
    options = {"epsilon": 0.05, "max_iters": 4000, "backend": backend, **KINDS[kind]}
    if masked:
        options.update(row_mask=random_mask(4, 13), col_mask=random_mask(4, 21))
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    plain, fast = sinkhorn(cost, tol=tol, **options), sinkhorn(cost, tol=tol, acceleration="anderson", **options)
    assert plain.converged.all()
    assert fast.converged.all()
    close = 1e-4 if dtype == torch.float32 else 1e-8
    assert torch.allclose(fast.plan(), plain.plan(), atol=close * plain.plan().max().item(), rtol=0)
    assert (fast.plan().sum((-2, -1)) - plain.plan().sum((-2, -1))).abs().max() < close


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_fewer_iterations_where_plain_ones_are_slow(backend):
    cost = random_costs(6, 17, 40)
    for kind in ({}, {"tau": 0.98}, {"mass": 0.9}):
        options = {"epsilon": 0.01, "max_iters": 20000, "tol": 1e-8, "backend": backend, **kind}
        plain = sinkhorn(cost, **options).n_iters.double().mean()
        assert sinkhorn(cost, acceleration="anderson", **options).n_iters.double().mean() < plain / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_never_worse(kind, dtype):
    """Of 600 random problems none takes longer than by plain iterations; with an exact mass at most 2 % do."""
    rounding = 1 if dtype == torch.float32 else 0  # at tol 1e-5 the last iteration may be decided by it
    total = total_plain = worse = count = 0
    for epsilon in (1.0, 0.1, 0.05, 0.01, 0.005):
        for shape in ((3, 4), (8, 30), (17, 40), (40, 17), (60, 130)):
            cost = random_costs(12, *shape, dtype=dtype)
            weights = [random_weights(12, size, dtype=dtype) for size in shape]
            for tol in (1e-3, 1e-5) if dtype == torch.float32 else (1e-3, 1e-8):
                options = {"epsilon": epsilon, "max_iters": 3000, "tol": tol, **KINDS[kind]}
                plain = sinkhorn(cost, *weights, **options)
                fast = sinkhorn(cost, *weights, acceleration="anderson", **options)
                assert fast.converged[plain.converged].all()
                solved = plain.converged
                assert kind == "mass" or (fast.n_iters <= plain.n_iters + rounding)[solved].all(), (epsilon, shape, tol)
                worse += int((fast.n_iters > plain.n_iters)[solved].sum())
                count += int(solved.sum())
                total, total_plain = total + int(fast.n_iters.sum()), total_plain + int(plain.n_iters.sum())
    assert worse <= 0.02 * count
    assert total < 0.8 * total_plain


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["balanced", "tau", "semi"])
def test_the_residual_is_that_of_a_plain_iteration(backend, kind):
    """Also when max_iters ends it: nothing that was extrapolated is returned without a plain iteration behind it."""
    cost = random_costs(5, 11, 30)
    for max_iters in (1, 2, 3, 5, 8, 500):
        result = sinkhorn(
            cost, epsilon=0.02, max_iters=max_iters, tol=1e-9, acceleration="anderson", backend=backend, **KINDS[kind]
        )
        assert torch.equal(result.converged, result.residual < 1e-9)
        # The map does not expand: one more plain iteration changes no more than the last one did.
        assert (plain_residual(result, cost, 0.02) <= result.residual * (1 + 1e-6) + 1e-12).all()
    assert result.converged.all()


def test_thread_count_does_not_change_a_bit():
    cost = random_costs(9, 13, 70, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([sinkhorn(cost, epsilon=0.02, acceleration="anderson", **kind) for kind in KINDS.values()])
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one.f, other.f)
            assert torch.equal(one.g, other.g)
            assert torch.equal(one.n_iters, other.n_iters)

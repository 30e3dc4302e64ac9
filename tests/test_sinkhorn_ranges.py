"""The compiled float32 `sinkhorn` where one of its ways to iterate hands over to another.

Exponents and scalings are at the borders of what they hold. The float64 solve of the same numbers is the oracle, the
reference back end that of the float64 solve.
"""

from __future__ import annotations

import pytest
import torch
from problems import DOUBLE_TOLERANCE, random_costs, random_weights

from pisces_kernels import sinkhorn

KINDS = {
    "balanced": {},
    "tau": {"tau": 0.9},
    "semi": {"tau": (1.0, 0.5)},
    "strongly damped": {"tau": 0.3},
    "mass": {"mass": 0.63},
}
# Ranges of cost / epsilon: kernels are built at once up to 24, scalings hold (-48, 24), exp of a float32 holds 87.
RANGES = [1.0, 23.9, 24.1, 47.0, 49.0, 86.0, 90.0, 150.0, 1000.0]


def check(cost, epsilon, *weights, **options):
    """float32 within 2e-6 of the range of the cost from float64, and float64 within rounding of the reference."""
    options = {"epsilon": epsilon, "tol": 0.0, **options}
    wide = [x.double() for x in (cost, *weights)]
    starts = {name: options.pop(name) for name in ("f_init", "g_init") if name in options}
    wide_starts = {name: start.double() for name, start in starts.items()}
    narrow = sinkhorn(cost, *weights, backend="cpu", **starts, **options)
    double = sinkhorn(*wide, backend="cpu", **wide_starts, **options)
    expected = sinkhorn(*wide, backend="reference", **wide_starts, **options)
    scale = max(1.0, double.f.abs().max().item(), double.g.abs().max().item())
    for got, middle, want in ((narrow.f, double.f, expected.f), (narrow.g, double.g, expected.g)):
        assert (middle - want).abs().max() < DOUBLE_TOLERANCE * scale
        assert (got - middle).abs().max() < 2e-6 * scale
    # A residual is a change in units of epsilon.
    assert (double.residual - expected.residual).abs().max() < 1e-9 * scale / epsilon
    assert (narrow.residual - double.residual).abs().max() < 4e-6 * scale / epsilon


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_iters", [1, 2, 30])
def test_costs_at_the_borders(kind, max_iters):
    """Costs that are all 0 or 1 put every exponent on the border itself."""
    for span in RANGES:
        for shape in ((9, 70), (40, 33), (130, 40)):
            smooth = random_costs(2, *shape, dtype=torch.float32)
            for cost in (smooth, (smooth > 0.8).float(), smooth + 3.0):
                check(cost, 1 / span, max_iters=max_iters, **KINDS[kind])


@pytest.mark.parametrize("kind", ["balanced", "tau", "mass"])
def test_weights_of_all_sizes(kind):
    """Weights from 1 to 1e-12 of their sum, zeros among them."""
    for span in RANGES:
        cost = random_costs(2, 21, 75, dtype=torch.float32)
        weights = []
        for size in (21, 75):
            weight = 10.0 ** -torch.linspace(0, 12, size).repeat(2, 1)[:, torch.randperm(size)]
            weight[:, 0] = 0.0
            weights.append(weight / weight.sum(-1, keepdim=True))
        check(cost, 1 / span, *weights, max_iters=30, **KINDS[kind])


@pytest.mark.parametrize("kind", ["balanced", "tau", "semi"])
def test_log_sums_far_from_the_last_potentials(kind):
    """A log-sum takes the last potentials as its reference: starts that are off by 5 to 1000 epsilon, row by row and
    column by column, leave sums that float32 cannot hold beside sums that it can."""
    epsilon = 0.002
    cost = random_costs(3, 33, 150, dtype=torch.float32)
    solved = sinkhorn(cost, epsilon=epsilon, max_iters=300, tol=1e-6, **KINDS[kind])
    for distance in (5.0, 30.0, 60.0, 100.0, 1000.0):
        for share in (0.1, 1.0):
            f, g = (
                x + epsilon * distance * torch.randn_like(x) * (torch.rand_like(x) < share)
                for x in (solved.f, solved.g)
            )
            for max_iters in (1, 2, 12):
                check(cost, epsilon, max_iters=max_iters, f_init=f, g_init=g, **KINDS[kind])
                check(cost, epsilon, max_iters=max_iters, f_init=f, **KINDS[kind])


def test_sums_far_from_the_last_potentials_do_not_fit_float32():
    """Negative control: without another reference the log-sums of the starts above overflow, or lose every term."""
    epsilon = 0.002
    cost = random_costs(3, 33, 150, dtype=torch.float32)
    solved = sinkhorn(cost, epsilon=epsilon, max_iters=300, tol=1e-6)
    g = solved.g + epsilon * 100.0 * torch.randn_like(solved.g)
    sums = ((solved.f[..., None] + g[:, None] - cost) / epsilon).exp().sum(-1)
    assert (~torch.isfinite(sums)).any()
    f = solved.f - epsilon * 1000.0
    assert (((f[..., None] + solved.g[:, None] - cost) / epsilon).exp().sum(-1) == 0).all()


def test_scalings_that_drift_out_of_their_range():
    """Slow convergence moves potentials by hundreds of epsilon after the kernel was built: it has to be built again."""
    for epsilon in (0.005, 0.002):
        steps = torch.rand(2, 60).sort().values.cumsum(-1)
        cost = (steps[:, :, None] - steps[:, None, :]).abs()
        cost = (cost / cost.amax((1, 2), keepdim=True)).float()
        weights = random_weights(2, 60, dtype=torch.float32), random_weights(2, 60, dtype=torch.float32)
        check(cost, epsilon, *weights, max_iters=400)
        check(cost, epsilon, *weights, max_iters=400, tau=0.99)

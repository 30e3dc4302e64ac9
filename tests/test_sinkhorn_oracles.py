"""`sinkhorn` and `reference.sinkhorn` against closed forms and POT in float64."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from problems import random_costs, random_weights

from pisces_kernels import sinkhorn

BACKENDS = ["reference", "cpu"]
TIGHT = {"max_iters": 3000, "tol": 1e-11}


def test_exact_mass_and_balanced_meet_pot():
    cost, a, b = random_costs(1, 8, 11)[0], random_weights(1, 8)[0], random_weights(1, 11)[0]
    result = sinkhorn(cost, a, b, epsilon=0.07, **TIGHT)
    expected = ot.bregman.sinkhorn_log(a.numpy(), b.numpy(), cost.numpy(), 0.07, stopThr=1e-14, numItermax=20000)
    np.testing.assert_allclose(result.plan().numpy(), expected, atol=1e-10)
    # POT's partial problem weighs entropy by the counting measure: the same plan with cost + epsilon log(a b).
    shifted = cost + 0.07 * (a[:, None] * b[None, :]).log()
    result = sinkhorn(shifted, a, b, epsilon=0.07, mass=0.7, **TIGHT)
    expected = ot.partial.entropic_partial_wasserstein(
        a.numpy(), b.numpy(), cost.numpy(), 0.07, m=0.7, stopThr=1e-15, numItermax=50000
    )
    np.testing.assert_allclose(result.plan().numpy(), expected, atol=1e-8)
    other = ot.partial.entropic_partial_wasserstein(a.numpy(), b.numpy(), cost.numpy(), 0.07, m=0.8)
    assert np.abs(result.plan().numpy() - other).max() > 1e-4  # the comparison can fail


def test_unbalanced_meets_pot():
    cost, a, b = random_costs(1, 8, 11)[0], random_weights(1, 8)[0], random_weights(1, 11)[0]
    epsilon, tau = 0.1, 0.8
    result = sinkhorn(cost, a, b, epsilon=epsilon, tau=tau, **TIGHT)
    rho = epsilon * tau / (1 - tau)
    expected = ot.unbalanced.sinkhorn_unbalanced(
        a.numpy(), b.numpy(), cost.numpy(), epsilon, rho, reg_type="kl", numItermax=20000, stopThr=1e-14
    )
    np.testing.assert_allclose(result.plan().numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms(backend):
    one = sinkhorn(torch.tensor([[0.3]], dtype=torch.float64), epsilon=0.1, backend=backend, **TIGHT)
    assert one.plan().item() == pytest.approx(1.0)
    assert one.value.item() == pytest.approx(0.3)
    flat = sinkhorn(torch.full((4, 7), 0.5, dtype=torch.float64), epsilon=0.1, backend=backend, **TIGHT)
    assert torch.allclose(flat.plan(), torch.full((4, 7), 1 / 28, dtype=torch.float64))
    # 2 x 2 with cost [[0, c], [c, 0]]: the plan is p/2 on the diagonal with p = 1 / (1 + exp(-c / epsilon)).
    c, epsilon = 0.2, 0.1
    two = sinkhorn(torch.tensor([[0.0, c], [c, 0.0]], dtype=torch.float64), epsilon=epsilon, backend=backend, **TIGHT)
    p = 1 / (1 + np.exp(-c / epsilon))
    assert two.plan()[0, 0].item() == pytest.approx(p / 2, abs=1e-12)
    # 1 x M balanced: the plan is b whatever the cost.
    b = random_weights(1, 6)[0]
    row = sinkhorn(random_costs(1, 1, 6)[0], None, b, epsilon=0.01, backend=backend, **TIGHT)
    assert torch.allclose(row.plan()[0], b, atol=1e-12)


def test_one_dirac_on_each_side():
    """1 x 1 with weights alpha, beta: f = tau_a (c - g - eps log beta), g = tau_b (c - f - eps log alpha)."""
    alpha, beta, c, epsilon, tau_a, tau_b = 0.7, 1.9, 0.4, 0.3, 0.8, 0.6
    result = sinkhorn(
        torch.tensor([[c]], dtype=torch.float64),
        torch.tensor([alpha], dtype=torch.float64),
        torch.tensor([beta], dtype=torch.float64),
        epsilon=epsilon,
        tau=(tau_a, tau_b),
        **TIGHT,
    )
    system = np.array([[1.0, tau_a], [tau_b, 1.0]])
    f, g = np.linalg.solve(system, [tau_a * (c - epsilon * np.log(beta)), tau_b * (c - epsilon * np.log(alpha))])
    assert result.f.item() == pytest.approx(f, abs=1e-9)
    assert result.g.item() == pytest.approx(g, abs=1e-9)
    assert result.plan().item() == pytest.approx(np.exp((f + g - c) / epsilon) * alpha * beta, abs=1e-9)


@pytest.mark.parametrize(
    ("epsilon", "means", "deviations"), [(0.5, (0.0, 1.0), (1.0, 0.5)), (2.0, (-0.3, 0.4), (0.7, 1.2))]
)
def test_gaussians_in_one_dimension(epsilon, means, deviations):
    """Janati et al. 2020, theorem 1, with 2 sigma^2 = epsilon: the value between two Gaussians for |x - y|^2."""
    grid = torch.linspace(-9, 9, 700, dtype=torch.float64)
    a, b = (torch.softmax(-((grid - m) ** 2) / (2 * s**2), -1) for m, s in zip(means, deviations, strict=True))
    cost = (grid[:, None] - grid[None, :]) ** 2
    value = sinkhorn(cost, a, b, epsilon=epsilon, max_iters=2000, tol=1e-11).value.item()
    variances = deviations[0] ** 2, deviations[1] ** 2
    root = np.sqrt(4 * variances[0] * variances[1] + (epsilon / 2) ** 2)
    bures = sum(variances) - root + epsilon / 2 * (1 - np.log(epsilon)) + epsilon / 2 * np.log(root + epsilon / 2)
    assert value == pytest.approx((means[0] - means[1]) ** 2 + bures, abs=1e-8)


def test_epsilon_to_zero_meets_linear_programming():
    """EMD <= <plan, cost> <= value <= EMD + epsilon min(H(a), H(b)), the optimal plan being a candidate."""
    cost, a, b = random_costs(1, 12, 17)[0], random_weights(1, 12)[0], random_weights(1, 17)[0]
    exact = ot.emd2(a.numpy(), b.numpy(), cost.numpy())
    entropy = min(-(w * w.log()).sum().item() for w in (a, b))
    gaps = []
    for epsilon in (0.1, 0.01, 0.001):
        result = sinkhorn(cost, a, b, epsilon=epsilon, max_iters=200_000, tol=1e-9, acceleration="anderson")
        assert result.converged
        transport, value = result.transport_cost.item(), result.value.item()
        assert exact - 1e-9 <= transport <= value <= exact + epsilon * entropy + 1e-9
        gaps.append(value - exact)
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]


def test_exact_mass_to_linear_programming():
    """Partial transport: <plan, cost> <= EMD_m + epsilon (H(a) + 1 - m) by the same argument."""
    cost, a, b = random_costs(1, 9, 14)[0], random_weights(1, 9)[0], random_weights(1, 14)[0]
    exact = ot.partial.partial_wasserstein2(a.numpy(), b.numpy(), cost.numpy(), m=0.6)
    entropy = -(a * a.log()).sum().item()
    for epsilon in (0.1, 0.01, 0.002):
        result = sinkhorn(cost, a, b, epsilon=epsilon, mass=0.6, max_iters=200_000, tol=1e-9)
        assert result.converged
        assert exact - 1e-9 <= result.transport_cost.item() <= exact + epsilon * (entropy + 0.4)

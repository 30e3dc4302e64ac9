"""`compat.geomloss.SamplesLoss` against geomloss itself, run until it has converged, and against closed forms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import geomloss
import numpy as np
import pytest
import torch
from geomloss._legacy import sinkhorn_divergence as geomloss_schedule
from problems import random_weights
from torch import Tensor

from pisces_kernels import sinkhorn_divergence
from pisces_kernels.compat import _geomloss_solver as solver
from pisces_kernels.compat.geomloss import SamplesLoss, solve_sample

TIGHT = {"tol": 1e-11, "max_iters": 100_000}
KINDS = [
    pytest.param({"p": p, "reach": reach, "debias": debias}, id=f"p{p}-reach{reach}-debias{debias}")
    for p in (1, 2)
    for reach in (None, 0.5)
    for debias in (True, False)
]


@pytest.fixture
def without_annealing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make geomloss iterate 300 times at the final temperature: converged, where its own schedule would stop early."""
    monkeypatch.setattr(geomloss_schedule, "epsilon_schedule", lambda p, diameter, blur, scaling: [blur**p] * 300)


def clouds(batch: tuple[int, ...] = (), mass: tuple[float, float] = (1.0, 1.0)) -> list[Tensor]:
    """(a, x, b, y) that require grad, 11 and 8 points in the unit square."""
    count = math.prod(batch)
    a, b = (m * random_weights(count, n).reshape(*batch, n) for m, n in zip(mass, (11, 8), strict=True))
    x, y = torch.rand(*batch, 11, 2, dtype=torch.float64), torch.rand(*batch, 8, 2, dtype=torch.float64)
    return [t.requires_grad_() for t in (a, x, b, y)]


def gradients(loss: Callable[..., Tensor], measures: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(*measures).sum(), measures))


def tangent(gradient: Tensor) -> Tensor:
    """Gradient with respect to weights without its mean: balanced losses know no other mass."""
    return gradient - gradient.mean(-1, keepdim=True)


@pytest.mark.usefixtures("without_annealing")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_converged_geomloss_has_the_same_values_and_gradients(kind: dict[str, Any], batch: tuple[int, ...]) -> None:
    reach = kind["reach"]
    measures = clouds(batch, mass=(1.7, 1.7) if reach is None else (1.7, 0.6))
    theirs = geomloss.SamplesLoss("sinkhorn", blur=0.3, **kind)
    ours = SamplesLoss("sinkhorn", blur=0.3, **kind, **TIGHT)
    torch.testing.assert_close(ours(*measures), theirs(*measures), rtol=1e-8, atol=1e-10)
    # geomloss multiplies unbalanced gradients by rho + epsilon/2 where the derivative of its value has rho + epsilon.
    epsilon, rho = 0.3 ** kind["p"], math.inf if reach is None else reach ** kind["p"]
    factor = 1.0 if reach is None else (rho + epsilon / 2) / (rho + epsilon)
    for name, mine, other in zip("axby", gradients(ours, measures), gradients(theirs, measures), strict=True):
        if name in "ab" and reach is None:
            mine, other = tangent(mine), tangent(other)
        elif name in "ab" and not kind["debias"]:  # the derivative of the term that is zero for probability vectors
            mine = mine + epsilon / 2
        torch.testing.assert_close(mine * factor, other, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_value(kind: dict[str, Any]) -> None:
    measures = clouds(mass=(1.0, 1.0) if kind["reach"] is None else (1.3, 0.8))
    loss = SamplesLoss("sinkhorn", blur=0.3, **kind, **TIGHT)
    steps = [torch.randn_like(t) * 1e-5 for t in measures]
    if kind["reach"] is None:  # keep the masses equal
        steps[0], steps[2] = tangent(steps[0]), tangent(steps[2])
    with torch.no_grad():
        ahead = loss(*[t + s for t, s in zip(measures, steps, strict=True)])
        behind = loss(*[t - s for t, s in zip(measures, steps, strict=True)])
    slope = sum((g * s).sum() for g, s in zip(gradients(loss, measures), steps, strict=True))
    torch.testing.assert_close((ahead - behind) / 2, slope, rtol=1e-4, atol=1e-11)


def test_second_derivatives_exist() -> None:
    x, y = torch.rand(4, 2, dtype=torch.float64, requires_grad=True), torch.rand(5, 2, dtype=torch.float64)
    loss = SamplesLoss("sinkhorn", blur=0.4, debias=False, **TIGHT)
    assert torch.autograd.gradgradcheck(lambda points: loss(points, y), (x,), atol=1e-5, rtol=1e-3)


@pytest.mark.usefixtures("without_annealing")
@pytest.mark.parametrize("kind", KINDS)
def test_potentials_follow_geomloss(kind: dict[str, Any]) -> None:
    for batch in ((), (2,)):
        measures = [t.detach() for t in clouds(batch)]
        ours = SamplesLoss("sinkhorn", blur=0.3, potentials=True, **kind, **TIGHT)(*measures)
        theirs = geomloss.SamplesLoss("sinkhorn", blur=0.3, potentials=True, **kind)(*measures)
        if kind["reach"] is None:  # unique up to a constant that goes from one to the other
            shift = (theirs[0] - ours[0]).mean(-1, keepdim=True)
            ours = (ours[0] + shift, ours[1] - shift)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-8)


def test_balanced_potentials_have_equal_means_and_are_the_gradients_of_the_weights() -> None:
    measures = clouds()
    f, g = SamplesLoss("sinkhorn", blur=0.3, potentials=True, debias=False, **TIGHT)(*measures)
    torch.testing.assert_close((measures[0] * f).sum(), (measures[2] * g).sum())
    to_a, _, to_b, _ = gradients(SamplesLoss("sinkhorn", blur=0.3, debias=False, **TIGHT), measures)
    torch.testing.assert_close(to_a, f[0].detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(to_b, g[0].detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("debias", [True, False])
def test_geomloss_tends_to_ours_with_its_scaling(debias: bool) -> None:
    measures = clouds((6,))

    def slope(library: Any, **options: Any) -> Tensor:
        return gradients(library("sinkhorn", blur=0.15, debias=debias, **options), measures)[1]

    exact = slope(SamplesLoss, **TIGHT)
    errors = [
        float((slope(geomloss.SamplesLoss, scaling=s) - exact).norm() / exact.norm()) for s in (0.5, 0.9, 0.99, 0.998)
    ]
    assert errors[3] < errors[2] < errors[1] < errors[0]
    assert errors[3] < min(0.05, errors[0] / 5)
    # Negative control: epsilon = 2 blur^2, the convention of `solve_sample`, is another loss.
    other = gradients(SamplesLoss("sinkhorn", blur=0.15 * math.sqrt(2), debias=debias, **TIGHT), measures)[1]
    assert float((other - exact).norm() / exact.norm()) > 2 * errors[3]


def test_annealing_does_not_change_the_answer() -> None:
    measures = [t.detach() for t in clouds()]
    losses = [
        SamplesLoss("sinkhorn", blur=0.1, **options, **TIGHT)(*measures)
        for options in ({}, {"scaling": 0.9}, {"scaling": 0.1}, {"diameter": 100.0}, {"diameter": 1e-3})
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_dtype_and_shape_of_results(dtype: torch.dtype) -> None:
    x, y = torch.rand(2, 6, 3), torch.rand(2, 5, 3)
    exact = SamplesLoss()(x.double(), y.double())
    loss = SamplesLoss()(x.to(dtype), y.to(dtype))
    assert (loss.shape, loss.dtype) == ((2,), dtype)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-2 if dtype == torch.float16 else 1e-4, atol=1e-4)
    single = SamplesLoss()(x[0].to(dtype), y[0].to(dtype))
    assert (single.shape, single.dtype) == ((), dtype)
    torch.testing.assert_close(single, loss[0])


def test_every_way_to_pass_weights() -> None:
    a, x, b, y = clouds((2,))
    uniform = torch.full_like(a, 1 / 11), torch.full_like(b, 1 / 8)
    loss = SamplesLoss("sinkhorn", blur=0.2, **TIGHT)
    torch.testing.assert_close(loss(x, y), loss(uniform[0], x, uniform[1], y))
    torch.testing.assert_close(loss(a.unsqueeze(-1), x, b.unsqueeze(-1), y), loss(a, x, b, y))
    torch.testing.assert_close(loss(None, a, x, None, b, y), loss(a, x, b, y))
    for i in range(2):
        torch.testing.assert_close(loss(a[i].unsqueeze(-1), x[i], b[i], y[i]), loss(a, x, b, y)[i])
    assert not torch.allclose(loss(x, y), loss(a, x, b, y))


def test_a_cost_function_replaces_the_distance() -> None:
    measures = clouds((2,))

    def half_square(x: Tensor, y: Tensor) -> Tensor:
        return ((x.unsqueeze(-2) - y.unsqueeze(-3)) ** 2).sum(-1) / 2

    by_power = SamplesLoss("sinkhorn", blur=0.2, **TIGHT)
    by_cost = SamplesLoss("sinkhorn", blur=0.2, cost=half_square, **TIGHT)
    torch.testing.assert_close(by_cost(*measures), by_power(*measures))
    for mine, other in zip(gradients(by_cost, measures), gradients(by_power, measures), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def test_a_cost_function_gets_the_points_as_they_are() -> None:
    x, y, features = torch.rand(6, 2), torch.rand(5, 2), torch.nn.Linear(2, 3)
    loss = SamplesLoss(blur=0.3, cost=lambda x, y: torch.cdist(features(x), features(y)))
    loss(x, y).backward()
    assert features.weight.grad is not None
    assert bool((features.weight.grad != 0).any())
    torch.testing.assert_close(loss(x, y), loss(x[None], y[None])[0])


@pytest.mark.parametrize("reach", [None, 0.5])
def test_streamed_equals_stored(reach: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    measures = clouds((2,), mass=(1.0, 1.0) if reach is None else (1.2, 0.7))
    options: dict[str, Any] = {"blur": 0.2, "reach": reach, **TIGHT}
    stored = SamplesLoss(backend="tensorized", **options)
    monkeypatch.setattr(solver, "half_squared_distances", None)  # whoever asks for the matrix fails
    with pytest.raises(TypeError):
        stored(*measures)
    streamed = SamplesLoss(backend="online", **options)
    monkeypatch.setattr(solver, "LARGEST_MATRIX", 0)
    automatic = SamplesLoss(**options)(*measures)
    found, found_gradients = streamed(*measures), gradients(streamed, measures)
    monkeypatch.undo()
    torch.testing.assert_close(found, automatic, rtol=0, atol=0)
    torch.testing.assert_close(found, stored(*measures), rtol=1e-9, atol=1e-11)
    for mine, other in zip(found_gradients, gradients(stored, measures), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reach", [None, 0.5])
def test_half_of_this_library_s_divergence(reach: float | None) -> None:
    a, x, b, y = clouds((2,), mass=(1.0, 1.0) if reach is None else (1.2, 0.7))
    loss = SamplesLoss("sinkhorn", blur=0.3, reach=reach, **TIGHT)(a, x, b, y)
    tau = 1.0 if reach is None else reach**2 / (reach**2 + 0.3**2)
    divergence = sinkhorn_divergence(x, y, a, b, epsilon=2 * 0.3**2, tau=tau, tol=1e-11, max_iters=5000)
    torch.testing.assert_close(loss, divergence / 2, rtol=1e-8, atol=1e-10)


def test_diracs() -> None:
    x, y = torch.randn(5, 1, 3, dtype=torch.float64), torch.randn(5, 1, 3, dtype=torch.float64)
    distance = (x - y).norm(dim=-1).squeeze(-1)
    for debias in (True, False):
        torch.testing.assert_close(SamplesLoss(p=2, debias=debias, **TIGHT)(x, y), distance**2 / 2)
        own = 1e-4 if debias else 0.0  # geomloss's distance of a point to itself, for p = 1
        torch.testing.assert_close(SamplesLoss(p=1, debias=debias, **TIGHT)(x, y), distance - own)


def test_unbalanced_diracs() -> None:
    """One mass m moves: log m = ((epsilon + rho) log(a b) - c) / (epsilon + 2 rho)."""
    a, b = 0.3 + torch.rand(2, 6, 1, dtype=torch.float64)
    x, y = torch.randn(2, 6, 1, 2, dtype=torch.float64)
    epsilon, rho = 0.4**2, 0.7**2
    cost = ((x - y) ** 2).sum(-1) / 2

    def objective(a: Tensor, b: Tensor, cost: Tensor) -> Tensor:
        mass = (((epsilon + rho) * (a * b).log() - cost) / (epsilon + 2 * rho)).exp()
        return epsilon * a * b + rho * (a + b) - (epsilon + 2 * rho) * mass

    plain = SamplesLoss(blur=0.4, reach=0.7, debias=False, **TIGHT)(a, x, b, y).unsqueeze(-1)
    torch.testing.assert_close(plain, objective(a, b, cost) - epsilon * (a * b - (a + b) / 2))
    own = objective(a, a, 0 * cost) / 2 + objective(b, b, 0 * cost) / 2
    debiased = SamplesLoss(blur=0.4, reach=0.7, **TIGHT)(a, x, b, y).unsqueeze(-1)
    torch.testing.assert_close(debiased, objective(a, b, cost) - own + epsilon / 2 * (a - b) ** 2)


def test_divergence_of_equal_clouds_is_zero_and_of_others_positive() -> None:
    a, x, b, y = (t.detach() for t in clouds((4,)))
    order = torch.randperm(11)
    loss = SamplesLoss("sinkhorn", blur=0.1)
    assert bool((loss(a, x, a[:, order], x[:, order]).abs() < 1e-6).all())
    assert bool((loss(a, x, b, y) > 1e-3).all())
    # Without debiasing the loss of a cloud with itself is not zero: the test above can fail.
    assert bool((SamplesLoss(blur=0.1, debias=False)(a, x, a, x).abs() > 1e-4).all())


def test_limits_of_blur() -> None:
    """From half the squared Wasserstein distance (sorted points on a line) to half that of the means."""
    x, y = torch.rand(2, 9, 1, dtype=torch.float64)
    y = y + 1.0  # the means apart: what is left of the variances is small beside their distance
    sorted_distance = ((x.sort(0).values - y.sort(0).values) ** 2).mean() / 2
    torch.testing.assert_close(SamplesLoss(blur=0.003)(x, y), sorted_distance, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(SamplesLoss(blur=100.0)(x, y), (x.mean() - y.mean()) ** 2 / 2, rtol=1e-3, atol=1e-7)


def test_far_from_the_origin() -> None:
    x, y = torch.rand(12, 2, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    near = SamplesLoss(blur=0.1, **TIGHT)(x, y)
    torch.testing.assert_close(SamplesLoss(blur=0.1, **TIGHT)(x + 1e5, y + 1e5), near, rtol=1e-6, atol=0)


def test_half_of_solve_sample() -> None:
    _, x, _, y = clouds()
    result = solve_sample(x, y, blur=0.2, debias=True, tol=1e-11)
    torch.testing.assert_close(SamplesLoss(blur=0.2, **TIGHT)(x, y), result.value / 2)


def test_small_masses_apart_are_solved_and_large_ones_refused() -> None:
    a, x, b, y = (t.detach() for t in clouds())
    y = y + 0.5  # a debiased loss near 0 has no relative error to speak of
    loss = SamplesLoss("sinkhorn", blur=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(loss(a * 1.001, x, b, y), loss(a, x, b, y), rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="same masses"):
        loss(a * 1.01, x, b, y)
    assert torch.isfinite(SamplesLoss("sinkhorn", blur=0.3, reach=1.0)(a * 1.01, x, b, y))


def test_unconverged_losses_warn() -> None:
    a, x, b, y = clouds()
    with pytest.warns(RuntimeWarning, match="after 1 iterations"):
        SamplesLoss(blur=0.01, scaling=0.01, tol=1e-12, max_iters=1)(a, x, b, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "energy"}, "expected 'sinkhorn'"),
        ({"loss": "hausdorff"}, "expected 'sinkhorn'"),
        ({"p": 3}, "expected 1 or 2"),
        ({"blur": 0.0}, "blur"),
        ({"reach": -1.0}, "reach"),
        ({"diameter": 0.0}, "diameter"),
        ({"scaling": 1.0}, "scaling"),
        ({"cost": "SqDist(X,Y)"}, "KeOps"),
        ({"backend": "multiscale"}, "multiscale"),
        ({"backend": "cuda"}, "backend"),
        ({"backend": "online", "p": 1}, "online"),
        ({"max_iters": 0}, "max_iters"),
        ({"tol": -1.0}, "tol"),
    ],
)
def test_options_that_are_not_here_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplesLoss(**options)
    loss = SamplesLoss()
    for name, value in options.items():  # attributes can change between calls
        setattr(loss, name, value)
    with pytest.raises(ValueError, match=message):
        loss(torch.rand(3, 2), torch.rand(4, 2))


def test_measures_that_do_not_fit_are_refused() -> None:
    loss, x, y = SamplesLoss(), torch.rand(3, 2), torch.rand(4, 2)
    for args, message in [
        ((x,), "1 arguments"),
        ((x, x, y), "3 arguments"),
        ((torch.zeros(3), torch.ones(3), x, None, None, y), "labels"),
        ((x[0], y), "x has shape"),
        ((x, torch.rand(4, 3)), "same batch and dimension"),
        ((x.expand(2, 3, 2), y.expand(3, 4, 2)), "same batch and dimension"),
        ((x[:0], y), "x has shape"),
        ((torch.ones(4), x, None, y), "a has shape"),
        ((-torch.ones(3), x, torch.ones(4), y), "negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(*args)
    with pytest.raises(TypeError, match="expected a torch"):
        loss(np.zeros((3, 2)), y)
    with pytest.raises(TypeError, match="floating"):
        loss(torch.ones(3, 2, dtype=torch.int64), y)

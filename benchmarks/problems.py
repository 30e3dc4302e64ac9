"""Inputs of the workloads, their float64 truths, and the error of a result.

Costs have the form that the method gives them: cosine, time and place of synthetic tokens, scaled to [0, 1]. Everything
comes from seeded generators, so a figure can be repeated. Truths are computed by `pisces_kernels.reference` in float64,
which shares no code with the compiled kernels; `agreement_with_pot` holds the smallest of them against POT in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pisces_kernels import reference, sinkhorn

PATCHES = 256  # 16 x 16 a frame
TRUTH_TOL = 1e-10
FREE_ROWS = 256  # rows and columns on which a large point cloud is checked


def tokens_of(frames: int, patches: int = PATCHES) -> int:
    """Number of video tokens: a CLS token and the patches of every frame."""
    return 1 + frames * patches


def geometry(frames: int, patches: int = PATCHES) -> tuple[Tensor, Tensor]:
    """Frame index [M] and place [M, 2] of the tokens of a video; the CLS token comes first."""
    side = math.isqrt(patches)
    axis = torch.linspace(0, 1, side)
    index = torch.cat([torch.tensor([-1.0]), torch.arange(frames).float().repeat_interleave(patches)])
    places = torch.cat([torch.full((1, 2), -1.0), torch.cartesian_prod(axis, axis).repeat(frames, 1)])
    return index, places


@dataclass(eq=False)
class Tokens:
    """What a fusion layer hands over: text [B, N, D], video [B, M, D], attention [B, H, N, M], the tokens' geometry."""

    text: Tensor
    video: Tensor
    attention: Tensor
    frame_index: Tensor
    positions: Tensor
    epsilon: float = 0.05
    tau: float = 0.9
    tol: float = 1e-3
    cotangent: Tensor = field(default_factory=lambda: torch.empty(0))

    def double(self) -> tuple[Tensor, ...]:
        """Arguments of the reference functions, in float64."""
        batch = self.text.shape[0]
        index, places = self.frame_index.double(), self.positions.double()
        return (
            self.text.double(), self.video.double(), self.attention.double(),
            index.expand(batch, *index.shape), places.expand(batch, *places.shape),
        )  # fmt: skip


def tokens(
    frames: int, rows: int = 40, heads: int = 16, dim: int = 1024, patches: int = PATCHES, seed: int = 0
) -> Tokens:
    """Random tokens whose features share a mean, and peaked attention."""
    draw = torch.Generator().manual_seed(seed)
    cols = tokens_of(frames, patches)
    text, video = (torch.randn(1, size, dim, generator=draw) + 0.5 for size in (rows, cols))
    attention = torch.softmax(3 * torch.randn(1, heads, rows, cols, generator=draw), -1)
    cotangent = torch.randn(1, heads, rows, cols, generator=draw)
    return Tokens(text, video, attention, *geometry(frames, patches), cotangent=cotangent)


@dataclass
class Dense:
    """Problems whose cost [P, N, M] is stored; uniform marginals; tau 1 is balanced.

    Attributes:
        n_iters: iterations of a contender that runs a fixed number.
        tol: stop threshold of a contender that has its own stop test.
        cotangent: [P, N, M], gradient with respect to the plan, for workloads that go backward.
    """

    cost: Tensor
    epsilon: float
    tau: float
    n_iters: int = 100
    tol: float = 0.0
    acceleration: str | None = None
    cotangent: Tensor = field(default_factory=lambda: torch.empty(0))
    _truth: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def a(self) -> Tensor:
        """Row weights [P, N]."""
        size = self.cost.shape[-2]
        return torch.full(self.cost.shape[:-1], 1 / size)

    @property
    def b(self) -> Tensor:
        """Column weights [P, M]."""
        size = self.cost.shape[-1]
        return torch.full((self.cost.shape[0], size), 1 / size)

    def plan_from(self, f: Tensor, g: Tensor) -> Tensor:
        """Plan of potentials in the convention exp((f + g - cost) / epsilon) a b, float64 [P, N, M]."""
        size = self.cost.shape[-1] * self.cost.shape[-2]
        exponent = f.double().unsqueeze(-1) + g.double().unsqueeze(-2) - self.cost.double()
        return exponent.div_(self.epsilon).exp_().div_(size)

    def plan_from_counting(self, f: Tensor, g: Tensor) -> Tensor:
        """The same from potentials of the counting reference measure, exp((f + g - cost) / epsilon).

        With uniform marginals the two damped fixed points differ by a constant: f / epsilon is larger by
        k = tau / (1 + tau) log(N M) here, and so is g / epsilon. Balanced ones have the same plan.
        """
        exponent = f.double().unsqueeze(-1) + g.double().unsqueeze(-2) - self.cost.double()
        return exponent.div_(self.epsilon).exp_().mul_(self.counting_scale)

    @property
    def counting_scale(self) -> float:
        """Factor from a plan of the counting measure to one of the product measure."""
        size = self.cost.shape[-1] * self.cost.shape[-2]
        return math.exp(2 * self.tau / (1 + self.tau) * math.log(size)) / size

    def truth(self) -> Tensor:
        """Plan at the fixed point, float64 [P, N, M]."""
        if "plan" not in self._truth:
            result = sinkhorn(
                self.cost.double(), epsilon=self.epsilon, tau=self.tau, tol=TRUTH_TOL, max_iters=5000,
                acceleration="anderson", gradient="none", backend="reference",
            )  # fmt: skip
            if not bool(result.converged.all()):
                raise RuntimeError(f"the float64 reference stopped at {result.residual.max():.1e}")
            self._truth["plan"] = self.plan_from(result.f, result.g)
        return self._truth["plan"]

    def true_gradient(self) -> Tensor:
        """Gradient of sum(plan * cotangent) with respect to the cost at the fixed point, float64 [P, N, M]."""
        if "gradient" not in self._truth:
            cost = self.cost.double().requires_grad_()
            result = sinkhorn(
                cost, epsilon=self.epsilon, tau=self.tau, tol=TRUTH_TOL, max_iters=5000, acceleration="anderson",
                backend="reference",
            )  # fmt: skip
            (result.plan() * self.cotangent.double()).sum().backward()
            assert cost.grad is not None
            self._truth["gradient"] = cost.grad
        return self._truth["gradient"]

    def agreement_with_pot(self) -> float:
        """Error of POT's log-domain solver in float64 against our truth, on the first problem."""
        import ot

        cost, a, b = self.cost[0].double().numpy(), self.a[0].double().numpy(), self.b[0].double().numpy()
        if self.tau == 1:
            plan = ot.bregman.sinkhorn_log(a, b, cost, self.epsilon, numItermax=20_000, stopThr=1e-12)
        else:
            rho = self.epsilon * self.tau / (1 - self.tau)
            options = {"numItermax": 5000, "stopThr": 1e-13, "tau": 1e100}
            plan = ot.unbalanced.sinkhorn_stabilized_unbalanced(a, b, cost, self.epsilon, rho, **options)
        return plan_error(torch.as_tensor(plan).unsqueeze(0), self.truth()[:1])


def token_problems(
    frames: int, rows: int, problems: int, *, epsilon: float = 0.05, dim: int = 128, patches: int = PATCHES,
    seed: int = 0, **options: Any,
) -> Dense:  # fmt: skip
    """Problems of the heads of one layer: cost [heads, N, M] in the official form."""
    some = tokens(frames, rows, problems, dim, patches, seed)
    index, places = some.frame_index.unsqueeze(0), some.positions.unsqueeze(0)
    cost = reference.token_cost(some.text, some.video, some.attention, index, places)[0]
    return Dense(cost.contiguous(), epsilon, 0.9, cotangent=some.cotangent[0], **options)


def balanced_problems(problems: int, size: int, *, epsilon: float, seed: int = 0, **options: Any) -> Dense:
    """Squared distances of uniform points in the unit square, scaled to [0, 1]: [P, size, size]."""
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(problems, size, 2, generator=draw) for _ in range(2))
    cost = (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(-1)
    return Dense(cost / cost.amax((1, 2), keepdim=True), epsilon, 1.0, **options)


@dataclass
class Clouds:
    """Two point clouds x [N, D], y [M, D], squared Euclidean cost, balanced, uniform weights."""

    x: Tensor
    y: Tensor
    epsilon: float
    n_iters: int = 1
    tol: float = 0.0
    acceleration: str | None = None
    _truth: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def half_step(self, points: Tensor, others: Tensor, potential: Tensor) -> Tensor:
        """-epsilon log mean_j exp((potential_j - |points_i - others_j|^2) / epsilon), float64."""
        squared = torch.cdist(points.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
        return -self.epsilon * (
            torch.logsumexp((potential.double() - squared) / self.epsilon, -1) - math.log(others.shape[0])
        )

    def truth(self, n_iters: int | None = None) -> tuple[Tensor, Tensor]:
        """Potentials (f [N], g [M]) after n_iters plain iterations, or at the fixed point, float64."""
        if n_iters not in self._truth:
            from pisces_kernels import sinkhorn_points

            stop: dict[str, Any] = {"tol": 1e-9, "max_iters": 2000, "acceleration": "anderson"}
            if n_iters is not None:
                stop = {"tol": 0.0, "max_iters": n_iters}
            result = sinkhorn_points(
                self.x.double(), self.y.double(), epsilon=self.epsilon, gradient="none", backend="reference", **stop
            )
            self._truth[n_iters] = (result.f, result.g)
        return self._truth[n_iters]


def clouds(size: int, dim: int, *, epsilon: float, n_iters: int = 1, seed: int = 0) -> Clouds:
    """Normal points whose squared distances have mean 2 in any dimension."""
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(size, dim, generator=draw) / math.sqrt(dim) for _ in range(2))
    return Clouds(x, y + 0.1, epsilon, n_iters)


def plan_error(plan: Tensor, truth: Tensor) -> float:
    """Largest total-variation distance of a row from the true one, as a share of the true row's mass.

    NaN in, NaN out. A wrong mass counts: rows are not normalised first.
    """
    distance = (plan.double() - truth).abs_().sum(-1) / 2
    return (distance / truth.sum(-1)).max().item()


def largest_relative(value: Tensor, truth: Tensor) -> float:
    """Largest difference as a share of the largest true entry; NaN in, NaN out."""
    return ((value.double() - truth).abs().max() / truth.abs().max()).item()


def one_iteration_error(problem: Clouds, f: Tensor, g: Tensor) -> float:
    """Error of one iteration from g = 0, in units of epsilon, on some rows and columns.

    f must be the half step from 0, up to the constant that makes balanced potentials unique; g the half step from f.
    """
    pick = torch.Generator().manual_seed(1)
    rows = torch.randperm(problem.x.shape[0], generator=pick)[:FREE_ROWS]
    cols = torch.randperm(problem.y.shape[0], generator=pick)[:FREE_ROWS]
    f, g = f.double(), g.double()
    wanted = problem.half_step(problem.x[rows], problem.y, torch.zeros(problem.y.shape[0]))
    error_f = f[rows] - wanted
    error_f = error_f - error_f.mean()  # the constant
    error_g = g[cols] - problem.half_step(problem.y[cols], problem.x, f)
    return torch.cat([error_f, error_g]).abs().max().item() / problem.epsilon


def potential_error(problem: Clouds, f: Tensor, g: Tensor, n_iters: int | None = None) -> float:
    """Largest error of potentials in units of epsilon, modulo the constant of balanced problems.

    The truth is that after n_iters plain iterations; None: at the fixed point.
    """
    true_f, true_g = problem.truth(n_iters)
    error_f, error_g = f.double() - true_f, g.double() - true_g
    shift = (error_f.mean() - error_g.mean()) / 2
    return torch.cat([error_f - shift, error_g + shift]).abs().max().item() / problem.epsilon

"""The workloads: real shapes, who competes on them, what accuracy counts, and what the algorithm has to do at least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import libraries, ours, peers, problems
from .contender import LIBRARY, OFFICIAL, OURS, SCALE, TORCH, Contender
from .errors import (
    attention_error,
    cost_error,
    cost_gradient_error,
    dense_error,
    fixed_count_error,
    gradient_error,
    plain_error,
    stop_error,
)
from .problems import Clouds, Dense, Tokens
from .work import Work, cloud_work, cost_work, iteration_work


@dataclass(frozen=True)
class Target:
    """times: how many times as fast as the best contender of the families, which are named for the table."""

    times: float
    against: str
    families: tuple[str, ...] = (TORCH, LIBRARY, OFFICIAL)
    log_domain: bool = False
    stretch: float | None = None
    names: tuple[str, ...] = ()
    best: bool = False


@dataclass(frozen=True)
class Workload:
    """A named piece of work.

    Attributes:
        make: smoke -> problem.
        contenders: ours first.
        error: (problem, result) -> error against float64.
        tolerance: largest error with which a figure counts, or how to get it from the problem.
        calibrate: contenders without their own stop test get the fewest iterations that reach the tolerance, ours the
            largest `tol`.
        work: (problem, iterations that ran) -> least work.
        calls: calls in a turn; the time is that of one.
        limit_ms: an absolute target.
        memory_less: (times, contender): peak memory that many times below the contender's.
        memory_of_result: peak memory at most that many times what the call returns.
    """

    name: str
    title: str
    make: Callable[[bool], Any]
    contenders: tuple[Contender, ...]
    error: Callable[[Any, Any], float]
    tolerance: float | Callable[[Any], float]
    targets: tuple[Target, ...] = ()
    calibrate: bool = False
    work: Callable[[Any, int], Work] | None = None
    calls: int = 1
    rounds: int = 11
    limit_ms: float | None = None
    memory_less: tuple[float, str] | None = None
    memory_of_result: float | None = None


EXP_FREE = (
    Contender("torch.compile exp-free", TORCH, peers.exp_free_compiled),
    Contender("torch exp-free, mv", TORCH, peers.exp_free_matvec),
)
EXP_FREE_MORE = (
    Contender("torch.compile exp-free, per problem", TORCH, peers.exp_free_compiled_each),
    Contender("torch exp-free, bmm", TORCH, peers.exp_free_batched),
)
LOG = (
    Contender("torch.compile log domain", TORCH, peers.compiled_log, log_domain=True),
    Contender("torch log domain", TORCH, peers.batched_log, log_domain=True),
)
POT = (
    Contender("POT stabilized", LIBRARY, libraries.pot_stabilized),
    Contender("POT kernel", LIBRARY, libraries.pot_kernel),
)
POT_BATCH = (
    Contender("POT batch", LIBRARY, partial(libraries.pot_batch, method="sinkhorn")),
    Contender("POT batch, log", LIBRARY, partial(libraries.pot_batch, method="log_sinkhorn"), log_domain=True),
)
OTT = (
    Contender("OTT log", LIBRARY, libraries.ott_log, log_domain=True),
    Contender("OTT kernel", LIBRARY, libraries.ott_kernel),
)
GEOMLOSS = (Contender("geomloss", LIBRARY, libraries.geomloss_batch, log_domain=True),)
OFFICIAL_LOOP = (Contender("official loop", OFFICIAL, peers.official_solve, log_domain=True),)
OFFICIAL_STOPPING = (dataclasses.replace(OFFICIAL_LOOP[0], own_stop=True),)
SOLVE = (Contender("ours", OURS, ours.solve),)
ANDERSON = (Contender("ours, anderson", OURS, ours.solve_anderson),)
CLOUDS = (
    Contender("ours", OURS, ours.clouds),
    Contender("torch.compile, chunked", TORCH, peers.compiled_clouds),
    Contender("torch, chunked", TORCH, peers.chunked_clouds),
    Contender("POT lazy", LIBRARY, libraries.pot_lazy),
    Contender("OTT online", LIBRARY, libraries.ott_online),
    Contender("one sgemm of that size an iteration", SCALE, peers.one_sgemm),
)
KEOPS = (Contender("KeOps", LIBRARY, libraries.keops_clouds),)


def official(smoke: bool, frames: int = 8, rows: int = 40, heads: int = 16, **options: Any) -> Dense:
    """Heads of one fusion layer: 16 problems of 40 x 2049 for 8 frames."""
    if smoke:
        return problems.token_problems(2, 7, 2, dim=16, patches=16, **options)
    return problems.token_problems(frames, rows, heads, **options)


def layer(smoke: bool) -> Tokens:
    """Features of one fusion layer, official shape."""
    return problems.tokens(2, 8, 2, 32, 16) if smoke else problems.tokens(8)


def square(smoke: bool, epsilon: float) -> Dense:
    """Balanced batch."""
    return problems.balanced_problems(*((3, 24) if smoke else (64, 256)), epsilon=epsilon)


def cloud(smoke: bool, size: int, dim: int, epsilon: float = 0.05, **options: Any) -> Clouds:
    """Clouds; the mean squared distance is 2."""
    return problems.clouds(70 if smoke else size, dim, epsilon=epsilon, **options)


BEST_PEER = "best peer"
TORCH_OR_POT = ("torch.compile exp-free", "torch exp-free, mv", *(c.name for c in (*EXP_FREE_MORE, *LOG, *POT)))

WORKLOADS: tuple[Workload, ...] = (
    Workload(
        "official_100",
        "Official T = 8: 16 x 40 x 2049, epsilon .05, tau .9, 100 iterations",
        official,
        (*SOLVE, *EXP_FREE, *EXP_FREE_MORE, *LOG, *POT, *GEOMLOSS, *OTT, *OFFICIAL_LOOP),
        dense_error,
        1e-5,
        (
            Target(6, "best torch or POT", names=TORCH_OR_POT, stretch=10),
            Target(45, "official loop", (OFFICIAL,)),
        ),
        work=iteration_work,
    ),
    Workload(
        "official_stop",
        "Official T = 8 to the error at which the official loop stops (change < 1e-3)",
        official,
        (*ANDERSON, *SOLVE, *EXP_FREE, *POT, *OTT, *OFFICIAL_STOPPING),
        dense_error,
        stop_error,
        (Target(24, BEST_PEER), Target(85, "official loop", (OFFICIAL,))),
        calibrate=True,
    ),
    Workload(
        "official_tenth",
        "Official T = 8 to a tenth of that error",
        official,
        (*ANDERSON, *SOLVE, *EXP_FREE, *POT, *OTT, *OFFICIAL_LOOP),
        dense_error,
        partial(stop_error, share=0.1),
        (Target(24, BEST_PEER), Target(85, "official loop", (OFFICIAL,))),
        calibrate=True,
    ),
    Workload(
        "official_plan",
        "Official T = 8, 100 iterations and the plan",
        official,
        (
            Contender("ours", OURS, ours.plan),
            Contender("torch.compile exp-free", TORCH, partial(peers.with_plan, peers.exp_free_compiled)),
            *POT,
            Contender("official loop", OFFICIAL, peers.official_plan, log_domain=True),
        ),
        dense_error,
        1e-5,
        work=iteration_work,
    ),
    Workload(
        "recipe_26",
        "Released recipe, 26 frames: 16 x 40 x 6657, 100 iterations",
        partial(official, frames=26),
        (*SOLVE, *EXP_FREE, *POT, *OTT[1:], *OFFICIAL_LOOP),
        dense_error,
        1e-5,
        work=iteration_work,
        rounds=7,
    ),
    Workload(
        "video_128",
        "128 frames: 4 x 64 x 32769, 50 iterations",
        partial(official, frames=128, rows=64, heads=4, n_iters=50),
        (*SOLVE, *EXP_FREE, *LOG[:1], *POT, *OTT[1:], *OFFICIAL_LOOP),
        dense_error,
        1e-4,
        (Target(3.5, BEST_PEER, stretch=5),),
        work=iteration_work,
        rounds=7,
    ),
    Workload(
        "video_128_tol",
        "128 frames to the error of the plain iteration at tol 1e-5",
        partial(official, frames=128, rows=64, heads=4, n_iters=100),
        (*ANDERSON, *SOLVE, *EXP_FREE, *POT[:1]),
        dense_error,
        partial(plain_error, tol=1e-5),
        (Target(8, BEST_PEER),),
        calibrate=True,
        rounds=7,
    ),
    Workload(
        "lexical_300",
        "300 lexical tokens: 16 x 300 x 2049, 50 iterations",
        partial(official, rows=300, n_iters=50),
        (*SOLVE, *EXP_FREE, *POT, *OTT[1:]),
        dense_error,
        1e-4,
        work=iteration_work,
        rounds=5,
    ),
    Workload(
        "balanced_256",
        "Balanced 64 x 256 x 256, epsilon .05, 100 iterations",
        partial(square, epsilon=0.05),
        (*SOLVE, *EXP_FREE, *LOG, *POT, *POT_BATCH, *GEOMLOSS, *OTT),
        dense_error,
        fixed_count_error,
        (
            Target(7, BEST_PEER, stretch=10),
            Target(20, "best log-domain peer", log_domain=True),
        ),
        work=iteration_work,
        rounds=7,
    ),
    Workload(
        "balanced_256_sharp",
        "Balanced 64 x 256 x 256, epsilon .01, 100 iterations",
        partial(square, epsilon=0.01),
        (*SOLVE, *EXP_FREE, *LOG[:1], *POT, *OTT),
        dense_error,
        fixed_count_error,
        work=iteration_work,
        rounds=5,
    ),
    Workload(
        "cloud_4096",
        "Clouds of 4,096 points, D = 64, ten iterations",
        partial(cloud, size=4096, dim=64, n_iters=10),
        CLOUDS,
        lambda problem, fg: problems.potential_error(problem, *fg, n_iters=problem.n_iters),
        1e-3,
        (
            Target(3.5, "best streaming peer"),
            Target(1 / 1.2, "one sgemm of that size an iteration", (SCALE,)),
        ),
        work=cloud_work,
        rounds=9,
    ),
    Workload(
        "cloud_4096_3d",
        "Clouds of 4,096 points, D = 3, one iteration",
        partial(cloud, size=4096, dim=3),
        (*CLOUDS, *KEOPS),
        lambda problem, fg: problems.one_iteration_error(problem, *fg),
        1e-3,
        work=cloud_work,
        rounds=9,
    ),
    Workload(
        "cloud_16384",
        "Clouds of 16,384 points, D = 64, one iteration",
        partial(cloud, size=16384, dim=64),
        CLOUDS,
        lambda problem, fg: problems.one_iteration_error(problem, *fg),
        1e-3,
        work=cloud_work,
        rounds=3,
    ),
    Workload(
        "cloud_16384_3d",
        "Clouds of 16,384 points, D = 3, one iteration",
        partial(cloud, size=16384, dim=3),
        CLOUDS,
        lambda problem, fg: problems.one_iteration_error(problem, *fg),
        1e-3,
        work=cloud_work,
        rounds=3,
    ),
    Workload(
        "cloud_4096_solve",
        "Clouds of 4,096 points, D = 3, epsilon .2, solved until potentials are right to a hundredth of epsilon",
        partial(cloud, size=4096, dim=3, epsilon=0.2),
        (
            Contender("ours, anderson", OURS, ours.clouds_anderson),
            CLOUDS[0],
            CLOUDS[1],
            *CLOUDS[3:5],
        ),
        lambda problem, fg: problems.potential_error(problem, *fg),
        1e-2,
        (Target(3.5, "best streaming peer"),),
        calibrate=True,
        rounds=3,
    ),
    Workload(
        "cost",
        "Official cost from features: N = 40, M = 2049, D = 1024, 16 heads",
        layer,
        (
            Contender("ours", OURS, ours.cost),
            Contender("torch.compile", TORCH, peers.compiled_cost),
            Contender("torch, all heads at once", TORCH, peers.batched_cost),
            Contender("official loop", OFFICIAL, peers.official_cost),
        ),
        cost_error,
        5e-5,
        (Target(2, "torch.compile", (TORCH,), stretch=3), Target(20, "official loop", (OFFICIAL,))),
        work=cost_work,
        rounds=21,
    ),
    Workload(
        "cost_backward",
        "Official cost, forward and backward through text, video and attention",
        layer,
        (
            Contender("ours", OURS, ours.cost_gradient),
            Contender("torch.compile", TORCH, lambda data: peers.cost_gradient(data, peers.compiled(peers.token_cost))),
            Contender("torch, all heads at once", TORCH, partial(peers.cost_gradient, run=peers.token_cost)),
        ),
        cost_gradient_error,
        1e-3,
    ),
    Workload(
        "attention",
        "Fused transport attention, official shape, stop at 1e-3",
        layer,
        (
            Contender("ours", OURS, ours.attention),
            Contender(
                "torch.compile exp-free", TORCH, partial(peers.torch_attention, compile_it=True, exponentials=False)
            ),
            Contender("torch exp-free", TORCH, partial(peers.torch_attention, compile_it=False, exponentials=False)),
            Contender("torch.compile log", TORCH, partial(peers.torch_attention, compile_it=True, exponentials=True)),
            Contender("official function", OFFICIAL, peers.official_attention),
        ),
        attention_error,
        1e-4,
    ),
    Workload(
        "attention_backward",
        "Fused transport attention, official shape, forward and backward through A",
        layer,
        (
            Contender("ours", OURS, partial(ours.attention, backward=True)),
            Contender(
                "torch.compile exp-free",
                TORCH,
                partial(peers.torch_attention, compile_it=True, exponentials=False, backward=True),
            ),
            Contender("official function", OFFICIAL, partial(peers.official_attention, backward=True)),
        ),
        attention_error,
        1e-4,
        (Target(20, "official function", (OFFICIAL,)),),
        memory_of_result=1.3,
    ),
    Workload(
        "backward_implicit",
        "Plan of official T = 8, forward and backward, implicit (100 iterations)",
        official,
        (
            Contender("ours, implicit", OURS, partial(ours.plan_gradient, gradient="implicit")),
            Contender("OTT implicit", LIBRARY, partial(libraries.ott_gradient, implicit=True)),
            Contender("autograd, torch.compile", TORCH, peers.autograd_compiled),
            Contender("autograd, torch", TORCH, peers.autograd_loop),
        ),
        gradient_error,
        1e-3,
        (Target(30, "OTT implicit", (LIBRARY,)),),
        memory_less=(100, "autograd, torch"),
        rounds=5,
    ),
    Workload(
        "backward_unrolled",
        "Plan of official T = 8, forward and backward through the iterations (100)",
        official,
        (
            Contender("ours, unrolled", OURS, partial(ours.plan_gradient, gradient="unrolled")),
            Contender("OTT unrolled", LIBRARY, partial(libraries.ott_gradient, implicit=False)),
            Contender("autograd, torch.compile", TORCH, peers.autograd_compiled),
            Contender("autograd, torch", TORCH, peers.autograd_loop),
        ),
        gradient_error,
        1e-3,
        rounds=5,
    ),
    Workload(
        "small",
        "One 8 x 8 problem in one call, gradient recorded, to the error of the plain iteration at tol 1e-3",
        lambda smoke: problems.token_problems(1, 8, 1, dim=16, patches=4, seed=2, n_iters=200),
        (Contender("ours", OURS, ours.small), *EXP_FREE[1:], *LOG[1:], *POT[1:]),
        dense_error,
        partial(plain_error, tol=1e-3),
        calibrate=True,
        calls=100,
        rounds=21,
        limit_ms=0.1,
    ),
)
BY_NAME = {workload.name: workload for workload in WORKLOADS}

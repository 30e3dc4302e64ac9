"""Least work of the algorithms: what the achieved share of the machine's limits is counted from."""

from __future__ import annotations

from dataclasses import dataclass

from .problems import Clouds, Dense, Tokens


@dataclass(frozen=True)
class Work:
    """Least work of an algorithm.

    Attributes:
        flops: additions and multiplications.
        exps: exponentials.
        loads: bytes that come from `level` at least.
        level: the memory that the repeatedly read data fits in: "L1", "L2", "L3" or "RAM".
        formula: how they are counted.
    """

    flops: float
    exps: float
    loads: float
    level: str
    formula: str


def iteration_work(problem: Dense, n_iters: int) -> Work:
    """Exp-free iterations: K is read once an iteration and serves two products."""
    entries = problem.cost.numel()
    bytes_of_one = 4 * problem.cost[0].numel()
    level = "L2" if bytes_of_one <= 400 * 1024 else "L3" if bytes_of_one <= 16 * 2**20 else "RAM"
    return Work(
        4.0 * entries * n_iters, float(entries), 4.0 * entries * n_iters, level,
        "per iteration 4 FLOP and 4 bytes an entry of K; one exp an entry in all",
    )  # fmt: skip


def cloud_work(problem: Clouds, n_iters: int) -> Work:
    """One matrix product an iteration serves both half steps, each of which takes an exp an entry."""
    entries, dim = problem.x.shape[0] * problem.y.shape[0], problem.x.shape[1]
    return Work(
        (2.0 * dim + 6) * entries * n_iters, 2.0 * entries * n_iters, 4.0 * entries * n_iters, "L1",
        "per iteration 2 D + 6 FLOP, 2 exp and 4 bytes a pair of points",
    )  # fmt: skip


def cost_work(data: Tokens, n_iters: int) -> Work:
    """The product of the features once for all heads, then about 20 operations an entry."""
    entries = data.attention.numel()
    product = 2.0 * data.text.shape[1] * data.video.shape[1] * data.video.shape[2]
    return Work(
        product + 20.0 * entries, 0.0, 12.0 * entries + 4.0 * data.video.numel(), "RAM",
        "2 N M D FLOP for all heads, 20 an entry; attention read once, cost written once and read once, features once",
    )  # fmt: skip

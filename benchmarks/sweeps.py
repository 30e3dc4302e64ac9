"""Time against the number of columns, of problems, and of frames: `python -m benchmarks.sweeps` prints JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from typing import Any

from . import problems
from .measure import Comparison
from .problems import Dense, Tokens
from .workloads import BY_NAME, Workload

SOLVERS = ("ours", "torch.compile exp-free", "torch exp-free, mv", "POT stabilized", "official loop")
POINTS: dict[str, tuple[int, ...]] = {"M": (257, 1025, 4097, 16385), "B": (1, 4, 16, 64), "frames": (4, 8, 26, 64)}
SMOKE_POINTS: dict[str, tuple[int, ...]] = {"M": (33, 65), "B": (1, 2), "frames": (1, 2)}
WHAT = {
    "M": "sinkhorn, 16 problems of 40 x M, 20 iterations",
    "B": "sinkhorn, B problems of 40 x 2049, 20 iterations",
    "frames": "transport_attention, 16 heads, 40 text tokens, forward and backward through A",
}
ROUNDS = 5


def dense(smoke: bool, problem_count: int, columns: int) -> Dense:
    """20 iterations in the official form; the patches of one frame are as many as there are columns."""
    patches = 16 if smoke else 256
    frames = max((columns - 1) // patches, 1)
    return problems.token_problems(frames, 7 if smoke else 40, problem_count, dim=32, patches=patches, n_iters=20)


def layer(smoke: bool, frames: int) -> Tokens:
    """Features of one layer."""
    return problems.tokens(frames, 8, 2, 32, 16) if smoke else problems.tokens(frames, dim=256)


def point(axis: str, value: str | int) -> Workload:
    """The workload of one point of a sweep."""
    size = int(value)
    if axis == "frames":
        base = BY_NAME["attention_backward"]
        return dataclasses.replace(base, name=f"frames={size}", make=partial(layer, frames=size))
    base = BY_NAME["official_100"]
    count, columns = (16, size) if axis == "M" else (size, 2049)
    make = partial(dense, problem_count=count, columns=columns)
    kept = tuple(c for c in base.contenders if c.name in SOLVERS)
    return dataclasses.replace(base, name=f"{axis}={size}", make=make, contenders=kept, tolerance=2e-2)


def run(axes: tuple[str, ...], smoke: bool) -> dict[str, Any]:
    """{axis: {"what", "points": [{"x", "contenders"}]}}."""
    out: dict[str, Any] = {}
    for axis in axes:
        points = []
        for size in (SMOKE_POINTS if smoke else POINTS)[axis]:
            comparison = Comparison(point(axis, size), smoke=smoke)
            comparison.run(1 if smoke else ROUNDS)
            points.append({"x": size, "contenders": comparison.finish()["contenders"]})
        out[axis] = {"what": WHAT[axis], "points": points}
    return out


def main() -> None:
    """Print the sweeps as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--axes", nargs="+", choices=tuple(POINTS), default=list(POINTS))
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(run(tuple(arguments.axes), arguments.smoke)))


if __name__ == "__main__":
    main()

"""What the Triton kernels need on GPUs that are not there: compiled ahead of time, read, held to a committed budget.

    python -m benchmarks.triton_static            # the table
    python -m benchmarks.triton_static --check    # exit 1 where a kernel exceeds benchmarks/triton_budget.json
    python -m benchmarks.triton_static --update   # write what was measured as the new budget

The adapters of `pisces_kernels._triton` run as they are on CPU tensors, but their launches compile for a device that is
only named: what is measured is what they would start there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import gpu_static

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns that the default will change
BUDGET = Path(__file__).parent / "triton_budget.json"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx90a")
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "gfx90a": 104}


@dataclass(frozen=True)
class Usage:
    """One kernel as it was launched, on one architecture.

    Attributes:
        registers: a thread (AMD: vector registers).
        spills: instructions that move registers to or from local memory. AMD: vector registers that were spilled;
            scalar ones move to lanes of vector registers, not to memory.
        shared: bytes of shared memory a program.
        instructions: of the loop that takes the time, an element of it and thread; 0 where there is none, and on AMD.
    """

    registers: int
    spills: int
    shared: int
    instructions: float = 0.0


class _Absent:
    """Stands in for the driver of a device that is not there."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.name = target
        nvidia = target.startswith("sm_")
        self.target = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def launches_compile(target: str) -> Iterator[list[Any]]:
    """Inside, launches of the adapters compile for a target; yields the list of compiled kernels, filled on the way."""
    import triton
    from triton.runtime.autotuner import Autotuner

    from pisces_kernels._triton import _launch

    compiled: list[Any] = []
    driver: Any = triton.runtime.driver
    before = _launch.launch, _launch.multiprocessors, driver._active  # the property would look for a device

    def launch(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(kernel, Autotuner):
            options = {**kernel.configs[0].all_kwargs(), **options}
            kernel = kernel.fn
        compiled.append(kernel.warmup(*arguments, grid=(1,), **options))

    _launch.launch, _launch.multiprocessors = launch, lambda device: MULTIPROCESSORS[target]  # type: ignore[assignment]
    driver.set_active(_Absent(target))
    try:
        yield compiled
    finally:
        _launch.launch, _launch.multiprocessors, driver._active = before  # type: ignore[assignment]


Loop = Counter[str]


def machine_code(kernel: Any) -> tuple[list[Loop], int, int]:
    """Instructions by name of the innermost loops of an NVIDIA kernel, its registers, its moves to local memory."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        registers = int(re.findall(r"REG:(\d+)", gpu_static.dump("-res-usage", file=cubin))[0])
        ((code,),) = (list(archs.values()) for archs in gpu_static.machine_code(cubin).values())
    spills = sum(name.startswith(gpu_static.SPILLS) for _, name, _ in code)
    return list(map(gpu_static.counted(code), gpu_static.innermost(gpu_static.spans(code)))), registers, spills


def usage(kernel: Any, per_element: Callable[[list[Loop]], float] | None = None) -> Usage:
    """What a compiled kernel needs.

    Args:
        kernel: what Triton compiled.
        per_element: instructions an element, of the innermost loops of an NVIDIA kernel.
    """
    if "cubin" not in kernel.asm:
        number = {name: int(value) for name, value in re.findall(r"\.(\w+_count): +(\d+)", kernel.asm["amdgcn"])}
        return Usage(number["vgpr_count"], number["vgpr_spill_count"], kernel.metadata.shared)
    loops, registers, spills = machine_code(kernel)
    count = 0.0 if per_element is None else round(per_element(loops), 2)
    return Usage(registers, spills, kernel.metadata.shared, count)


# ---- what is launched ------------------------------------------------------------------------------------------

Count = Callable[[list[Loop]], float]


@dataclass(frozen=True)
class Case:
    """One call of an adapter.

    Attributes:
        call: makes its tensors and calls it.
        counts: for kernels with a loop that takes the time, how its instructions are counted.
    """

    call: Callable[[], object]
    counts: dict[str, Count] = field(default_factory=dict)


def dense(n_problems: int, n_rows: int, n_cols: int, mass: float | None = None) -> Callable[[], object]:
    """A dense solve with everything that is optional but the starts."""
    from pisces_kernels._triton.sinkhorn import sinkhorn

    def call() -> object:
        a, b = torch.ones(n_problems, n_rows), torch.ones(n_problems, n_cols)
        masks = {"row_mask": torch.ones_like(a, dtype=torch.bool), "col_mask": torch.ones_like(b, dtype=torch.bool)}
        total = None if mass is None else torch.full((n_problems,), mass)
        options: dict[str, Any] = {"tau_a": 0.9, "tau_b": 0.9, "mass": total, "max_iters": 100, "tol": 1e-3}
        cost = torch.ones(n_problems, n_rows, n_cols)
        return sinkhorn(cost, a, b, torch.ones(n_problems), f_init=None, g_init=None, **options, **masks)

    return call


def a_column(n_rows: int) -> Count:
    """The one pass over K: a thread takes a column of n_rows elements through the loop with most multiply-adds."""
    return lambda loops: max(loops, key=lambda loop: loop["FFMA"]).total() / n_rows


def two_passes(rows: int) -> Count:
    """Columns and row sums, each a loop over `rows` elements of a column."""
    return lambda loops: sum(loop.total() for loop in sorted(loops, key=lambda loop: loop["FFMA"])[-2:]) / rows


def a_pair(loops: list[Loop]) -> float:
    """The loop over tiles of columns: its instructions for each of its exponentials, one a pair."""
    return min(loop.total() / loop["MUFU"] for loop in loops if loop["MUFU"] >= 8)


def clouds(precision: str) -> Callable[[], object]:
    """A solve of two clouds of 64 features."""
    from pisces_kernels._triton.points import sinkhorn_points

    def call() -> object:
        x, y = (torch.ones(1, 4096, 64) for _ in range(2))
        weights, mask = torch.ones(1, 4096), torch.ones(1, 4096, dtype=torch.bool)
        options: dict[str, Any] = {"tau_a": 0.9, "tau_b": 0.9, "mass": None, "max_iters": 100, "tol": 1e-3}
        options.update(acceleration=None, f_init=None, g_init=None, cost="sqeuclidean", precision=precision)
        return sinkhorn_points(x, y, weights, weights, torch.ones(1), row_mask=mask, col_mask=mask, **options)

    return call


def streamed() -> object:
    """What else is asked of two clouds: a transform, a product with a coupling, transport of a cloud to itself."""
    from pisces_kernels._triton import points

    x, y, row = torch.ones(1, 500, 64), torch.ones(1, 700, 64), torch.ones(1, 500)
    col, mask, epsilon = torch.ones(1, 700), torch.ones(1, 500, dtype=torch.bool), torch.ones(1)
    factors = torch.ones(1, 500, 8), torch.ones(1, 700, 8)
    points.soft_minimum(x, y, col, col, epsilon[:, None], True)
    points.product(x, y, row, col, epsilon[:, None], torch.ones(1, 700, 66), factors, True)
    return points.self_transport(x, row, epsilon, 0.9, mask, 100, 1e-3, "sqeuclidean")


def after_a_solve() -> object:
    """Plan, its logarithm and sums, their gradient, and the gradient of the potentials."""
    from pisces_kernels._triton import gradients, plan

    cost, f, g = torch.ones(16, 40, 2049), torch.ones(16, 40), torch.ones(16, 2049)
    masks, epsilon = (torch.ones(16, 40, dtype=torch.bool), torch.ones(16, 2049, dtype=torch.bool)), torch.ones(16)
    solved = cost, f, g, f, g, epsilon, *masks
    plan.plan(*solved, logarithm=False)
    plan.plan(*solved, logarithm=True)
    plan.plan_sums(*solved)
    plan.plan_backward(cost, f, g, epsilon, *solved)
    return gradients.implicit(f, g, cost, f, g, epsilon, f, g, 0.9, 0.9, False, *masks)


def tokens() -> object:
    """A layer of transport attention and its gradient, the token cost and its gradient."""
    from pisces_kernels._triton import cost

    text, video, attention = torch.ones(2, 40, 1024), torch.ones(2, 2049, 1024), torch.ones(2, 16, 40, 2049)
    inputs = text, video, attention, torch.ones(2, 2049), torch.ones(2, 2049, 2)
    rows, cols = torch.ones(2, 40, dtype=torch.bool), torch.ones(2, 2049, dtype=torch.bool)
    weights: dict[str, Any] = {"gamma": 0.2, "eta": 0.2}
    cost.token_cost(*inputs, **weights, normalize=True, row_mask=rows, col_mask=cols)
    cost.cosine_gradient(attention, *inputs, rows, cols, attention, 0.2, 0.2, True)
    options: dict[str, Any] = {"epsilon": 0.05, "tau": 0.9, "mass": None, "max_iters": 100, "tol": 1e-3}
    cost.transport_attention(*inputs, **options, row_mask=rows, return_plan=True, **weights)
    return cost.fusion_gradient(attention, attention, attention, rows)


CASES = {
    "dense 40 x 2049": Case(dense(128, 40, 2049), {"sinkhorn_kernel": a_column(40)}),
    "dense 300 x 2049": Case(dense(128, 300, 2049), {"sinkhorn_kernel": two_passes(64)}),
    "dense 64 x 32769, teams": Case(dense(4, 64, 32769), {"sinkhorn_kernel": a_column(64)}),
    "dense 40 x 2049, exact mass": Case(dense(128, 40, 2049, mass=0.5)),
    "points float32": Case(clouds("float32"), {"solve_kernel": a_pair}),
    "points tf32": Case(clouds("tf32"), {"solve_kernel": a_pair}),
    "points bf16": Case(clouds("bf16"), {"solve_kernel": a_pair}),
    "points, the rest": Case(streamed),
    "plan and gradients": Case(after_a_solve),
    "tokens": Case(tokens),
}


def measure(target: str, case: str) -> dict[str, Usage]:
    """Usage of what a case launches on a target, by "kernel, case"; the worst of a kernel that is launched twice."""
    with launches_compile(target) as compiled:
        CASES[case].call()
    found: dict[str, Usage] = {}
    for kernel in compiled:
        name = f"{kernel.metadata.name}, {case}"
        use = usage(kernel, CASES[case].counts.get(kernel.metadata.name))
        former = found.get(name, use)
        found[name] = Usage(*map(max, zip(astuple(use), astuple(former), strict=True)))
    return found


def measure_all(targets: Sequence[str] = TARGETS) -> dict[str, dict[str, Usage]]:
    """Usage by kernel and target of all cases; two processes, or as many as there are processors."""
    found: dict[str, dict[str, Usage]] = {}
    jobs = [(target, case) for case in CASES for target in targets]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for (target, _), uses in zip(jobs, pool.map(measure, *zip(*jobs, strict=True)), strict=True):
            for name, use in uses.items():
                found.setdefault(name, {})[target] = use
    return found


def table(measured: dict[str, dict[str, Usage]]) -> str:
    """Markdown, one row a kernel."""
    targets = [target for target in TARGETS if any(target in archs for archs in measured.values())]
    lines = [f"| kernel | {' | '.join(targets)} | instructions, {' and '.join(t for t in targets if t[0] == 's')} |"]
    lines.append("|" + "---|" * (len(targets) + 2))
    for name, archs in sorted(measured.items()):
        cells = [f"{archs[t].registers}, {archs[t].spills}, {archs[t].shared}" if t in archs else "" for t in targets]
        counts = ", ".join(f"{archs[t].instructions:.1f}" for t in targets if t in archs and archs[t].instructions)
        lines.append(f"| `{name.split(', ')[0]}`, {', '.join(name.split(', ')[1:])} | {' | '.join(cells)} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="exit 1 where a kernel exceeds the budget")
    choice.add_argument("--update", action="store_true", help="write the budget")
    arguments = parser.parse_args()
    measured = measure_all()
    print("Registers, spills, bytes of shared memory.\n")
    print(table(measured))
    if arguments.update:
        plain = {kernel: {arch: asdict(use) for arch, use in archs.items()} for kernel, archs in measured.items()}
        BUDGET.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")
    if arguments.check:
        found = gpu_static.violations(measured, json.loads(BUDGET.read_text()))
        print("\n".join(found) or "within the budget")
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

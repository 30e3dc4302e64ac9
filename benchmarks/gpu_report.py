"""What the CUDA kernels and their peers have to do on a GPU, counted, and how fast a GPU could do it at best.

    python -m benchmarks.gpu_report              # the tables; with a GPU also measured times
    python -m benchmarks.gpu_report --flash      # with FlashSinkhorn (pip install flash-sinkhorn==0.4.1), by triton

Ours: instructions from the machine code (gpu_budget.json, triton_budget.json), bytes and launches from the shapes.
Peers: every operator that PyTorch runs is counted while the peer runs on the CPU; it is one launch at least. A
predicted time is a lower bound: the resource that takes longest at the vendor's peak rates, launches and host reads
added. Only a column that says measured has run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pisces_kernels import sinkhorn, sinkhorn_points, transport_attention, why_not

from . import gpu_flash, peers, problems
from .gpu_static import BUDGET
from .triton_static import BUDGET as TRITON_BUDGET

# Seconds, our assumptions: a launch, one by PyTorch from Python, a value read by the host, barriers of grid, cluster.
LAUNCH, EAGER_LAUNCH, HOST_READ, GRID_BARRIER, CLUSTER_BARRIER = 2.5e-6, 4e-6, 15e-6, 1.5e-6, 0.4e-6
SHARED_BYTES, ISSUED = 128, 128  # a multiprocessor and clock: bytes of shared memory; lanes of all four schedulers


@dataclass(frozen=True)
class Device:
    """Peak rates from the vendor's data sheets.

    Attributes:
        sm: of the machine code that is counted.
        multiprocessors: their number.
        clock: boost, Hz.
        hbm: bytes a second.
        l2: bytes of the L2 cache; what fits is not counted as read again.
        tensor: flops a second by precision, dense.
        special: exponentials a multiprocessor and clock.
    """

    name: str
    sm: str
    multiprocessors: int
    clock: float
    hbm: float
    l2: float
    tensor: dict[str, float]
    special: int = 16


DEVICES = (
    Device("A100", "80", 108, 1.41e9, 2.04e12, 40e6, {"tf32": 156e12, "bf16": 312e12}),
    Device("H100", "90", 132, 1.755e9, 3.35e12, 50e6, {"tf32": 495e12, "bf16": 989e12}),
    Device("B200", "100", 148, 1.85e9, 8.0e12, 126e6, {"tf32": 1100e12, "bf16": 2250e12}),
)


@dataclass(frozen=True)
class Work:
    """What has to be done; times are of the busiest multiprocessor's share.

    Attributes:
        launches: kernels.
        host_reads: times that the host waits for a value.
        bytes: of memory behind the L2 cache.
        instructions: lanes' instructions.
        exps: on the special function unit.
        flops: on tensor cores, at `precision`.
        shared: bytes through shared memory.
        idle: seconds that nothing else can fill: barriers of a team of blocks.
        waves: the busiest multiprocessor's share over the average one.
        eager: launched by PyTorch from Python.
    """

    launches: float
    host_reads: float = 0
    bytes: float = 0
    instructions: float = 0
    exps: float = 0
    flops: float = 0
    precision: str = "tf32"
    shared: float = 0
    idle: float = 0
    waves: float = 1
    eager: bool = False

    def predicted(self, device: Device) -> tuple[float, str]:
        """Seconds at least, and what binds."""
        cores = device.multiprocessors * device.clock
        parts = {
            "memory": self.bytes / device.hbm,
            "instructions": self.waves * self.instructions / (cores * ISSUED),
            "exponentials": self.waves * self.exps / (cores * device.special),
            "tensor cores": self.waves * self.flops / device.tensor[self.precision],
            "shared memory": self.waves * self.shared / (cores * SHARED_BYTES),
        }
        waiting = {
            "launches": self.launches * (EAGER_LAUNCH if self.eager else LAUNCH),
            "host reads": self.host_reads * HOST_READ,
            "barriers": self.idle,
        }
        bound = max(parts, key=lambda name: parts[name])
        longest = max(waiting, key=lambda name: waiting[name])
        busy, waits = parts[bound], sum(waiting.values())
        if self.eager:  # the device works while the host launches
            return max(busy, waiting["launches"]) + waiting["host reads"], bound if busy > waits else longest
        return busy + waits, bound if busy > waits else longest

    def times(self, factor: float) -> Work:
        """The same so many times."""
        names = ("launches", "host_reads", "bytes", "instructions", "exps", "flops", "shared", "idle")
        return replace(self, **{name: getattr(self, name) * factor for name in names})


class Counter(TorchDispatchMode):
    """Counts what the operators of a peer would do on a GPU."""

    EXPONENTIALS = ("exp", "log", "logsumexp", "softmax", "pow")

    def __init__(self, l2: float) -> None:
        super().__init__()
        self.l2 = l2
        self.work = Work(0, eager=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and add it."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if name == "_local_scalar_dense":
            self.work = replace(self.work, launches=self.work.launches + 1, host_reads=self.work.host_reads + 1)
            return out
        inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        is_view = results and all(result.untyped_storage().data_ptr() in inputs for result in results)
        if (is_view and not func._schema.is_mutable) or not results or name in ("empty", "empty_strided", "detach"):
            return out
        sizes = {tensor.data_ptr(): stored(tensor) for tensor in (*tensors, *results)}
        total = sum(sizes.values())
        largest = max(tensor.numel() for tensor in (*tensors, *results))
        flops = (
            2.0 * results[0].numel() * tensors[-2].shape[-1] if name in ("mm", "bmm", "mv", "addmm", "baddbmm") else 0
        )
        exps = float(largest) if any(word in name for word in self.EXPONENTIALS) else 0.0
        self.work = replace(
            self.work,
            launches=self.work.launches + 1,
            bytes=self.work.bytes + (total if total > self.l2 else 0),
            exps=self.work.exps + exps,
            flops=self.work.flops + flops,
            instructions=self.work.instructions + largest,
        )
        return out


def stored(tensor: Tensor) -> int:
    """Bytes that are behind a tensor: those of a broadcast one are few."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def counted(run: Callable[[], object], device: Device) -> Work:
    """The work of one call."""
    with torch.no_grad(), Counter(device.l2) as counter:
        run()
    return counter.work


def an_iteration(prepare: Callable[[Any], Any], problem: Any, device: Device) -> Work:
    """The work of one iteration of a peer: what three have more than two."""
    two, three = (counted(prepare(replace(problem, n_iters=n)).call, device) for n in (2, 3))
    names = ("launches", "host_reads", "bytes", "instructions", "exps", "flops")
    return replace(three, **{name: getattr(three, name) - getattr(two, name) for name in names})


# ---- ours ----------------------------------------------------------------------------------------------------


def instructions(kernel: str, device: Device) -> float:
    """A pair or element and iteration, from the committed budget."""
    return float(json.loads(BUDGET.read_text())[kernel][device.sm]["instructions"])


def triton_instructions(kernel: str, device: Device) -> float:
    """A pair or element and iteration of a Triton kernel in one of the cases of `triton_static`."""
    return float(json.loads(TRITON_BUDGET.read_text())[kernel][f"sm_{device.sm}"]["instructions"])


def dense(n_problems: int, n_rows: int, n_cols: int, n_iters: int, device: Device) -> Work:
    """The one-launch solve with K in shared memory, rows up to 40."""
    rows = 16 if n_rows <= 16 else 32 if n_rows <= 32 else 40
    room = (163 if device.sm == "80" else 227) * 1024
    team = 1
    while 4 * (rows + 6) * (-(-n_cols // team // 32) * 32) + 8192 > room:
        team *= 2
    blocks = n_problems * team
    waves = -(-blocks // device.multiprocessors) * device.multiprocessors / blocks
    elements = n_problems * rows * n_cols * n_iters
    return Work(
        launches=1,
        bytes=4 * n_problems * (n_rows * n_cols + 2 * (n_rows + n_cols)),
        instructions=elements * instructions(f"sinkhorn_kernel<{rows}>", device),
        exps=2 * n_problems * n_cols * n_iters,
        shared=4 * elements,
        waves=waves,
        idle=(0 if team == 1 else GRID_BARRIER if device.sm == "80" else CLUSTER_BARRIER) * n_iters,
    )


def dense_triton(n_problems: int, n_rows: int, n_cols: int, n_iters: int, device: Device) -> Work:
    """The one-launch solve in Triton, 40 rows: K goes through the caches once an iteration."""
    elements = n_problems * n_rows * n_cols * n_iters
    matrices = 4 * n_problems * n_rows * n_cols
    return Work(
        launches=2,  # the counters of the teams are set to 0
        bytes=3 * matrices + (matrices * n_iters if matrices > device.l2 / 2 else 0),  # half: the nearer partition
        instructions=elements * triton_instructions("sinkhorn_kernel, dense 40 x 2049", device),
        exps=2 * n_problems * n_cols * n_iters,
        waves=-(-n_problems // device.multiprocessors) * device.multiprocessors / n_problems,
    )


def points_triton(n_rows: int, n_cols: int, dim: int, n_iters: int, precision: str, device: Device) -> Work:
    """All iterations in one cooperative launch in Triton, between packing of both clouds and writing."""
    per_pair = triton_instructions(f"solve_kernel, points {precision}", device)
    work = points(n_rows, n_cols, dim, n_iters, precision, device)
    return replace(work, launches=5, instructions=2 * n_rows * n_cols * n_iters * per_pair)


def points(n_rows: int, n_cols: int, dim: int, n_iters: int, precision: str, device: Device) -> Work:
    """All iterations in one cooperative launch, between packing and writing."""
    kernel = {"float32": "(Precision)0, false", "tf32": "(Precision)1, false", "bf16": "(Precision)2, true"}[precision]
    pairs = 2 * n_rows * n_cols * n_iters
    terms = 3 if precision == "float32" else 1
    return Work(
        launches=4,
        bytes=4 * 3 * (n_rows + n_cols) * dim,
        instructions=pairs * instructions(f"points_kernel<{kernel}>", device),
        exps=pairs,
        flops=2 * terms * pairs * dim,
        precision="bf16" if precision == "bf16" else "tf32",
        idle=2 * GRID_BARRIER * n_iters,
    )


def attention(shape: tuple[int, int, int, int, int], n_iters: int, device: Device) -> Work:
    """Similarity of a layer and the fused launch; shape: samples, heads, rows, columns, features."""
    samples, heads, n_rows, n_cols, dim = shape
    solve = dense(samples * heads, n_rows, n_cols, n_iters, device)
    features, weights = 4 * samples * (n_rows + n_cols) * dim, 4 * samples * heads * n_rows * n_cols
    similarity = 4 * samples * n_rows * n_cols
    again = 0 if device.multiprocessors * 4 * n_rows * n_cols / 2 < device.l2 else weights
    products = samples * -(-n_rows // 64) * 64 * n_cols * dim
    return replace(
        solve,
        launches=2,
        bytes=features + 2 * weights + 2 * similarity + again,
        instructions=solve.instructions + products * instructions("similarity_kernel", device),
        exps=solve.exps + 2 * weights / 4,
    )


def attention_triton(shape: tuple[int, int, int, int, int], n_iters: int, device: Device) -> Work:
    """A layer in Triton: similarity, expected places, cost with its range, solve and fusion; the cost is stored.

    Instructions are the solve's; some torch operations that fill the weights are left out.
    """
    samples, heads, n_rows, n_cols, dim = shape
    solve = dense_triton(samples * heads, n_rows, n_cols, n_iters, device)
    features, weights = 4 * samples * (n_rows + n_cols) * dim, 4 * samples * heads * n_rows * n_cols
    return replace(
        solve, launches=solve.launches + 6, bytes=solve.bytes + features + 6 * weights, exps=solve.exps + weights / 2
    )


# ---- tables --------------------------------------------------------------------------------------------------

W1 = (128, 40, 2049, 100)
W4 = (4096, 4096, 64, 10)
LAYER = (8, 16, 40, 2049, 1024)
STOP = 35  # iterations of a head until the official tolerance


def dense_rows(device: Device) -> dict[str, Work]:
    """W1: a layer's problems, 100 iterations each."""
    n_problems, n_rows, _, n_iters = W1
    problem = problems.token_problems(8, n_rows, n_problems, dim=16, n_iters=n_iters)
    one = replace(problem, cost=problem.cost[:1])
    cost = problem.cost
    fused = Work(2, bytes=2 * cost.nbytes if cost.nbytes > device.l2 else 0, exps=2.0 * cost.numel(), eager=True)
    return {
        "ours": dense(*W1, device),
        "ours, Triton": dense_triton(*W1, device),
        "official loop": an_iteration(peers.official_solve, one, device).times(n_problems * n_iters),
        "batched torch, log domain": an_iteration(peers.batched_log, problem, device).times(n_iters),
        "batched torch, products": an_iteration(peers.exp_free_batched, problem, device).times(n_iters),
        "torch.compile, log domain, fused without loss": fused.times(n_iters),
    }


def points_rows(device: Device, flash: bool) -> dict[str, Work]:
    """W4: two clouds, 10 iterations."""
    n_rows, n_cols, dim, n_iters = W4
    clouds = problems.Clouds(torch.rand(n_rows, dim), torch.rand(n_cols, dim), 0.5, n_iters)
    rows = {f"ours, {name}": points(*W4, name, device) for name in ("float32", "tf32", "bf16")}
    rows |= {f"ours, Triton, {name}": points_triton(*W4, name, device) for name in ("float32", "tf32", "bf16")}
    rows["chunked torch"] = an_iteration(peers.chunked_clouds, clouds, device).times(n_iters)
    if flash:
        per_pair = gpu_flash.instructions_per_pair(int(device.sm), dim)
        pairs = 2 * n_rows * n_cols * n_iters
        rows["FlashSinkhorn, TF32"] = Work(
            2 * n_iters,
            bytes=4 * (n_rows + n_cols) * dim,
            instructions=pairs * per_pair,
            exps=pairs,
            flops=2 * pairs * dim,
        )
    return rows


def attention_rows(device: Device) -> dict[str, Work]:
    """W5: a layer of transport attention, batch 8."""
    samples, heads, n_rows, _, dim = LAYER
    data = problems.tokens(8, n_rows, 1, dim)
    head = counted(lambda: peers.official_cost_head(data, 0), device)
    solve = an_iteration(peers.official_solve, problems.token_problems(8, n_rows, 1, dim=16), device).times(STOP)
    names = ("launches", "host_reads", "bytes", "instructions", "exps", "flops")
    official = replace(head, **{name: getattr(head, name) + getattr(solve, name) for name in names})
    return {
        "ours": attention(LAYER, STOP, device),
        "ours, Triton": attention_triton(LAYER, STOP, device),
        "official, head by head": official.times(samples * heads),
    }


def measured(kind: str, names: list[str]) -> dict[str, float]:
    """Milliseconds on this machine's GPU by row, what Python needs for a call included; the median of 20 calls."""
    device = torch.device("cuda")
    runs: dict[str, Callable[[], object]] = {}
    ours = [pair for pair in (("ours", "cuda"), ("ours, Triton", "triton")) if why_not(pair[1]) is None]
    if kind == "dense":
        n_problems, n_rows, n_cols, n_iters = W1
        cost = torch.rand(n_problems, n_rows, n_cols, device=device)
        for name, backend in ours:
            runs[name] = lambda backend=backend: sinkhorn(
                cost, epsilon=0.05, tau=0.9, max_iters=n_iters, tol=0.0, gradient="none", backend=backend
            )
        runs["batched torch, log domain"] = lambda: peers.log_solve(cost, 0.05, 0.9, n_iters)
    elif kind == "points":
        n_rows, n_cols, dim, n_iters = W4
        x, y = torch.rand(n_rows, dim, device=device), torch.rand(n_cols, dim, device=device)
        for name, backend in ours:
            for precision in ("float32", "tf32", "bf16"):
                runs[f"{name}, {precision}"] = lambda precision=precision, backend=backend: sinkhorn_points(
                    x, y, precision=precision, epsilon=0.5, max_iters=n_iters, tol=0.0, backend=backend
                )
    else:
        samples, heads, n_rows, n_cols, dim = LAYER
        data = problems.tokens(8, n_rows, heads, dim)
        inputs = [
            t.to(device).expand(samples, *t.shape[1:]).contiguous() for t in (data.text, data.video, data.attention)
        ]
        inputs += [data.frame_index.to(device), data.positions.to(device)]
        for name, backend in ours:
            runs[name] = lambda backend=backend: transport_attention(*inputs, max_iters=STOP, tol=0.0, backend=backend)
    result = {}
    for name in names:
        if name in runs:
            times = []
            for _ in range(23):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                runs[name]()
                torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            result[name] = statistics.median(times[3:]) * 1e3
    return result


def short(value: float) -> str:
    """Two or three digits and a unit."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def section(title: str, kind: str, rows_of: Callable[[Device], dict[str, Work]]) -> str:
    """One workload as a table: what is counted for the H100, and the least time on each device."""
    by_device = {device.name: rows_of(device) for device in DEVICES}
    names = list(by_device["H100"])
    times = measured(kind, names) if torch.cuda.is_available() else {}
    head = ["", "launches", "host reads", "bytes", "exps", "instructions"] + [f"{d.name}, ms" for d in DEVICES]
    head += [f"measured ({torch.cuda.get_device_name()}), ms"] if times else []
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        work = by_device["H100"][name]
        cells = [name, f"{work.launches:,.0f}", f"{work.host_reads:,.0f}"]
        cells += [short(value) for value in (work.bytes, work.exps, work.instructions)]
        for device in DEVICES:
            seconds, bound = by_device[device.name][name].predicted(device)
            cells.append(f"{seconds * 1e3:.3g} ({bound})")
        if times:
            cells.append(f"{times[name]:.3g}" if name in times else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flash", action="store_true", help="compile FlashSinkhorn's kernels, too")
    flash = parser.parse_args().flash
    torch.manual_seed(0)
    print("Predicted: the least time at peak rates, with what binds. Counts are those for the H100.\n")
    n_problems, n_rows, n_cols, n_iters = W1
    print(section(f"W1: {n_problems} problems {n_rows} x {n_cols}, {n_iters} iterations", "dense", dense_rows), "\n")
    n_rows, n_cols, dim, n_iters = W4
    title = f"W4: clouds of {n_rows} and {n_cols} points, {dim} features, {n_iters} iterations"
    print(section(title, "points", lambda device: points_rows(device, flash)), "\n")
    title = "W5: transport attention of a layer, batch {}, {} heads, {} x {}, {} features".format(*LAYER)
    print(section(f"{title}, {STOP} iterations", "attention", attention_rows))


if __name__ == "__main__":
    main()

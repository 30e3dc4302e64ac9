"""How long the kernels of a call take on this machine's GPU, by back end: the table in docs/triton.md.

    python -m benchmarks.gpu_times                 # all workloads
    python -m benchmarks.gpu_times --only clouds   # those whose names contain a word

Milliseconds of all kernels of a call on the device, by PyTorch's profiler, mean of five calls after two; what the host
does is not in them. Inputs are random, all iterations run (tol = 0).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pisces_kernels import sinkhorn, sinkhorn_points, transport_attention, why_not

BACKENDS = ("cuda", "triton", "reference")
DENSE = ((128, 40, 2049, 100), (1024, 40, 2049, 100), (4, 64, 32769, 50), (64, 256, 256, 100), (128, 300, 2049, 50))
CALLS = 5
Run = Callable[[str], object]  # of a back end


def device_time(call: Callable[[], object]) -> float:
    """Milliseconds of all kernels of a call."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / CALLS / 1e3


def workloads() -> Iterator[tuple[str, Run]]:
    """Name, and what runs on a back end; tensors are made when their turn comes."""
    for n_problems, n_rows, n_cols, n_iters in DENSE:
        cost = torch.rand(n_problems, n_rows, n_cols, device="cuda")
        options: dict[str, Any] = {"epsilon": 0.05, "tau": 0.9, "max_iters": n_iters, "tol": 0.0, "gradient": "none"}
        name = f"{n_problems} problems {n_rows} x {n_cols}, {n_iters} iterations"
        yield name, lambda backend, cost=cost, options=options: sinkhorn(cost, **options, backend=backend)
    x, y = torch.rand(4096, 64, device="cuda"), torch.rand(4096, 64, device="cuda")
    for precision in ("float32", "tf32", "bf16"):
        options = {"epsilon": 0.5, "max_iters": 10, "tol": 0.0, "precision": precision}
        name = f"clouds 4096 x 4096, 64 features, 10 iterations, {precision}"
        yield name, lambda backend, options=options: sinkhorn_points(x, y, **options, backend=backend)
    query, key = torch.randn(8, 40, 1024, device="cuda"), torch.randn(8, 2049, 1024, device="cuda")
    attention = torch.rand(8, 16, 40, 2049, device="cuda").softmax(-1)
    geometry = torch.arange(2049, device="cuda") // 256, torch.rand(2049, 2, device="cuda")

    def layer(backend: str, weights: torch.Tensor) -> torch.Tensor:
        return transport_attention(query, key, weights, *geometry, max_iters=35, tol=0.0, backend=backend)

    yield "transport attention, 8 x 16 heads, 40 x 2049, 1024 features, 35 iterations", lambda b: layer(b, attention)
    leaf = attention.clone().requires_grad_()
    yield "the same with its gradient", lambda b: layer(b, leaf).sum().backward()
    cost = torch.rand(128, 40, 2049, device="cuda", requires_grad=True)
    options = {"epsilon": 0.05, "tau": 0.9}
    name = "plan of 128 problems 40 x 2049 to tol 1e-3, with its gradient"
    yield name, lambda b: sinkhorn(cost, **options, backend=b).plan().square().sum().backward()


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the workloads' names")
    only = parser.parse_args().only
    if not torch.cuda.is_available():
        raise SystemExit("gpu_times: this PyTorch sees no GPU.")
    backends = [name for name in BACKENDS if why_not(name) is None]
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}; milliseconds on the device\n")
    print(f"| | {' | '.join(backends)} |\n|{'---|' * (len(backends) + 1)}")
    for name, run in workloads():
        if only in name:
            times = []
            for backend in backends:
                lacks = backend == "reference" and not name.endswith("float32") and name.startswith("clouds")
                times.append("" if lacks else f"{device_time(lambda run=run, b=backend: run(b)):.3g}")
            print(f"| {name} | {' | '.join(times)} |", flush=True)


if __name__ == "__main__":
    main()

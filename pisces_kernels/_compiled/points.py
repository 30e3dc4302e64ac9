"""Point clouds: the solve, one transform, and products with the kernel, streamed."""

from __future__ import annotations

import torch
from torch import Tensor

from ._task import PRECISIONS, address, as_bytes, run


def _run(name: str, x: Tensor, inputs: dict[str, Tensor | None], **options: object) -> None:
    """Call one operation; inputs and outputs are contiguous tensors by name, null where they are None."""
    task: dict[str, object] = {key: address(tensor) for key, tensor in inputs.items()}
    problems, rows, dim = x.shape
    task.update(problems=problems, rows=rows, dim=dim, threads=torch.get_num_threads(), **options)
    run(name, task, x)


def _doubles(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.double().contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    *,
    tau_a: float,
    tau_b: float,
    mass: Tensor | None,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    max_iters: int,
    tol: float,
    acceleration: str | None,
    f_init: Tensor | None,
    g_init: Tensor | None,
    cost: str,
    precision: str = "float32",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve P problems between prepared clouds [P, N, D], [P, M, D]: (f, g, n_iters int32, residual)."""
    problems, cols = b.shape
    results = (
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(b, memory_format=torch.contiguous_format),
        a.new_empty(problems, dtype=torch.int32),
        x.new_empty(problems),
    )
    inputs = {
        "x": x.contiguous(),
        "y": y.contiguous(),
        "a": a.contiguous(),
        "b": b.contiguous(),
        "epsilon": _doubles(epsilon),
        "mass": _doubles(mass),
        "row_mask": as_bytes(row_mask),
        "col_mask": as_bytes(col_mask),
        "f_init": _contiguous(f_init),
        "g_init": _contiguous(g_init),
        **dict(zip(("f", "g", "n_iters", "residual"), results, strict=True)),
    }
    options = {"tau_a": tau_a, "tau_b": tau_b, "tol": tol, "max_iters": max_iters, "precision": PRECISIONS[precision]}
    _run("points_solve", x, inputs, cols=cols, squared=cost != "cosine", anderson=acceleration == "anderson", **options)
    return results


def self_transport(
    x: Tensor, a: Tensor, epsilon: Tensor, tau: float, mask: Tensor | None, max_iters: int, tol: float, cost: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Potential f = g of P clouds [P, N, D] with themselves: (f [P, N], n_iters int32, residual)."""
    problems, rows = a.shape
    results = (
        torch.empty_like(a, memory_format=torch.contiguous_format),
        a.new_empty(problems, dtype=torch.int32),
        x.new_empty(problems),
    )
    inputs = dict.fromkeys(("y", "b", "mass", "col_mask", "f_init", "g_init", "g"))
    inputs.update(x=x.contiguous(), a=a.contiguous(), epsilon=_doubles(epsilon), row_mask=as_bytes(mask))
    inputs.update(zip(("f", "n_iters", "residual"), results, strict=True))
    options = {"tau_a": tau, "tau_b": tau, "tol": tol, "max_iters": max_iters, "precision": PRECISIONS["float32"]}
    _run("points_self", x, inputs, cols=rows, squared=cost != "cosine", anderson=False, **options)
    return results


def soft_minimum(x: Tensor, y: Tensor, potential: Tensor, log_weight: Tensor, epsilon: Tensor, squared: bool) -> Tensor:
    """`reference.soft_minimum` of the streamed cost: potential and log_weight [P, M], epsilon [P, 1] -> [P, N]."""
    result = x.new_empty(x.shape[:-1])
    inputs = dict.fromkeys(("a", "mass", "row_mask", "col_mask", "f_init", "g", "n_iters", "residual"))
    inputs.update(x=x.contiguous(), y=y.contiguous(), b=log_weight.contiguous(), g_init=potential.contiguous())
    inputs.update(epsilon=_doubles(epsilon), f=result)
    options = {"tau_a": 1.0, "tau_b": 1.0, "tol": 0.0, "max_iters": 1, "precision": PRECISIONS["float32"]}
    _run("points_transform", x, inputs, cols=y.shape[-2], squared=squared, anderson=False, **options)
    return result


def product(
    x: Tensor,
    y: Tensor,
    row: Tensor,
    col: Tensor,
    epsilon: Tensor,
    right: Tensor,
    coupling: tuple[Tensor, Tensor] | None,
    squared: bool,
) -> Tensor:
    """K right with K_ij = exp(row_i + col_j - cost_ij / epsilon) <left_i, right_j>; see `_streaming.products`."""
    width = right.shape[-1]
    result = right.new_empty(*row.shape, width)
    left, right_factor = (None, None) if coupling is None else (t.contiguous() for t in coupling)
    inputs = {
        "x": x.contiguous(),
        "y": y.contiguous(),
        "row": row.contiguous(),
        "col": col.contiguous(),
        "epsilon": _doubles(epsilon),
        "right": right.contiguous(),
        "left": left,
        "right_factor": right_factor,
        "out": result,
    }
    factors = 0 if left is None else left.shape[-1]
    _run("points_product", x, inputs, cols=y.shape[-2], width=width, factors=factors, squared=squared)
    return result

"""Dense problems."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._task import address, as_bytes, run


def sinkhorn(cost: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.sinkhorn`, compiled; same arguments and results, with any leading dimensions."""
    task, results, _alive = _task(cost, *others, **options)
    run("sinkhorn", task, cost)
    return results


def _task(
    cost: Tensor,
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
    f_init: Tensor | None,
    g_init: Tensor | None,
    acceleration: str | None = None,
) -> tuple[tuple[float, ...], tuple[Tensor, Tensor, Tensor, Tensor], list[Tensor | None]]:
    """Describe a batch to the compiled code: (task, results, tensors that must outlive the call)."""
    cost, a, b = cost.contiguous(), a.contiguous(), b.contiguous()
    epsilon = epsilon.double().contiguous()
    mass = None if mass is None else mass.double().contiguous()
    row_mask, col_mask = as_bytes(row_mask), as_bytes(col_mask)
    f_init = None if f_init is None else f_init.contiguous()
    g_init = None if g_init is None else g_init.contiguous()
    *batch, rows, cols = cost.shape
    f, g = a.new_empty(a.shape), b.new_empty(b.shape)
    n_iters, residual = a.new_empty(batch, dtype=torch.int32), a.new_empty(batch)
    task = (  # the fields of pk::SinkhornTask (csrc/api.h), in its order
        cost.data_ptr(),
        a.data_ptr(),
        b.data_ptr(),
        epsilon.data_ptr(),
        address(mass),
        address(row_mask),
        address(col_mask),
        address(f_init),
        address(g_init),
        f.data_ptr(),
        g.data_ptr(),
        n_iters.data_ptr(),
        residual.data_ptr(),
        n_iters.numel(),
        rows,
        cols,
        tau_a,
        tau_b,
        tol,
        max_iters,
        acceleration == "anderson",
    )
    alive = [cost, a, b, epsilon, mass, row_mask, col_mask, f_init, g_init]
    return task, (f, g, n_iters, residual), alive

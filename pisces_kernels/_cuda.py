"""Adapter of the CUDA kernel. Compiled, not yet executed on a GPU: it runs only when backend="cuda" is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._cpu.sinkhorn import sinkhorn_task


def sinkhorn(cost: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.sinkhorn` in one launch on the current stream; same arguments and results, without exact mass."""
    if options["mass"] is not None:
        raise ValueError("sinkhorn: backend 'cuda' does not solve for an exact mass. Use backend='reference'.")
    if options["acceleration"] is not None:
        raise ValueError(
            "sinkhorn: backend 'cuda' has no acceleration yet. Use acceleration=None, or backend='reference'."
        )
    task, results, alive = sinkhorn_task(cost, *others, **options)
    module = _dispatch.extension()
    suffix = "f64" if cost.dtype == torch.float64 else "f32"
    n_elements = getattr(module, f"cuda_sinkhorn_workspace_{suffix}")(task)
    workspace = torch.empty(n_elements, dtype=cost.dtype, device=cost.device)
    stream = torch.cuda.current_stream(cost.device)
    launch = getattr(module, f"cuda_sinkhorn_{suffix}")
    launch(task, workspace.data_ptr(), stream.device_index, stream.cuda_stream)
    for tensor in alive:  # inputs made here are freed after this call: the allocator must wait for the stream
        if tensor is not None:
            tensor.record_stream(stream)
    return results

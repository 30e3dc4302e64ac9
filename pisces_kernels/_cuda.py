"""CUDA back end: launches the compiled solver on the current stream of the tensors' device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._cpu.sinkhorn import sinkhorn_task

STORAGES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
}  # pk::Storage (csrc/api.h): how a cost lies in memory


def refuse(cost: Tensor, dtype: torch.dtype, mass: Tensor | None, acceleration: str | None) -> None:
    """Raise ValueError for what the kernels do not do."""
    lacks = None
    if dtype != torch.float32 or cost.dtype not in STORAGES:
        lacks = (
            f"computes in float32 on costs in float32, bfloat16 or float16, got {cost.dtype} and weights for {dtype}"
        )
    elif mass is not None:
        lacks = "does not solve for an exact mass"
    elif acceleration is not None:
        lacks = f"has no acceleration, got {acceleration!r}"
    if lacks is not None:
        raise ValueError(f"sinkhorn: backend 'cuda' {lacks}. Use backend='reference'.")


def place(device: torch.device) -> tuple[int, int]:
    """Index of a CUDA device and the address of its current stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def sinkhorn(cost: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.sinkhorn` in one launch, without exact mass and acceleration; same arguments and results.

    Inputs that are made contiguous here, and the workspace, come from PyTorch's allocator on the stream of the launch
    and may be reused on it as soon as the launch is queued: nothing waits for the device.
    """
    task, results, _alive = sinkhorn_task(cost, *others, **options)
    workspaces = []

    def allocate(n_bytes: int) -> int:
        workspaces.append(torch.empty(n_bytes, dtype=torch.uint8, device=cost.device))
        return workspaces[-1].data_ptr()

    _dispatch.extension().cuda_sinkhorn(task, (STORAGES[cost.dtype], *place(cost.device)), allocate)
    return results

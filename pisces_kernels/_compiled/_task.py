"""What every adapter needs: launching a task where its tensors are, addresses of tensors, masks as bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch

STORAGES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
}  # pk::Storage (csrc/api.h): how the CUDA kernels find some tensors in memory
PRECISIONS = {"float32": 0, "tf32": 1, "bf16": 2}  # pk::Precision: how the CUDA kernels multiply points


def run(name: str, task: tuple[float, ...] | dict[str, object], stored: Tensor) -> None:
    """Run a task where its tensors are.

    On CUDA it is queued on the current stream. Inputs that were made contiguous for it, and its workspace, come from
    PyTorch's allocator on that stream and may be reused on it as soon as the launch is queued: nothing waits.

    Args:
        name: of the operation.
        task: fields of its struct in csrc/api.h.
        stored: one of its tensors: says which device; the dtype in memory on CUDA; float32 or float64 on CPUs.
    """
    if _dispatch.kind(stored.device) == "cpu":
        suffix = "f64" if stored.dtype == torch.float64 else "f32"
        getattr(_dispatch.extension(), f"cpu_{name}_{suffix}")(task, torch.get_num_threads())
        return
    workspaces = []

    def allocate(n_bytes: int) -> int:
        workspaces.append(torch.empty(n_bytes, dtype=torch.uint8, device=stored.device))
        return workspaces[-1].data_ptr()

    where = (STORAGES[stored.dtype], *_dispatch.cuda_place(stored.device))
    getattr(_dispatch.extension(), f"cuda_{name}")(task, where, allocate)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)

"""How every adapter reads its tensors, makes its results and starts its kernels.

The tests and the budget of the machine code replace what is here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.autotuner import Autotuner

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when kernels are defined, that is now
Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]


def read(tensor: Tensor | None) -> Any:
    """A tensor as the kernels read it: contiguous, masks as bytes; None stays None."""
    if tensor is None:
        return None
    return tensor.contiguous().view(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a result or for scratch, on the device of another tensor; the kernels write all of a result."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device surely runs at the same time; 1 in the interpreter, which runs one after the other."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def architecture() -> int | str:
    """Compute capability of an NVIDIA device times ten, or the name of AMD's ("gfx942"); 90 in the interpreter."""
    return 90 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def lanes() -> int:
    """Threads of a warp: 32 on NVIDIA, 64 on AMD's data centre devices."""
    return 32 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().warp_size)


def launch(kernel: Any, grid: Grid, *arguments: Any, **options: Any) -> None:
    """Start a kernel where its first argument is, on PyTorch's current stream.

    An autotuned kernel is tuned at its first launch for its key, which times its few configurations. With
    `torch.use_deterministic_algorithms(True)`, in a graph's capture and in the interpreter its first configuration
    runs: the sums of another one have another order.
    """
    fixed = INTERPRETED or torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing()
    if isinstance(kernel, Autotuner) and fixed:
        options = {**kernel.configs[0].all_kwargs(), **options}
        kernel = kernel.fn
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)

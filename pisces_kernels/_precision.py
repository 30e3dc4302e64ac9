"""Computing in the dtype of the inputs, whatever autocast and the float32 settings of matrix products say."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PER_BACKEND = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # since PyTorch 2.9; before, one setting for all


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """No autocast inside; nothing is built where there is none, which is 6 us cheaper."""
    # The meta device has no autocast to ask for.
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


class full_precision:
    """Matrix products in the dtype of their inputs: no autocast, no TF32, no bfloat16 inside, whatever the settings."""

    def __init__(self, device: torch.device) -> None:
        self._autocast = no_autocast(device.type)
        self._owner = None
        if PER_BACKEND:
            self._owner = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul

    def __enter__(self) -> None:
        if self._owner is not None:
            self._before = self._owner.fp32_precision
            self._owner.fp32_precision = "ieee"
        else:
            self._before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        self._autocast.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._autocast.__exit__(*error)
        if self._owner is not None:
            self._owner.fp32_precision = self._before
        else:
            torch.set_float32_matmul_precision(self._before)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward formula compute as the forward did, also when it is called inside torch.autocast."""

    @functools.wraps(backward)
    def run(ctx: Any, grad: Tensor, *others: Tensor) -> Any:
        with no_autocast(grad.device.type):
            return backward(ctx, grad, *others)

    return run

"""Computing in the dtype of the inputs, whatever autocast and the float32 settings of matrix products say."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in the dtype of their inputs: no autocast, no TF32, no bfloat16 inside, whatever the settings."""
    owners = [m for m in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if hasattr(m, "fp32_precision")]
    before = [owner.fp32_precision for owner in owners]
    older = None if owners else torch.get_float32_matmul_precision()  # PyTorch before 2.9
    autocast = (
        torch.autocast(device.type, enabled=False)
        if torch.amp.is_autocast_available(device.type)
        else contextlib.nullcontext()
    )
    try:
        for owner in owners:
            owner.fp32_precision = "ieee"
        if older is not None:
            torch.set_float32_matmul_precision("highest")
        with autocast:
            yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value
        if older is not None:
            torch.set_float32_matmul_precision(older)


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward formula compute as the forward did, also when it is called inside torch.autocast."""

    @functools.wraps(backward)
    def run(ctx: Any, grad: Tensor, *others: Tensor) -> Any:
        if not torch.amp.is_autocast_available(grad.device.type):  # the meta device has none
            return backward(ctx, grad, *others)
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad, *others)

    return run

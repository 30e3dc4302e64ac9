"""Argument checks shared by the public functions: who, got, wanted, do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The usual types first: isinstance of an abstract class is slow.
REAL, INTEGRAL = (float, int, Real), (int, Integral)


def floating(who: str, name: str, value: object, ndim: int | None = None) -> Tensor:
    """Return value if it is a floating tensor (with ndim dimensions), else raise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{who}: {name} is a {type(value).__name__}, expected a torch.Tensor.")
    if value.dtype not in FLOATS:
        raise TypeError(f"{who}: {name} has dtype {value.dtype}, expected a floating dtype. Call .float() on it.")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{who}: {name} has shape {tuple(value.shape)}, expected {ndim} dimensions.")
    return value


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32: half precision is accumulated in float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def same_device(who: str, first: Tensor, **others: object) -> None:
    """Raise unless every other argument is None or a tensor on the device of the first."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{who}: {name} is a {type(tensor).__name__}, expected a torch.Tensor.")
        if tensor.device != first.device:
            raise ValueError(f"{who}: {name} is on {tensor.device}, expected {first.device}. Move it with .to().")


def broadcast(who: str, name: str, value: Tensor, shape: Sequence[int], meaning: str) -> Tensor:
    """Expand value to shape, or raise with the wanted shape and what it means."""
    try:
        return value.expand(tuple(shape))
    except RuntimeError:
        raise ValueError(
            f"{who}: {name} has shape {tuple(value.shape)}, expected {tuple(shape)} = {meaning} "
            "or a shape that broadcasts to it."
        ) from None


def mask(who: str, name: str, value: Tensor | None, shape: Sequence[int], meaning: str) -> Tensor | None:
    """Expand a boolean mask to shape; None stays None."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{who}: {name} is {got}, expected a bool tensor that is True where the entry exists.")
    return broadcast(who, name, value, shape, meaning)


def readable(*tensors: Tensor) -> bool:
    """True when values may be looked at without stopping a device or breaking a graph or function transform."""
    return not torch.compiler.is_compiling() and all(
        type(t) is Tensor and t.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        for t in tensors
    )


def extremes(value: Tensor) -> tuple[float, float]:
    """Smallest and largest entry, both NaN if any is; (1, 1) without entries."""
    if value.numel() == 0:
        return 1.0, 1.0
    low, high = value.detach().aminmax()
    return low.item(), high.item()


def weights(who: str, name: str, value: Tensor) -> None:
    """Raise for negative or non-finite weights; CPU tensors only, others are reported through the residual."""
    if not readable(value):
        return
    low, high = extremes(value)
    if not 0.0 <= low <= high < math.inf:
        raise ValueError(f"{who}: {name} has negative or non-finite entries, expected finite weights >= 0.")


def unit_interval(who: str, name: str, value: float) -> float:
    """Return value if it is in (0, 1]."""
    if not isinstance(value, REAL) or not 0.0 < float(value) <= 1.0:
        raise ValueError(f"{who}: {name} is {value!r}, expected a number in (0, 1].")
    return float(value)


def number(who: str, name: str, value: float) -> float:
    """Return value if it is a finite number."""
    if not isinstance(value, REAL) or not math.isfinite(value):
        raise ValueError(f"{who}: {name} is {value!r}, expected a finite number.")
    return float(value)


def positive(who: str, name: str, value: float) -> float:
    """Return value if it is a finite number > 0."""
    if not isinstance(value, REAL) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{who}: {name} is {value!r}, expected a finite number > 0.")
    return float(value)


def stopping(who: str, max_iters: int, tol: float) -> tuple[int, float]:
    """Return (max_iters, tol) if max_iters is in [1, 2^31) and tol >= 0."""
    if isinstance(max_iters, bool) or not isinstance(max_iters, INTEGRAL) or not 1 <= max_iters < 2**31:
        raise ValueError(f"{who}: max_iters is {max_iters!r}, expected an int >= 1 (and < 2^31, where it is counted).")
    if not isinstance(tol, REAL) or not tol >= 0:
        raise ValueError(f"{who}: tol is {tol!r}, expected a number >= 0 (0 runs all iterations).")
    return int(max_iters), float(tol)

"""What a decoder carries from one chunk of a video to the next: nested tuples, lists and dicts of tensors and flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Cache = Any
"""A tensor, None, a string or a number, or a tuple, list or dict of caches."""


def tensors(cache: Cache) -> list[Tensor]:
    """All tensors of a cache, in an order that its structure fixes."""
    found: list[Tensor] = []
    replaced(cache, found.append)
    return found


def replaced(cache: Cache, change: Callable[[Tensor], Any]) -> Cache:
    """The same structure with every tensor changed."""
    if isinstance(cache, Tensor):
        return change(cache)
    if isinstance(cache, dict):
        return {name: replaced(entry, change) for name, entry in cache.items()}
    if isinstance(cache, list | tuple):
        return type(cache)(replaced(entry, change) for entry in cache)
    return cache


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory: pinned and without waiting where the device has its own memory."""
    if tensor.device.type == "meta":  # for a plan: it takes none of the device's
        return tensor.new_empty(1).expand(tensor.shape)
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return host.copy_(tensor, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Back from :func:`to_host`; the copy is ordered behind the one that went there."""
    if device.type == "meta":
        return tensor.contiguous()
    return tensor.to(device, non_blocking=True)

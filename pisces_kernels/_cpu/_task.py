"""What every adapter needs: the compiled function of a dtype, addresses of tensors, masks as bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _dispatch


def kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    return getattr(_dispatch.extension(), f"cpu_{name}_{'f64' if dtype == torch.float64 else 'f32'}")


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)

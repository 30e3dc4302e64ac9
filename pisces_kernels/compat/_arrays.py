"""From NumPy arrays, lists and torch tensors to tensors, and back to what the caller uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks

_FROM_NUMPY = {
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


@dataclass(frozen=True)
class Origin:
    """What the caller's arrays are; results go back to the same.

    Attributes:
        numpy: True for NumPy arrays and plain lists, False for torch tensors.
        dtype: floating dtype of the results; whole numbers become float64 (NumPy) or the default dtype (torch).
        device: where the tensors are.
    """

    numpy: bool
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, who: str, **values: Any) -> Origin:
        """Read the origin off the arguments; lists, None and empty arrays take that of the others."""
        arrays = {}
        for name, value in values.items():
            if isinstance(value, np.ndarray | np.generic | Tensor):
                if (value.numel() if isinstance(value, Tensor) else value.size) > 0:
                    arrays[name] = value
            elif value is not None and not isinstance(value, list | tuple):
                raise ValueError(f"{who}: {name} is a {type(value).__name__}, expected a NumPy array or torch tensor.")
        tensors = {name: value for name, value in arrays.items() if isinstance(value, Tensor)}
        if not tensors:
            common = np.result_type(*arrays.values()) if arrays else np.dtype(np.float64)
            return cls(True, _FROM_NUMPY.get(common, torch.float64), torch.device("cpu"))
        if len(tensors) < len(arrays):
            others = [name for name in arrays if name not in tensors]
            raise ValueError(f"{who}: {', '.join(tensors)} in torch, {', '.join(others)} in NumPy. Convert one side.")
        first, *rest = tensors.values()
        _checks.same_device(who, first, **tensors)
        dtype = first.dtype
        for tensor in rest:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return cls(False, dtype if dtype in _checks.FLOATS else torch.get_default_dtype(), first.device)

    def tensor(self, value: Any) -> Tensor:
        """The value as a tensor to compute with: float32 for half precision; a torch tensor keeps its gradient."""
        working = torch.float64 if self.dtype == torch.float64 else torch.float32
        if isinstance(value, Tensor):
            return value.to(self.device, working)
        array = np.asarray(value)
        array = np.require(array, array.dtype if array.dtype in _FROM_NUMPY else np.float64, ["C", "W"])
        return torch.from_numpy(array).to(self.device, working)

    def array(self, value: Tensor) -> Any:
        """The result for the caller: a NumPy array (a NumPy scalar for one number) or a tensor."""
        value = value.to(self.dtype)
        return value.detach().numpy()[()] if self.numpy else value

"""Peak memory and work of operations on tensors, counted as they are called: with contents or without."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class TensorMeter(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside the block and still alive.

    What kernels use inside themselves (workspaces, an allocator's rounding) is not seen.

    Args:
        there: tensors that were made before: one that is looked at through a view (every linear layer's weight is) or
            changed in place would be taken for a new one otherwise.

    Attributes:
        peak: most bytes alive at a time.
        flops: floating-point operations of convolutions and matrix products, by PyTorch's own formulas.

    Example:
        >>> import torch
        >>> from pisces.decode.meter import TensorMeter
        >>> with TensorMeter() as meter:
        ...     x = torch.zeros(1000)
        ...     x = x + 1
        >>> meter.peak
        8000
    """

    def __init__(self, there: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.peak = self.alive = self.flops = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it made."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.alive -= size

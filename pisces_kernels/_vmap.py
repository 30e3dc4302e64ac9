"""torch.func.vmap for operators whose tensors all lead with dimensions of independent problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fold_into_problems(operator: Callable[..., Any]) -> None:
    """Register a vmap rule that makes the mapped dimension part of dimension 0 of every tensor.

    Args:
        operator: a custom op whose tensor arguments and results all have the problems in dimension 0.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size

        def fold(argument: Any, dim: int | None) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            mapped = argument.expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            return mapped.reshape(size * mapped.shape[1], *mapped.shape[2:])

        results = operator(*(fold(argument, dim) for argument, dim in zip(arguments, in_dims, strict=True)))
        alone = isinstance(results, Tensor)
        unfolded = tuple(
            result.reshape(size, result.shape[0] // size, *result.shape[1:])
            for result in ((results,) if alone else results)
        )
        return (unfolded[0], 0) if alone else (unfolded, (0,) * len(unfolded))

    torch.library.register_vmap(operator, rule)


def lead_with_mapped(operator: Callable[..., Any]) -> None:
    """Register a vmap rule that makes the mapped dimension the first of every tensor.

    Args:
        operator: a custom op whose tensor arguments and results all lead with the same dimensions of problems, as many
            as there are.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        def lead(argument: Any, dim: int | None) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            return argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)

        results = operator(*(lead(argument, dim) for argument, dim in zip(arguments, in_dims, strict=True)))
        return results, (0,) * len(results)

    torch.library.register_vmap(operator, rule)

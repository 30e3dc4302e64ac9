"""Derivatives of compiled operators by the plain torch formulas that they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._autograd import differentiable
from ._precision import without_autocast


def differentiable_by(operator: Any, formulas: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Differentiate a custom op as if it computed `formulas`, and return the function to call instead of it.

    The gradient runs the formulas with a graph: for operators that are gradients themselves, so that only second
    derivatives pay for it.

    Args:
        operator: see `_autograd.differentiable`; it returns a tuple of floating tensors.
        formulas: torch code with the arguments (positional) and results of the operator.

    Returns:
        A function with the arguments (positional) and results of the operator.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.constants = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if constant is None else constant[0] for constant in ctx.constants]
        floating = [k for k, value in enumerate(inputs) if isinstance(value, Tensor) and value.is_floating_point()]

        def of_floating(*values: Tensor) -> tuple[Tensor, ...]:
            full = list(inputs)
            for k, value in zip(floating, values, strict=True):
                full[k] = value
            return formulas(*full)

        _, pullback = torch.func.vjp(of_floating, *(inputs[k] for k in floating))
        results: list[Tensor | None] = [None] * len(inputs)
        for k, value in zip(floating, pullback(grads), strict=True):
            results[k] = value
        return tuple(results)

    return differentiable(operator, backward, setup_context)

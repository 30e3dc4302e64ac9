"""Gradients of custom operators, seen by autograd, by torch.compile and by torch.func alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def differentiable(
    operator: Any, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Register the gradient of a custom op and return the function to call instead of it.

    The gradient registered with the op is what torch.compile and `torch.library.opcheck` use, but torch.func.grad
    refuses it (PyTorch 2.13: the generated Function has no separate setup_context) and forward-mode derivatives of it
    are silently zero. Outside of a traced graph the op is therefore called through an autograd.Function with the same
    formulas: torch.func.grad, vjp and vmap work and compose, torch.func.jvp raises NotImplementedError.

    Args:
        operator: what `torch.library.custom_op` returned; its vmap rule is registered apart.
        backward: (ctx, *grads) -> one gradient or None per argument, in plain torch that can be differentiated again.
        setup_context: (ctx, inputs, output).

    Returns:
        A function with the arguments (positional) and results of the op.
    """
    operator.register_autograd(backward, setup_context=setup_context)
    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(lambda *inputs: operator(*inputs)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    function: Any = type(f"{operator._name}_function", (torch.autograd.Function,), members)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*inputs)
        return function.apply(*inputs)

    return call

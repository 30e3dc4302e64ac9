"""Gradients of custom operators, seen by autograd, by torch.compile and by torch.func alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

# Parts of PyTorch without a promise. Without any one of them every call takes the way that serves all transforms.
try:
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _any_requires_grad,
        _dispatch_keys,
        _dispatch_tls_local_include_set,
        _len_torch_function_stack,
    )
    from torch.autograd.function import _SingleLevelFunction

    SHORT_WAY = hasattr(forward_ad, "_current_level") and hasattr(profiler, "_is_profiler_enabled")
except ImportError:
    SHORT_WAY = False


def _bits(*keys: Any) -> int:
    bits = 0
    for key in keys:
        bits |= DispatchKeySet(key).raw_repr()
    return bits


# What the dispatcher knows of a dense CPU tensor and of a thread that only computes. Whatever can stand between a call
# and its numbers adds a key: vmap and grad, fake and functional tensors, dispatch modes, tracers, lazy negation.
if SHORT_WAY:
    _TENSOR_KEYS = _bits(DispatchKey.CPU, DispatchKey.AutogradCPU, DispatchKey.ADInplaceOrView, DispatchKey.AutocastCPU)
    _THREAD_KEYS = _bits(DispatchKey.BackendSelect, DispatchKey.ADInplaceOrView)


def _only_computes(inputs: tuple[Any, ...]) -> bool:
    """True when nothing but reverse-mode autograd has to see an operation on these inputs."""
    if (
        _dispatch_tls_local_include_set().raw_repr() | _THREAD_KEYS != _THREAD_KEYS
        or _len_torch_function_stack() != 0
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    ):
        return False
    for x in inputs:
        if type(x) is Tensor or type(x) is Parameter:
            if _dispatch_keys(x).raw_repr() | _TENSOR_KEYS != _TENSOR_KEYS:
                return False
        elif isinstance(x, Tensor):
            return False
    return True


def differentiable(
    operator: Any, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Register the gradient of a custom op and return the function to call instead of it.

    The gradient registered with the op is what torch.compile and `torch.library.opcheck` use, but torch.func.grad
    refuses it (PyTorch 2.13: the generated Function has no separate setup_context) and forward-mode derivatives of it
    are silently zero. Outside of a traced graph the op is therefore called through an autograd.Function with the same
    formulas: torch.func.grad, vjp and vmap work and compose, torch.func.jvp raises NotImplementedError.

    Where only autograd has to see the operation, the op's own code runs in a Function without the preparations for
    transforms: the dispatcher and `torch.autograd.Function.apply` take 0.1 ms, more than a small problem.

    Args:
        operator: what `torch.library.custom_op` returned; its vmap rule is registered apart.
        backward: (ctx, *grads) -> one gradient or None per argument, in plain torch that can be differentiated again.
        setup_context: (ctx, inputs, output).

    Returns:
        A function with the arguments (positional) and results of the op.
    """
    operator.register_autograd(backward, setup_context=setup_context)
    name = f"{operator._name}_function"
    formulas = {"setup_context": staticmethod(setup_context), "backward": staticmethod(backward)}
    transformed: Any = type(
        name,
        (torch.autograd.Function,),
        {**formulas, "forward": staticmethod(lambda *inputs: operator(*inputs)), "generate_vmap_rule": True},
    )

    def any_way(*inputs: Any) -> Any:
        return operator(*inputs) if torch.compiler.is_compiling() else transformed.apply(*inputs)

    compute = getattr(operator, "_init_fn", None)
    if not SHORT_WAY or compute is None:
        return any_way
    direct: Any = type(name, (_SingleLevelFunction,), {**formulas, "forward": staticmethod(compute)})

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or not _only_computes(inputs):
            return any_way(*inputs)
        if torch.is_grad_enabled() and _any_requires_grad(*inputs):
            return direct.apply(*inputs)
        return compute(*inputs)

    return call

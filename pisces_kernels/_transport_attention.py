"""Cross-attention refined by partial optimal transport: the public function, its checks, custom op and gradient."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _checks, _dispatch, reference
from ._autograd import differentiable
from ._precision import full_precision, without_autocast
from ._sinkhorn import sinkhorn
from ._token_cost import features, geometry, token_cost
from ._vmap import fold_into_problems

WHO = "transport_attention"


@overload
def transport_attention(
    query: Tensor, key: Tensor, attention: Tensor, frame_index: Tensor, positions: Tensor, *,
    epsilon: float = ..., tau: float = ..., mass: float | None = ..., row_mask: Tensor | None = ...,
    max_iters: int = ..., tol: float = ..., gamma: float = ..., eta: float = ..., return_plan: Literal[False] = ...,
    differentiable_plan: bool = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def transport_attention(
    query: Tensor, key: Tensor, attention: Tensor, frame_index: Tensor, positions: Tensor, *,
    epsilon: float = ..., tau: float = ..., mass: float | None = ..., row_mask: Tensor | None = ...,
    max_iters: int = ..., tol: float = ..., gamma: float = ..., eta: float = ..., return_plan: Literal[True],
    differentiable_plan: bool = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def transport_attention(
    query: Tensor,
    key: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    *,
    epsilon: float = 0.05,
    tau: float = 0.9,
    mass: float | None = None,
    row_mask: Tensor | None = None,
    max_iters: int = 200,
    tol: float = 1e-3,
    gamma: float = 0.2,
    eta: float = 0.2,
    return_plan: bool = False,
    differentiable_plan: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Refine cross-attention by a partial transport plan between text and video tokens, per sample and head.

    refined = softmax_j(log(attention + 1e-6) + log(plan / plan row sum + 1e-6)), where plan solves `sinkhorn` on
    `token_cost(query, key, attention, ...)` with uniform marginals over the selected rows and over all columns.

    Args:
        query: [B, Q, D] floating, features of text tokens (heads concatenated).
        key: [B, M, D] floating, features of video tokens.
        attention: [B, H, Q, M] floating, cross-attention probabilities.
        frame_index: [M] or [B, M] floating or integer, time of each video token in any unit, from any origin; a CLS
            token has -1 (one frame before the first).
        positions: [M, 2] or [B, M, 2] floating or integer, place of each video token, in [0, 1]; a CLS token has
            (-1, -1). Tokens may lie anywhere: no grid is assumed.
        epsilon: entropic regularisation, in units of the cost's range. Default of PISCES: 0.05.
        tau: damping of both marginals, rho / (rho + epsilon). The released code's "m" is this number; default 0.9.
        mass: exact transported mass in (0, 1] (the paper's m); excludes tau, which is then not used.
        row_mask: [B, Q] bool, True for the rows to refine (the lexical tokens). Cost scaling and transport run over
            these rows only; the others come back bit for bit.
        max_iters: most iterations. A plan that has not converged by then is used as it is: about 35 iterations reach
            1e-3 with the defaults. `sinkhorn` on the `token_cost` returns the flags (n_iters, residual, converged).
        tol: stop below this residual.
        gamma: weight of time in the cost.
        eta: weight of place in the cost.
        return_plan: also return the plan.
        differentiable_plan: let gradients flow through the plan too (to query, key and attention).
        backend: None (the best that can run), "reference", "cpu", "cuda" or "triton" (float32).

    Returns:
        [B, H, Q, M] in the dtype of attention, computed in float32 or float64 also under torch.autocast; with
        return_plan also the plan [B, H, Q, M] (float32, or float64 if an input is float64), zero in rows that are not
        selected. A NaN or inf in what a head reads is not hidden: its selected rows are NaN then.

    Memory:
        On the "cpu" back end one head's cost a thread; on "cuda" [B, Q, M] floats, and the kernel matrices of the heads
        that run at the same time where they do not fit on chip; never [B, H, Q, M] beyond what is returned. On
        "triton" the cost and its kernel matrix, [B, H, Q, M] floats each.

    Gradient:
        With the plan held constant:
        attention_bar = refined * (refined_bar - sum_j refined * refined_bar) / (attention + 1e-6),
        which can be differentiated again; saved: attention and the result. With differentiable_plan the composition of
        the three steps is differentiated (first derivatives), which keeps [B, H, Q, M] intermediates. torch.func.grad,
        vjp and vmap work; forward mode (jvp) raises.

    Raises:
        TypeError: an input has the wrong kind of dtype.
        ValueError: shapes, devices or ranges do not fit.

    Example:
        >>> import torch
        >>> from pisces_kernels import transport_attention
        >>> query, key = torch.randn(2, 5, 16), torch.randn(2, 12, 16)
        >>> attention = torch.softmax(torch.randn(2, 4, 5, 12), -1)
        >>> frame_index = torch.arange(3).repeat_interleave(4)
        >>> positions = torch.cartesian_prod(torch.linspace(0, 1, 2), torch.linspace(0, 1, 2)).repeat(3, 1)
        >>> transport_attention(query, key, attention, frame_index, positions).sum(-1).allclose(torch.ones(2, 4, 5))
        True

    Source: PISCES (arXiv 2602.01624), semantic reward and released code.
    """
    batch, _, n_rows, n_cols = features(WHO, ("query", "key"), query, key, attention)
    _checks.same_device(
        WHO, query, key=key, attention=attention, frame_index=frame_index, positions=positions, row_mask=row_mask
    )
    dtype = _checks.working_dtype(query, key, attention)
    frames, places = geometry(WHO, frame_index, positions, batch, n_cols, dtype)
    row_mask = _checks.mask(WHO, "row_mask", row_mask, (batch, n_rows), "(B, Q)")
    epsilon = _checks.positive(WHO, "epsilon", epsilon)
    tau = _checks.unit_interval(WHO, "tau", tau)
    gamma, eta = _checks.number(WHO, "gamma", gamma), _checks.number(WHO, "eta", eta)
    if mass is not None:
        mass = _checks.unit_interval(WHO, "mass", mass)
    max_iters, tol = _checks.stopping(WHO, max_iters, tol)
    chosen = _dispatch.resolve(WHO, backend, query.device, dtype)
    stored = dtype  # of what the kernels read
    if chosen in ("cuda", "triton") and query.dtype == key.dtype == attention.dtype and not differentiable_plan:
        stored = attention.dtype
    wide = attention.to(stored)
    if differentiable_plan:
        refined, plan = _composition(
            query.to(dtype), key.to(dtype), wide, frames, places, epsilon, tau, mass, row_mask, max_iters, tol, gamma,
            eta, chosen,
        )  # fmt: skip
    else:
        refined, plan = _transport_attention(
            wide, query.detach().to(stored), key.detach().to(stored), frames, places, epsilon, tau, mass, row_mask,
            max_iters, tol, gamma, eta, return_plan, chosen,
        )  # fmt: skip
    refined = refined.to(attention.dtype)
    return (refined, plan) if return_plan else refined


def _composition(
    query: Tensor,
    key: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    epsilon: float,
    tau: float,
    mass: float | None,
    row_mask: Tensor | None,
    max_iters: int,
    tol: float,
    gamma: float,
    eta: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The three steps one after the other, each with its own gradient."""
    cost = token_cost(
        query, key, attention, frame_index, positions, gamma=gamma, eta=eta, row_mask=row_mask, backend=backend
    )
    rows = None if row_mask is None else row_mask.unsqueeze(1)  # [B, 1, Q]
    result = sinkhorn(
        cost,
        epsilon=epsilon,
        tau=tau if mass is None else 1.0,
        mass=mass,
        row_mask=rows,
        max_iters=max_iters,
        tol=tol,
        backend=backend,
    )
    return reference.fuse(attention, reference.row_plan(cost, result.g, epsilon), row_mask), result.plan()


@torch.library.custom_op("pisces_kernels::transport_attention", mutates_args=())
def _transport_attention_op(
    attention: Tensor,
    query: Tensor,
    key: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    epsilon: float,
    tau: float,
    mass: float | None,
    row_mask: Tensor | None,
    max_iters: int,
    tol: float,
    gamma: float,
    eta: float,
    return_plan: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Refined attention and plan (empty unless asked for) on one back end."""
    options: dict[str, Any] = {"epsilon": epsilon, "tau": tau, "mass": mass, "row_mask": row_mask}
    options.update(max_iters=max_iters, tol=tol, gamma=gamma, eta=eta)
    if _dispatch.has_kernel("transport_attention", backend):
        fused = _dispatch.kernel("transport_attention", backend)
        return fused(query, key, attention, frame_index, positions, return_plan=return_plan, **options)
    with full_precision(query.device):  # the cost is compared with epsilon: no half precision or TF32 inside
        refined, plan = reference.transport_attention(query, key, attention, frame_index, positions, **options)
    return refined, plan if return_plan else plan.new_empty(0)


@_transport_attention_op.register_fake
def _(attention: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    *_, return_plan, _backend = others
    refined = torch.empty_like(attention, memory_format=torch.contiguous_format)
    plan = attention.new_empty(attention.shape if return_plan else 0, dtype=_checks.working_dtype(attention))
    return refined, plan


def _held_gradient(grad: Tensor, attention: Tensor, refined: Tensor, row_mask: Tensor | None) -> Tensor:
    """Gradient with respect to attention with the plan held, where refined = (A + c) P / sum (A + c) P."""
    slope = refined / (attention + reference.ATTENTION_FLOOR)
    fused = slope * (grad - (refined * grad).sum(-1, keepdim=True))
    return fused if row_mask is None else torch.where(row_mask[:, None, :, None], fused, grad)


@torch.library.custom_op("pisces_kernels::transport_attention_backward", mutates_args=())
def _backward_op(grad: Tensor, attention: Tensor, refined: Tensor, row_mask: Tensor | None, backend: str) -> Tensor:
    """`_held_gradient` on one back end."""
    if _dispatch.has_kernel("fusion_gradient", backend):
        return _dispatch.kernel("fusion_gradient", backend)(grad, attention, refined, row_mask)
    return _held_gradient(grad, attention, refined, row_mask)


@_backward_op.register_fake
def _(grad: Tensor, *unused: object) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


@without_autocast
def _backward_again(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives: differentiate the formula."""
    *tensors, row_mask = ctx.saved_tensors

    def formula(grad: Tensor, attention: Tensor, refined: Tensor) -> Tensor:
        return _held_gradient(grad, attention, refined, row_mask)

    _, pullback = torch.func.vjp(formula, *tensors)
    return *pullback(grad), None, None


fold_into_problems(_backward_op)
_held_gradient_on = differentiable(_backward_op, _backward_again, _backward_setup_context)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    refined, plan = output
    ctx.mark_non_differentiable(plan)
    ctx.save_for_backward(inputs[0], refined, inputs[8])
    ctx.backend = inputs[-1]


def _backward(ctx: Any, grad: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    attention, refined, row_mask = ctx.saved_tensors
    return _held_gradient_on(grad, attention, refined, row_mask, ctx.backend), *([None] * 14)


fold_into_problems(_transport_attention_op)
_transport_attention = differentiable(_transport_attention_op, _backward, _setup_context)

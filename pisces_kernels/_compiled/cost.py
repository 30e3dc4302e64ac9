"""The token cost, alone and inside transport attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import working_dtype
from ._task import address, as_bytes, run


def _cost_inputs(
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> dict[str, Tensor | None]:
    """What the cost kernels read; the tensors must live until they are done."""
    return {
        "text": text.contiguous(),
        "video": video.contiguous(),
        "attention": attention.contiguous(),
        "frame": frame_index.contiguous(),
        "positions": positions.contiguous(),
        "row_mask": as_bytes(row_mask),
        "col_mask": as_bytes(col_mask),
    }


def _cost_task(
    inputs: dict[str, Tensor | None], shape: torch.Size, dim: int, gamma: float, eta: float, normalize: bool
) -> dict[str, object]:
    task: dict[str, object] = {name: address(tensor) for name, tensor in inputs.items()}
    task.update(zip(("samples", "heads", "rows", "cols"), shape, strict=True))
    task.update(dim=dim, gamma=gamma, place_weight=eta / 2**0.5, normalize=normalize)
    task.setdefault("cost", 0)
    return task


def token_cost(
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    *,
    gamma: float,
    eta: float,
    normalize: bool,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> Tensor:
    """`reference.token_cost`, compiled; same arguments and result."""
    inputs = _cost_inputs(text, video, attention, frame_index, positions, row_mask, col_mask)
    cost = attention.new_empty(attention.shape)
    task = _cost_task(inputs, attention.shape, text.shape[-1], gamma, eta, normalize)
    task["cost"] = cost.data_ptr()
    run("token_cost", task, attention)
    return cost


def token_cost_gradient(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    cost: Tensor,
    gamma: float,
    eta: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_token_cost.gradients`, compiled; same arguments and results."""
    inputs = _cost_inputs(text, video, attention, frame_index, positions, row_mask, col_mask)
    inputs.update(grad=grad.contiguous(), cost=cost.contiguous())
    task = _cost_task(inputs, attention.shape, text.shape[-1], gamma, eta, normalize)
    results = tuple(t.new_empty(t.shape) for t in (text, video, attention))
    task.update(zip(("grad_text", "grad_video", "grad_attention"), map(address, results), strict=True), grad_cosine=0)
    run("token_cost_gradient", task, cost)
    return results[0], results[1], results[2]


def cosine_gradient(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    cost: Tensor,
    gamma: float,
    eta: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """What CUDA has of `token_cost_gradient`: the gradients of the cosines [B, N, M] and of the attention."""
    inputs = _cost_inputs(text, video, attention, frame_index, positions, row_mask, col_mask)
    inputs.update(grad=grad.contiguous(), cost=cost.contiguous())
    task = _cost_task(inputs, attention.shape, text.shape[-1], gamma, eta, normalize)
    to_cosine = cost.new_empty(cost.shape[0], *cost.shape[2:])
    to_attention = attention.new_empty(attention.shape)
    task.update(grad_cosine=to_cosine.data_ptr(), grad_attention=to_attention.data_ptr(), grad_text=0, grad_video=0)
    run("token_cost_gradient", task, cost)
    return to_cosine, to_attention


def transport_attention(
    query: Tensor,
    key: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    *,
    epsilon: float,
    tau: float,
    mass: float | None,
    row_mask: Tensor | None,
    max_iters: int,
    tol: float,
    gamma: float,
    eta: float,
    return_plan: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.transport_attention`, compiled, without a cost in memory; the plan is empty unless asked for."""
    inputs = _cost_inputs(query, key, attention, frame_index, positions, row_mask, None)
    refined = attention.new_empty(attention.shape)
    plan = attention.new_empty(attention.shape if return_plan else 0, dtype=working_dtype(attention))
    task = _cost_task(inputs, attention.shape, query.shape[-1], gamma, eta, True)
    task.update(epsilon=epsilon, tau=tau, mass=0.0 if mass is None else mass, tol=tol, max_iters=max_iters)
    task.update(refined=refined.data_ptr(), plan=plan.data_ptr() if return_plan else 0)
    run("transport_attention", task, attention)
    return refined, plan


def fusion_gradient(grad: Tensor, attention: Tensor, refined: Tensor, row_mask: Tensor | None) -> Tensor:
    """Gradient of transport attention with respect to attention, the plan held: see `_transport_attention`."""
    inputs = {
        "grad": grad.contiguous(),
        "attention": attention.contiguous(),
        "refined": refined.contiguous(),
        "row_mask": as_bytes(row_mask),
    }
    result = grad.new_empty(grad.shape)
    task: dict[str, object] = {name: address(tensor) for name, tensor in inputs.items()}
    task.update(zip(("samples", "heads", "rows", "cols"), grad.shape, strict=True))
    task["result"] = result.data_ptr()
    run("fusion_gradient", task, grad)
    return result

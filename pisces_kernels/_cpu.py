"""Adapter of the compiled CPU kernels: contiguous tensors, their addresses, and PyTorch's thread count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _dispatch


def _kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    return getattr(_dispatch.extension(), f"cpu_{name}_{'f64' if dtype == torch.float64 else 'f32'}")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def sinkhorn(cost: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.sinkhorn` in C++; same arguments and results."""
    task, results, _alive = sinkhorn_task(cost, *others, **options)
    _kernel("sinkhorn", cost.dtype)(task, torch.get_num_threads())
    return results


def sinkhorn_task(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    *,
    tau_a: float,
    tau_b: float,
    mass: Tensor | None,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    max_iters: int,
    tol: float,
    f_init: Tensor | None,
    g_init: Tensor | None,
    acceleration: str | None = None,
) -> tuple[dict[str, object], tuple[Tensor, Tensor, Tensor, Tensor], list[Tensor | None]]:
    """Describe a batch to the compiled code: (task, results, tensors that must outlive the call)."""
    inputs = {
        "cost": cost.contiguous(),
        "a": a.contiguous(),
        "b": b.contiguous(),
        "epsilon": epsilon.double().contiguous(),
        "mass": None if mass is None else mass.double().contiguous(),
        "row_mask": _bytes(row_mask),
        "col_mask": _bytes(col_mask),
        "f_init": None if f_init is None else f_init.contiguous(),
        "g_init": None if g_init is None else g_init.contiguous(),
    }
    problems, rows, cols = cost.shape
    results = (
        torch.empty((problems, rows), dtype=cost.dtype, device=cost.device),
        torch.empty((problems, cols), dtype=cost.dtype, device=cost.device),
        torch.empty(problems, dtype=torch.int32, device=cost.device),
        torch.empty(problems, dtype=cost.dtype, device=cost.device),
    )
    task: dict[str, object] = {name: _address(tensor) for name, tensor in inputs.items()}
    task.update(zip(("f", "g", "n_iters", "residual"), (t.data_ptr() for t in results), strict=True))
    task.update(problems=problems, rows=rows, cols=cols)
    task.update(tau_a=tau_a, tau_b=tau_b, tol=tol, max_iters=max_iters, anderson=acceleration == "anderson")
    return task, results, list(inputs.values())


def _cost_inputs(
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    gamma: float,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> dict[str, Tensor | None]:
    """What the cost kernel reads. Masked entries are cleared first: they may hold anything, NaN included."""
    if row_mask is not None:
        text = torch.where(row_mask.unsqueeze(-1), text, 0.0)
    low = high = frame_index
    if col_mask is not None:
        video = torch.where(col_mask.unsqueeze(-1), video, 0.0)
        attention = torch.where(col_mask[:, None, None, :], attention, 0.0)
        low = torch.where(col_mask, frame_index, torch.inf)
        high = torch.where(col_mask, frame_index, -torch.inf)
        frame_index = torch.where(col_mask, frame_index, 0.0)
        positions = torch.where(col_mask.unsqueeze(-1), positions, 0.0)
    t_range = high.amax(-1) - low.amin(-1)  # [B]
    y = torch.nn.functional.normalize(text, dim=-1)
    x = torch.nn.functional.normalize(video, dim=-1)
    return {
        "similarity": y @ x.transpose(-1, -2),  # [B, N, M], shared by the heads
        "attention": attention.contiguous(),
        "frame": frame_index.contiguous(),
        "place_y": positions[..., 0].contiguous(),
        "place_x": positions[..., 1].contiguous(),
        "time_weight": gamma / torch.where(t_range > 0, t_range, 1.0),
        "row_mask": _bytes(row_mask),
        "col_mask": _bytes(col_mask),
    }


def _cost_task(inputs: dict[str, Tensor | None], shape: torch.Size, eta: float, normalize: bool) -> dict[str, object]:
    task: dict[str, object] = {name: _address(tensor) for name, tensor in inputs.items()}
    task.update(zip(("samples", "heads", "rows", "cols"), shape, strict=True))
    task.update(place_weight=eta / 2**0.5, normalize=normalize, cost=0)
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
    """`reference.token_cost` in C++; same arguments and result."""
    inputs = _cost_inputs(text, video, attention, frame_index, positions, gamma, row_mask, col_mask)
    cost = torch.empty(attention.shape, dtype=attention.dtype)
    task = _cost_task(inputs, attention.shape, eta, normalize)
    task["cost"] = cost.data_ptr()
    _kernel("token_cost", cost.dtype)(task, torch.get_num_threads())
    return cost


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
    """`reference.transport_attention` in C++, head by head; the plan is empty unless it is asked for."""
    inputs = _cost_inputs(query, key, attention, frame_index, positions, gamma, row_mask, None)
    refined = attention.clone(memory_format=torch.contiguous_format)
    plan = torch.zeros(attention.shape, dtype=attention.dtype) if return_plan else attention.new_empty(0)
    task = _cost_task(inputs, attention.shape, eta, True)
    task.update(epsilon=epsilon, tau=tau, mass=0.0 if mass is None else mass, tol=tol, max_iters=max_iters)
    task.update(refined=refined.data_ptr(), plan=plan.data_ptr() if return_plan else 0)
    _kernel("transport_attention", refined.dtype)(task, torch.get_num_threads())
    return refined, plan

"""The plan of solved dense problems, its sums and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _task
from ._task import address, as_bytes


def solved(
    cost: Tensor,
    f: Tensor | None,
    g: Tensor | None,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> dict[str, Tensor | None]:
    """The tensors of a batch as the compiled code reads them; they must outlive the call."""
    return {
        "cost": cost.contiguous(),
        "f": None if f is None else f.contiguous(),
        "g": None if g is None else g.contiguous(),
        "a": a.contiguous(),
        "b": b.contiguous(),
        "epsilon": epsilon.double().contiguous(),
        "row_mask": as_bytes(row_mask),
        "col_mask": as_bytes(col_mask),
    }


def run(name: str, tensors: dict[str, Tensor | None], **options: Any) -> None:
    """Call a compiled function on the tensors and results of one batch."""
    cost = tensors["cost"]
    assert cost is not None  # for the type checker
    task: dict[str, object] = {key: address(tensor) for key, tensor in tensors.items()}
    task.update(zip(("problems", "rows", "cols"), cost.shape, strict=True))
    task.update(options)
    _task.run(name, task, cost)


def empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def plan(cost: Tensor, *others: Tensor | None, logarithm: bool) -> Tensor:
    """exp((f + g - cost) / epsilon) a b, or its logarithm. [P, N, M]"""
    result = empty_like(cost)
    run("plan", {**solved(cost, *others), "plan": result}, logarithm=logarithm)
    return result


def plan_sums(cost: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over columns [P, N] and over rows [P, M], and sum(plan * cost) [P]."""
    n_problems, n_rows, n_cols = cost.shape
    results = cost.new_empty(n_problems, n_rows), cost.new_empty(n_problems, n_cols), cost.new_empty(n_problems)
    named = dict(zip(("row_sums", "col_sums", "energy"), results, strict=True))
    run("plan_sums", {**solved(cost, *others), **named})
    return results


def plan_backward(
    grad_plan: Tensor | None,
    grad_rows: Tensor | None,
    grad_cols: Tensor | None,
    grad_energy: Tensor | None,
    cost: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_plan._gradients`, compiled; same arguments and results."""
    grads = {"grad_plan": grad_plan, "grad_rows": grad_rows, "grad_cols": grad_cols, "grad_energy": grad_energy}
    held = {name: None if grad is None else grad.contiguous() for name, grad in grads.items()}
    to_cost, to_f, to_g, to_a, to_b = (empty_like(value) for value in (cost, f, g, a, b))
    to_epsilon = epsilon.new_empty(epsilon.shape, dtype=torch.float64)
    results = {"to_cost": to_cost, "to_f": to_f, "to_g": to_g, "to_a": to_a, "to_b": to_b, "to_epsilon": to_epsilon}
    run("plan_backward", {**solved(cost, f, g, a, b, epsilon, row_mask, col_mask), **held, **results})
    return to_cost, to_f, to_g, to_a, to_b, to_epsilon.to(epsilon.dtype)

"""Checks and defaults of a transport problem, whatever its cost is: weights, epsilon, tau, mass, masks, starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks

ACCELERATIONS = (None, "anderson")


class Problem(NamedTuple):
    """Checked arguments, expanded to the batch: a [..., N], b [..., M], epsilon [...] float64, mass [...] float64."""

    batch: tuple[int, ...]
    dtype: torch.dtype
    a: Tensor
    b: Tensor
    epsilon: Tensor
    tau: tuple[float, float]
    mass: Tensor | None
    row_mask: Tensor | None
    col_mask: Tensor | None
    f_init: Tensor | None
    g_init: Tensor | None
    max_iters: int
    tol: float
    acceleration: str | None
    gradient: str

    def flat(self, tensor: Tensor | None) -> Tensor | None:
        """[..., X] -> [P, X], the problems in one dimension."""
        return None if tensor is None else flat(tensor, self.batch)

    def constant_unless_differentiated(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor, detached with gradient="none"."""
        return tensor.detach() if tensor is not None and self.gradient == "none" else tensor

    def solution(self, f: Tensor, g: Tensor, n_iters: Tensor, residual: Tensor) -> dict[str, Any]:
        """Fields of `Solution` from the results of a solve, in the shape of the batch or flat."""
        if residual.ndim != len(self.batch):
            f, g = f.reshape(self.a.shape), g.reshape(self.b.shape)
            n_iters, residual = n_iters.reshape(self.batch), residual.reshape(self.batch)
        return {
            "f": f,
            "g": g,
            "n_iters": n_iters,
            "residual": residual,
            "tol": self.tol,
            "a": self.a,
            "b": self.b,
            "epsilon": self.epsilon,
            "tau": self.tau,
            "mass": None if self.mass is None else self.mass.to(self.dtype),
            "row_mask": self.row_mask,
            "col_mask": self.col_mask,
            "gradient": self.gradient,
        }


def flat(tensor: Tensor, batch: Sequence[int]) -> Tensor:
    """[..., X] -> [P, X], the problems in one dimension."""
    if len(batch) == 1:
        return tensor
    return tensor.reshape(math.prod(batch), *tensor.shape[len(batch) :])


def check(
    who: str,
    leading: Tensor,
    shape: Sequence[int],
    meaning: tuple[str, str],
    *,
    gradients: Sequence[str],
    a: Tensor | None,
    b: Tensor | None,
    epsilon: float | Tensor,
    tau: float | tuple[float, float],
    mass: float | Tensor | None,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    max_iters: int,
    tol: float,
    acceleration: str | None,
    f_init: Tensor | None,
    g_init: Tensor | None,
    gradient: str,
) -> Problem:
    """Check everything but the cost and fill in the defaults.

    Args:
        who: name of the calling function.
        leading: the tensor that sets device and dtype.
        shape: (..., N, M).
        meaning: what (..., N) and (..., M) are in the caller's words, for messages.
        gradients: the values of `gradient` that the caller has.

    Returns:
        `Problem`.
    """
    *batch, n_rows, n_cols = shape
    row_shape, col_shape = (*batch, n_rows), (*batch, n_cols)
    for name, value in (("a", a), ("b", b), ("f_init", f_init), ("g_init", g_init)):
        if value is not None:
            _checks.floating(who, name, value)
    _checks.same_device(who, leading, a=a, b=b, row_mask=row_mask, col_mask=col_mask, f_init=f_init, g_init=g_init)
    dtype = _checks.working_dtype(leading, a, b)
    max_iters, tol = _checks.stopping(who, max_iters, tol)
    if gradient not in gradients:
        raise ValueError(f"{who}: gradient is {gradient!r}, expected one of {tuple(gradients)}.")
    if acceleration not in ACCELERATIONS:
        raise ValueError(f"{who}: acceleration is {acceleration!r}, expected None or 'anderson'.")
    if acceleration is not None and gradient == "unrolled":
        raise ValueError(
            f"{who}: gradient='unrolled' differentiates plain iterations, got acceleration={acceleration!r}. "
            "Use gradient='implicit', or acceleration=None."
        )
    taus = tau if isinstance(tau, (tuple, list)) else (tau, tau)
    if len(taus) != 2:
        raise ValueError(f"{who}: tau has {len(taus)} entries, expected a number or (tau_a, tau_b).")
    tau_a, tau_b = _checks.unit_interval(who, "tau", taus[0]), _checks.unit_interval(who, "tau", taus[1])
    if mass is not None and (tau_a, tau_b) != (1.0, 1.0):
        raise ValueError(f"{who}: got tau={tau} and mass={mass}, which exclude each other. Pass one of them.")

    row_mask = _checks.mask(who, "row_mask", row_mask, row_shape, meaning[0])
    col_mask = _checks.mask(who, "col_mask", col_mask, col_shape, meaning[1])
    a = _weights(who, "a", a, row_shape, meaning[0], row_mask, dtype, leading.device)
    b = _weights(who, "b", b, col_shape, meaning[1], col_mask, dtype, leading.device)
    eps = _per_problem(who, "epsilon", epsilon, batch, leading.device)
    total = None if mass is None else _per_problem(who, "mass", mass, batch, leading.device)
    if total is not None and _checks.readable(a, b, total):
        room = torch.minimum(a.sum(-1), b.sum(-1)).double()
        possible = (total > 0) & (total <= room * (1 + 1e-6)) | (room == 0)
        if not bool(possible.all()):
            raise ValueError(
                f"{who}: mass is {mass}, expected in (0, {room.min().item():.6g}] = (0, min(sum a, sum b)]."
            )
    if f_init is not None:
        f_init = _checks.broadcast(who, "f_init", f_init.to(dtype), row_shape, meaning[0])
    if g_init is not None:
        g_init = _checks.broadcast(who, "g_init", g_init.to(dtype), col_shape, meaning[1])
    return Problem(
        batch=tuple(batch),
        dtype=dtype,
        a=a,
        b=b,
        epsilon=eps,
        tau=(tau_a, tau_b),
        mass=total,
        row_mask=row_mask,
        col_mask=col_mask,
        f_init=f_init,
        g_init=g_init,
        max_iters=max_iters,
        tol=tol,
        acceleration=acceleration,
        gradient=gradient,
    )


def _weights(
    who: str,
    name: str,
    value: Tensor | None,
    shape: tuple[int, ...],
    meaning: str,
    mask: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Weights of one side in the working dtype, zero where masked; uniform over what exists by default."""
    if value is None:
        if mask is None:
            return torch.full(shape, 1.0 / shape[-1], dtype=dtype, device=device)
        return mask.to(dtype) / mask.sum(-1, keepdim=True).clamp_min(1).to(dtype)
    value = _checks.broadcast(who, name, value.to(dtype), shape, meaning)
    if mask is not None:
        value = torch.where(mask, value, 0.0)
    _checks.weights(who, name, value)
    return value


def _per_problem(who: str, name: str, value: float | Tensor, batch: list[int], device: torch.device) -> Tensor:
    """One positive float64 number a problem."""
    if not isinstance(value, Tensor):
        return torch.full(batch, _checks.positive(who, name, value), dtype=torch.float64, device=device)
    value = _checks.broadcast(who, name, value.to(device, torch.float64), batch, "one number, or one per problem")
    if _checks.readable(value):
        low, high = _checks.extremes(value)
        if not 0.0 < low <= high < math.inf:
            raise ValueError(f"{who}: {name} has entries <= 0 or non-finite ones, expected finite numbers > 0.")
    return value

"""Gradients of the potentials of dense problems, at the fixed point and through the iterations."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import empty_like, run, solved


def implicit(
    grad_f: Tensor,
    grad_g: Tensor,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    f: Tensor,
    g: Tensor,
    tau_a: float,
    tau_b: float,
    exact_mass: bool,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_implicit.formulas`, compiled: its results, and [P] bool, False where float64 cannot hold the plan's sums."""
    to_epsilon, to_mass = (cost.new_empty(cost.shape[0], dtype=torch.float64) for _ in range(2))
    sound = cost.new_empty(cost.shape[0], dtype=torch.bool)
    to_cost, to_a, to_b = (empty_like(value) for value in (cost, a, b))
    tensors = {
        **solved(cost, f, g, a, b, epsilon, row_mask, col_mask),
        "grad_f": grad_f.contiguous(),
        "grad_g": grad_g.contiguous(),
        "to_cost": to_cost,
        "to_a": to_a,
        "to_b": to_b,
        "to_epsilon": to_epsilon,
        "to_mass": to_mass,
        "sound": sound,
    }
    run("implicit", tensors, tau_a=tau_a, tau_b=tau_b, exact_mass=exact_mass)
    return to_cost, to_a, to_b, to_epsilon.to(epsilon.dtype), to_mass.to(epsilon.dtype), sound


def unrolled(
    grad_f: Tensor,
    grad_g: Tensor,
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    mass: Tensor | None,
    f_init: Tensor | None,
    g_init: Tensor | None,
    tau_a: float,
    tau_b: float,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    n_iters: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_unrolled.gradients`, compiled: its results, and [P] bool, False for problems that it does not take."""
    to_epsilon, to_mass = (cost.new_empty(cost.shape[0], dtype=torch.float64) for _ in range(2))
    sound = cost.new_empty(cost.shape[0], dtype=torch.bool)
    to_cost, to_a, to_b = (empty_like(value) for value in (cost, a, b))
    to_f, to_g = (None if start is None else empty_like(start) for start in (f_init, g_init))
    tensors = {
        **solved(cost, f_init, g_init, a, b, epsilon, row_mask, col_mask),
        "mass": None if mass is None else mass.double().contiguous(),
        "n_iters": n_iters.contiguous(),
        "grad_f": grad_f.contiguous(),
        "grad_g": grad_g.contiguous(),
        "to_cost": to_cost,
        "to_a": to_a,
        "to_b": to_b,
        "to_f": to_f,
        "to_g": to_g,
        "to_epsilon": to_epsilon,
        "to_mass": to_mass,
        "sound": sound,
    }
    most_iters = int(n_iters.max()) if n_iters.numel() else 0
    run("unrolled", tensors, tau_a=tau_a, tau_b=tau_b, most_iters=most_iters)
    nothing = (a.new_empty(a.shape[0], 0) for _ in range(3))
    of_mass, of_f, of_g = (
        none if value is None else value
        for value, none in zip((None if mass is None else to_mass.to(mass.dtype), to_f, to_g), nothing, strict=True)
    )
    return to_cost, to_a, to_b, to_epsilon.to(epsilon.dtype), of_mass, of_f, of_g, sound

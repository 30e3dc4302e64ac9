"""Gradient of the potentials at the fixed point: kernels for the passes over the cost, PyTorch for one dense system.

With x_ij the exponents of the plan P_ij = a_i b_j exp(x_ij), s_i = sum_j exp(x_ij) b_j and t_j = sum_i exp(x_ij) a_i,
its sums are p = a s and q = b t, and the transposed fixed-point equations are

    v_i / tau_a + a_i sum_j exp(x_ij) / t_j u_j = grad_f_i,      u_j / tau_b + b_j sum_i exp(x_ij) / s_i v_i = grad_g_j,

    grad_cost = P (v / p + u / q),   a_bar = -epsilon sum_j exp(x) / t u,   b_bar = -epsilon sum_i exp(x) / s v.

The longer side's unknown (u, say) is eliminated. With v = tau_a z sqrt(p) the system of the shorter one is

    (1 - tau_a tau_b Y Y^T) z = (grad_f - tau_b a sum_j exp(x) / t grad_g) / sqrt(p),  Y_ij = P_ij / sqrt(p_i q_j) <= 1.

Rows of 1 - tau_a tau_b Y Y^T times sqrt(p) are (1 - tau_a tau_b) sqrt(p): the diagonal follows from the other entries
without cancellation, however close to singular the system is. Sums are kept as logarithms: none overflows.

Balanced problems may fall apart into blocks that exchange next to nothing. Then alpha = v / p and beta = u / q are
large constants of opposite sign in a block, and only alpha + beta, small within a block, is seen. So alpha is kept in
two floats, and beta is found from its distance to an average of alpha.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._units import LN2, LOG2_E
from .plan import exponent

# Shorter and longer side of a tile, all of which a warp has; long where the cost is contiguous.
TILE_OF_ROWS, TILE_OF_COLS = (4, 64), (32, 8)
BLOCK = 16  # of the longer side, in the products Y Y^T
TILE = 64  # of the shorter side there, at most
WARPS = 4
FEWEST_PROGRAMS = 512  # of the products, where the longer side can be split for it
LONGEST_SUM = 4096  # terms of a product that are added in float32
LIFT = 1e-12  # of the diagonal before it is factorised; 3 solves take it back
SOLVES = 3
LARGEST = 1e30


@triton.jit
def load_short(potential_ptr, weight_ptr, offs, size):
    """(exists, potential, weight) of entries of a side, whose weight is -1 where there is none: -inf and -1 there."""
    weight = tl.load(weight_ptr + offs, mask=offs < size, other=-1.0)
    exists = weight >= 0
    return exists, tl.load(potential_ptr + offs, mask=exists, other=float("-inf")), weight


@triton.jit
def exponents(cost_ptr, offs, rows, cols, f, g, a, b, inverse_epsilon):
    """Exponents of two, -inf where an entry does not exist. [SHORT, LONG]"""
    cost = tl.load(cost_ptr + offs, mask=rows[:, None] & cols[None, :], other=0.0)
    return exponent(cost, f, g, a, b, inverse_epsilon) * LOG2_E


@triton.jit
def finite(logarithm):
    """0 where a logarithm is -inf."""
    return tl.where(logarithm == float("-inf"), 0.0, logarithm)


@triton.jit
def sums_kernel(
    cost_ptr, short_ptr, long_ptr, short_weight_ptr, long_weight_ptr, long_grad_ptr, epsilon_ptr,
    long_log_ptr, part_logs_ptr, part_products_ptr, n_short, n_long, stride_short, stride_long, tiles,
    SHORT: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Write log2 of t [P, m]; parts [P, tiles, n] of sums over the longer side: log2 of s, exp(x) / t grad."""
    program = tl.program_id(0)
    problem, first = (program // tiles).to(tl.int64), program % tiles * LONG
    short_ptr, short_weight_ptr = short_ptr + problem * n_short, short_weight_ptr + problem * n_short
    start_long = problem * n_long + first
    offs_l = tl.arange(0, LONG)
    longs, g, b = load_short(long_ptr + start_long, long_weight_ptr + start_long, offs_l, n_long - first)
    grad = tl.load(long_grad_ptr + start_long + offs_l, mask=longs, other=0.0)
    log_b = tl.log2(tl.maximum(b, 0.0))
    inverse_epsilon = 1.0 / tl.load(epsilon_ptr + problem)
    cost_ptr += problem * n_short * n_long + first.to(tl.int64) * stride_long
    offs = tl.arange(0, SHORT)[:, None] * stride_short + offs_l[None, :] * stride_long
    parts_at = program.to(tl.int64) * n_short
    top, total = tl.full((LONG,), float("-inf"), tl.float32), tl.zeros((LONG,), tl.float32)
    tile_ptr = cost_ptr
    for start in range(0, n_short, SHORT):
        offs_s = start + tl.arange(0, SHORT)
        shorts, f, a = load_short(short_ptr, short_weight_ptr, offs_s, n_short)
        x = exponents(tile_ptr, offs, shorts, longs, f, g, a, b, inverse_epsilon)
        of_short = x + log_b[None, :]
        short_top = finite(tl.max(of_short, 1))
        part = short_top + tl.log2(tl.sum(tl.exp2(of_short - short_top[:, None]), 1))
        tl.store(part_logs_ptr + parts_at + offs_s, part, mask=offs_s < n_short)
        of_long = x + tl.log2(tl.maximum(a, 0.0))[:, None]
        new_top = tl.maximum(top, tl.max(of_long, 0))
        level = finite(new_top)
        total = total * tl.exp2(top - level) + tl.sum(tl.exp2(of_long - level[None, :]), 0)
        top = new_top
        tile_ptr += SHORT * stride_short
    log_t = finite(finite(top) + tl.log2(total))
    tl.store(long_log_ptr + start_long + offs_l, log_t, mask=offs_l < n_long - first)
    tile_ptr = cost_ptr
    for start in range(0, n_short, SHORT):
        offs_s = start + tl.arange(0, SHORT)
        shorts, f, a = load_short(short_ptr, short_weight_ptr, offs_s, n_short)
        x = exponents(tile_ptr, offs, shorts, longs, f, g, a, b, inverse_epsilon)
        products = tl.sum(tl.exp2(x - log_t[None, :]) * grad[None, :], 1)
        tl.store(part_products_ptr + parts_at + offs_s, products, mask=offs_s < n_short)
        tile_ptr += SHORT * stride_short


@triton.jit
def normalised(
    cost_ptr, offs, short_ptr, short_weight_ptr, half_log_ptr, offs_s, n_short,
    longs, g, b, half_long, inverse_epsilon,
):  # fmt: skip
    """Y at some entries of the shorter side. [TILE, BLOCK]"""
    shorts, f, a = load_short(short_ptr, short_weight_ptr, offs_s, n_short)
    half_short = tl.load(half_log_ptr + offs_s, mask=shorts, other=0.0)
    x = exponents(cost_ptr, offs, shorts, longs, f, g, a, b, inverse_epsilon)
    return tl.exp2(x + half_short[:, None] + half_long[None, :])


@triton.jit
def product_kernel(
    cost_ptr, short_ptr, long_ptr, short_weight_ptr, long_weight_ptr, half_log_ptr, long_log_ptr, epsilon_ptr,
    parts_ptr, n_short, n_long, stride_short, stride_long, tiles, splits, chunk,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write parts [P, splits, n, n] of Y Y^T, its tiles on and below the diagonal."""
    program = tl.program_id(0)
    tile = program // splits % (tiles * tiles)
    problem, split = (program // (splits * tiles * tiles)).to(tl.int64), program % splits
    offs_i, offs_k = tile // tiles * TILE + tl.arange(0, TILE), tile % tiles * TILE + tl.arange(0, TILE)
    if tile % tiles <= tile // tiles:
        short_ptr, short_weight_ptr = short_ptr + problem * n_short, short_weight_ptr + problem * n_short
        half_log_ptr += problem * n_short
        long_ptr, long_weight_ptr = long_ptr + problem * n_long, long_weight_ptr + problem * n_long
        long_log_ptr += problem * n_long
        cost_ptr += problem * n_short * n_long
        inverse_epsilon = 1.0 / tl.load(epsilon_ptr + problem)
        product = tl.zeros((TILE, TILE), tl.float32)
        for start in range(split * chunk, tl.minimum((split + 1) * chunk, n_long), BLOCK):
            offs_l = start + tl.arange(0, BLOCK)
            longs, g, b = load_short(long_ptr, long_weight_ptr, offs_l, n_long)
            log_t = tl.load(long_log_ptr + offs_l, mask=longs, other=0.0)
            half_long = 0.5 * (tl.log2(tl.maximum(b, 0.0)) - log_t)  # -inf without weight
            at = offs_l.to(tl.int64)[None, :] * stride_long
            left = normalised(
                cost_ptr, offs_i.to(tl.int64)[:, None] * stride_short + at, short_ptr, short_weight_ptr, half_log_ptr,
                offs_i, n_short, longs, g, b, half_long, inverse_epsilon,
            )  # fmt: skip
            right = normalised(
                cost_ptr, offs_k.to(tl.int64)[:, None] * stride_short + at, short_ptr, short_weight_ptr, half_log_ptr,
                offs_k, n_short, longs, g, b, half_long, inverse_epsilon,
            )  # fmt: skip
            product = tl.dot(left, tl.trans(right), product, input_precision="ieee")
        at = offs_i.to(tl.int64)[:, None] * n_short + offs_k[None, :]
        mask = (offs_i < n_short)[:, None] & (offs_k < n_short)[None, :]
        tl.store(parts_ptr + (problem * splits + split) * n_short * n_short + at, product, mask=mask)


@triton.jit
def gradient_kernel(
    cost_ptr, short_ptr, long_ptr, short_weight_ptr, long_weight_ptr, long_grad_ptr, long_log_ptr, epsilon_ptr,
    v_ptr, short_log_ptr, alpha_ptr, alpha_rest_ptr, loose_ptr, drift_ptr,
    to_cost_ptr, to_long_ptr, part_sums_ptr, totals_ptr, n_short, n_long, stride_short, stride_long, tiles, tau_long,
    BALANCED: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Find u, and write the gradients of the cost [P, N, M] and of the longer side's weights [P, m].

    Parts: sum_j exp(x) / t u [P, tiles, n], and of epsilon's gradient [P, tiles]

        sum b exp(x) / s v (x - log s) + a exp(x) / t u (x - log t),

    where BALANCED without -sum v log s, which does not ask for the cost.

    Args:
        v_ptr, short_log_ptr: [P, n], v and log2 of s. Not BALANCED.
        alpha_ptr, alpha_rest_ptr: [P, n], alpha as the sum of two floats, 0 without weight. BALANCED.
        loose_ptr: [P, n], v / s without weight, else 0. BALANCED.
        drift_ptr: [P], what the choice sum a f = sum b g hands back to the longer side. BALANCED.
    """
    program = tl.program_id(0)
    problem, first = (program // tiles).to(tl.int64), program % tiles * LONG
    short_ptr, short_weight_ptr = short_ptr + problem * n_short, short_weight_ptr + problem * n_short
    start_long = problem * n_long + first
    offs_l = tl.arange(0, LONG)
    longs, g, b = load_short(long_ptr + start_long, long_weight_ptr + start_long, offs_l, n_long - first)
    grad = tl.load(long_grad_ptr + start_long + offs_l, mask=longs, other=0.0)
    log_t = tl.load(long_log_ptr + start_long + offs_l, mask=longs, other=0.0)
    b_there = tl.maximum(b, 0.0)
    epsilon = tl.load(epsilon_ptr + problem)
    inverse_epsilon = 1.0 / epsilon
    start_cost = problem * n_short * n_long + first.to(tl.int64) * stride_long
    cost_ptr, to_cost_ptr = cost_ptr + start_cost, to_cost_ptr + start_cost
    offs = tl.arange(0, SHORT)[:, None] * stride_short + offs_l[None, :] * stride_long
    parts_at = program.to(tl.int64) * n_short
    tile_ptr = cost_ptr
    if BALANCED:
        alpha_ptr, alpha_rest_ptr = alpha_ptr + problem * n_short, alpha_rest_ptr + problem * n_short
        loose_ptr += problem * n_short
        mass, mean, loose_sum = (
            tl.zeros((LONG,), tl.float32),
            tl.zeros((LONG,), tl.float32),
            tl.zeros((LONG,), tl.float32),
        )
        for start in range(0, n_short, SHORT):
            offs_s = start + tl.arange(0, SHORT)
            shorts, f, a = load_short(short_ptr, short_weight_ptr, offs_s, n_short)
            share = tl.exp2(exponents(tile_ptr, offs, shorts, longs, f, g, a, b, inverse_epsilon) - log_t[None, :])
            alpha = tl.load(alpha_ptr + offs_s, mask=shorts, other=0.0)
            loose = tl.load(loose_ptr + offs_s, mask=shorts, other=0.0)
            loose_sum += tl.sum(share * loose[:, None], 0)
            share *= tl.maximum(a, 0.0)[:, None]
            mass += tl.sum(share, 0)
            mean += tl.sum(share * alpha[:, None], 0)
            tile_ptr += SHORT * stride_short
        scale = 1.0 / tl.where(mass > 0, mass, 1.0)
        mean *= scale
        rest = tl.zeros((LONG,), tl.float32)
        tile_ptr = cost_ptr
        for start in range(0, n_short, SHORT):  # the mean again, now of what is left: the first one was rounded
            offs_s = start + tl.arange(0, SHORT)
            shorts, f, a = load_short(short_ptr, short_weight_ptr, offs_s, n_short)
            share = tl.exp2(exponents(tile_ptr, offs, shorts, longs, f, g, a, b, inverse_epsilon) - log_t[None, :])
            alpha = tl.load(alpha_ptr + offs_s, mask=shorts, other=0.0)
            alpha_rest = tl.load(alpha_rest_ptr + offs_s, mask=shorts, other=0.0)
            distance = (alpha[:, None] - mean[None, :]) + alpha_rest[:, None]
            rest += tl.sum(share * tl.maximum(a, 0.0)[:, None] * distance, 0)
            tile_ptr += SHORT * stride_short
        rest *= scale
        t = tl.exp2(log_t)
        q = b_there * t
        grad -= q * loose_sum * scale
        u = grad - q * (mean + rest)
        to_long = tl.load(drift_ptr + problem) * finite(g) - epsilon * t * (mean + rest + loose_sum * scale)
    else:
        v_ptr, short_log_ptr = v_ptr + problem * n_short, short_log_ptr + problem * n_short
        density = tl.zeros((LONG,), tl.float32)  # sum_i exp(x) / s v
        for start in range(0, n_short, SHORT):
            offs_s = start + tl.arange(0, SHORT)
            shorts, f, a = load_short(short_ptr, short_weight_ptr, offs_s, n_short)
            x = exponents(tile_ptr, offs, shorts, longs, f, g, a, b, inverse_epsilon)
            log_s = tl.load(short_log_ptr + offs_s, mask=shorts, other=0.0)
            v = tl.load(v_ptr + offs_s, mask=shorts, other=0.0)
            density += tl.sum(tl.exp2(x - log_s[:, None]) * v[:, None], 0)
            tile_ptr += SHORT * stride_short
        u = tau_long * (grad - b_there * density)
        to_long = -epsilon * density
    tl.store(to_long_ptr + start_long + offs_l, tl.where(longs, to_long, 0.0), mask=offs_l < n_long - first)
    total = tl.zeros((LONG,), tl.float32)
    if BALANCED:
        total -= u * log_t
    moved = tl.zeros((), tl.int64)
    for start in range(0, n_short, SHORT):
        offs_s = start + tl.arange(0, SHORT)
        shorts, f, a = load_short(short_ptr, short_weight_ptr, offs_s, n_short)
        x = exponents(cost_ptr + moved, offs, shorts, longs, f, g, a, b, inverse_epsilon)
        a_there = tl.maximum(a, 0.0)
        share = tl.exp2(x - log_t[None, :])
        if BALANCED:  # logarithms of s and t are about 0
            alpha = tl.load(alpha_ptr + offs_s, mask=shorts, other=0.0)
            alpha_rest = tl.load(alpha_rest_ptr + offs_s, mask=shorts, other=0.0)
            loose = tl.load(loose_ptr + offs_s, mask=shorts, other=0.0)
            distance = ((alpha[:, None] - mean[None, :]) + alpha_rest[:, None]) - rest[None, :]
            to_cost = a_there[:, None] * (distance * q[None, :] + grad[None, :]) + loose[:, None] * q[None, :]
            to_cost *= share
            total += tl.sum(to_cost * finite(x), 0)
        else:  # they may be large, but what is exponentiated is small where it counts
            log_s = tl.load(short_log_ptr + offs_s, mask=shorts, other=0.0)
            v = tl.load(v_ptr + offs_s, mask=shorts, other=0.0)
            to_cost = tl.exp2(x - log_s[:, None]) * v[:, None] * b_there[None, :]
            from_long = share * u[None, :] * a_there[:, None]
            by_exponent = to_cost * finite(x - log_s[:, None]) + from_long * finite(x - log_t[None, :])
            total += tl.sum(by_exponent, 0)
            to_cost += from_long
        tl.store(part_sums_ptr + parts_at + offs_s, tl.sum(share * u[None, :], 1), mask=offs_s < n_short)
        inside = (offs_s < n_short)[:, None] & (offs_l < n_long - first)[None, :]
        tl.store(to_cost_ptr + moved + offs, to_cost, mask=inside)
        moved += SHORT * stride_short
    tl.store(totals_ptr + program, tl.sum(total, 0) * LN2)


class _Side:
    """One side of a batch: weights -1 where there is nothing, and the gradient that is left to solve for."""

    def __init__(self, potential: Tensor, weight: Tensor, grad: Tensor, mask: Tensor | None, tau: float) -> None:
        self.potential, self.mask, self.tau, self.size = potential, mask, tau, weight.shape[-1]
        self.weight = weight if mask is None else torch.where(mask, weight, 0.0)
        self.grad = (grad if mask is None else torch.where(mask, grad, 0.0)).double()

    def total(self) -> Tensor:
        """Sum of the weights. [P, 1]"""
        return self.weight.sum(-1, keepdim=True, dtype=torch.float64)

    def leave_out(self, alive: Tensor) -> None:
        """Mark what does not exist."""
        there = alive if self.mask is None else self.mask & alive
        self.exists, self.marked = there, torch.where(there, self.weight, -1.0)


class _Problems:
    """A batch as the kernels read it, turned so that `short` has at most as many entries as `long`."""

    def __init__(self, cost: Tensor, epsilon: Tensor, rows: _Side, cols: _Side) -> None:
        self.n_problems, n_rows, n_cols = cost.shape
        self.turned = n_rows > n_cols
        self.short, self.long = (cols, rows) if self.turned else (rows, cols)
        self.balanced = rows.tau == 1.0 and cols.tau == 1.0
        weight, other = self.short.total(), self.long.total()
        alive = (weight > 0) & (other > 0)
        for side in (rows, cols):
            side.leave_out(alive)
        self.drift = torch.zeros_like(weight)
        if self.balanced:  # undo the choice sum a f = sum b g, made after the last iteration
            excess = self.short.grad.sum(-1, keepdim=True) - self.long.grad.sum(-1, keepdim=True)
            self.drift = excess / torch.where(alive, weight + other, 1.0)
            self.short.grad = self.short.grad - self.drift * self.short.weight
            self.long.grad = self.long.grad + self.drift * self.long.weight
        values = (cost, self.short.potential, self.long.potential, self.short.marked, self.long.marked)
        self.solved = [_launch.read(value) for value in values]
        self.epsilon = _launch.read(epsilon.float())
        self.long_grad = _launch.read(self.long.grad.float())
        across, along = TILE_OF_COLS if self.turned else TILE_OF_ROWS
        across = min(across, triton.next_power_of_2(self.short.size))
        self.options = {"SHORT": across, "LONG": along, "num_warps": 1}
        self.tiles = triton.cdiv(self.long.size, along)
        strides = (1, n_cols) if self.turned else (n_cols, 1)
        self.sizes = (self.short.size, self.long.size, *strides)
        self.programs = self.n_problems * self.tiles

    def parts(self) -> Tensor:
        """Scratch for what is summed over the longer side. [P, tiles, n]"""
        return _launch.empty((self.n_problems, self.tiles, self.short.size), self.epsilon)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """log2 of t [P, m]; log2 of s, and sum_j exp(x) / t grad, both [P, n] float64."""
        long_log = _launch.empty((self.n_problems, self.long.size), self.epsilon)
        logs, products = self.parts(), self.parts()
        tensors = (*self.solved, self.long_grad, self.epsilon, long_log, logs, products)
        _launch.launch(sums_kernel, (self.programs,), *tensors, *self.sizes, self.tiles, **self.options)
        short_log = torch.logsumexp(logs.double() * math.log(2), 1) / math.log(2)
        # Without any weight on the other side nothing exists, and nothing is read of it.
        return long_log, torch.where(self.short.exists, short_log, 0.0), products.sum(1, dtype=torch.float64)

    def coupling(self, half_log: Tensor, long_log: Tensor) -> Tensor:
        """tau_a tau_b Y Y^T with zeros on the diagonal. [P, n, n] float64"""
        n, m = self.short.size, self.long.size
        tile = min(TILE, max(16, triton.next_power_of_2(n)))
        tiles = triton.cdiv(n, tile)
        programs = self.n_problems * tiles * (tiles + 1) // 2
        wanted = max(triton.cdiv(FEWEST_PROGRAMS, programs), triton.cdiv(m, LONGEST_SUM))
        chunk = triton.cdiv(triton.cdiv(m, min(wanted, triton.cdiv(m, 16 * BLOCK))), BLOCK) * BLOCK
        splits = triton.cdiv(m, chunk)
        parts = _launch.empty((self.n_problems, splits, n, n), self.epsilon)
        tensors = (*self.solved, _launch.read(half_log), long_log, self.epsilon, parts)
        sizes = (*self.sizes, tiles, splits, chunk)
        grid = (self.n_problems * tiles * tiles * splits,)
        _launch.launch(product_kernel, grid, *tensors, *sizes, TILE=tile, BLOCK=BLOCK, num_warps=WARPS)
        lower = parts.tril(-1).sum(1, dtype=torch.float64)
        return (self.short.tau * self.long.tau) * (lower + lower.mT)


def _solve(coupling: Tensor, root: Tensor, right: Tensor, lost: float, balanced: bool) -> Tensor:
    """Solve (1 - tau_a tau_b Y Y^T) z = right, everything in float64.

    Args:
        coupling: [P, n, n], tau_a tau_b Y Y^T with zeros on the diagonal and for what has no weight.
        root: [P, n], sqrt(p), 0 without weight.
        right: [P, n].
        lost: 1 - tau_a tau_b.
        balanced: the system has the null vector root; it is lifted, which moves the solution along it only.

    Returns:
        [P, n].
    """
    weighted = root > 0
    rest = (coupling @ root.unsqueeze(-1)).squeeze(-1)
    system = torch.diag_embed(torch.where(weighted, lost + rest / torch.where(weighted, root, 1.0), 1.0)) - coupling
    if balanced:
        unit = root / torch.where(weighted, root, 0.0).square().sum(-1, keepdim=True).clamp_min(1e-300).sqrt()
        system = system + unit.unsqueeze(-1) * unit.unsqueeze(-2)
    # Blocks that exchange less than float64 holds make it singular: what they say is then left out by the lift.
    lifted = system + torch.diag_embed(LIFT * system.diagonal(dim1=-2, dim2=-1))
    factor = torch.linalg.cholesky_ex(lifted).L
    eye = torch.eye(root.shape[-1], dtype=torch.float64, device=root.device).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    target = right.unsqueeze(-1)
    z = inverse.mT @ (inverse @ target)
    for _ in range(SOLVES - 1):
        z = z + inverse.mT @ (inverse @ (target - system @ z))
    return z.squeeze(-1)


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
    """`_implicit.formulas` in kernels: its results, and [P] bool, all True. There is no exact mass here."""
    to_mass, sound = torch.zeros_like(epsilon), torch.ones_like(epsilon, dtype=torch.bool)
    to_cost = _launch.empty(cost.shape, cost)
    if not cost.numel():
        return to_cost, torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(epsilon), to_mass, sound
    rows, cols = _Side(f, a, grad_f, row_mask, tau_a), _Side(g, b, grad_g, col_mask, tau_b)
    batch = _Problems(cost, epsilon, rows, cols)
    short, long = batch.short, batch.long

    long_log, short_log, products = batch.sums()
    weight = short.weight.double()
    weighted = short.exists & (weight > 0)
    loose = short.exists & (weight == 0)  # no weight: what they are does not depend on the others
    # Of loose entries 1 stands for the weight.
    root = torch.where(weighted, weight, 1.0).sqrt() * torch.exp2(0.5 * short_log)
    half_log = 0.5 * (torch.where(weighted, weight, 1.0).log2() - short_log)
    coupling = batch.coupling(half_log.float(), long_log)
    known = torch.where(loose, short.grad / root, 0.0)
    right = (short.grad - long.tau * weight * products) / root + (coupling @ known.unsqueeze(-1)).squeeze(-1)
    coupling = torch.where(weighted.unsqueeze(-1) & weighted.unsqueeze(-2), coupling, 0.0)
    lost = 1.0 - short.tau * long.tau
    z = _solve(coupling, torch.where(weighted, root, 0.0), torch.where(weighted, right, 0.0), lost, batch.balanced)
    if batch.balanced:
        # Of all solutions the one with sum v = sum u: it treats rows and columns alike, whichever are more.
        v = torch.where(weighted, z * root, torch.where(loose, short.grad, 0.0))
        total = torch.where(weighted, root.square(), 0.0).sum(-1, keepdim=True)
        missing = long.grad.sum(-1, keepdim=True) / 2 - v.sum(-1, keepdim=True)
        z = torch.where(weighted, z + root * missing / torch.where(total > 0, total, 1.0), 0.0)
    v = torch.where(weighted, short.tau * z * root, torch.where(loose, short.tau * short.grad, 0.0))

    values: list[Tensor | None] = [None] * 6  # v, log2 of s, alpha in two parts, v / s of loose entries, drift
    if batch.balanced:
        alpha = torch.where(weighted, z / root, 0.0).clamp(-LARGEST, LARGEST)
        high = alpha.float()
        outside = torch.where(loose, v * torch.exp2(-short_log), 0.0).float()
        values[2:] = high, (alpha - high.double()).float(), outside, batch.drift.squeeze(-1).float()
    else:
        values[:2] = v.float(), short_log.float()
    to_long, part_sums = _launch.empty((batch.n_problems, long.size), cost), batch.parts()
    totals = _launch.empty((batch.n_problems, batch.tiles), cost)
    tensors = (*batch.solved, batch.long_grad, long_log, batch.epsilon, *(_launch.read(value) for value in values))
    arguments = (*tensors, to_cost, to_long, part_sums, totals, *batch.sizes, batch.tiles, long.tau)
    _launch.launch(gradient_kernel, (batch.programs,), *arguments, BALANCED=batch.balanced, **batch.options)
    by_weight = -epsilon.double().unsqueeze(-1) * part_sums.sum(1, dtype=torch.float64)
    to_short = torch.where(short.exists, by_weight - batch.drift * short.potential, 0.0).to(a.dtype)
    to_epsilon = totals.sum(1, dtype=torch.float64)
    if batch.balanced:
        to_epsilon = to_epsilon - math.log(2) * (v * short_log).sum(-1)
    to_a, to_b = (to_long, to_short) if batch.turned else (to_short, to_long)
    return to_cost, to_a, to_b, to_epsilon.to(epsilon.dtype), to_mass, sound

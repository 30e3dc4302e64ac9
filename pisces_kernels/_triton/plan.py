"""The plan of solved dense problems, its sums and their gradient: one pass over the cost, one exponential an entry.

With density = exp((f_i + g_j - cost_ij) / epsilon), the exponent at most 40 where a weight is zero, plan = a density b.
Of a function of the plan and its sums, G the gradient with respect to one entry and h = density G,

    a_bar = sum_j h b,   b_bar = sum_i h a,   f_bar = a a_bar / epsilon,   g_bar = b b_bar / epsilon,
    cost_bar = grad_energy plan - a b h / epsilon,   epsilon_bar = -sum a b h exponent / epsilon.

A program has some rows, all of a column's in one thread, and goes over a chunk of the columns: sums over its rows stay
in the thread, sums over columns are taken across threads once at the end. Both leave parts, which a second kernel adds
in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._units import LN2, LOG2_E

COLS, WARPS = 128, 4  # a thread a column
MOST_ROWS = 8
CHUNK = 1024  # columns of a program
PARTS, ADDED = 8, 128  # of the kernel that adds: parts in one step, sums of a program
CEILING = tl.constexpr(40.0)  # of the exponent where the density is multiplied by a weight of zero


@triton.jit
def load_side(potential_ptr, weight_ptr, mask_ptr, problem, offs, size):
    """(exists, potential, weight) of some rows or columns of a problem, 0 where there is none; arrays are [P, size]."""
    exists = offs < size
    at = problem * size + offs
    if mask_ptr is not None:
        exists = exists & (tl.load(mask_ptr + at, mask=exists, other=0) != 0)
    return exists, tl.load(potential_ptr + at, mask=exists, other=0.0), tl.load(weight_ptr + at, mask=exists, other=0.0)


@triton.jit
def ceiling(weight):
    """What bounds the exponents of a row or column: CEILING where its weight is zero."""
    return tl.where(weight > 0, float("inf"), CEILING)


@triton.jit
def exponent(cost, f, g, a, b, inverse_epsilon):
    """(f + g - cost) / epsilon of a tile, bounded where a weight is zero; NaN stays. [ROWS, COLS]"""
    x = ((f[:, None] + g[None, :]) - cost) * inverse_epsilon
    x = tl.minimum(x, ceiling(a)[:, None], propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, ceiling(b)[None, :], propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def place(n_rows, n_cols, row_tiles, chunks, ROWS: tl.constexpr):
    """(problem, row tile, chunk of columns, first entry of the tile's rows in [P, N, M]) of a program."""
    program = tl.program_id(0)
    problem, row_tile = (program // (chunks * row_tiles)).to(tl.int64), program // chunks % row_tiles
    return problem, row_tile, program % chunks, (problem * n_rows + row_tile * ROWS) * n_cols


@triton.jit
def plan_kernel(
    cost_ptr, f_ptr, g_ptr, a_ptr, b_ptr, epsilon_ptr, row_mask_ptr, col_mask_ptr, plan_ptr,
    n_rows, n_cols, row_tiles, chunks, chunk,
    LOGARITHM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write the plan [P, N, M], 0 where masked, or its logarithm, -inf where masked or without weight."""
    problem, row_tile, part, corner = place(n_rows, n_cols, row_tiles, chunks, ROWS)
    offs_i, offs_r = row_tile * ROWS + tl.arange(0, ROWS), tl.arange(0, ROWS)[:, None] * n_cols
    rows, f, a = load_side(f_ptr, a_ptr, row_mask_ptr, problem, offs_i, n_rows)
    log_a = tl.log2(a) * LN2  # -inf without weight
    inverse_epsilon = 1.0 / tl.load(epsilon_ptr + problem)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, n_cols), COLS):
        offs_j = start + tl.arange(0, COLS)
        cols, g, b = load_side(g_ptr, b_ptr, col_mask_ptr, problem, offs_j, n_cols)
        at = offs_r + offs_j[None, :]
        exists = rows[:, None] & cols[None, :]
        x = exponent(tl.load(cost_ptr + corner + at, mask=exists, other=0.0), f, g, a, b, inverse_epsilon)
        if LOGARITHM:
            plan = tl.where(exists, x + (log_a[:, None] + (tl.log2(b) * LN2)[None, :]), float("-inf"))
        else:
            plan = tl.where(exists, a[:, None] * tl.exp2(x * LOG2_E) * b[None, :], 0.0)
        tl.store(plan_ptr + corner + at, plan, mask=(offs_i < n_rows)[:, None] & (offs_j < n_cols)[None, :])


@triton.jit
def plan_sums_kernel(
    cost_ptr, f_ptr, g_ptr, a_ptr, b_ptr, epsilon_ptr, row_mask_ptr, col_mask_ptr,
    row_parts_ptr, col_parts_ptr, total_parts_ptr, n_rows, n_cols, row_tiles, chunks, chunk,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Parts of the plan's sums over columns [programs, ROWS] and over rows [P, row_tiles, M], of sum(plan * cost)."""
    problem, row_tile, part, corner = place(n_rows, n_cols, row_tiles, chunks, ROWS)
    offs_i, offs_r = row_tile * ROWS + tl.arange(0, ROWS), tl.arange(0, ROWS)[:, None] * n_cols
    rows, f, a = load_side(f_ptr, a_ptr, row_mask_ptr, problem, offs_i, n_rows)
    inverse_epsilon = 1.0 / tl.load(epsilon_ptr + problem)
    col_parts_ptr += (problem * row_tiles + row_tile) * n_cols
    row_sums, totals = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((COLS,), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, n_cols), COLS):
        offs_j = start + tl.arange(0, COLS)
        cols, g, b = load_side(g_ptr, b_ptr, col_mask_ptr, problem, offs_j, n_cols)
        exists = rows[:, None] & cols[None, :]
        cost = tl.load(cost_ptr + corner + (offs_r + offs_j[None, :]), mask=exists, other=0.0)
        x = exponent(cost, f, g, a, b, inverse_epsilon)
        plan = tl.where(exists, a[:, None] * tl.exp2(x * LOG2_E) * b[None, :], 0.0)
        row_sums += plan
        totals += tl.sum(plan * cost, 0)
        tl.store(col_parts_ptr + offs_j, tl.sum(plan, 0), mask=offs_j < n_cols)
    program = tl.program_id(0).to(tl.int64)
    tl.store(row_parts_ptr + program * ROWS + tl.arange(0, ROWS), tl.sum(row_sums, 1))
    tl.store(total_parts_ptr + program, tl.sum(totals, 0))


@triton.jit
def plan_backward_kernel(
    cost_ptr, f_ptr, g_ptr, a_ptr, b_ptr, epsilon_ptr, row_mask_ptr, col_mask_ptr,
    grad_plan_ptr, grad_rows_ptr, grad_cols_ptr, grad_energy_ptr, to_cost_ptr,
    row_parts_ptr, col_parts_ptr, total_parts_ptr, n_rows, n_cols, row_tiles, chunks, chunk,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write cost_bar [P, N, M], and parts as above: of a_bar, of b_bar, and of sum a b h exponent."""
    problem, row_tile, part, corner = place(n_rows, n_cols, row_tiles, chunks, ROWS)
    offs_i, offs_r = row_tile * ROWS + tl.arange(0, ROWS), tl.arange(0, ROWS)[:, None] * n_cols
    rows, f, a = load_side(f_ptr, a_ptr, row_mask_ptr, problem, offs_i, n_rows)
    inverse_epsilon = 1.0 / tl.load(epsilon_ptr + problem)
    energy = 0.0
    if grad_energy_ptr is not None:
        energy = tl.load(grad_energy_ptr + problem)
    row_grads = tl.zeros((ROWS,), tl.float32)
    if grad_rows_ptr is not None:
        row_grads = tl.load(grad_rows_ptr + problem * n_rows + offs_i, mask=rows, other=0.0)
    col_parts_ptr += (problem * row_tiles + row_tile) * n_cols
    row_sums, totals = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((COLS,), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, n_cols), COLS):
        offs_j = start + tl.arange(0, COLS)
        cols, g, b = load_side(g_ptr, b_ptr, col_mask_ptr, problem, offs_j, n_cols)
        at = offs_r + offs_j[None, :]
        exists = rows[:, None] & cols[None, :]
        cost = tl.load(cost_ptr + corner + at, mask=exists, other=0.0)
        grad = energy * cost + row_grads[:, None]
        if grad_plan_ptr is not None:
            grad += tl.load(grad_plan_ptr + corner + at, mask=exists, other=0.0)
        if grad_cols_ptr is not None:
            grad += tl.load(grad_cols_ptr + problem * n_cols + offs_j, mask=cols, other=0.0)[None, :]
        x = exponent(cost, f, g, a, b, inverse_epsilon)
        density = tl.where(exists, tl.exp2(x * LOG2_E), 0.0)
        h = density * grad
        h_b = h * b[None, :]
        to_cost = a[:, None] * (energy * density * b[None, :] - inverse_epsilon * h_b)
        tl.store(to_cost_ptr + corner + at, to_cost, mask=(offs_i < n_rows)[:, None] & (offs_j < n_cols)[None, :])
        row_sums += h_b
        totals += tl.sum(a[:, None] * h_b * x, 0)
        tl.store(col_parts_ptr + offs_j, tl.sum(a[:, None] * h, 0), mask=offs_j < n_cols)
    program = tl.program_id(0).to(tl.int64)
    tl.store(row_parts_ptr + program * ROWS + tl.arange(0, ROWS), tl.sum(row_sums, 1))
    tl.store(total_parts_ptr + program, tl.sum(totals, 0))


@triton.jit
def store_sums(
    parts_ptr, first, stride, n_parts, sums_ptr, to_potential_ptr, weight_ptr, mask_ptr, problem, offs, size,
    inverse_epsilon, PARTS: tl.constexpr,
):  # fmt: skip
    """Write sums of a side [P, size] and, if there is a place for it, weight sum / epsilon.

    The parts of the sum at offs lie at parts_ptr + first, `stride` apart.
    """
    sums = tl.zeros((PARTS, offs.shape[0]), tl.float32)
    for start in range(0, n_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        mask = (parts < n_parts)[:, None] & (offs < size)[None, :]
        sums += tl.load(parts_ptr + parts.to(tl.int64)[:, None] * stride + first[None, :], mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    at = problem * size + offs
    tl.store(sums_ptr + at, total, mask=offs < size)
    if to_potential_ptr is not None:
        _, _, weight = load_side(weight_ptr, weight_ptr, mask_ptr, problem, offs, size)
        tl.store(to_potential_ptr + at, weight * total * inverse_epsilon, mask=offs < size)


@triton.jit
def add_kernel(
    row_parts_ptr, col_parts_ptr, total_parts_ptr, row_sums_ptr, col_sums_ptr, totals_ptr, to_f_ptr, to_g_ptr,
    a_ptr, b_ptr, epsilon_ptr, row_mask_ptr, col_mask_ptr, n_rows, n_cols, row_tiles, chunks,
    ROWS: tl.constexpr, PARTS: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Add the parts of plan_sums_kernel, or of plan_backward_kernel where to_f and to_g are given, in their order."""
    row_blocks, col_blocks = tl.cdiv(n_rows, ADDED), tl.cdiv(n_cols, ADDED)
    program = tl.program_id(0).to(tl.int64)
    problem, block = program // (row_blocks + col_blocks + 1), program % (row_blocks + col_blocks + 1)
    inverse_epsilon = 1.0 / tl.load(epsilon_ptr + problem)
    if block < row_blocks:
        offs = block.to(tl.int32) * ADDED + tl.arange(0, ADDED)
        first = (problem * row_tiles + offs // ROWS) * chunks * ROWS + offs % ROWS
        store_sums(
            row_parts_ptr, first, ROWS, chunks, row_sums_ptr, to_f_ptr, a_ptr, row_mask_ptr, problem, offs, n_rows,
            inverse_epsilon, PARTS,
        )  # fmt: skip
    elif block < row_blocks + col_blocks:
        offs = (block - row_blocks).to(tl.int32) * ADDED + tl.arange(0, ADDED)
        first = problem * row_tiles * n_cols + offs
        store_sums(
            col_parts_ptr, first, n_cols, row_tiles, col_sums_ptr, to_g_ptr, b_ptr, col_mask_ptr, problem, offs, n_cols,
            inverse_epsilon, PARTS,
        )  # fmt: skip
    else:
        tiles = row_tiles * chunks
        total = tl.zeros((ADDED,), tl.float32)
        for start in range(0, tiles, ADDED):
            offs = start + tl.arange(0, ADDED)
            total += tl.load(total_parts_ptr + problem * tiles + offs, mask=offs < tiles, other=0.0)
        scale = 1.0
        if to_f_ptr is not None:
            scale = -inverse_epsilon
        tl.store(totals_ptr + problem, tl.sum(total, 0) * scale)


class _Batch:
    """Solved problems as the kernels read them, and how they are divided into programs."""

    def __init__(
        self,
        cost: Tensor,
        f: Tensor,
        g: Tensor,
        a: Tensor,
        b: Tensor,
        epsilon: Tensor,
        row_mask: Tensor | None,
        col_mask: Tensor | None,
    ) -> None:
        self.problems, self.rows, self.cols = cost.shape
        self.solved = [_launch.read(value) for value in (cost, f, g, a, b, epsilon.float(), row_mask, col_mask)]
        tile = min(MOST_ROWS, triton.next_power_of_2(self.rows))
        # Chunks of about the same length, each of whole tiles.
        chunk = triton.cdiv(triton.cdiv(self.cols, triton.cdiv(self.cols, CHUNK)), COLS) * COLS
        self.row_tiles, self.chunks = triton.cdiv(self.rows, tile), triton.cdiv(self.cols, chunk)
        self.sizes = (self.rows, self.cols, self.row_tiles, self.chunks, chunk)
        self.programs = self.problems * self.row_tiles * self.chunks
        self.options = {"ROWS": tile, "COLS": COLS, "num_warps": WARPS}

    def parts(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scratch for parts of sums over columns, over rows, and of all entries."""
        by_rows = _launch.empty((self.programs, self.options["ROWS"]), like)
        by_cols = _launch.empty((self.problems, self.row_tiles, self.cols), like)
        return by_rows, by_cols, _launch.empty((self.programs,), like)

    def add(self, parts: tuple[Tensor, ...], sums: tuple[Tensor, ...], potentials: tuple[Tensor | None, ...]) -> None:
        """Fill the sums over columns, over rows, and of all entries from their parts."""
        blocks = triton.cdiv(self.rows, ADDED) + triton.cdiv(self.cols, ADDED) + 1
        grid = (self.problems * blocks,)
        tensors = (*parts, *sums, *potentials, *self.solved[3:])
        options = {"ROWS": self.options["ROWS"], "PARTS": PARTS, "ADDED": ADDED, "num_warps": WARPS}
        _launch.launch(add_kernel, grid, *tensors, *self.sizes[:4], **options)


def plan(cost: Tensor, *others: Tensor | None, logarithm: bool) -> Tensor:
    """exp((f + g - cost) / epsilon) a b, or its logarithm. [P, N, M]"""
    result = _launch.empty(cost.shape, cost)
    if cost.numel():
        batch = _Batch(cost, *others)
        tensors = (*batch.solved, result)
        _launch.launch(plan_kernel, (batch.programs,), *tensors, *batch.sizes, LOGARITHM=logarithm, **batch.options)
    return result


def plan_sums(cost: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over columns [P, N] and over rows [P, M], and sum(plan * cost) [P]."""
    n_problems, n_rows, n_cols = cost.shape
    row_sums, col_sums = _launch.empty((n_problems, n_rows), cost), _launch.empty((n_problems, n_cols), cost)
    energy = _launch.empty((n_problems,), cost)
    if cost.numel():
        batch = _Batch(cost, *others)
        parts = batch.parts(cost)
        _launch.launch(plan_sums_kernel, (batch.programs,), *batch.solved, *parts, *batch.sizes, **batch.options)
        batch.add(parts, (row_sums, col_sums, energy), (None, None))
    return row_sums, col_sums, energy


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
    """`_plan._gradients` in kernels; same arguments and results."""
    to_cost, to_f, to_g, to_a, to_b, to_epsilon = (
        _launch.empty(value.shape, cost) for value in (cost, f, g, a, b, epsilon)
    )
    if cost.numel():
        batch = _Batch(cost, f, g, a, b, epsilon, row_mask, col_mask)
        grads = [_launch.read(grad) for grad in (grad_plan, grad_rows, grad_cols, grad_energy)]
        parts = batch.parts(cost)
        tensors = (*batch.solved, *grads, to_cost, *parts)
        _launch.launch(plan_backward_kernel, (batch.programs,), *tensors, *batch.sizes, **batch.options)
        batch.add(parts, (to_a, to_b, to_epsilon), (to_f, to_g))
    return to_cost, to_f, to_g, to_a, to_b, to_epsilon.to(epsilon.dtype)

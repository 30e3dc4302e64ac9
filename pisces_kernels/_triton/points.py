"""Point clouds: the solve, one transform, and products with the kernel, streamed.

Before any of them the points are packed: scaled so that products are exponents of two, rounded, padded. With
k = log2(e) / epsilon,

    "sqeuclidean"   k |x - y|^2 = h + h' - <X, Y>,       X = sqrt(2 k) x,   h = |X|^2 / 2
    "cosine"        k (1 - <x, y>) = h + h' - <X, Y>,    X = sqrt(k) x,     h = k / 2

for the rounded X: distances are those of the rounded points. "float32" has X as the sum of two TF32 numbers on NVIDIA's
tensor cores, and takes three of the four products; AMD's matrix cores have float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._streamed import (
    DONE,
    HAS_COLS,
    HAS_ROWS,
    LAST,
    LOG_WEIGHT,
    N_ITERS,
    NORM,
    NOT_FINITE,
    OFFSET,
    POTENTIAL,
    RESIDUAL,
    SOLVERS,
    VECTORS,
    multiply_add,
)  # fmt: skip
from ._team import TOGETHER
from ._units import LOG2_E

HIGHEST = tl.constexpr(80.0 * LOG2_E.value)  # exponent of a row and a column that both have no weight
STEP = 32  # points that a program packs
TILE = 128  # clouds are padded to multiples of it: all tiles divide it
SIDE, MOST_WIDTH = 64, 128  # of a tile of a product: rows and columns of K, columns of the result
MOST_SPLITS = 16  # parts of the columns, so that programs have work where there are few tiles of rows


@triton.jit
def pack_kernel(
    points_ptr, weight_ptr, mask_ptr, start_ptr, epsilon_ptr,
    packed_ptr, state_ptr, flags_ptr,
    count, size, dim, padded, width, flag_count, first_flag,
    SQUARED: tl.constexpr, LOGS: tl.constexpr, TF32: tl.constexpr, PARTS: tl.constexpr, SIDE: tl.constexpr,
    STEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Pack STEP points of one side.

    Args:
        points_ptr: [P, size, dim].
        weight_ptr: [P, size], logarithms if LOGS; None: 1.
        mask_ptr: [P, size] or None.
        start_ptr: [P, size], the potential to start from, or None: 0.
        epsilon_ptr: [P].
        packed_ptr: [P, PARTS, padded, width]: rounded, or high and low part.
        state_ptr: [P, padded] of every vector, see `solve_kernel`, one each count entries.
        flags_ptr: [P, flag_count], of which this side has those from first_flag on.
        SIDE: HAS_ROWS or HAS_COLS.
    """
    tiles = padded // STEP
    problem, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    offs = tile * STEP + tl.arange(0, STEP)
    inside = offs < size
    if mask_ptr is not None:
        inside = inside & (tl.load(mask_ptr + problem * size + offs, mask=inside, other=0) != 0)
    scale = LOG2_E / tl.load(epsilon_ptr + problem)
    root = tl.sqrt_rn(2.0 * scale if SQUARED else scale)
    squares = tl.zeros((STEP, CHUNK), tl.float32)
    bad = tl.zeros((STEP, CHUNK), tl.int32)
    of = points_ptr + (problem * size + offs)[:, None] * dim
    to = packed_ptr + (problem * PARTS * padded + offs)[:, None] * width
    for k in range(0, width, CHUNK):
        offs_k = (k + tl.arange(0, CHUNK))[None, :]
        there = inside[:, None] & (offs_k < dim)
        value = tl.load(of + offs_k, mask=there, other=0.0) * root
        bad |= (~(tl.abs(value) < float("inf"))).to(tl.int32)
        high = value.to(packed_ptr.dtype.element_ty)
        if TF32:  # to the nearest number with 10 bits after the point
            high = ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        tl.store(to + offs_k, high)
        if PARTS == 2:
            low = value - high
            low = ((low.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            tl.store(to + padded.to(tl.int64) * width + offs_k, low)
        else:
            value = high.to(tl.float32)
        squares += value * value
    norm = tl.sum(squares, 1) / 2.0 if SQUARED else tl.zeros((STEP,), tl.float32) + scale / 2.0
    sound = (tl.max(bad, 1) == 0) & (norm < 1e37)  # sums of four of them are finite

    log_weight = tl.zeros((STEP,), tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + problem * size + offs, mask=inside, other=1.0)
        if LOGS:
            log_weight = weight * LOG2_E
        else:
            log_weight = tl.where(weight > 0, tl.log2(tl.where(weight > 0, weight, 1.0)), float("-inf"))
        sound = sound & (weight < float("inf"))
    log_weight = tl.where(inside, log_weight, float("-inf"))
    potential = tl.zeros((STEP,), tl.float32)
    if start_ptr is not None:
        potential = tl.load(start_ptr + problem * size + offs, mask=inside, other=0.0) * scale
        sound = sound & (tl.abs(potential) < float("inf"))
    norm = tl.where(inside, norm, float("inf"))
    at = state_ptr + problem * padded + offs
    tl.store(at + NORM * count, norm)
    tl.store(at + LOG_WEIGHT * count, log_weight)
    tl.store(at + POTENTIAL * count, potential)
    tl.store(at + LAST * count, tl.zeros((STEP,), tl.float32))
    tl.store(at + OFFSET * count, potential - norm + log_weight)
    weighted = LOGS | (tl.max((log_weight > float("-inf")).to(tl.int32), 0) > 0)
    broken = tl.max((inside & ~sound).to(tl.int32), 0) > 0
    flags = tl.where(weighted, SIDE, 0) | tl.where(broken, NOT_FINITE, 0)
    tl.store(flags_ptr + problem * flag_count + first_flag + tile, flags)


@triton.jit
def _moments(potential_ptr, weight_ptr, mask_ptr, size, BLOCK: tl.constexpr):
    """(sum of the weights, sum of weight times potential, how many potentials are not finite)."""
    mass, moment = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, size, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        inside = offs < size
        if mask_ptr is not None:
            inside = inside & (tl.load(mask_ptr + offs, mask=inside, other=0) != 0)
        weight = tl.load(weight_ptr + offs, mask=inside, other=0.0)
        potential = tl.load(potential_ptr + offs, mask=inside, other=0.0)
        mass += weight
        moment += weight * potential
        bad |= (~(tl.abs(potential) < float("inf"))).to(tl.int32)
    return tl.sum(mass, 0), tl.sum(moment, 0), tl.max(bad, 0)


@triton.jit
def _write(potential_ptr, out_ptr, mask_ptr, size, shift, unit, failed, BLOCK: tl.constexpr):
    """Store the potentials in units of the cost, NaN where the problem failed and 0 where there is no point."""
    for first in range(0, size, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        inside = offs < size
        there = inside
        if mask_ptr is not None:
            there = inside & (tl.load(mask_ptr + offs, mask=inside, other=0) != 0)
        potential = (tl.load(potential_ptr + offs, mask=there, other=0.0) + shift) * unit
        potential = tl.where(failed, float("nan"), tl.where(unit > 0, potential, 0.0))
        tl.store(out_ptr + offs, tl.where(there, potential, 0.0), mask=inside)


@triton.jit
def finish_kernel(
    row_potential_ptr, col_potential_ptr, a_ptr, b_ptr, row_mask_ptr, col_mask_ptr, epsilon_ptr,
    counters_ptr, f_ptr, g_ptr, n_iters_ptr, residual_ptr,
    n_rows, n_cols, padded_rows, padded_cols, stride,
    BALANCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Results of one problem from what `solve_kernel` left.

    Args:
        row_potential_ptr: [P, padded_rows], and of the columns.
        a_ptr: [P, n_rows], None for a transform, which may be infinite.
        g_ptr: [P, n_cols], None where there are no columns: f, a and the mask of the rows stand alone.
        counters_ptr: [P, stride], see `solve_kernel`.
        n_iters_ptr: [P], and residual.
    """
    problem = tl.program_id(0).to(tl.int64)
    row_potential_ptr += problem * padded_rows
    f_ptr += problem * n_rows
    if row_mask_ptr is not None:
        row_mask_ptr += problem * n_rows
    if g_ptr is not None:
        col_potential_ptr += problem * padded_cols
        b_ptr += problem * n_cols
        g_ptr += problem * n_cols
        if col_mask_ptr is not None:
            col_mask_ptr += problem * n_cols
    residual = tl.load(counters_ptr + problem * stride + RESIDUAL).to(tl.float32, bitcast=True)
    iterations = tl.load(counters_ptr + problem * stride + N_ITERS)
    failed, solved = residual != residual, iterations > 0
    shift = 0.0
    if a_ptr is not None:
        mass, moment, bad = _moments(row_potential_ptr, a_ptr + problem * n_rows, row_mask_ptr, n_rows, BLOCK)
        if g_ptr is not None:
            mass_b, moment_b, bad_b = _moments(col_potential_ptr, b_ptr, col_mask_ptr, n_cols, BLOCK)
            bad |= bad_b
            if BALANCED:  # f + c and g - c are the same plan: sum a f = sum b g treats rows and columns alike
                shift = tl.where(solved, (moment - moment_b) / (mass + mass_b), 0.0)
        failed = failed | (solved & (bad > 0))
    # A problem without weight was not solved: its potentials are 0.
    unit = tl.where(solved, tl.load(epsilon_ptr + problem) / LOG2_E, 0.0)
    _write(row_potential_ptr, f_ptr, row_mask_ptr, n_rows, -shift, unit, failed, BLOCK)
    if g_ptr is not None:
        _write(col_potential_ptr, g_ptr, col_mask_ptr, n_cols, shift, unit, failed, BLOCK)
    tl.store(n_iters_ptr + problem, iterations)
    tl.store(residual_ptr + problem, tl.where(failed, float("nan"), residual))


@triton.jit
def product_kernel(
    rows_ptr, cols_ptr, row_offset_ptr, col_offset_ptr, right_ptr, left_ptr, right_factor_ptr, out_ptr,
    n_rows, n_cols, padded_rows, padded_cols, dim, width, factors,
    PARTS: tl.constexpr, INPUT: tl.constexpr, MATRIX: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS x WIDTH entries of (K * left right_factor^T) right, K_ij = 2^(row_i + col_j + <x_i, y_j>).

    Args:
        rows_ptr: [P, PARTS, padded_rows, dim], packed; cols_ptr alike.
        row_offset_ptr: [P, padded_rows], -inf beyond the cloud; col_offset_ptr alike.
        right_ptr: [P, n_cols, width].
        left_ptr: [P, n_rows, factors], or None for K alone.
        right_factor_ptr: [P, n_cols, factors], or None.
        out_ptr: [P, n_rows, width].
    """
    tiles, pieces = tl.cdiv(n_rows, ROWS), tl.cdiv(width, WIDTH)
    item = tl.program_id(0) // pieces
    problem, first_row = (item // tiles).to(tl.int64), item % tiles * ROWS
    offs_row, offs_col = first_row + tl.arange(0, ROWS), tl.arange(0, COLS)
    offs_e = tl.program_id(0) % pieces * WIDTH + tl.arange(0, WIDTH)
    rows_ptr += (problem * PARTS * padded_rows + first_row) * dim
    cols_ptr += problem * PARTS * padded_cols * dim
    row_offset = tl.load(row_offset_ptr + problem * padded_rows + offs_row)
    col_offset_ptr += problem * padded_cols
    right_ptr += problem * n_cols * width
    out = tl.zeros((ROWS, WIDTH), tl.float32)
    for col in range(0, n_cols, COLS):
        mask_col = col + offs_col < n_cols
        exponent = row_offset[:, None] + tl.load(col_offset_ptr + col + offs_col)[None, :]
        exponent = multiply_add(
            rows_ptr, padded_rows.to(tl.int64) * dim,
            cols_ptr + tl.cast(col, tl.int64) * dim, padded_cols.to(tl.int64) * dim,
            dim, exponent, ROWS, COLS, CHUNK, PARTS, INPUT,
        )  # fmt: skip
        kernel = tl.exp2(tl.where(exponent > HIGHEST, HIGHEST, exponent))
        at_col = (col + offs_col).to(tl.int64)[:, None]
        if left_ptr is not None:
            coupling = tl.zeros((ROWS, COLS), tl.float32)
            for k in range(0, factors, CHUNK):
                offs_k = k + tl.arange(0, CHUNK)
                left = tl.load(
                    left_ptr + (problem * n_rows + offs_row)[:, None] * factors + offs_k[None, :],
                    mask=(offs_row < n_rows)[:, None] & (offs_k < factors)[None, :], other=0.0,
                )  # fmt: skip
                factor = tl.load(
                    right_factor_ptr + (problem * n_cols + col + offs_col)[None, :] * factors + offs_k[:, None],
                    mask=mask_col[None, :] & (offs_k < factors)[:, None], other=0.0,
                )  # fmt: skip
                coupling = tl.dot(left, factor, coupling, input_precision=MATRIX)
            kernel *= coupling
        right = tl.load(
            right_ptr + at_col * width + offs_e[None, :], mask=mask_col[:, None] & (offs_e < width)[None, :], other=0.0
        )
        out = tl.dot(kernel, right, out, input_precision=MATRIX)
    at = (problem * n_rows + offs_row)[:, None] * width + offs_e[None, :]
    tl.store(out_ptr + at, out, mask=(offs_row < n_rows)[:, None] & (offs_e < width)[None, :])


@dataclass(frozen=True)
class _Arithmetic:
    """How the products of points are computed on a device.

    Attributes:
        dtype: of the packed points.
        parts: numbers that a feature is the sum of.
        input: `input_precision` of the products of points.
        matrix: of products of other matrices, in float32.
        chunk: features of one step: all of them, of rows that stay in the program, or some.
        width: features of a packed point, a multiple of the chunk.
        solver: one of `SOLVERS`.
    """

    dtype: torch.dtype
    parts: int
    input: str
    matrix: str
    chunk: int
    width: int
    solver: str

    @staticmethod
    def of(precision: str, dim: int) -> _Arithmetic:
        """For points of some features; float32 is never less than it says."""
        arch = _launch.architecture()
        amd = not isinstance(arch, int)
        parts = 2 if precision == "float32" and not amd else 1
        size = 2 if precision == "bf16" else 4 * parts  # bytes of a feature
        resident = dim <= min(128, 512 // size)
        chunk = max(16, triton.next_power_of_2(dim)) if resident else min(64, 256 // size)
        solver = "amd"
        if isinstance(arch, int):
            deep = "deep, Blackwell" if arch >= 100 else "deep" if arch >= 90 else "deep, before Hopper"
            solver = deep if parts == 2 or chunk * size > 256 else "flat"
        # Products of bfloat16 are exact. Of AMD's devices gfx942 alone multiplies TF32; others take rounded points.
        rounds = precision != "bf16" and (not amd or (precision == "tf32" and arch == "gfx942"))
        return _Arithmetic(
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            parts=parts,
            input="tf32" if rounds else "ieee",
            matrix="ieee" if amd else "tf32x3",
            chunk=chunk,
            width=triton.cdiv(dim, chunk) * chunk,
            solver=solver,
        )


class _Side:
    """One side of all problems: tensors as they are given, [P, size, ...], and the size when it is packed."""

    def __init__(
        self, points: Tensor, weight: Tensor | None = None, mask: Tensor | None = None, start: Tensor | None = None
    ) -> None:
        self.points, self.weight, self.mask, self.start = map(_launch.read, (points, weight, mask, start))
        self.size = points.shape[1]
        self.padded = triton.cdiv(self.size, TILE) * TILE


class _Packed:
    """Sides of all problems as the kernels read them, one after the other in memory.

    Args:
        sides: rows and columns, or the rows alone.
        epsilon: [P] or [P, 1].
        squared: whether the cost is "sqeuclidean".
        precision: of the products of points.
        logs: whether the weights are logarithms.
    """

    def __init__(
        self, sides: list[_Side], epsilon: Tensor, squared: bool, precision: str = "float32", logs: bool = False
    ) -> None:
        like = sides[0].points
        self.problems, _, dim = like.shape
        self.sides, self.arithmetic = sides, _Arithmetic.of(precision, dim)
        self.epsilon = _launch.read(epsilon.reshape(-1).float())
        count = self.problems * sum(side.padded for side in sides)
        parts, width = self.arithmetic.parts, self.arithmetic.width
        steps = [side.padded // STEP for side in sides]
        self.points = _launch.empty((count * parts * width,), like, self.arithmetic.dtype)
        self.state = _launch.empty((VECTORS.value + (len(sides) == 1), count), like)
        self.flags = _launch.empty((self.problems, sum(steps)), like, torch.int32)
        for at, side in enumerate(sides):
            start = self.start(at)
            _launch.launch(
                pack_kernel, (self.problems * steps[at],),
                side.points, side.weight, side.mask, side.start, self.epsilon,
                self.points[start * parts * width :], self.state[0, start:], self.flags,
                count, side.size, dim, side.padded, width, sum(steps), at * steps[0],
                SQUARED=squared, LOGS=logs, TF32=precision == "tf32" or parts == 2, PARTS=parts,
                SIDE=(HAS_ROWS, HAS_COLS)[at].value, STEP=STEP, CHUNK=self.arithmetic.chunk,
            )  # fmt: skip

    def start(self, side: int) -> int:
        """Where a side begins in a vector of all points."""
        return side * self.problems * self.sides[0].padded

    def iterate(
        self, turns: int, max_iters: int = 1, taus: tuple[float, float] = (1.0, 1.0), tol: float = 0.0, begin: int = 0
    ) -> Tensor:
        """Run `solve_kernel`: its counters, and potentials in the place of those to start from."""
        like, problems = self.state, self.problems
        kernel, tile = SOLVERS[self.arithmetic.solver]
        rows, cols = self.sides[0].padded, self.sides[-1].padded
        tiles = [side.padded // tile for side in self.sides]
        programs = _launch.multiprocessors(like.device)  # all that surely run at the same time
        each = max(1, programs // problems)  # of a problem
        splits = [max(1, min(each // tiles[0], cols // TILE, MOST_SPLITS)), 1]
        if turns == 2:
            splits[1] = max(1, min(each // tiles[1], rows // TILE, MOST_SPLITS))
        items = max(count * parts for count, parts in zip(tiles[:turns], splits, strict=False))
        team = triton.cdiv(items, triton.cdiv(items, each))  # enough to be as fast as all of them
        teams = min(problems, max(1, programs // team))
        parts = 2 * problems * (rows * splits[0] + cols * splits[1]) if max(splits) > 1 else 0
        counters = _launch.empty((problems, DONE.value + sum(tiles)), like, torch.int32).zero_()
        together: dict[str, Any] = TOGETHER if team > 1 else {}
        _launch.launch(
            kernel, (teams * team,),
            self.points, self.state, _launch.empty((parts,), like), self.flags, counters,
            problems, like.shape[1], problems * rows, rows, cols, self.arithmetic.width, *splits, max_iters, *taus, tol,
            TURNS=turns, SELF=len(self.sides) == 1, BEGIN=begin, STEP=STEP,
            TEAM=team, SPLITS=triton.next_power_of_2(max(splits)), ROWS=tile,
            RESIDENT=self.arithmetic.chunk == self.arithmetic.width, CHUNK=self.arithmetic.chunk,
            PARTS=self.arithmetic.parts, INPUT=self.arithmetic.input, **together,
        )  # fmt: skip
        return counters

    def finish(
        self, counters: Tensor, f: Tensor, g: Tensor | None = None, transform: bool = False, balanced: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Write f, and g where there is one, in units of the cost: (n_iters [P] int32, residual [P])."""
        rows, cols = self.sides[0], self.sides[-1]
        potential = self.state[POTENTIAL.value]
        n_iters, residual = _launch.empty((self.problems,), f, torch.int32), _launch.empty((self.problems,), f)
        _launch.launch(
            finish_kernel, (self.problems,),
            potential, None if g is None else potential[self.start(1) :],
            None if transform else rows.weight, None if g is None else cols.weight,
            rows.mask, None if g is None else cols.mask, self.epsilon, counters, f, g, n_iters, residual,
            rows.size, cols.size, rows.padded, cols.padded, counters.shape[1], BALANCED=balanced, BLOCK=1024,
        )  # fmt: skip
        return n_iters, residual


def sinkhorn_points(
    x: Tensor,
    y: Tensor,
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
    acceleration: str | None,
    f_init: Tensor | None,
    g_init: Tensor | None,
    cost: str,
    precision: str = "float32",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve P problems between prepared clouds [P, N, D], [P, M, D]: (f, g, n_iters int32, residual)."""
    assert mass is None  # refused before, see `_dispatch`
    assert acceleration is None
    f, g = _launch.empty(a.shape, a), _launch.empty(b.shape, b)
    if x.shape[0] == 0:
        return f, g, a.new_empty(0, dtype=torch.int32), a.new_empty(0)
    sides = [_Side(x, a, row_mask, f_init), _Side(y, b, col_mask, g_init)]
    packed = _Packed(sides, epsilon, cost != "cosine", precision)
    begin = -1 if f_init is not None and g_init is None else 0
    counters = packed.iterate(2, max_iters, (tau_a, tau_b), tol, begin)
    n_iters, residual = packed.finish(counters, f, g, balanced=tau_a == 1.0 and tau_b == 1.0)
    return f, g, n_iters, residual


def self_transport(
    x: Tensor, a: Tensor, epsilon: Tensor, tau: float, mask: Tensor | None, max_iters: int, tol: float, cost: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Potential f = g of P clouds [P, N, D] with themselves: (f [P, N], n_iters int32, residual)."""
    f = _launch.empty(a.shape, a)
    if x.shape[0] == 0:
        return f, a.new_empty(0, dtype=torch.int32), a.new_empty(0)
    packed = _Packed([_Side(x, a, mask)], epsilon, cost != "cosine")
    return f, *packed.finish(packed.iterate(1, max_iters, (tau, tau), tol), f)


def soft_minimum(x: Tensor, y: Tensor, potential: Tensor, log_weight: Tensor, epsilon: Tensor, squared: bool) -> Tensor:
    """`reference.soft_minimum` of the streamed cost: potential and log_weight [P, M], epsilon [P, 1] -> [P, N]."""
    result = _launch.empty(x.shape[:2], x)
    if x.shape[0] == 0:
        return result
    packed = _Packed([_Side(x), _Side(y, log_weight, start=potential)], epsilon, squared, logs=True)
    packed.finish(packed.iterate(1), result, transform=True)
    return result


def product(
    x: Tensor,
    y: Tensor,
    row: Tensor,
    col: Tensor,
    epsilon: Tensor,
    right: Tensor,
    coupling: tuple[Tensor, Tensor] | None,
    squared: bool,
) -> Tensor:
    """K right with K_ij = exp(row_i + col_j - cost_ij / epsilon) <left_i, right_j>; see `_streaming.products`."""
    (problems, rows), cols, width = row.shape, col.shape[1], right.shape[-1]
    result = _launch.empty((problems, rows, width), right)
    if result.numel() == 0:
        return result
    packed = _Packed([_Side(x, row), _Side(y, col)], epsilon, squared, logs=True)
    arithmetic, start, offset = packed.arithmetic, packed.start(1), packed.state[OFFSET.value]
    left, right_factor = coupling or (None, None)
    piece = min(MOST_WIDTH, max(16, triton.next_power_of_2(width)))
    tiles = problems * triton.cdiv(rows, SIDE) * triton.cdiv(width, piece)
    _launch.launch(
        product_kernel, (tiles,),
        packed.points, packed.points[start * arithmetic.parts * arithmetic.width :],
        offset, offset[start:],
        *map(_launch.read, (right, left, right_factor)), result,
        rows, cols, packed.sides[0].padded, packed.sides[1].padded, arithmetic.width, width,
        0 if left is None else left.shape[-1],
        PARTS=arithmetic.parts, INPUT=arithmetic.input, MATRIX=arithmetic.matrix,
        ROWS=SIDE, COLS=SIDE // 2, CHUNK=min(arithmetic.chunk, 32), WIDTH=piece, num_warps=8, num_stages=2,
    )  # fmt: skip
    return result

"""The iterations between point clouds, streamed: a tile of the cost is computed, used and forgotten.

Everything on the device is in powers of two. With k = log2(e) / epsilon, points scaled by sqrt(s k) and norms h_i (see
`points`), the potentials are F = k f and G = k g, and a half iteration of the rows is

    l_i = log2 sum_j 2^(c_j + <x_i, y_j>),    c_j = G_j - h_j + log2 b_j,    F_i = -tau (l_i - h_i).

What a column has to say lies in its offset c_j, what a row has to say in its reference: an entry costs one subtraction,
where its sum of products starts, one exponential and one addition. The reference is the row's last log-sum, so that no
maximum is needed. Where that is not there yet or has moved too far, a pass before finds the largest exponents.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._team import meet
from ._units import LN2

FAR = tl.constexpr(60.0)  # powers of two that a log-sum may move from its reference, with float32's limits far away
NOT_FINITE, HAS_ROWS, HAS_COLS = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)  # flags of a problem
# Vectors of all points: the norm is inf where there is no point; `last` are the last log-sums.
NORM, LOG_WEIGHT, POTENTIAL, LAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
OFFSET, VECTORS = tl.constexpr(4), tl.constexpr(5)
# Counters of a problem: the largest changes of three iterations in turn; the programs that met; the results, with a NaN
# for a problem that cannot be solved; and from DONE on, for each tile of rows and of columns, the parts that are there.
ARRIVED, N_ITERS, RESIDUAL, DONE = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)


@triton.jit
def multiply_add(
    rows_ptr, rows_low, cols_ptr, cols_low, dim, total,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, INPUT: tl.constexpr,
):  # fmt: skip
    """total [ROWS, COLS] + <x_i, y_j>, by chunks of the features; see `points.pack_kernel` for packed points.

    Args:
        rows_ptr: first point of the rows, [*, dim]; its low part is rows_low entries further on.
        cols_ptr: first point of the columns.
    """
    offs_k = tl.arange(0, CHUNK)
    at_rows = tl.arange(0, ROWS)[:, None] * dim + offs_k[None, :]
    at_cols = tl.arange(0, COLS)[None, :] * dim + offs_k[:, None]
    for k in range(0, dim, CHUNK):
        x, y = tl.load(rows_ptr + k + at_rows), tl.load(cols_ptr + k + at_cols)
        if PARTS == 2:  # the product of both low parts is below float32
            total = tl.dot(tl.load(rows_ptr + rows_low + k + at_rows), y, total, input_precision=INPUT)
            total = tl.dot(x, tl.load(cols_ptr + cols_low + k + at_cols), total, input_precision=INPUT)
        total = tl.dot(x, y, total, input_precision=INPUT)
    return total


@triton.jit
def _over_columns(
    rows_ptr, rows_low, cols_ptr, cols_low, offset_ptr, dim, first, last, reference,
    LARGEST: tl.constexpr, RESIDENT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, INPUT: tl.constexpr,
):  # fmt: skip
    """For each row over columns [first, last): the largest exponent, or the sum of all powers of two. [ROWS]"""
    offs_k, offs_col = tl.arange(0, CHUNK), tl.arange(0, COLS)
    at_rows = tl.arange(0, ROWS)[:, None] * dim + offs_k[None, :]
    at_cols = offs_col[None, :] * dim + offs_k[:, None]
    if RESIDENT:
        x = tl.load(rows_ptr + at_rows)
        if PARTS == 2:
            x_low = tl.load(rows_ptr + rows_low + at_rows)
    cols_ptr += tl.cast(first, tl.int64) * dim
    # Kept for every GROUP of columns of the tile: where one thread has them, others are asked once only, at the end.
    result = tl.full((ROWS, COLS // GROUP), float("-inf") if LARGEST else 0.0, tl.float32)
    for col in range(first, last, COLS):
        offset = tl.load(offset_ptr + col + offs_col, cache_modifier=".cg")
        exponent = offset[None, :] - reference[:, None]
        if RESIDENT:
            y = tl.load(cols_ptr + at_cols)
            if PARTS == 2:
                exponent = tl.dot(x_low, y, exponent, input_precision=INPUT)
                exponent = tl.dot(x, tl.load(cols_ptr + cols_low + at_cols), exponent, input_precision=INPUT)
            exponent = tl.dot(x, y, exponent, input_precision=INPUT)
        else:
            exponent = multiply_add(
                rows_ptr, rows_low, cols_ptr, cols_low, dim, exponent, ROWS, COLS, CHUNK, PARTS, INPUT
            )
        if LARGEST:
            result = tl.maximum(result, tl.max(tl.reshape(exponent, (ROWS, COLS // GROUP, GROUP)), 2))
        else:
            result += tl.sum(tl.reshape(tl.exp2(exponent), (ROWS, COLS // GROUP, GROUP)), 2)
        cols_ptr += COLS * dim
    return tl.max(result, 1) if LARGEST else tl.sum(result, 1)


@triton.jit
def _joined(parts_ptr, stride, splits, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Reference and sum of rows from those of all parts of the columns, added in their order. [ROWS], [ROWS]"""
    offs_split = tl.arange(0, SPLITS)[None, :]
    at = 2 * offs_split * stride + tl.arange(0, ROWS)[:, None]
    there = offs_split < splits
    tops = tl.load(parts_ptr + at, mask=there, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(parts_ptr + stride + at, mask=there, other=0.0, cache_modifier=".cg")
    top = tl.max(tops, 1)
    top = tl.where(top > float("-inf"), top, 0.0)  # -inf - -inf is NaN
    return top, tl.sum(sums * tl.exp2(tops - top[:, None]), 1)


@triton.jit
def _flags(flags_ptr, count):
    """All that the tiles of a problem found when they were packed."""
    found = tl.zeros((128,), tl.int32)
    for first in range(0, count, 128):
        offs = first + tl.arange(0, 128)
        found |= tl.load(flags_ptr + offs, mask=offs < count, other=0)
    return tl.max(found & 1, 0) | tl.max(found & 2, 0) | tl.max(found & 4, 0)


@triton.jit
def solve_kernel(
    points_ptr, state_ptr, parts_ptr, flags_ptr, counters_ptr,
    problems, count, all_rows, n_rows, n_cols, width, row_splits, col_splits, max_iters, tau_a, tau_b, tol,
    TURNS: tl.constexpr, SELF: tl.constexpr, BEGIN: tl.constexpr,
    STEP: tl.constexpr, TEAM: tl.constexpr, SPLITS: tl.constexpr, RESIDENT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, INPUT: tl.constexpr,
):  # fmt: skip
    """Start to end of all problems: a team of programs takes one problem after the other.

    Sides are rows and columns, one after the other in memory, of n = n_rows or n_cols points, multiples of a tile.

    Args:
        points_ptr: [sides, P, PARTS, n, width], packed.
        state_ptr: [VECTORS, sides, P, n], see NORM; with SELF a second copy of the offsets, so that one is read while
            the other is written.
        parts_ptr: [sides, P, splits, 2, n], reference and sum of each part of the columns; not used by one part.
        flags_ptr: [P, points of both sides / STEP].
        count: points of both sides of all problems, and all_rows, those of the rows, where the columns begin.
        counters_ptr: [P, DONE + tiles of both sides], see ARRIVED, 0.
        row_splits: parts into which the columns are divided for a tile of rows.
        TURNS: half iterations in one iteration; 1 where only the rows have a turn.
        BEGIN: the first half iteration: 0, or -1 for one of the columns that does not count.
        SELF: the rows are the columns, too, and move half of their way.
        SPLITS: power of two that is not less than the splits.
    """
    team, rank = tl.program_id(0) // TEAM, tl.program_id(0) % TEAM
    offs_row = tl.arange(0, ROWS)
    dim = CHUNK if RESIDENT else width
    tiles = n_rows // ROWS + (0 if SELF else n_cols // ROWS)
    for p in range(team, problems, tl.num_programs(0) // TEAM):
        problem = tl.cast(p, tl.int64)
        counters = counters_ptr + problem * (DONE + tiles)
        steps = (n_rows + (0 if SELF else n_cols)) // STEP
        flags = _flags(flags_ptr + problem * steps, steps)
        weighted = (flags & 6) == (HAS_ROWS if SELF else HAS_ROWS | HAS_COLS)
        running = weighted & ((flags & NOT_FINITE) == 0)
        residual = tl.where(weighted & (flags & NOT_FINITE != 0), float("nan"), 0.0)
        half, iterations, meeting = BEGIN, 0, 0
        while running:
            # Both sides share one piece of code: `own` has its turn, `other` is summed over.
            turn = tl.cast(half & 1, tl.int64) if TURNS == 2 else 0
            n_own = tl.where(turn == 0, n_rows, n_cols)
            n_other = n_rows if SELF else tl.where(turn == 0, n_cols, n_rows)
            own = turn * all_rows + problem * n_own
            other = own if SELF else (1 - turn) * all_rows + problem * n_other
            splits = tl.where(turn == 0, row_splits, col_splits)
            tau = tl.where(turn == 0, tau_a, tau_b)
            read, write = OFFSET, OFFSET
            if SELF:
                read, write = OFFSET + (half & 1), OFFSET + 1 - (half & 1)
            offset_ptr = state_ptr + read * count + other
            col_tiles = n_other // COLS
            for item in range(rank, n_own // ROWS * splits, TEAM):
                tile, split = item // splits, item % splits
                row = own + tile * ROWS
                rows_ptr = points_ptr + (own * PARTS + tile * ROWS) * dim
                cols_ptr = points_ptr + other * PARTS * dim
                first, last = split * col_tiles // splits * COLS, (split + 1) * col_tiles // splits * COLS
                parts = parts_ptr + (turn * all_rows * row_splits + problem * n_own * splits) * 2 + tile * ROWS
                done = counters + DONE + turn * (n_rows // ROWS) + tile
                at = state_ptr + row + offs_row
                there = tl.load(at + NORM * count) < float("inf")
                exact = half < BEGIN + TURNS  # no last log-sums yet
                alone = splits == 1
                reference = tl.load(at + LAST * count, cache_modifier=".cg")
                pending = True
                while pending:
                    if exact:
                        reference = _over_columns(
                            rows_ptr, n_own * dim, cols_ptr, n_other * dim, offset_ptr, dim, first, last,
                            tl.zeros((ROWS,), tl.float32), True, RESIDENT, GROUP, ROWS, COLS, CHUNK, PARTS, INPUT,
                        )  # fmt: skip
                        reference = tl.where(reference > float("-inf"), reference, 0.0)
                    total = _over_columns(
                        rows_ptr, n_own * dim, cols_ptr, n_other * dim, offset_ptr, dim, first, last,
                        reference, False, RESIDENT, GROUP, ROWS, COLS, CHUNK, PARTS, INPUT,
                    )  # fmt: skip
                    complete = alone
                    if not alone:  # the last program to arrive has all parts
                        to = parts + tl.cast(split, tl.int64) * 2 * n_own + offs_row
                        # A part without a column must not lift the common reference.
                        tl.store(to, tl.where(total > 0, reference, float("-inf")))
                        tl.store(to + n_own, total)
                        tl.debug_barrier()
                        before = tl.atomic_add(done, 1, sem="acq_rel", scope="gpu")
                        tl.debug_barrier()
                        complete = before % splits == splits - 1
                        if complete:
                            reference, total = _joined(parts, n_own, splits, SPLITS, ROWS)
                    away = tl.log2(total)
                    far = tl.max((there & ~(tl.abs(away) <= FAR)).to(tl.int32), 0) > 0
                    pending = complete & far & ~exact
                    if pending:  # once more, with all columns
                        exact, alone = True, True
                        first, last = col_tiles * 0, col_tiles * COLS
                    elif complete:
                        log_sum = reference + away
                        norm = tl.load(at + NORM * count)
                        old = tl.load(at + POTENTIAL * count, cache_modifier=".cg")
                        image = -tau * (log_sum - norm)
                        change = tl.where(there, tl.abs(image - old), 0.0)
                        new = tl.where(there, (old + image) / 2 if SELF else image, 0.0)
                        tl.store(at + POTENTIAL * count, new)
                        tl.store(at + LAST * count, tl.where(there, log_sum, 0.0))
                        log_weight = tl.load(at + LOG_WEIGHT * count)
                        tl.store(at + write * count, new - norm + log_weight)
                        if half >= 0:
                            # The bits of numbers >= 0 are in the order of the numbers, with NaN above all.
                            largest = tl.max(change.to(tl.int32, bitcast=True), 0)
                            tl.atomic_max(counters + iterations % 3, largest)
            meeting += 1
            meet(counters + ARRIVED, meeting, TEAM)
            half += 1
            if (half > 0) & (half % TURNS == 0):
                moved = tl.load(counters + iterations % 3, cache_modifier=".cg")
                residual = moved.to(tl.float32, bitcast=True) * LN2
                # Nobody reads this one any more, nor writes to it before the next meeting.
                tl.store(counters + (iterations + 2) % 3, 0)
                iterations += 1
                running = (iterations < max_iters) & ~(residual < tol)  # NaN keeps running: it is reported
        tl.store(counters + N_ITERS, iterations)
        tl.store(counters + RESIDUAL, residual.to(tl.int32, bitcast=True))


def _tuned(rows: int, *configs: tuple[int, int, int, int]) -> tuple[Any, int]:
    """The kernel for tiles of some rows, in the fastest of a few configurations (COLS, GROUP, warps, stages)."""
    kernel = triton.autotune(
        configs=[
            triton.Config({"COLS": cols, "GROUP": group}, num_warps=warps, num_stages=stages)
            for cols, group, warps, stages in configs
        ],
        key=["CHUNK", "RESIDENT", "PARTS", "INPUT"],
        reset_to_zero=["counters_ptr"],  # every trial is a whole solve, from the same start
        restore_value=["state_ptr"],
    )(solve_kernel)
    return kernel, rows


# Kernels and rows of their tiles, see `points`. The first configuration is the one where sums must have one order only;
# none of them spills. 64 entries of a tile a thread spread what a tile costs (barriers, addresses). A thread of Hopper
# and later has whole parts of rows, so that the GROUP may be all columns; before, and on AMD's devices, it has 2 or 4
# neighbours. One or two stages of columns on their way: what is faster depends on the time of a product.
SOLVERS = {
    "flat": _tuned(128, (128, 128, 8, 2), (128, 128, 8, 3), (64, 2, 8, 3)),
    "deep": _tuned(64, (64, 2, 4, 2), (64, 64, 4, 2), (128, 128, 8, 2)),
    "deep, Blackwell": _tuned(64, (32, 32, 4, 2), (64, 2, 4, 2), (64, 64, 4, 2)),
    "deep, before Hopper": _tuned(64, (32, 2, 4, 2), (64, 2, 4, 2)),
    "amd": _tuned(64, (64, 4, 4, 2), (64, 4, 4, 1)),
}

"""Iterations of the dense solver without exponentials: K stays in memory, the scalings move.

    K_ij = 2^(REFERENCE_i + REFERENCE_j - s cost_ij)
    LOG_i = (tau_a - 1) REFERENCE_i - tau_a log2 sum_j K_ij b_j 2^LOG_j      and the same for columns.

K lies in tiles of BLOCK columns, four rows to a word of 16 bytes: [tiles, quads, BLOCK, 4]. A thread owns a column of a
tile with all of its rows, so that the column's sum, its new scaling and its part of the next row sums need no other
thread, and (up to 64 rows) each element of K is read once an iteration.
"""

import triton
import triton.language as tl

from ._sides import LOG, REFERENCE, SCALED, WEIGHT, left_of_rows

# Logs of scalings outside of these are absorbed into the references; sums outside of theirs are not trusted.
SCALING_LOW, SCALING_HIGH = tl.constexpr(-69.0), tl.constexpr(34.5)
SUM_LOW, SUM_HIGH = tl.constexpr(1e-18), tl.constexpr(1e10)
WIDE, BAD = tl.constexpr(1), tl.constexpr(2)  # trouble: absorb; what was computed is no use
TOP = tl.constexpr(120.0)  # of an exponent: only entries without weight come there before sums are refused


@triton.jit
def build(
    k_ptr, cost_ptr, rows_ptr, n_rows, row_stride, cols_ptr, n_cols, col_stride, scale, member, n_tiles, n_quads,
    TEAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write K of this program's tiles; 0 where a row or column is absent."""
    offs_s = tl.arange(0, 4)[None, :]
    for tile in range(member, n_tiles, TEAM):
        offs_j = tile * BLOCK + tl.arange(0, BLOCK)[:, None]
        col = tl.load(cols_ptr + REFERENCE * col_stride + offs_j)
        col_there = tl.load(cols_ptr + WEIGHT * col_stride + offs_j) >= 0
        for quad in range(n_quads):
            offs_i = quad * 4 + offs_s
            inside = offs_i < n_rows
            row = tl.load(rows_ptr + REFERENCE * row_stride + offs_i, mask=inside, other=0.0)
            there = col_there & (tl.load(rows_ptr + WEIGHT * row_stride + offs_i, mask=inside, other=-1.0) >= 0)
            value = tl.load(cost_ptr + offs_i.to(tl.int64) * n_cols + offs_j, mask=there, other=0.0).to(tl.float32)
            entry = tl.where(there, tl.exp2(tl.minimum(row + col - scale * value, TOP)), 0.0)
            at = quad * (4 * BLOCK) + tl.arange(0, BLOCK)[:, None] * 4 + offs_s
            tl.store(k_ptr + tile * (n_quads.to(tl.int64) * (4 * BLOCK)) + at, entry)
    tl.debug_barrier()


@triton.jit
def _tile(entries, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS / 4, 4 BLOCK] as [ROWS / 4, BLOCK, 4].

    Words of 16 bytes that follow each other go to the threads of a warp in turn, whatever the version of Triton: that
    makes a column one thread's. For a load in three dimensions versions 3.6 and 3.9 chose different layouts.
    """
    return tl.reshape(entries, (ROWS // 4, BLOCK, 4))


@triton.jit
def _k(k_ptr, tile, first_quad, n_quads, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Entries of a tile and of ROWS rows, [ROWS / 4, BLOCK, 4]; 0 beyond the last quad."""
    offs_q, offs_js = first_quad + tl.arange(0, ROWS // 4)[:, None], tl.arange(0, 4 * BLOCK)[None, :]
    at = tile * (n_quads.to(tl.int64) * (4 * BLOCK)) + offs_q * (4 * BLOCK) + offs_js
    return _tile(tl.load(k_ptr + at, mask=offs_q < n_quads, other=0.0), BLOCK, ROWS)


@triton.jit
def _column_sums(k, rows_ptr, row_stride, first_quad, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """sum_i K_ij SCALED_i over ROWS rows. [BLOCK]

    SCALED is read from memory, that is the L1 cache, each time: registers are full of K and of the row sums.
    It is read as if every column had its own, which gives it the layout of K.
    """
    offs_q, offs_js = first_quad + tl.arange(0, ROWS // 4)[:, None], tl.arange(0, 4 * BLOCK)[None, :]
    scaled_ptr = tl.multiple_of(rows_ptr + SCALED * row_stride, 16)  # bytes: the stride is a multiple of 8 entries
    u = tl.load(scaled_ptr + offs_q * 4 + offs_js % 4)
    return tl.sum(tl.sum(k * _tile(u, BLOCK, ROWS), 2), 0)


@triton.jit
def _update(total, weight, reference, before, tau):
    """New logs of some entries from their sums, how far they moved, and their trouble."""
    total = tl.where(weight >= 0, total, 1.0)
    log = tl.where(weight >= 0, (tau - 1.0) * reference - tau * tl.log2(total), 0.0)
    wide = ~((log >= SCALING_LOW) & (log <= SCALING_HIGH))
    bad = ~((total >= SUM_LOW) & (total <= SUM_HIGH))  # NaN too
    return log, tl.abs(log - before), tl.where(bad, BAD, tl.where(wide, WIDE, 0))


@triton.jit
def scale_rows(
    rows_ptr, row_stride, slots_ptr, meeting, n_slot, turn, tau,
    ROWS: tl.constexpr, TEAM: tl.constexpr,
):  # fmt: skip
    """New logs of all rows from the sums in the slots; returns (largest change, worst trouble)."""
    moved = tl.zeros((ROWS,), tl.float32)
    trouble = tl.zeros((ROWS,), tl.int32)
    for i in range(0, row_stride, ROWS):
        offs = i + tl.arange(0, ROWS)
        total = tl.sum(left_of_rows(slots_ptr, meeting, n_slot, 0, row_stride, offs, 0.0, TEAM), 0)
        weight = tl.load(rows_ptr + WEIGHT * row_stride + offs)
        reference = tl.load(rows_ptr + REFERENCE * row_stride + offs)
        before = tl.load(rows_ptr + (LOG + turn) * row_stride + offs)
        log, change, problem = _update(total, weight, reference, before, tau)
        tl.store(rows_ptr + (LOG + 1 - turn) * row_stride + offs, log)
        tl.store(rows_ptr + SCALED * row_stride + offs, tl.maximum(weight, 0.0) * tl.exp2(log))
        moved, trouble = tl.maximum(moved, change), tl.maximum(trouble, problem)
    tl.debug_barrier()
    return tl.max(moved, 0), tl.max(trouble, 0)


@triton.jit
def scale_columns(
    k_ptr, rows_ptr, row_stride, cols_ptr, col_stride, own_ptr, turn, tau, moves, member, n_tiles, n_quads,
    ROWS: tl.constexpr, ONE: tl.constexpr, TEAM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """New logs of this program's columns (unless they do not `move`), and its part of the next row sums in its slot.

    With `moves` the rows' SCALED is used and the columns' new logs are written; else the current ones of both count.
    Returns (largest change, worst trouble).
    """
    moved = tl.zeros((BLOCK,), tl.float32)
    trouble = tl.zeros((BLOCK,), tl.int32)
    offs_s = tl.arange(0, 4)
    if ONE:
        sums = tl.zeros((ROWS // 4, BLOCK, 4), tl.float32)
        for tile in tl.range(member, n_tiles, TEAM, num_stages=STAGES):
            k = _k(k_ptr, tile, 0, n_quads, BLOCK, ROWS)
            offs = tile * BLOCK + tl.arange(0, BLOCK)
            weight = tl.load(cols_ptr + WEIGHT * col_stride + offs)
            log = tl.load(cols_ptr + (LOG + turn) * col_stride + offs)
            if moves:
                total = _column_sums(k, rows_ptr, row_stride, 0, BLOCK, ROWS)
                reference = tl.load(cols_ptr + REFERENCE * col_stride + offs)
                log, change, problem = _update(total, weight, reference, log, tau)
                tl.store(cols_ptr + (LOG + 1 - turn) * col_stride + offs, log)
                moved, trouble = tl.maximum(moved, change), tl.maximum(trouble, problem)
            v = tl.maximum(weight, 0.0) * tl.exp2(log)
            sums += k * v[None, :, None]
        offs_q = tl.arange(0, ROWS // 4)
        tl.store(own_ptr + offs_q[:, None] * 4 + offs_s[None, :], tl.sum(sums, 1))
    else:
        if moves:
            for tile in range(member, n_tiles, TEAM):
                total = tl.zeros((BLOCK,), tl.float32)
                for first in range(0, n_quads, ROWS // 4):
                    k = _k(k_ptr, tile, first, n_quads, BLOCK, ROWS)
                    total += _column_sums(k, rows_ptr, row_stride, first, BLOCK, ROWS)
                offs = tile * BLOCK + tl.arange(0, BLOCK)
                weight = tl.load(cols_ptr + WEIGHT * col_stride + offs)
                reference = tl.load(cols_ptr + REFERENCE * col_stride + offs)
                before = tl.load(cols_ptr + (LOG + turn) * col_stride + offs)
                log, change, problem = _update(total, weight, reference, before, tau)
                tl.store(cols_ptr + (LOG + 1 - turn) * col_stride + offs, log)
                moved, trouble = tl.maximum(moved, change), tl.maximum(trouble, problem)
            tl.debug_barrier()
        now = tl.where(moves, 1 - turn, turn)
        for first in range(0, n_quads, ROWS // 4):
            sums = tl.zeros((ROWS // 4, BLOCK, 4), tl.float32)
            for tile in range(member, n_tiles, TEAM):
                offs = tile * BLOCK + tl.arange(0, BLOCK)
                weight = tl.load(cols_ptr + WEIGHT * col_stride + offs)
                v = tl.maximum(weight, 0.0) * tl.exp2(tl.load(cols_ptr + (LOG + now) * col_stride + offs))
                sums += _k(k_ptr, tile, first, n_quads, BLOCK, ROWS) * v[None, :, None]
            offs_q = first + tl.arange(0, ROWS // 4)
            tl.store(own_ptr + offs_q[:, None] * 4 + offs_s[None, :], tl.sum(sums, 1))
    return tl.max(moved, 0), tl.max(trouble, 0)

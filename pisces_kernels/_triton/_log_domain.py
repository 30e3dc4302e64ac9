"""Iterations of the dense solver by log-sums with running maxima: right for every range, two exponentials an entry.

A half iteration of a side is L_i = log2 sum_j 2^(G_j + log2 b_j - s cost_ij), and the new potential -tau L_i. With an
exact mass it is the cap min(-L_i - level, 0), where the level makes the side's sums add up to the mass:

    sum_i a_i min(1, 2^(level + L_i)) = mass.
"""

import triton
import triton.language as tl

from ._sides import WEIGHT, left_of_rows, log_weight, potential, set_potential


@triton.jit
def _join(top, total, exponent):
    """Add 2^exponent to sums 2^top total."""
    higher = tl.maximum(top, exponent)
    level = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is NaN
    return higher, total * tl.exp2(top - level) + tl.exp2(exponent - level)


@triton.jit
def _entries(cost_ptr, offs_i, offs_j, n_cols, there):
    """Entries of the cost, 0 where absent: what is masked may be NaN."""
    return tl.load(cost_ptr + offs_i.to(tl.int64) * n_cols + offs_j, mask=there, other=0.0).to(tl.float32)


@triton.jit
def sum_rows(
    cost_ptr, rows_ptr, row_stride, cols_ptr, n_cols, col_stride, turn, scale, own_ptr, member, n_tiles,
    TEAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Leave maximum and sum of every row over this program's columns in its slot."""
    offs_s = tl.arange(0, 4)
    for quad in range(row_stride // 4):
        offs_i = quad * 4 + offs_s
        row_there = tl.load(rows_ptr + WEIGHT * row_stride + offs_i) >= 0
        top = tl.full((BLOCK, 4), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK, 4), tl.float32)
        for tile in range(member, n_tiles, TEAM):
            offs_j = tile * BLOCK + tl.arange(0, BLOCK)
            column, weight = potential(cols_ptr, col_stride, offs_j, turn, offs_j < col_stride)
            level = (column + log_weight(weight))[:, None]
            there = (weight > 0)[:, None] & row_there[None, :]
            value = _entries(cost_ptr, offs_i[None, :], offs_j[:, None], n_cols, there)
            top, total = _join(top, total, tl.where(there, level - scale * value, float("-inf")))
        highest = tl.max(top, 0)
        level = tl.where(highest == float("-inf"), 0.0, highest)
        tl.store(own_ptr + offs_i, highest)
        tl.store(own_ptr + row_stride + offs_i, tl.sum(total * tl.exp2(top - level[None, :]), 0))


@triton.jit
def _row_log_sums(
    slots_ptr, meeting, n_slot, row_stride, offs, TEAM: tl.constexpr
):  # fmt: skip
    """L of some rows from what all programs left."""
    top = left_of_rows(slots_ptr, meeting, n_slot, 0, row_stride, offs, float("-inf"), TEAM)
    total = left_of_rows(slots_ptr, meeting, n_slot, 1, row_stride, offs, 0.0, TEAM)
    highest = tl.max(top, 0)
    level = tl.where(highest == float("-inf"), 0.0, highest)
    return highest + tl.log2(tl.sum(total * tl.exp2(top - level[None, :]), 0))


@triton.jit
def update_rows(
    rows_ptr, row_stride, slots_ptr, meeting, n_slot, turn, tau, sums_ptr,
    HAS_MASS: tl.constexpr, ROWS: tl.constexpr, TEAM: tl.constexpr,
):  # fmt: skip
    """New potentials of all rows (with a mass only their L, into `sums_ptr`); returns the largest change."""
    moved = tl.zeros((ROWS,), tl.float32)
    for i in range(0, row_stride, ROWS):
        offs = i + tl.arange(0, ROWS)
        sums = _row_log_sums(slots_ptr, meeting, n_slot, row_stride, offs, TEAM)
        if HAS_MASS:
            tl.store(sums_ptr + offs, sums)
        else:
            before, weight = potential(rows_ptr, row_stride, offs, turn, offs < row_stride)
            value = tl.where(weight >= 0, -tau * sums, 0.0)
            set_potential(rows_ptr, row_stride, offs, value, offs < row_stride)
            moved = _larger(moved, tl.abs(value - before))
    tl.debug_barrier()
    return _worst(moved)


@triton.jit
def update_columns(
    cost_ptr, rows_ptr, row_stride, cols_ptr, n_cols, col_stride, turn, scale, tau, sums_ptr, member, n_tiles,
    HAS_MASS: tl.constexpr, TEAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """New potentials of this program's columns (with a mass only their L, into `sums_ptr`); returns the largest change.

    The rows' potentials are references, with logs of 0.
    """
    moved = tl.zeros((BLOCK,), tl.float32)
    offs_s = tl.arange(0, 4)
    for tile in range(member, n_tiles, TEAM):
        offs_j = tile * BLOCK + tl.arange(0, BLOCK)
        before, weight = potential(cols_ptr, col_stride, offs_j, turn, offs_j < col_stride)
        top = tl.full((BLOCK, 4), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK, 4), tl.float32)
        for quad in range(row_stride // 4):
            offs_i = quad * 4 + offs_s
            row, row_weight = potential(rows_ptr, row_stride, offs_i, turn, offs_i < row_stride)
            there = (row_weight > 0)[None, :] & (weight >= 0)[:, None]
            value = _entries(cost_ptr, offs_i[None, :], offs_j[:, None], n_cols, there)
            exponent = (row + log_weight(row_weight))[None, :] - scale * value
            top, total = _join(top, total, tl.where(there, exponent, float("-inf")))
        highest = tl.max(top, 1)
        level = tl.where(highest == float("-inf"), 0.0, highest)
        sums = highest + tl.log2(tl.sum(total * tl.exp2(top - level[:, None]), 1))
        if HAS_MASS:
            tl.store(sums_ptr + offs_j, sums)
        else:
            value = tl.where(weight >= 0, -tau * sums, 0.0)
            set_potential(cols_ptr, col_stride, offs_j, value, offs_j < col_stride)
            moved = _larger(moved, tl.abs(value - before))
    return _worst(moved)


@triton.jit
def _larger(moved, change):
    """The larger one; a NaN stays (`maximum` may drop it, a comparison that is false does not)."""
    return tl.where(change <= moved, moved, change)


@triton.jit
def _worst(moved):
    """Largest entry, NaN where one is."""
    broken = tl.max((moved != moved).to(tl.int32), 0)
    return tl.where(broken > 0, float("nan"), tl.max(moved, 0))


@triton.jit
def _open(side_ptr, stride, sums_ptr, size, level, BLOCK: tl.constexpr):
    """At a level: weight of the entries that are full, and log2 of the others' sum of weight 2^L.

    An entry counts as full only beyond the rounding of its sum: when the mass is just what some entries hold, the level
    must not go to where the next, perhaps far, one fills up.
    """
    full = tl.zeros((BLOCK,), tl.float32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, size, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        weight = tl.load(side_ptr + WEIGHT * stride + offs, mask=offs < size, other=-1.0)
        sums = tl.load(sums_ptr + offs, mask=weight > 0, other=float("-inf"), cache_modifier=".cg")
        over = (weight > 0) & (sums + level > 1e-6 + 3e-7 * tl.abs(sums))
        full += tl.where(over, weight, 0.0)
        top, total = _join(top, total, tl.where(over, float("-inf"), sums + log_weight(weight)))
    highest = tl.max(top, 0)
    rest = tl.sum(total * tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest)), 0)
    return tl.sum(full, 0), highest + tl.log2(rest)


@triton.jit
def find_level(side_ptr, stride, sums_ptr, size, mass, BLOCK: tl.constexpr):
    """The level of a side in powers of two, by Newton's method from below.

    In 2^level the transported mass is concave and piecewise linear: every step fills entries up, or is the last one.
    """
    _, rest = _open(side_ptr, stride, sums_ptr, size, float("-inf"), BLOCK)
    level = tl.log2(mass) - rest
    step = 0
    going = tl.abs(level) < float("inf")
    while going & (step < 100):
        full, rest = _open(side_ptr, stride, sums_ptr, size, level, BLOCK)
        room = mass - full
        possible = (room > 0) & (rest > float("-inf"))  # else all are full, to rounding
        better = tl.where(possible, tl.log2(tl.where(possible, room, 1.0)) - rest, level)
        going = better > level + 1e-6 + 2e-7 * tl.abs(level)
        level = tl.maximum(level, better)
        step += 1
    return level


@triton.jit
def set_caps(
    side_ptr, stride, sums_ptr, first, step, size, turn, mass, BLOCK: tl.constexpr
):  # fmt: skip
    """Caps of a side from its L, of the blocks that this program holds; returns (largest change, level)."""
    level = find_level(side_ptr, stride, sums_ptr, size, mass, BLOCK)
    moved = tl.zeros((BLOCK,), tl.float32)
    for i in range(first * BLOCK, size, step * BLOCK):
        offs = i + tl.arange(0, BLOCK)
        before, weight = potential(side_ptr, stride, offs, turn, offs < size)
        sums = tl.load(sums_ptr + offs, mask=weight >= 0, other=0.0, cache_modifier=".cg")
        value = tl.where(weight >= 0, tl.minimum(-sums - level, 0.0), 0.0)
        set_potential(side_ptr, stride, offs, value, offs < size)
        moved = _larger(moved, tl.abs(value - before))
    tl.debug_barrier()
    return _worst(moved), level

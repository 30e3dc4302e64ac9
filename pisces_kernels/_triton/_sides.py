"""What the dense solver keeps of a problem's rows and columns, and what its programs exchange.

Everything is in powers of two. With s = log2(e) / epsilon a side keeps WEIGHT, REFERENCE and two LOG of every entry,
of which `turn` says the current one: its potential is (REFERENCE + LOG) / s. Absent entries have the weight -1. Rows
have a fifth number, SCALED = weight 2^LOG, of the newest LOG that was computed.

Each program of a team holds all rows and its own tiles of columns. At a meeting it leaves a slot with sums over its
columns: two numbers a row, then VOTES numbers. Slots take turns, so that nobody writes what is still being read.
"""

import triton
import triton.language as tl

from ._team import meet

WEIGHT, REFERENCE, LOG, SCALED = (tl.constexpr(value) for value in (0, 1, 2, 4))
COL_FIELDS, ROW_FIELDS = tl.constexpr(4), tl.constexpr(5)
VOTES = tl.constexpr(8)


@triton.jit
def load_side(
    side_ptr, stride, offs, size, weight_ptr, mask_ptr, start_ptr, scale,
):  # fmt: skip
    """Store weights and start of some entries; returns (weights, start where there, 1 where that is not finite)."""
    there = offs < size
    if mask_ptr is not None:
        there = there & (tl.load(mask_ptr + offs, mask=there, other=0) != 0)
    weight = tl.load(weight_ptr + offs, mask=there, other=0.0)
    start = tl.zeros_like(weight)
    if start_ptr is not None:
        start = tl.load(start_ptr + offs, mask=there, other=0.0)
    inside = offs < stride
    tl.store(side_ptr + WEIGHT * stride + offs, tl.where(there, weight, -1.0), mask=inside)
    tl.store(side_ptr + REFERENCE * stride + offs, start * scale, mask=inside)
    tl.store(side_ptr + LOG * stride + offs, tl.zeros_like(weight), mask=inside)
    tl.store(side_ptr + (LOG + 1) * stride + offs, tl.zeros_like(weight), mask=inside)
    bad = (~(tl.abs(start) < float("inf"))).to(tl.int32)
    return weight, tl.where(there, start, float("-inf")), bad


@triton.jit
def potential(side_ptr, stride, offs, turn, inside):
    """Potentials of some entries in powers of two, and their weights."""
    weight = tl.load(side_ptr + WEIGHT * stride + offs, mask=inside, other=-1.0)
    reference = tl.load(side_ptr + REFERENCE * stride + offs, mask=inside, other=0.0)
    return reference + tl.load(side_ptr + (LOG + turn) * stride + offs, mask=inside, other=0.0), weight


@triton.jit
def set_potential(side_ptr, stride, offs, value, inside):
    """New potentials, as references."""
    tl.store(side_ptr + REFERENCE * stride + offs, value, mask=inside)
    tl.store(side_ptr + LOG * stride + offs, tl.zeros_like(value), mask=inside)
    tl.store(side_ptr + (LOG + 1) * stride + offs, tl.zeros_like(value), mask=inside)


@triton.jit
def log_weight(weight):
    """log2 of weights; -inf for those that are 0 or absent."""
    return tl.where(weight > 0, tl.log2(tl.where(weight > 0, weight, 1.0)), float("-inf"))


@triton.jit
def absorb(side_ptr, stride, first, step, size, turn, BLOCK: tl.constexpr):
    """Let potentials be references, with logs of 0, of every block that this program holds."""
    for i in range(first * BLOCK, size, step * BLOCK):
        offs = i + tl.arange(0, BLOCK)
        value, _ = potential(side_ptr, stride, offs, turn, offs < stride)
        set_potential(side_ptr, stride, offs, value, offs < stride)


@triton.jit
def slot(slots_ptr, member, meeting, n_slot, TEAM: tl.constexpr):
    """Where a member leaves its numbers for its next meeting."""
    return slots_ptr + ((meeting % 2) * TEAM + member) * n_slot


@triton.jit
def vote(own_ptr, n_votes, number, value):
    """Leave a number in one's own slot."""
    tl.store(own_ptr + n_votes + number, value)


@triton.jit
def votes(slots_ptr, meeting, n_slot, n_votes, number, TEAM: tl.constexpr):
    """What all members left of one number at a meeting. [TEAM]"""
    at = slots_ptr + ((meeting % 2) * TEAM + tl.arange(0, TEAM)) * n_slot + n_votes + number
    return tl.load(at, cache_modifier=".cg")


@triton.jit
def left_of_rows(slots_ptr, meeting, n_slot, number, row_stride, offs, nothing, TEAM: tl.constexpr):
    """What all members left of the first or second number of some rows at a meeting. [TEAM, rows]"""
    at = slots_ptr + ((meeting % 2) * TEAM + tl.arange(0, TEAM)[:, None]) * n_slot + offs[None, :]
    return tl.load(at + number * row_stride, mask=(offs < row_stride)[None, :], other=nothing, cache_modifier=".cg")


@triton.jit
def gather(arrived_ptr, meeting, TEAM: tl.constexpr):
    """Meet the team after its meeting of that number; returns the number of this one."""
    meet(arrived_ptr, meeting + 1, TEAM)
    return meeting + 1

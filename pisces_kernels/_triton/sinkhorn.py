"""Dense problems: a team of programs solves each from start to convergence, all problems in one launch.

Iterations use a kernel matrix in memory and no exponentials (`_scaling`) where floats hold it; new references are taken
when the scalings have moved far, and log-domain iterations (`_log_domain`) do what nothing else can: the first
iteration of a wide problem, steps whose sums leave the range of a float, an exact mass. The device decides.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch
from ._log_domain import set_caps, sum_rows, update_columns, update_rows
from ._scaling import BAD, SCALING_HIGH, WIDE, build, scale_columns, scale_rows
from ._sides import (
    COL_FIELDS,
    LOG,
    REFERENCE,
    ROW_FIELDS,
    VOTES,
    WEIGHT,
    absorb,
    gather,
    load_side,
    potential,
    slot,
    vote,
    votes,
)
from ._team import TOGETHER
from ._units import LN2, LOG2_E

SIZES = ("n_rows", "n_cols", "row_stride", "col_stride", "max_iters")  # one compilation serves them all
WARPS = 4
LARGEST_TEAM = 64
LEAST_TILES = 2  # of a program of a team: with fewer its meetings take longer than its work


@triton.jit
def _shift_side(side_ptr, stride, first, step, size, shift, BLOCK: tl.constexpr):
    """Add a number to the references of what exists."""
    for i in range(first * BLOCK, size, step * BLOCK):
        offs = i + tl.arange(0, BLOCK)
        there = tl.load(side_ptr + WEIGHT * stride + offs, mask=offs < stride, other=-1.0) >= 0
        reference = tl.load(side_ptr + REFERENCE * stride + offs, mask=there, other=0.0)
        tl.store(side_ptr + REFERENCE * stride + offs, reference + shift, mask=there)


@triton.jit
def _start_close(rows_ptr, stride, n_rows, low, BLOCK: tl.constexpr):
    """References at which K of a close cost fits; the potentials stay 0."""
    for i in range(0, n_rows, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        there = tl.load(rows_ptr + WEIGHT * stride + offs, mask=offs < stride, other=-1.0) >= 0
        tl.store(rows_ptr + REFERENCE * stride + offs, low, mask=there)
        tl.store(rows_ptr + LOG * stride + offs, -low, mask=there)


@triton.jit
def _see_cost(
    cost_ptr, rows_ptr, row_stride, cols_ptr, n_cols, col_stride, member, n_tiles,
    TEAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Smallest and largest entry of this program's columns, and how many are not finite."""
    low = tl.full((BLOCK, 4), float("inf"), tl.float32)
    high = tl.full((BLOCK, 4), float("-inf"), tl.float32)
    bad = tl.zeros((BLOCK, 4), tl.int32)
    for tile in range(member, n_tiles, TEAM):
        offs_j = tile * BLOCK + tl.arange(0, BLOCK)[:, None]
        col_there = tl.load(cols_ptr + WEIGHT * col_stride + offs_j) >= 0
        for quad in range(row_stride // 4):
            offs_i = quad * 4 + tl.arange(0, 4)[None, :]
            there = col_there & (tl.load(rows_ptr + WEIGHT * row_stride + offs_i) >= 0)
            value = tl.load(cost_ptr + offs_i.to(tl.int64) * n_cols + offs_j, mask=there, other=0.0).to(tl.float32)
            low = tl.minimum(low, tl.where(there, value, float("inf")))
            high = tl.maximum(high, tl.where(there, value, float("-inf")))
            bad += (~(tl.abs(value) < float("inf"))).to(tl.int32)
    return tl.min(tl.min(low, 1), 0), tl.max(tl.max(high, 1), 0), tl.sum(tl.sum(bad, 1), 0)


@triton.jit
def _moments(side_ptr, stride, first, step, size, turn, BLOCK: tl.constexpr):
    """(sum of weight times potential, how many potentials are not finite) of the blocks that this program holds."""
    moment = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for i in range(first * BLOCK, size, step * BLOCK):
        offs = i + tl.arange(0, BLOCK)
        value, weight = potential(side_ptr, stride, offs, turn, offs < stride)
        moment += tl.where(weight > 0, weight * value, 0.0)
        bad += ((weight >= 0) & ~(tl.abs(value) < float("inf"))).to(tl.int32)
    return tl.sum(moment, 0), tl.sum(bad, 0)


@triton.jit
def _write(result_ptr, side_ptr, stride, first, step, size, turn, shift, unit, failed, empty, BLOCK: tl.constexpr):
    """Potentials in units of the cost, moved by a constant: 0 where absent or the problem is empty, NaN if failed."""
    for i in range(first * BLOCK, size, step * BLOCK):
        offs = i + tl.arange(0, BLOCK)
        value, weight = potential(side_ptr, stride, offs, turn, offs < stride)
        value = tl.where(failed, float("nan"), (value + shift) * unit)
        tl.store(result_ptr + offs, tl.where((weight >= 0) & (empty == 0), value, 0.0), mask=offs < size)


@triton.jit(do_not_specialize=SIZES)
def sinkhorn_kernel(
    cost_ptr, a_ptr, b_ptr, epsilon_ptr, mass_ptr, row_mask_ptr, col_mask_ptr, f_init_ptr, g_init_ptr,
    f_ptr, g_ptr, n_iters_ptr, residual_ptr,
    k_ptr, rows_ptr, cols_ptr, row_sums_ptr, col_sums_ptr, slots_ptr, arrived_ptr,
    n_rows, n_cols, row_stride, col_stride, tau_a, tau_b, tol, max_iters,
    ROWS: tl.constexpr, ONE: tl.constexpr, BALANCED: tl.constexpr, TEAM: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Solve problem program_id / TEAM; see `sinkhorn` for the tensors."""
    problem = (tl.program_id(0) // TEAM).to(tl.int64)
    member = tl.program_id(0) % TEAM
    HAS_MASS: tl.constexpr = mass_ptr is not None
    n_quads = tl.cdiv(n_rows, 4)
    n_tiles = tl.cdiv(n_cols, BLOCK)
    n_votes = 2 * row_stride  # where they are in a slot
    n_slot = n_votes + VOTES
    cost_ptr += problem * n_rows * n_cols
    a_ptr += problem * n_rows
    f_ptr += problem * n_rows
    b_ptr += problem * n_cols
    g_ptr += problem * n_cols
    rows_ptr += tl.program_id(0).to(tl.int64) * ROW_FIELDS * row_stride
    cols_ptr += problem * COL_FIELDS * col_stride
    slots_ptr += problem * 2 * TEAM * n_slot
    arrived_ptr += problem
    if not HAS_MASS:
        k_ptr += problem * n_quads * 4 * col_stride
    else:
        row_sums_ptr += tl.program_id(0).to(tl.int64) * row_stride
        col_sums_ptr += problem * col_stride
    if row_mask_ptr is not None:
        row_mask_ptr += problem * n_rows
    if col_mask_ptr is not None:
        col_mask_ptr += problem * n_cols
    if f_init_ptr is not None:
        f_init_ptr += problem * n_rows
    if g_init_ptr is not None:
        g_init_ptr += problem * n_cols
    epsilon = tl.load(epsilon_ptr + problem)
    scale = LOG2_E / epsilon
    unit = epsilon * LN2

    mass_a = tl.zeros((ROWS,), tl.float32)
    top_f = tl.full((ROWS,), float("-inf"), tl.float32)
    row_bad = tl.zeros((ROWS,), tl.int32)
    for i in range(0, row_stride, ROWS):
        weight, start, bad = load_side(
            rows_ptr, row_stride, i + tl.arange(0, ROWS), n_rows, a_ptr, row_mask_ptr, f_init_ptr, scale
        )
        mass_a, top_f, row_bad = mass_a + weight, tl.maximum(top_f, start), row_bad + bad
    mass_b = tl.zeros((BLOCK,), tl.float32)
    top_g = tl.full((BLOCK,), float("-inf"), tl.float32)
    col_bad = tl.zeros((BLOCK,), tl.int32)
    for tile in range(member, n_tiles, TEAM):
        offs_j = tile * BLOCK + tl.arange(0, BLOCK)
        weight, start, bad = load_side(cols_ptr, col_stride, offs_j, n_cols, b_ptr, col_mask_ptr, g_init_ptr, scale)
        mass_b, top_g, col_bad = mass_b + weight, tl.maximum(top_g, start), col_bad + bad
    tl.debug_barrier()
    low, high, bad = _see_cost(
        cost_ptr, rows_ptr, row_stride, cols_ptr, n_cols, col_stride, member, n_tiles, TEAM, BLOCK
    )
    own_ptr = slot(slots_ptr, member, 1, n_slot, TEAM)
    vote(own_ptr, n_votes, 0, tl.sum(mass_b, 0))
    vote(own_ptr, n_votes, 1, (bad + tl.sum(col_bad, 0)).to(tl.float32))
    vote(own_ptr, n_votes, 2, low)
    vote(own_ptr, n_votes, 3, high)
    vote(own_ptr, n_votes, 4, tl.max(top_g, 0))
    meeting = gather(arrived_ptr, 0, TEAM)
    total_a = tl.sum(mass_a, 0)
    total_b = tl.sum(votes(slots_ptr, meeting, n_slot, n_votes, 0, TEAM), 0)
    broken = tl.sum(votes(slots_ptr, meeting, n_slot, n_votes, 1, TEAM), 0) + tl.sum(row_bad, 0)
    low = tl.min(votes(slots_ptr, meeting, n_slot, n_votes, 2, TEAM), 0)
    high = tl.max(votes(slots_ptr, meeting, n_slot, n_votes, 3, TEAM), 0)
    empty = ((total_a <= 0) | (total_b <= 0)).to(tl.int32)
    broken += (~((total_a < float("inf")) & (total_b < float("inf")))).to(tl.float32)
    running = (broken == 0) & (empty == 0)

    level = 0.0  # exact mass: its multiplier in powers of two; potentials are caps
    if HAS_MASS:
        mass = tl.load(mass_ptr + problem)
        if f_init_ptr is not None:
            top = tl.max(top_f, 0) * scale
            level += tl.where(running, top, 0.0)
            _shift_side(rows_ptr, row_stride, 0, 1, n_rows, -top, ROWS)
        if g_init_ptr is not None:
            top = tl.max(votes(slots_ptr, meeting, n_slot, n_votes, 4, TEAM), 0) * scale
            level += tl.where(running, top, 0.0)
            _shift_side(cols_ptr, col_stride, member, TEAM, n_cols, -top, BLOCK)

    turn = 0
    building = 0  # K is to be written at the references
    scaled = 0  # K and the row sums in the slots are those of the potentials
    failures = 0  # of steps with K, in a row
    waits = 1  # log-domain iterations before K is tried again
    if (not HAS_MASS) and (f_init_ptr is None) and (g_init_ptr is None):  # noqa: SIM102 (the next one on the device)
        if running & ((high - low) * scale <= SCALING_HIGH):
            _start_close(rows_ptr, row_stride, n_rows, low * scale, ROWS)
            building = 1
    half = 0  # a start from f alone: g first, not counted
    if (f_init_ptr is not None) and (g_init_ptr is None):
        half = 1
    tl.debug_barrier()

    iteration = 0
    residual = float("inf")
    while running & (iteration < max_iters):
        moved = 0.0
        trouble = 0
        good = 0
        counts = 1 - tl.maximum(building, half)
        if not HAS_MASS:
            if building == 0:
                if scaled != 0:
                    moved, trouble = scale_rows(
                        rows_ptr, row_stride, slots_ptr, meeting, n_slot, turn, tau_a, ROWS, TEAM
                    )
                    good = (trouble < BAD).to(tl.int32)
            else:
                build(
                    k_ptr, cost_ptr, rows_ptr, n_rows, row_stride, cols_ptr, n_cols, col_stride, scale, member,
                    n_tiles, n_quads, TEAM, BLOCK,
                )  # fmt: skip
                good = 1
            if good != 0:
                own_ptr = slot(slots_ptr, member, meeting + 1, n_slot, TEAM)
                by_cols, worse = scale_columns(
                    k_ptr, rows_ptr, row_stride, cols_ptr, col_stride, own_ptr, turn, tau_b, building == 0, member,
                    n_tiles, n_quads, ROWS, ONE, TEAM, BLOCK, STAGES,
                )  # fmt: skip
                vote(own_ptr, n_votes, 0, by_cols)
                vote(own_ptr, n_votes, 1, worse.to(tl.float32))
                meeting = gather(arrived_ptr, meeting, TEAM)
                by_cols = tl.max(votes(slots_ptr, meeting, n_slot, n_votes, 0, TEAM), 0)
                worse = tl.max(votes(slots_ptr, meeting, n_slot, n_votes, 1, TEAM), 0).to(tl.int32)
                moved = tl.maximum(moved, by_cols)
                trouble = tl.maximum(trouble, worse)
                good = (trouble < BAD).to(tl.int32)
        again = 0
        if good != 0:
            failures = 0
            scaled = 1
            if building == 0:
                turn = 1 - turn
                # Slow convergence adds up the rounding of the scalings' logs: with new references they are small again.
                done = iteration + 1
                again = ((trouble == WIDE) | ((done >= 128) & ((done & (done - 1)) == 0))).to(tl.int32)
            building = 0
        else:
            if scaled != 0:
                failures += 1
                waits = tl.where(failures < 2, 1, 1 << tl.minimum(failures, 6))
            scaled = 0
            absorb(rows_ptr, row_stride, 0, 1, n_rows, turn, ROWS)
            absorb(cols_ptr, col_stride, member, TEAM, n_cols, turn, BLOCK)
            tl.debug_barrier()
            before = level
            if half == 0:
                own_ptr = slot(slots_ptr, member, meeting + 1, n_slot, TEAM)
                sum_rows(
                    cost_ptr, rows_ptr, row_stride, cols_ptr, n_cols, col_stride, turn, scale, own_ptr, member,
                    n_tiles, TEAM, BLOCK,
                )  # fmt: skip
                meeting = gather(arrived_ptr, meeting, TEAM)
                moved = update_rows(
                    rows_ptr, row_stride, slots_ptr, meeting, n_slot, turn, tau_a, row_sums_ptr,
                    HAS_MASS, ROWS, TEAM,
                )  # fmt: skip
                if HAS_MASS:
                    moved, _ = set_caps(rows_ptr, row_stride, row_sums_ptr, 0, 1, n_rows, turn, mass, ROWS)
            by_cols = update_columns(
                cost_ptr, rows_ptr, row_stride, cols_ptr, n_cols, col_stride, turn, scale, tau_b, col_sums_ptr,
                member, n_tiles, HAS_MASS, TEAM, BLOCK,
            )  # fmt: skip
            if HAS_MASS:
                meeting = gather(arrived_ptr, meeting, TEAM)  # all column sums are there
                by_cols, level = set_caps(cols_ptr, col_stride, col_sums_ptr, member, TEAM, n_cols, turn, mass, BLOCK)
            vote(slot(slots_ptr, member, meeting + 1, n_slot, TEAM), n_votes, 0, by_cols)
            meeting = gather(arrived_ptr, meeting, TEAM)
            found = votes(slots_ptr, meeting, n_slot, n_votes, 0, TEAM)
            unclear = tl.max((found != found).to(tl.int32), 0) > 0
            moved = tl.maximum(tl.maximum(moved, tl.max(found, 0)), tl.abs(level - before))
            moved = tl.where(unclear, float("nan"), moved)
            waits -= 1 - half
            if not HAS_MASS:
                again = tl.where(waits <= 0, 1, 0)
            half = 0
        if again != 0:
            absorb(rows_ptr, row_stride, 0, 1, n_rows, turn, ROWS)
            absorb(cols_ptr, col_stride, member, TEAM, n_cols, turn, BLOCK)
            tl.debug_barrier()
            building = 1
        iteration += counts
        if counts != 0:
            residual = moved * LN2
            running = ~(residual < tol)  # NaN keeps running: it is reported, not hidden

    moment_a, bad_f = _moments(rows_ptr, row_stride, 0, 1, n_rows, turn, ROWS)
    moment_b, bad_g = _moments(cols_ptr, col_stride, member, TEAM, n_cols, turn, BLOCK)
    own_ptr = slot(slots_ptr, member, meeting + 1, n_slot, TEAM)
    vote(own_ptr, n_votes, 0, moment_b)
    vote(own_ptr, n_votes, 1, bad_g.to(tl.float32))
    meeting = gather(arrived_ptr, meeting, TEAM)
    moment_b = tl.sum(votes(slots_ptr, meeting, n_slot, n_votes, 0, TEAM), 0)
    broken += tl.sum(votes(slots_ptr, meeting, n_slot, n_votes, 1, TEAM), 0) + bad_f
    failed = (broken > 0) & (empty == 0)
    shift_f = level / 2
    shift_g = level / 2
    if BALANCED:  # f + c and g - c are the same plan: sum a f = sum b g
        shift_g = (moment_a - moment_b) / (total_a + total_b)
        shift_f = -shift_g
    if member == 0:
        _write(f_ptr, rows_ptr, row_stride, 0, 1, n_rows, turn, shift_f, unit, failed, empty, ROWS)
        tl.store(n_iters_ptr + problem, iteration)
        tl.store(residual_ptr + problem, tl.where(empty != 0, 0.0, tl.where(failed, float("nan"), residual)))
    _write(g_ptr, cols_ptr, col_stride, member, TEAM, n_cols, turn, shift_g, unit, failed, empty, BLOCK)


def sinkhorn(
    cost: Tensor,
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
    f_init: Tensor | None,
    g_init: Tensor | None,
    acceleration: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.sinkhorn` in Triton; same arguments and results, with any leading dimensions.

    `acceleration` is refused before. The cost is float32, bfloat16 or float16; everything is computed in float32.
    Memory: one more matrix of the size of the cost in float32, rows padded to four and columns to a tile.
    """
    *batch, n_rows, n_cols = cost.shape
    n_problems = math.prod(batch)
    f, g = _launch.empty(a.shape, a), _launch.empty(b.shape, b)
    n_iters, residual = _launch.empty(batch, a, torch.int32), _launch.empty(batch, a)
    if n_problems == 0:
        return f, g, n_iters, residual
    read = _launch.read
    rows = min(64, max(8, triton.next_power_of_2(n_rows)))
    warps = WARPS if n_rows <= rows else 2 * WARPS  # 300 x 2049 on an H100: a third faster than with WARPS
    block = warps * _launch.lanes()
    arch = _launch.architecture()
    # Tiles of K that are on their way while one is used. On sm_80 registers would spill; AMD was not tried on a device.
    stages = 2 if isinstance(arch, int) and arch >= 90 else 1
    row_stride, n_tiles = rows * triton.cdiv(n_rows, rows), triton.cdiv(n_cols, block)
    col_stride, n_slot = n_tiles * block, 2 * row_stride + VOTES.value
    team = _team_size(n_problems, n_tiles, _launch.multiprocessors(cost.device))
    exact = mass is not None
    k_size = 0 if exact else n_problems * 4 * triton.cdiv(n_rows, 4) * col_stride
    tensors: list[Any] = [
        *map(read, (cost, a, b, epsilon.float(), None if mass is None else mass.float())),
        *map(read, (row_mask, col_mask, f_init, g_init)),
        f, g, n_iters, residual,
        None if exact else _launch.empty((k_size,), a),
        _launch.empty((n_problems * team, ROW_FIELDS.value, row_stride), a),
        _launch.empty((n_problems, COL_FIELDS.value, col_stride), a),
        _launch.empty((n_problems * team, row_stride), a) if exact else None,
        _launch.empty((n_problems, col_stride), a) if exact else None,
        _launch.empty((n_problems, 2, team, n_slot), a),
        _launch.empty((n_problems,), a, torch.int32).zero_(),
    ]  # fmt: skip
    _launch.launch(
        sinkhorn_kernel, (n_problems * team,), *tensors, n_rows, n_cols, row_stride, col_stride, tau_a, tau_b, tol,
        max_iters, ROWS=rows, ONE=n_rows <= rows, BALANCED=not exact and tau_a == 1.0 and tau_b == 1.0,
        TEAM=team, BLOCK=block, STAGES=stages, num_warps=warps, **(TOGETHER if team > 1 else {}),
    )  # fmt: skip
    return f, g, n_iters, residual


def _team_size(n_problems: int, n_tiles: int, multiprocessors: int) -> int:
    """Programs a problem: a power of two, so many that the device is full, but with work for each of them."""
    most = min(multiprocessors // n_problems, triton.cdiv(n_tiles, LEAST_TILES), LARGEST_TEAM)
    return 1 << max(0, most.bit_length() - 1) if most > 0 else 1

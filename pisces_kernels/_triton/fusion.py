"""The fusion of attention and transport plan, and its gradient, in Triton.

    refined_ij = (A_ij + c)(R_ij + c) / sum_j (A_ij + c)(R_ij + c),   R_i = softmax_j((g_j - cost_ij) / epsilon)

which is softmax_j(log(A + c) + log(R + c)) without a logarithm, and whose divisor is known from three sums of the row:
with E_ij = exp((g_j - top_i - cost_ij) / epsilon) it is sum A E / sum E + c (sum A + 1) + M c^2. The gradient with R
held is A_bar = refined (refined_bar - sum_j refined refined_bar) / (A + c).

A program has a part of a row in its registers. A row of one part is read once. A longer one takes two launches of the
same kernel: the first leaves every part's sums, the second adds them in their order and writes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from . import _launch
from ._units import LOG2_E

CHUNK = 4096  # most columns of a program; parts depend on M alone, so that a head does not depend on its batch
FLOOR = tl.constexpr(reference.ATTENTION_FLOOR)


def split(cols: int) -> tuple[int, int, dict[str, int]]:
    """(parts, columns of a part, options of the launch) for kernels that hold a part of a row in registers."""
    parts = triton.cdiv(cols, CHUNK)
    chunk = triton.cdiv(triton.cdiv(cols, parts), 32) * 32
    tile = triton.next_power_of_2(min(cols, chunk))
    return triton.cdiv(cols, chunk), chunk, {"COLS": tile, "num_warps": min(max(tile // 256, 1), 16)}


@triton.jit
def is_selected(row_mask_ptr, at):
    """Whether a row exists."""
    selected = at >= 0  # no mask: all of them
    if row_mask_ptr is not None:
        selected = tl.load(row_mask_ptr + at) != 0
    return selected


@triton.jit
def fuse_kernel(
    attention_ptr, cost_ptr, f_ptr, g_ptr, a_ptr, row_mask_ptr, sums_ptr, refined_ptr, plan_ptr,
    n_heads, n_rows, n_cols, chunk, parts, epsilon, b,
    SUM: tl.constexpr, WRITE: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Fuse one row of one head, or one part of its columns.

    Args:
        attention_ptr: [B, H, N, M], 16 or 32 bits.
        cost_ptr: [B, H, N, M].
        f_ptr: [B, H, N].
        g_ptr: [B, H, M].
        a_ptr: [B, H, N].
        row_mask_ptr: [B, N] or None; other rows stay what they were.
        sums_ptr: [B, H, N, parts, 4], of each part: largest g - cost, sum of E against it, sum of A E, sum of A.
        refined_ptr: [B, H, N, M], the dtype of attention.
        plan_ptr: [B, H, N, M] or None.
        b: weight of a column.
        SUM: read the row and find its sums; if not, they are read from `sums_ptr`.
        WRITE: write the result; if not, the sums.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    sample = row // (n_heads * n_rows)
    offs_j = part * chunk + tl.arange(0, COLS)
    mask_j = offs_j < tl.minimum((part + 1) * chunk, n_cols)
    at = row * n_cols + offs_j
    stored = tl.load(attention_ptr + at, mask=mask_j, other=0.0)
    if not is_selected(row_mask_ptr, sample * n_rows + row % n_rows):
        if WRITE:
            tl.store(refined_ptr + at, stored, mask=mask_j)  # bit for bit
            if plan_ptr is not None:
                tl.store(plan_ptr + at, tl.zeros((COLS,), tl.float32), mask=mask_j)
        return
    attention = stored.to(tl.float32)
    scale = LOG2_E / epsilon
    head_at = row // n_rows * n_cols + offs_j
    lead = tl.load(g_ptr + head_at, mask=mask_j, other=0.0) - tl.load(cost_ptr + at, mask=mask_j, other=float("inf"))
    if SUM:
        top = tl.max(lead, axis=0)
        e = tl.exp2((lead - top) * scale)  # 0 outside of the row
        e_sum, product, total = tl.sum(e, axis=0), tl.sum(attention * e, axis=0), tl.sum(attention, axis=0)
        if not WRITE:
            sums_at = sums_ptr + (row * parts + part) * 4
            tl.store(sums_at, top)
            tl.store(sums_at + 1, e_sum)
            tl.store(sums_at + 2, product)
            tl.store(sums_at + 3, total)
    else:
        offs_p = tl.arange(0, PARTS)
        mask_p = offs_p < parts
        sums_at = sums_ptr + (row * parts + offs_p) * 4
        tops = tl.load(sums_at, mask=mask_p, other=-float("inf"))
        top = tl.max(tops, axis=0)
        share = tl.exp2((tops - top) * scale)
        e_sum = tl.sum(share * tl.load(sums_at + 1, mask=mask_p, other=0.0), axis=0)
        product = tl.sum(share * tl.load(sums_at + 2, mask=mask_p, other=0.0), axis=0)
        total = tl.sum(tl.load(sums_at + 3, mask=mask_p, other=0.0), axis=0)
        e = tl.exp2((lead - top) * scale)
    if WRITE:
        inverse = 1.0 / e_sum
        norm = 1.0 / (product * inverse + FLOOR * (total + 1.0) + n_cols * (FLOOR * FLOOR))
        refined = (attention + FLOOR) * (e * inverse + FLOOR) * norm
        tl.store(refined_ptr + at, refined.to(refined_ptr.dtype.element_ty), mask=mask_j)
        if plan_ptr is not None:
            mass = tl.exp2((tl.load(f_ptr + row) + top) * scale) * tl.load(a_ptr + row) * b
            tl.store(plan_ptr + at, e * mass, mask=mask_j)


@triton.jit
def fusion_gradient_kernel(
    grad_ptr, attention_ptr, refined_ptr, row_mask_ptr, sums_ptr, result_ptr, n_heads, n_rows, n_cols, chunk, parts,
    SUM: tl.constexpr, WRITE: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradient of the attention in one row of one head, or in one part of its columns.

    Args:
        grad_ptr: [B, H, N, M], 16 or 32 bits, like attention_ptr, refined_ptr and result_ptr.
        row_mask_ptr: [B, N] or None; in other rows the gradient passes.
        sums_ptr: [B, H, N, parts], sum of refined times gradient.
        SUM: as in `fuse_kernel`; WRITE too.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    sample = row // (n_heads * n_rows)
    offs_j = part * chunk + tl.arange(0, COLS)
    mask_j = offs_j < tl.minimum((part + 1) * chunk, n_cols)
    at = row * n_cols + offs_j
    stored = tl.load(grad_ptr + at, mask=mask_j, other=0.0)
    if not is_selected(row_mask_ptr, sample * n_rows + row % n_rows):
        if WRITE:
            tl.store(result_ptr + at, stored, mask=mask_j)
        return
    grad = stored.to(tl.float32)
    refined = tl.load(refined_ptr + at, mask=mask_j, other=0.0).to(tl.float32)
    if SUM:
        dot = tl.sum(refined * grad, axis=0)
        if not WRITE:
            tl.store(sums_ptr + row * parts + part, dot)
    else:
        offs_p = tl.arange(0, PARTS)
        dot = tl.sum(tl.load(sums_ptr + row * parts + offs_p, mask=offs_p < parts, other=0.0), axis=0)
    if WRITE:
        attention = tl.load(attention_ptr + at, mask=mask_j, other=0.0).to(tl.float32)
        result = refined / (attention + FLOOR) * (grad - dot)
        tl.store(result_ptr + at, result.to(result_ptr.dtype.element_ty), mask=mask_j)


def _over_rows(
    kernel: Any, tensors: list[Any], results: list[Any], shape: torch.Size, n_sums: int, *extra: float
) -> None:
    """Launch once for rows of one part, else for the sums and then for the results."""
    samples, heads, rows, cols = shape
    n_all = samples * heads * rows
    parts, chunk, options = split(cols)
    sums = None if parts == 1 else _launch.empty((n_all, parts, n_sums), tensors[0])
    for first, last in ((True, True),) if parts == 1 else ((True, False), (False, True)):
        _launch.launch(
            kernel, (n_all, parts), *tensors, sums, *results, heads, rows, cols, chunk, parts, *extra,
            SUM=first, WRITE=last, PARTS=triton.next_power_of_2(parts), **options,
        )  # fmt: skip


def fuse(
    attention: Tensor,
    cost: Tensor,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    row_mask: Tensor | None,
    epsilon: float,
    return_plan: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.fuse` with the rows of the plan, and the plan if asked for (else empty).

    Args:
        attention: [B, H, N, M], read by the kernels as it is.
        cost: [B * H, N, M].
        f: [B * H, N].
        g: [B * H, M].
        a: [B * H, N].
        row_mask: [B, N] bytes, or None.
        epsilon: of the solve.
        return_plan: whether to write the plan.
    """
    cols = attention.shape[-1]
    refined = _launch.empty(attention.shape, attention, attention.dtype)
    plan = _launch.empty(attention.shape if return_plan else (0,), attention)
    tensors = [attention, cost, f, g, a, row_mask]
    results = [refined, plan if return_plan else None]
    _over_rows(fuse_kernel, tensors, results, attention.shape, 4, epsilon, 1.0 / cols)
    return refined, plan


def fusion_gradient(grad: Tensor, attention: Tensor, refined: Tensor, row_mask: Tensor | None) -> Tensor:
    """Gradient of transport attention with respect to attention, the plan held: see `_transport_attention`."""
    result = _launch.empty(grad.shape, grad, grad.dtype)
    if grad.numel() > 0:
        tensors = [_launch.read(value) for value in (grad, attention, refined, row_mask)]
        _over_rows(fusion_gradient_kernel, tensors, [result], grad.shape, 1)
    return result

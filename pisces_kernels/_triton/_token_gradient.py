"""The gradient of the token cost in Triton, down to that of the cosines.

    raw_bar_ij = scale cost_bar_ij + at_low [cost_ij = 0] + at_high [cost_ij = 1]
    cosine_bar_ij = -sum_heads raw_bar_ij
    t_bar_i = time_weight sum_j raw_bar_ij sign(t_i - frame_j),   s_bar_i = place_weight sum_j raw_bar_ij direction_ij
    attention_bar_ij = (t_bar_i (frame_j - t_i) + s_bar_i (position_j - s_i)) / max(sum_j attention_ij, c)

scale = 1 / (high - low); at_low and at_high are what moves the extremes, shared by the entries that tie for them. The
range is not stored: the raw cost of its two entries is computed again from the features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, _token_cost
from ._token_cost import LEAST_NORM, RANGE_FLOOR, raw_cost, read_columns
from .fusion import is_selected, split


@triton.jit
def extremes_kernel(
    grad_ptr, cost_ptr, row_mask_ptr, col_mask_ptr, sums_ptr, extremes_ptr, n_heads, n_rows, n_cols, rows_each,
    COLS: tl.constexpr,
):  # fmt: skip
    """Sums over a block of one head for the gradient of the scaling, and where the last extremes are.

    Args:
        grad_ptr: [B, H, N, M].
        cost_ptr: [B, H, N, M], scaled.
        sums_ptr: [B, H, blocks, 4]: gradient, gradient times cost, entries at 0, entries at 1.
        extremes_ptr: [B, H, blocks, 2]: i M + j of an entry at 0 and of one at 1; -1 where there is none.
    """
    head = tl.program_id(0).to(tl.int64)
    sample = head // n_heads
    offs_j = tl.program_id(1) * COLS + tl.arange(0, COLS)
    exists = offs_j < n_cols
    if col_mask_ptr is not None:
        exists = exists & (tl.load(col_mask_ptr + sample * n_cols + offs_j, mask=exists, other=0) != 0)
    by_grad, by_cost = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    lows, highs = tl.zeros((COLS,), tl.int32), tl.zeros((COLS,), tl.int32)
    low, high = tl.full((COLS,), -1, tl.int32), tl.full((COLS,), -1, tl.int32)
    begin = tl.program_id(2) * rows_each
    for i in range(begin, tl.minimum(begin + rows_each, n_rows)):
        if is_selected(row_mask_ptr, sample * n_rows + i):
            at = (head * n_rows + i) * n_cols + offs_j
            grad = tl.load(grad_ptr + at, mask=exists, other=0.0)
            cost = tl.load(cost_ptr + at, mask=exists, other=0.5)
            by_grad += grad
            by_cost += grad * cost
            lows += (cost == 0.0).to(tl.int32)
            highs += (cost == 1.0).to(tl.int32)
            low = tl.where(cost == 0.0, i * n_cols + offs_j, low)
            high = tl.where(cost == 1.0, i * n_cols + offs_j, high)
    blocks = tl.num_programs(1) * tl.num_programs(2)
    block = head * blocks + tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    tl.store(sums_ptr + block * 4, tl.sum(by_grad, axis=0))
    tl.store(sums_ptr + block * 4 + 1, tl.sum(by_cost, axis=0))
    tl.store(sums_ptr + block * 4 + 2, tl.sum(lows, axis=0).to(tl.float32))
    tl.store(sums_ptr + block * 4 + 3, tl.sum(highs, axis=0).to(tl.float32))
    tl.store(extremes_ptr + block * 2, tl.max(low, axis=0))
    tl.store(extremes_ptr + block * 2 + 1, tl.max(high, axis=0))


@triton.jit
def raw_at(
    entry, text_ptr, video_ptr, means_ptr, frame_ptr, positions_ptr, head, sample, n_rows, n_cols, dim, place_weight,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Raw cost of entry i M + j of a head, from the features."""
    i, j = entry // n_cols, sample * n_cols + entry % n_cols
    offs_d = tl.arange(0, DEPTH)
    dot, text_square = tl.zeros((DEPTH,), tl.float32), tl.zeros((DEPTH,), tl.float32)
    video_square = tl.zeros((DEPTH,), tl.float32)
    for d in range(0, dim, DEPTH):
        text = tl.load(text_ptr + (sample * n_rows + i) * dim + d + offs_d, mask=offs_d < dim - d, other=0.0)
        video = tl.load(video_ptr + j * dim + d + offs_d, mask=offs_d < dim - d, other=0.0)
        dot += text * video
        text_square += text * text
        video_square += video * video
    by_text = 1.0 / tl.maximum(tl.sqrt(tl.sum(text_square, axis=0)), LEAST_NORM)
    by_video = 1.0 / tl.maximum(tl.sqrt(tl.sum(video_square, axis=0)), LEAST_NORM)
    semantic = 1.0 - tl.sum(dot, axis=0) * by_text * by_video
    frame, y, x = tl.load(frame_ptr + j), tl.load(positions_ptr + 2 * j), tl.load(positions_ptr + 2 * j + 1)
    row_ptr = means_ptr + (head * n_rows + i) * 5
    return raw_cost(semantic, row_ptr, frame, y, x, tl.load(row_ptr + 4), place_weight)


@triton.jit
def scaling_kernel(
    sums_ptr, extremes_ptr, text_ptr, video_ptr, means_ptr, frame_ptr, positions_ptr, scalings_ptr,
    n_heads, n_rows, n_cols, dim, blocks, place_weight, BLOCKS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradient of the raw cost of one head: scale times that of the cost, and at_low or at_high more at the extremes.

    Args:
        sums_ptr: [B, H, blocks, 4], see `extremes_kernel`; extremes_ptr too.
        scalings_ptr: [B, H, 3]: scale, at_low, at_high. NaN where nothing exists or not all is finite.
    """
    head = tl.program_id(0).to(tl.int64)
    sample = head // n_heads
    offs_k = head * blocks + tl.arange(0, BLOCKS)
    mask_k = tl.arange(0, BLOCKS) < blocks
    by_grad = tl.sum(tl.load(sums_ptr + offs_k * 4, mask=mask_k, other=0.0), axis=0)
    by_cost = tl.sum(tl.load(sums_ptr + offs_k * 4 + 1, mask=mask_k, other=0.0), axis=0)
    lows = tl.sum(tl.load(sums_ptr + offs_k * 4 + 2, mask=mask_k, other=0.0), axis=0)
    highs = tl.sum(tl.load(sums_ptr + offs_k * 4 + 3, mask=mask_k, other=0.0), axis=0)
    low = tl.max(tl.load(extremes_ptr + offs_k * 2, mask=mask_k, other=-1), axis=0)
    high = tl.max(tl.load(extremes_ptr + offs_k * 2 + 1, mask=mask_k, other=-1), axis=0)
    nothing = low < 0
    low = tl.maximum(low, 0)
    high = tl.where(high < 0, low, high)  # no entry at 1: the range is below its floor
    least = raw_at(
        low, text_ptr, video_ptr, means_ptr, frame_ptr, positions_ptr, head, sample, n_rows, n_cols, dim, place_weight,
        DEPTH,
    )  # fmt: skip
    most = raw_at(
        high, text_ptr, video_ptr, means_ptr, frame_ptr, positions_ptr, head, sample, n_rows, n_cols, dim, place_weight,
        DEPTH,
    )  # fmt: skip
    scale = tl.where(nothing, float("nan"), 1.0 / tl.maximum(most - least, RANGE_FLOOR))
    to_divisor = tl.where(most - least > RANGE_FLOOR, -by_cost * scale, 0.0)
    tl.store(scalings_ptr + head * 3, scale)
    tl.store(scalings_ptr + head * 3 + 1, (-by_grad * scale - to_divisor) / tl.maximum(lows, 1.0))
    tl.store(scalings_ptr + head * 3 + 2, to_divisor / tl.maximum(highs, 1.0))


@triton.jit
def cosine_gradient_kernel(
    grad_ptr, cost_ptr, means_ptr, frame_ptr, positions_ptr, row_mask_ptr, col_mask_ptr, scalings_ptr, cosine_ptr,
    sums_ptr, n_heads, n_rows, n_cols, COLS: tl.constexpr,
):  # fmt: skip
    """Gradient of a part of one row of the cosines, over all heads, and what each head's means get of it.

    Args:
        grad_ptr: [B, H, N, M].
        cost_ptr: [B, H, N, M].
        scalings_ptr: [B, H, 3], or None where the cost is not scaled.
        cosine_ptr: [B, N, M].
        sums_ptr: [B, H, N, parts, 3]: gradients of expected frame, y and x, without time_weight and place_weight.
    """
    sample_row = tl.program_id(0).to(tl.int64)
    sample, i = sample_row // n_rows, sample_row % n_rows
    offs_j = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask_j = offs_j < n_cols
    exists, frame, y, x = read_columns(frame_ptr, positions_ptr, col_mask_ptr, sample * n_cols + offs_j, mask_j)
    total = tl.zeros((COLS,), tl.float32)
    heads = tl.where(is_selected(row_mask_ptr, sample_row), n_heads, 0)
    for h in range(heads):
        head = sample * n_heads + h
        row = head * n_rows + i
        to_raw = tl.load(grad_ptr + row * n_cols + offs_j, mask=exists, other=0.0)
        if scalings_ptr is not None:
            cost = tl.load(cost_ptr + row * n_cols + offs_j, mask=exists, other=0.5)
            scale, at_low = tl.load(scalings_ptr + head * 3), tl.load(scalings_ptr + head * 3 + 1)
            at_high = tl.load(scalings_ptr + head * 3 + 2)
            more = tl.where(cost == 0.0, at_low, tl.where(cost == 1.0, at_high, 0.0))
            to_raw = tl.where(exists, to_raw * scale + more, 0.0)
        total += to_raw
        dt = tl.load(means_ptr + row * 5) - frame
        dy, dx = tl.load(means_ptr + row * 5 + 1) - y, tl.load(means_ptr + row * 5 + 2) - x
        squared = dy * dy + dx * dx
        along = tl.where(squared > 0, to_raw * tl.rsqrt(tl.where(squared > 0, squared, 1.0)), 0.0)
        sums_at = sums_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * 3
        tl.store(sums_at, tl.sum(tl.where(dt > 0, to_raw, tl.where(dt < 0, -to_raw, 0.0)), axis=0))
        tl.store(sums_at + 1, tl.sum(along * dy, axis=0))
        tl.store(sums_at + 2, tl.sum(along * dx, axis=0))
    tl.store(cosine_ptr + sample_row * n_cols + offs_j, -total, mask=mask_j)


@triton.jit
def attention_gradient_kernel(
    sums_ptr, means_ptr, frame_ptr, positions_ptr, row_mask_ptr, col_mask_ptr, result_ptr,
    n_heads, n_rows, n_cols, chunk, parts, place_weight, PARTS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradient of a part of one row of the attention.

    Args:
        sums_ptr: [B, H, N, parts, 3], see `cosine_gradient_kernel`.
        means_ptr: [B, H, N, 5].
        result_ptr: [B, H, N, M], zero where masked.
    """
    row = tl.program_id(0).to(tl.int64)
    sample = row // (n_heads * n_rows)
    offs_j = tl.program_id(1) * chunk + tl.arange(0, COLS)
    mask_j = offs_j < tl.minimum((tl.program_id(1) + 1) * chunk, n_cols)
    result = tl.zeros((COLS,), tl.float32)
    if is_selected(row_mask_ptr, sample * n_rows + row % n_rows):
        offs_p = tl.arange(0, PARTS)
        mask_p, sums_at = offs_p < parts, sums_ptr + (row * parts + offs_p) * 3
        total = tl.load(means_ptr + row * 5 + 3)
        scale = 1.0 / tl.maximum(total, RANGE_FLOOR)
        to_frame = tl.sum(tl.load(sums_at, mask=mask_p, other=0.0), axis=0) * (tl.load(means_ptr + row * 5 + 4) * scale)
        to_y = tl.sum(tl.load(sums_at + 1, mask=mask_p, other=0.0), axis=0) * (place_weight * scale)
        to_x = tl.sum(tl.load(sums_at + 2, mask=mask_p, other=0.0), axis=0) * (place_weight * scale)
        mean_frame, mean_y = tl.load(means_ptr + row * 5), tl.load(means_ptr + row * 5 + 1)
        along = to_frame * mean_frame + to_y * mean_y + to_x * tl.load(means_ptr + row * 5 + 2)
        along = tl.where(total < RANGE_FLOOR, 0.0, along)  # the divisor is constant there
        exists, frame, y, x = read_columns(frame_ptr, positions_ptr, col_mask_ptr, sample * n_cols + offs_j, mask_j)
        result = tl.where(exists, to_frame * frame + to_y * y + to_x * x - along, 0.0)
    tl.store(result_ptr + row * n_cols + offs_j, result, mask=mask_j)


def cosine_gradient(
    grad: Tensor,
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    cost: Tensor,
    gamma: float,
    eta: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """`_token_cost.gradients` up to the cosines: their gradient [B, N, M], and that of the attention."""
    samples, heads, rows, cols = attention.shape
    to_cosine = _launch.empty((samples, rows, cols), grad)
    to_attention = _launch.empty(attention.shape, grad)
    if attention.numel() == 0:
        return to_cosine, to_attention
    grad, cost, text, video, attention = map(_launch.read, (grad, cost, text, video, attention))
    places = frame_index, positions = _launch.read(frame_index), _launch.read(positions)
    masks = _launch.read(row_mask), _launch.read(col_mask)
    row_data = _token_cost.means(attention, *places, *masks, gamma)
    place_weight = eta / 2**0.5
    scalings = None
    if normalize:
        tiles, blocks, each = _token_cost.blocks_of(samples * heads, rows, cols)
        sums = _launch.empty((samples * heads, tiles * blocks, 4), grad)
        extremes = _launch.empty((samples * heads, tiles * blocks, 2), grad, torch.int32)
        scalings = _launch.empty((samples * heads, 3), grad)
        _launch.launch(
            extremes_kernel, (samples * heads, tiles, blocks), grad, cost, *masks, sums, extremes,
            heads, rows, cols, each, COLS=_token_cost.COLS, num_warps=4,
        )  # fmt: skip
        _launch.launch(
            scaling_kernel, (samples * heads,), sums, extremes, text, video, row_data, *places, scalings,
            heads, rows, cols, text.shape[-1], tiles * blocks, place_weight,
            BLOCKS=triton.next_power_of_2(tiles * blocks), DEPTH=512, num_warps=4,
        )  # fmt: skip
    tiles = triton.cdiv(cols, _token_cost.COLS)
    sums = _launch.empty((samples * heads * rows, tiles, 3), grad)
    _launch.launch(
        cosine_gradient_kernel, (samples * rows, tiles), grad, cost, row_data, *places, *masks, scalings, to_cosine,
        sums, heads, rows, cols, COLS=_token_cost.COLS, num_warps=4,
    )  # fmt: skip
    parts, chunk, options = split(cols)
    _launch.launch(
        attention_gradient_kernel, (samples * heads * rows, parts), sums, row_data, *places, *masks, to_attention,
        heads, rows, cols, chunk, tiles, place_weight, PARTS=triton.next_power_of_2(tiles), **options,
    )  # fmt: skip
    return to_cosine, to_attention

"""The token cost in Triton.

    raw_ij  = 1 - cosine(text_i, video_j) + time_weight |t_i - frame_j| + place_weight |s_i - position_j|
    cost_ij = (raw_ij - low) / max(high - low, c)

t_i and s_i are the means of frame and position under row i of a head's attention; low and high are the extremes of the
head. The cosines of a sample are one matrix product, which its heads share. The raw cost is not stored: it is computed
twice, once for its range and once to be written. Its products are inside of an fma (or stand alone), so that no choice
of a compiler can differ between the two: the extremes come out as exactly 0 and 1, by which the gradient knows them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from . import _launch
from .fusion import is_selected, split

COLS = 512  # columns of a program that goes over rows
PROGRAMS = 512  # that fill a GPU: with fewer, rows are split, too
RANGE_FLOOR = tl.constexpr(reference.RANGE_FLOOR)
LEAST_NORM = tl.constexpr(1e-12)  # torch.nn.functional.normalize


@triton.jit
def similarity_kernel(
    text_ptr, video_ptr, row_mask_ptr, col_mask_ptr, similarity_ptr, n_rows, n_cols, dim,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """1 - cosine, a tile of rows and columns of one sample.

    Args:
        text_ptr: [B, N, D], 16 or 32 bits.
        video_ptr: [B, M, D], the same.
        row_mask_ptr: [B, N] or None; what is masked is not read and has a cosine of 0.
        col_mask_ptr: [B, M] or None.
        similarity_ptr: [B, N, M].
    """
    row_tiles, col_tiles = tl.cdiv(n_rows, ROWS), tl.cdiv(n_cols, COLS)
    sample = (tl.program_id(0) // (row_tiles * col_tiles)).to(tl.int64)
    tile = tl.program_id(0) % (row_tiles * col_tiles)
    offs_i = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    offs_j = tile // row_tiles * COLS + tl.arange(0, COLS)
    offs_d = tl.arange(0, DEPTH)
    mask_i, mask_j = offs_i < n_rows, offs_j < n_cols
    rows, cols = mask_i, mask_j
    if row_mask_ptr is not None:
        rows = mask_i & (tl.load(row_mask_ptr + sample * n_rows + offs_i, mask=mask_i, other=0) != 0)
    if col_mask_ptr is not None:
        cols = mask_j & (tl.load(col_mask_ptr + sample * n_cols + offs_j, mask=mask_j, other=0) != 0)
    text_at = text_ptr + (sample * n_rows + offs_i)[:, None] * dim + offs_d[None, :]
    video_at = video_ptr + (sample * n_cols + offs_j)[:, None] * dim + offs_d[None, :]
    dots = tl.zeros((ROWS, COLS), tl.float32)
    text_squares, video_squares = tl.zeros((ROWS, DEPTH), tl.float32), tl.zeros((COLS, DEPTH), tl.float32)
    for d in range(0, dim, DEPTH):
        mask_d = (offs_d < dim - d)[None, :]
        text = tl.load(text_at + d, mask=rows[:, None] & mask_d, other=0.0)
        video = tl.load(video_at + d, mask=cols[:, None] & mask_d, other=0.0)
        dots = tl.dot(text, tl.trans(video), dots, input_precision="ieee")
        text_squares += text.to(tl.float32) * text.to(tl.float32)
        video_squares += video.to(tl.float32) * video.to(tl.float32)
    by_text = 1.0 / tl.maximum(tl.sqrt(tl.sum(text_squares, axis=1)), LEAST_NORM)
    by_video = 1.0 / tl.maximum(tl.sqrt(tl.sum(video_squares, axis=1)), LEAST_NORM)
    result = 1.0 - dots * by_text[:, None] * by_video[None, :]
    at = (sample * n_rows + offs_i)[:, None] * n_cols + offs_j[None, :]
    tl.store(similarity_ptr + at, result, mask=mask_i[:, None] & mask_j[None, :])


@triton.jit
def read_columns(frame_ptr, positions_ptr, col_mask_ptr, at, mask_j):
    """Which columns exist, and their frame, y and x; 0 where there is none."""
    exists = mask_j
    if col_mask_ptr is not None:
        exists = mask_j & (tl.load(col_mask_ptr + at, mask=mask_j, other=0) != 0)
    frame = tl.load(frame_ptr + at, mask=exists, other=0.0)
    y = tl.load(positions_ptr + 2 * at, mask=exists, other=0.0)
    x = tl.load(positions_ptr + 2 * at + 1, mask=exists, other=0.0)
    return exists, frame, y, x


@triton.jit
def moments_kernel(
    attention_ptr, frame_ptr, positions_ptr, row_mask_ptr, col_mask_ptr, moments_ptr,
    n_heads, n_rows, n_cols, chunk, parts, COLS: tl.constexpr,
):  # fmt: skip
    """Sums of a part of one row of the attention.

    Args:
        attention_ptr: [B, H, N, M], 16 or 32 bits; masked entries are not read.
        moments_ptr: [B, H, N, parts, 6]: sum of A, A frame, A y, A x; first and last frame of the part.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    sample = row // (n_heads * n_rows)
    offs_j = part * chunk + tl.arange(0, COLS)
    mask_j = offs_j < tl.minimum((part + 1) * chunk, n_cols)
    exists, frame, y, x = read_columns(frame_ptr, positions_ptr, col_mask_ptr, sample * n_cols + offs_j, mask_j)
    end = tl.where(is_selected(row_mask_ptr, sample * n_rows + row % n_rows), n_cols, 0)
    mask = exists & (offs_j < end)
    weight = tl.load(attention_ptr + row * n_cols + offs_j, mask=mask, other=0.0).to(tl.float32)
    at = moments_ptr + (row * parts + part) * 6
    tl.store(at, tl.sum(weight, axis=0))
    tl.store(at + 1, tl.sum(weight * frame, axis=0))
    tl.store(at + 2, tl.sum(weight * y, axis=0))
    tl.store(at + 3, tl.sum(weight * x, axis=0))
    tl.store(at + 4, tl.min(tl.where(exists, frame, float("inf")), axis=0))
    tl.store(at + 5, tl.max(tl.where(exists, frame, -float("inf")), axis=0))


@triton.jit
def means_kernel(moments_ptr, means_ptr, n_all, parts, gamma, ROWS: tl.constexpr):
    """Add the parts of every row, in their order.

    Args:
        moments_ptr: [B H N, parts, 6].
        means_ptr: [B H N, 5]: expected frame, y, x; sum of the attention; time_weight of the row's sample.
    """
    offs_i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask_i = offs_i < n_all
    total, frame = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    y, x = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    first, last = tl.full((ROWS,), float("inf"), tl.float32), tl.full((ROWS,), -float("inf"), tl.float32)
    for part in range(parts):
        at = moments_ptr + (offs_i * parts + part) * 6
        total += tl.load(at, mask=mask_i, other=0.0)
        frame += tl.load(at + 1, mask=mask_i, other=0.0)
        y += tl.load(at + 2, mask=mask_i, other=0.0)
        x += tl.load(at + 3, mask=mask_i, other=0.0)
        first = tl.minimum(first, tl.load(at + 4, mask=mask_i, other=0.0))
        last = tl.maximum(last, tl.load(at + 5, mask=mask_i, other=0.0))
    scale = 1.0 / tl.maximum(total, RANGE_FLOOR)
    span = last - first
    at = means_ptr + offs_i * 5
    tl.store(at, frame * scale, mask=mask_i)
    tl.store(at + 1, y * scale, mask=mask_i)
    tl.store(at + 2, x * scale, mask=mask_i)
    tl.store(at + 3, total, mask=mask_i)
    tl.store(at + 4, gamma / tl.where(span > 0, span, 1.0), mask=mask_i)


@triton.jit
def raw_cost(semantic, means_ptr, frame, y, x, time_weight, place_weight):
    """Cost before the scaling of entries of the row whose means lie at `means_ptr`; the same bits for all who ask."""
    mean_frame, mean_y, mean_x = tl.load(means_ptr), tl.load(means_ptr + 1), tl.load(means_ptr + 2)
    dy, dx = mean_y - y, mean_x - x
    distance = tl.sqrt(tl.fma(dy, dy, dx * dx))
    return tl.fma(distance, place_weight, tl.fma(tl.abs(mean_frame - frame), time_weight, semantic))


@triton.jit
def range_kernel(
    similarity_ptr, means_ptr, frame_ptr, positions_ptr, row_mask_ptr, col_mask_ptr, ranges_ptr,
    n_heads, n_rows, n_cols, rows_each, place_weight, COLS: tl.constexpr,
):  # fmt: skip
    """Least and greatest raw cost of a block of one head; NaN if one is among them.

    Args:
        similarity_ptr: [B, N, M].
        means_ptr: [B, H, N, 5].
        ranges_ptr: [B, H, blocks, 2].
    """
    head = tl.program_id(0).to(tl.int64)
    sample = head // n_heads
    offs_j = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask_j = offs_j < n_cols
    exists, frame, y, x = read_columns(frame_ptr, positions_ptr, col_mask_ptr, sample * n_cols + offs_j, mask_j)
    time_weight = tl.load(means_ptr + head * n_rows * 5 + 4)
    low, high = tl.full((COLS,), float("inf"), tl.float32), tl.full((COLS,), -float("inf"), tl.float32)
    begin = tl.program_id(2) * rows_each
    for i in range(begin, tl.minimum(begin + rows_each, n_rows)):
        if is_selected(row_mask_ptr, sample * n_rows + i):
            semantic = tl.load(similarity_ptr + (sample * n_rows + i) * n_cols + offs_j, mask=exists, other=0.0)
            raw = raw_cost(semantic, means_ptr + (head * n_rows + i) * 5, frame, y, x, time_weight, place_weight)
            low = tl.minimum(low, tl.where(exists, raw, float("inf")), propagate_nan=tl.PropagateNan.ALL)
            high = tl.maximum(high, tl.where(exists, raw, -float("inf")))
    bad = tl.max((low != low).to(tl.int32), axis=0)
    blocks = tl.num_programs(1) * tl.num_programs(2)
    at = ranges_ptr + (head * blocks + tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)) * 2
    tl.store(at, tl.where(bad > 0, float("nan"), tl.min(low, axis=0)))
    tl.store(at + 1, tl.max(high, axis=0))


@triton.jit
def cost_kernel(
    similarity_ptr, means_ptr, frame_ptr, positions_ptr, row_mask_ptr, col_mask_ptr, ranges_ptr, cost_ptr,
    n_heads, n_rows, n_cols, rows_each, place_weight, NORMALIZE: tl.constexpr, BLOCKS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """Write a block of the cost of one head.

    Args:
        similarity_ptr: [B, N, M].
        means_ptr: [B, H, N, 5].
        ranges_ptr: [B, H, blocks, 2], of blocks that are those of this launch.
        cost_ptr: [B, H, N, M].
    """
    head = tl.program_id(0).to(tl.int64)
    sample = head // n_heads
    if NORMALIZE:
        blocks = tl.num_programs(1) * tl.num_programs(2)
        offs_k = tl.arange(0, BLOCKS)
        at, mask_k = ranges_ptr + (head * blocks + offs_k) * 2, offs_k < blocks
        lows = tl.load(at, mask=mask_k, other=float("inf"))
        highs = tl.load(at + 1, mask=mask_k, other=-float("inf"))
        low = tl.min(lows, axis=0)
        span = tl.max(highs, axis=0) - low
        bad = (tl.max((lows != lows).to(tl.int32), axis=0) > 0) | (span == float("inf"))
        low = tl.where(bad, float("nan"), low)
        inverse = 1.0 / tl.maximum(span, RANGE_FLOOR)
        greatest = tl.where(span < RANGE_FLOOR, span * inverse, 1.0)  # exactly 1
    offs_j = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask_j = offs_j < n_cols
    exists, frame, y, x = read_columns(frame_ptr, positions_ptr, col_mask_ptr, sample * n_cols + offs_j, mask_j)
    time_weight = tl.load(means_ptr + head * n_rows * 5 + 4)
    begin = tl.program_id(2) * rows_each
    for i in range(begin, tl.minimum(begin + rows_each, n_rows)):
        cost = tl.zeros((COLS,), tl.float32)
        if is_selected(row_mask_ptr, sample * n_rows + i):
            semantic = tl.load(similarity_ptr + (sample * n_rows + i) * n_cols + offs_j, mask=exists, other=0.0)
            raw = raw_cost(semantic, means_ptr + (head * n_rows + i) * 5, frame, y, x, time_weight, place_weight)
            cost = tl.where(exists, raw, 0.0)
            if NORMALIZE:
                above = raw - low
                cost = tl.where(exists, tl.where(above == span, greatest, above * inverse), 0.0)
        tl.store(cost_ptr + (head * n_rows + i) * n_cols + offs_j, cost, mask=mask_j)


def blocks_of(heads: int, rows: int, cols: int) -> tuple[int, int, int]:
    """(column tiles, row blocks, rows of a block) of kernels that go over the rows of all heads."""
    tiles = triton.cdiv(cols, COLS)
    each = triton.cdiv(rows, min(max(PROGRAMS // (heads * tiles), 1), triton.cdiv(rows, 8)))
    return tiles, triton.cdiv(rows, each), each


def similarity(text: Tensor, video: Tensor, row_mask: Tensor | None, col_mask: Tensor | None) -> Tensor:
    """1 - cosine [B, N, M] of inputs that are read as they are."""
    samples, rows, dim = text.shape
    cols = video.shape[1]
    result = _launch.empty((samples, rows, cols), text)
    tile = {"ROWS": min(max(triton.next_power_of_2(rows), 16), 64), "COLS": 64, "DEPTH": 32}
    grid = (samples * triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(cols, tile["COLS"]),)
    _launch.launch(
        similarity_kernel, grid, text, video, row_mask, col_mask, result, rows, cols, dim, **tile, num_warps=8
    )
    return result


def means(
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    gamma: float,
) -> Tensor:
    """Expected frame, y and x, sum of the attention and weight of time of every row, [B, H, N, 5]."""
    samples, heads, rows, cols = attention.shape
    n_all = samples * heads * rows
    parts, chunk, options = split(cols)
    moments = _launch.empty((n_all, parts, 6), attention)
    result = _launch.empty((samples, heads, rows, 5), attention)
    _launch.launch(
        moments_kernel, (n_all, parts), attention, frame_index, positions, row_mask, col_mask, moments,
        heads, rows, cols, chunk, parts, **options,
    )  # fmt: skip
    _launch.launch(means_kernel, (triton.cdiv(n_all, 128),), moments, result, n_all, parts, gamma, ROWS=128)
    return result


def write_cost(
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    gamma: float,
    eta: float,
    normalize: bool,
) -> Tensor:
    """`token_cost` of inputs that the kernels can read."""
    samples, heads, rows, cols = attention.shape
    problems = samples * heads
    geometry = (frame_index, positions, row_mask, col_mask)
    semantic = similarity(text, video, row_mask, col_mask)
    inputs = (semantic, means(attention, *geometry, gamma), *geometry)
    tiles, blocks, each = blocks_of(problems, rows, cols)
    grid, sizes = (problems, tiles, blocks), (heads, rows, cols, each, eta / 2**0.5)
    ranges = _launch.empty((problems, tiles * blocks, 2), attention) if normalize else None
    if normalize:
        _launch.launch(range_kernel, grid, *inputs, ranges, *sizes, COLS=COLS, num_warps=4)
    result = _launch.empty(attention.shape, attention)
    _launch.launch(
        cost_kernel, grid, *inputs, ranges, result, *sizes, NORMALIZE=normalize,
        BLOCKS=triton.next_power_of_2(tiles * blocks), COLS=COLS, num_warps=4,
    )  # fmt: skip
    return result

"""Sums over the plan of two point clouds, tile by tile: the N x M cost is computed, used and forgotten.

cost_ij = max(0, h_i + k_j - s <x_i, y_j>) for both costs, so that every tile is one matrix product:

    "sqeuclidean"  |x_i - y_j|^2:   h = |x|^2, k = |y|^2, s = 2;  the points are centred first, the cost stays the same
    "cosine"       1 - cos(x, y):   h = 1,     k = 0,     s = 1;  the points are scaled to length 1 first (0 stays 0)

Shapes: P problems, N rows, M columns, D features, E and F columns of a factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _dispatch

COSTS = ("sqeuclidean", "cosine")

# Entries of a tile, of which up to two are alive at a time. A transform of 4096 x 4096 points, D = 64, took 170 ms of
# one Zen 3 core with 2^14, 60 to 80 ms with 2^18 to 2^20, 100 ms with 2^22; a GPU wants the larger ones.
TILE = 1 << 20
# Columns of a tile of many rows: enough for the matrix product, few enough that N x D and M x D are read rarely.
WIDTH = 4096
# Smallest and largest exponent that exp sees. Below are denormal numbers, which made the transform above five times
# slower and are too small to change a sum; the upper end is explained in `products`.
EXPONENTS = {torch.float32: (-85.0, 80.0), torch.float64: (-705.0, 700.0)}


@dataclass(frozen=True, eq=False)
class Points:
    """Two clouds, prepared for their cost.

    Attributes:
        x: [P, N, D].
        y: [P, M, D].
        row: [P, N], h of the module's formula.
        col: [P, M], k.
        scale: s.
        backend: what computes the sums: "reference" (this file), "cpu", "cuda" or "triton".
    """

    x: Tensor
    y: Tensor
    row: Tensor
    col: Tensor
    scale: float
    backend: str

    @staticmethod
    def of(x: Tensor, y: Tensor, cost: str, backend: str = "reference") -> Points:
        """Clouds from `prepare`, with what the tiles of the cost need."""
        if cost == "cosine":
            return Points(x, y, torch.ones_like(x[..., 0]), torch.zeros_like(y[..., 0]), 1.0, backend)
        return Points(x, y, (x * x).sum(-1), (y * y).sum(-1), 2.0, backend)

    @property
    def mT(self) -> Points:
        """The transposed problem."""
        return Points(self.y, self.x, self.col, self.row, self.scale, self.backend)

    @property
    def squared(self) -> bool:
        """Whether the cost is "sqeuclidean"."""
        return self.scale == 2.0

    def finite(self) -> Tensor:
        """[P] bool: no entry of the cost can be infinite or NaN."""
        reach = self.row.abs().amax(-1).sqrt() + self.col.abs().amax(-1).sqrt()  # cost <= reach^2 + 1
        points = torch.isfinite(self.x).all(-1).all(-1) & torch.isfinite(self.y).all(-1).all(-1)
        return points & torch.isfinite(2.0 * reach * reach)

    def tiles(self) -> Iterator[tuple[slice, list[tuple[slice, list[slice]]]]]:
        """Slices of problems, in each of them slices of rows, in each of them slices of columns."""
        problems, n_rows, n_cols = self.x.shape[0], self.x.shape[1], self.y.shape[1]
        width = min(n_cols, max(WIDTH, TILE // n_rows), TILE)
        height = min(n_rows, max(1, TILE // width))
        depth = max(1, TILE // (n_rows * n_cols))
        cols = [slice(j, min(j + width, n_cols)) for j in range(0, n_cols, width)]
        rows = [(slice(i, min(i + height, n_rows)), cols) for i in range(0, n_rows, height)]
        for p in range(0, problems, depth):
            yield slice(p, min(p + depth, problems)), rows

    def cost(self, p: slice, i: slice, j: slice) -> Tensor:
        """One tile of the cost, a new tensor. [p, i, j]"""
        product = torch.baddbmm(
            self.col[p, None, j], self.x[p, i], self.y[p, j].transpose(-1, -2), beta=1.0, alpha=-self.scale
        )
        return product.add_(self.row[p, i, None]).clamp_min_(0.0)


def prepare(
    x: Tensor, y: Tensor, cost: str, row_mask: Tensor | None = None, col_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Move or scale the points so that the cost is a matrix product without loss; masked points become zero.

    Without centring the squares of points far from the origin swamp their distances: at 1e3 with distances of 1 the
    cost would lose all but one digit in float32.

    Args:
        x: [..., N, D].
        y: [..., M, D].
        cost: one of `COSTS`.
        row_mask: [..., N] bool.
        col_mask: [..., M] bool.

    Returns:
        (x [..., N, D], y [..., M, D]), differentiable: the gradient of any function of the cost passes unchanged.
    """
    if row_mask is not None:
        x = torch.where(row_mask.unsqueeze(-1), x, 0.0)
    if col_mask is not None:
        y = torch.where(col_mask.unsqueeze(-1), y, 0.0)
    if cost == "cosine":
        return torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(y, dim=-1)
    n_rows = x.shape[-2] if row_mask is None else row_mask.sum(-1)[..., None, None]
    n_cols = y.shape[-2] if col_mask is None else col_mask.sum(-1)[..., None, None]
    count = n_rows + n_cols
    if isinstance(count, Tensor):
        count = count.clamp_min(1).to(x.dtype)
    # Any common point will do, so its own gradient and its rounding do not matter.
    centre = (x.detach().sum(-2, keepdim=True) + y.detach().sum(-2, keepdim=True)) / count
    x, y = x - centre, y - centre
    if row_mask is not None:
        x = torch.where(row_mask.unsqueeze(-1), x, 0.0)
    if col_mask is not None:
        y = torch.where(col_mask.unsqueeze(-1), y, 0.0)
    return x, y


def soft_minimum(points: Points, potential: Tensor, log_weight: Tensor, epsilon: Tensor) -> Tensor:
    """`reference.soft_minimum` of the streamed cost: a running maximum and the sum that is relative to it.

    Args:
        points: the clouds.
        potential: [P, M], the potential that is summed out.
        log_weight: [P, M], log of its marginal; -inf removes an entry.
        epsilon: [P, 1].

    Returns:
        [P, N].
    """
    if _dispatch.has_kernel("points_transform", points.backend):
        transform = _dispatch.kernel("points_transform", points.backend)
        # The constants of "cosine" add up to 1, whichever side has them.
        return transform(points.x, points.y, potential, log_weight, epsilon, points.squared)
    lowest, _ = EXPONENTS[potential.dtype]
    result = torch.empty_like(points.row)
    col = potential / epsilon + log_weight  # [P, M]
    for p, rows in points.tiles():
        for i, cols in rows:
            top = torch.full_like(points.row[p, i], -torch.inf)
            total = torch.zeros_like(top)
            for j in cols:
                exponent = points.cost(p, i, j).div_(-epsilon[p, :, None]).add_(col[p, None, j])
                higher = torch.maximum(top, exponent.amax(-1))
                # A row without a column so far has the maximum -inf, and -inf - -inf is NaN.
                level = torch.where(torch.isneginf(higher), 0.0, higher)
                total = total * (top - level).exp() + exponent.sub_(level.unsqueeze(-1)).clamp_min_(lowest).exp_().sum(
                    -1
                )
                top = higher
            result[p, i] = -epsilon[p] * (top + total.log())
    return result


def products(
    points: Points,
    row: Tensor,
    col: Tensor,
    epsilon: Tensor,
    right: Tensor | None,
    left: Tensor | None,
    coupling: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return K right and K^T left in one pass, K_ij = exp(row_i + col_j - cost_ij / epsilon).

    Exponents stop short of overflow: they can reach it only between a row and a column that both have no weight, whose
    products the callers multiply by zero.

    Args:
        points: the clouds.
        row: [P, N].
        col: [P, M].
        epsilon: [P, 1].
        right: [P, M, E], or None to leave this product out.
        left: [P, N, F], or None.
        coupling: (L [P, N, C], R [P, M, C]) multiplies K_ij by <L_i, R_j>.

    Returns:
        ([P, N, E] or None, [P, M, F] or None).
    """
    if _dispatch.has_kernel("points_product", points.backend):
        product = _dispatch.kernel("points_product", points.backend)
        turned = None if coupling is None else coupling[::-1]
        x, y, squared = points.x, points.y, points.squared
        return (
            None if right is None else product(x, y, row, col, epsilon, right, coupling, squared),
            None if left is None else product(y, x, col, row, epsilon, left, turned, squared),
        )
    lowest, largest = EXPONENTS[row.dtype]
    from_right = None if right is None else right.new_zeros(*row.shape, right.shape[-1])
    from_left = None if left is None else left.new_zeros(*col.shape, left.shape[-1])
    for p, rows in points.tiles():
        for i, cols in rows:
            for j in cols:
                kernel = points.cost(p, i, j).div_(-epsilon[p, :, None]).add_(row[p, i, None]).add_(col[p, None, j])
                kernel = kernel.clamp_(lowest, largest).exp_()
                if coupling is not None:
                    kernel.mul_(coupling[0][p, i] @ coupling[1][p, j].transpose(-1, -2))
                if from_right is not None and right is not None:
                    from_right[p, i] += kernel @ right[p, j]
                if from_left is not None and left is not None:
                    from_left[p, j] += kernel.transpose(-1, -2) @ left[p, i]
    return from_right, from_left


@dataclass(frozen=True)
class Sums:
    """What `weighted_sums` returns.

    Attributes:
        rows: [P, N], sum_j K_ij right_j.
        cols: [P, M], sum_i left_i K_ij.
        grad_x: [P, N, D], gradient of sum_ij W_ij cost_ij at constant W.
        grad_y: [P, M, D].
        energy: [P], sum_ij W_ij (f_i + g_j - cost_ij).
    """

    rows: Tensor
    cols: Tensor
    grad_x: Tensor
    grad_y: Tensor
    energy: Tensor


def cost_gradient(points: Points, rows: Tensor, to_y: Tensor, cols: Tensor, to_x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the clouds, given sums over the gradient W of their cost.

    Args:
        points: the clouds.
        rows: [P, N], sum_j W_ij.
        to_y: [P, N, D], sum_j W_ij y_j.
        cols: [P, M], sum_i W_ij.
        to_x: [P, M, D], sum_i W_ij x_i.

    Returns:
        ([P, N, D], [P, M, D]).
    """
    if not points.squared:
        return -to_y, -to_x
    return 2.0 * (points.x * rows.unsqueeze(-1) - to_y), 2.0 * (points.y * cols.unsqueeze(-1) - to_x)


def weighted_sums(
    points: Points,
    row: Tensor,
    col: Tensor,
    epsilon: Tensor,
    left: Tensor,
    right: Tensor,
    f: Tensor | None,
    g: Tensor | None,
    coupling: tuple[Tensor, Tensor] | None = None,
) -> Sums:
    """Everything that a gradient needs of the matrix W_ij = left_i K_ij right_j, in one pass; see `products` for K.

    Args:
        points: the clouds.
        row: [P, N].
        col: [P, M].
        epsilon: [P, 1].
        left: [P, N].
        right: [P, M].
        f: [P, N], for the energy; None is 0.
        g: [P, M].
        coupling: see `products`.

    Returns:
        `Sums`.
    """
    dim, scale = points.x.shape[-1], points.scale
    shift = -points.col if g is None else g - points.col  # [P, M]
    factors = right.unsqueeze(-1) * torch.cat([points.y, torch.ones_like(points.y[..., :1]), shift.unsqueeze(-1)], -1)
    from_right, from_left = products(
        points,
        row,
        col,
        epsilon,
        factors,
        left.unsqueeze(-1) * torch.cat([points.x, torch.ones_like(points.x[..., :1])], -1),
        coupling,
    )
    assert from_right is not None  # for the type checker
    assert from_left is not None
    to_y, rows, shifts = from_right[..., :dim], from_right[..., dim], from_right[..., dim + 1]
    to_x, cols = from_left[..., :dim], from_left[..., dim]
    per_row = shifts - points.row * rows + scale * (points.x * to_y).sum(-1)
    if f is not None:
        per_row = per_row + f * rows
    grad_x, grad_y = cost_gradient(points, rows, to_y, cols, to_x)
    return Sums(
        rows=rows,
        cols=cols,
        grad_x=left.unsqueeze(-1) * grad_x,
        grad_y=right.unsqueeze(-1) * grad_y,
        energy=(left * per_row).sum(-1),
    )


def log_or_zero(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the weights with log 0 = 0, and 1 where there is a weight, else 0, for the product with it.

    Dividing a sum by the weight, or by 1 where it is 0, then gives its derivative with respect to the weight.
    """
    positive = weights > 0
    return torch.where(positive, weights, 1.0).log(), positive.to(weights.dtype)


def over_weight(sums: Tensor, weights: Tensor) -> Tensor:
    """Sums of exp(... + `log_or_zero`) without the weight of the row or column that they belong to."""
    return sums / torch.where(weights > 0, weights, 1.0)

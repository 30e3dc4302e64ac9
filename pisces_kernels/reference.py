"""The definitions in plain torch: the specification that is read, and the oracle that the back ends are tested against.

Every function works on batches without a loop over samples or heads, in the log domain, and is differentiable by
ordinary autograd (through the iterations that ran). Use float64 for an oracle. Argument checks live in the public
functions of the package; here the shapes are taken as given:

    P problems, N rows (text tokens), M columns (video tokens), B samples, H heads, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ._anderson import LEAST, Anderson

ATTENTION_FLOOR = 1e-6  # added to attention and to plan rows before their logarithms meet (PISCES; its code clamps)
RANGE_FLOOR = 1e-6  # smallest divisor of the min-max scaling and of an attention row's sum (released code of PISCES)


def log_weights(weights: Tensor) -> Tensor:
    """Logarithm of non-negative weights with log 0 = -inf and no gradient through the zeros.

    Args:
        weights: [...], non-negative.

    Returns:
        [...], log(weights).
    """
    positive = weights > 0
    return torch.where(positive, torch.where(positive, weights, 1.0).log(), -torch.inf)


def bounded(exponent: Tensor, weighted: Tensor) -> Tensor:
    """Keep exp finite where the result is multiplied by a weight of zero: nothing else limits the exponent there.

    Args:
        exponent: [...].
        weighted: [...] bool, that broadcasts: False where the product is zero whatever the exponent.

    Returns:
        [...], at most about half the largest representable exponent where not weighted.
    """
    return torch.where(weighted, exponent, exponent.clamp_max(40.0))


def soft_minimum(cost: Tensor, potential: Tensor, log_weight: Tensor, epsilon: Tensor) -> Tensor:
    """Return the entropic c-transform, -epsilon * log sum_j weight_j exp((potential_j - cost_ij) / epsilon).

    Args:
        cost: [P, N, M].
        potential: [P, M], the potential that is summed out.
        log_weight: [P, M], log of its marginal; -inf removes an entry.
        epsilon: [P, 1].

    Returns:
        [P, N].
    """
    exponent = (potential.unsqueeze(-2) - cost) / epsilon.unsqueeze(-1) + log_weight.unsqueeze(-2)  # [P, N, M]
    return -epsilon * torch.logsumexp(exponent, dim=-1)


def saturate(soft: Tensor, weight: Tensor, mass: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Solve one side of the exact-mass problem: potential and multiplier of the mass together.

    With L_i = -soft_i / epsilon the row sums are weight_i * min(1, exp(level/epsilon + L_i)); the level is the one that
    makes them sum to mass. The sum is piecewise linear in exp(level/epsilon), so sorting L finds it exactly.

    Args:
        soft: [P, N], entropic c-transform of the other side's potential.
        weight: [P, N], marginal, zero where masked.
        mass: [P, 1], the mass to transport.
        epsilon: [P, 1].

    Returns:
        (potential [P, N] <= 0 with maximum 0, level [P, 1]).
    """
    dtype = soft.dtype
    log_sum = (-soft / epsilon).double()  # [P, N]
    weight64 = weight.double()
    log_sum = torch.where(weight64 > 0, log_sum, -torch.inf)  # an entry without weight never decides the level
    order = log_sum.detach().argsort(dim=-1, descending=True)
    sorted_sum = log_sum.gather(-1, order)
    sorted_weight = weight64.gather(-1, order)
    full = sorted_weight.cumsum(-1) - sorted_weight  # [P, N], mass of the k rows before this one, all saturated
    tail = (sorted_sum + log_weights(sorted_weight)).flip(-1).logcumsumexp(-1).flip(-1)  # [P, N], log mass of the rest
    room = mass.double() - full
    levels = torch.where(room > 0, torch.where(room > 0, room, 1.0).log() - tail, torch.inf)  # level if k rows saturate
    # k rows saturate when the next one stays under its weight: the first such k. The slack matters when the mass is
    # exactly the weight of the fullest rows: rounding must not send the level to where the next, perhaps far, row
    # fills up.
    slack = 1e-6 if dtype == torch.float32 else 1e-11
    fits = (levels + sorted_sum <= slack) & torch.isfinite(levels)
    n_weighted = (weight64 > 0).sum(-1, keepdim=True)
    first = torch.where(fits.any(-1, keepdim=True), fits.int().argmax(-1, keepdim=True), (n_weighted - 1).clamp_min(0))
    level = levels.gather(-1, first)
    level = torch.where(torch.isfinite(level), level, -sorted_sum.gather(-1, first))  # all the mass there is
    level = level * epsilon.double()
    potential = torch.minimum(soft.double() - level, torch.zeros_like(level))
    return potential.to(dtype), level.to(dtype)


@dataclass(frozen=True)
class Alternation:
    """The iteration of one batch of problems, whatever computes its transforms: f from g, then g from f.

    Attributes:
        row_transform: [P, M] -> [P, N], g -> -epsilon log sum_j b_j exp((g_j - cost_ij) / epsilon).
        col_transform: [P, N] -> [P, M], the same for f.
        a: [P, N], zero where masked.
        b: [P, M], zero where masked.
        epsilon: [P, 1] in the dtype of the weights.
        rows: [P, N] bool, True where the row exists.
        cols: [P, M] bool.
        tau_a: rho_a / (rho_a + epsilon) in (0, 1]; 1 keeps the row marginal.
        tau_b: the same for columns.
        mass: [P], exact transported mass; the taus are then not used.
    """

    row_transform: Callable[[Tensor], Tensor]
    col_transform: Callable[[Tensor], Tensor]
    a: Tensor
    b: Tensor
    epsilon: Tensor
    rows: Tensor
    cols: Tensor
    tau_a: float
    tau_b: float
    mass: Tensor | None

    def row_update(self, g: Tensor) -> Tensor:
        """Row potential (with `mass`: its cap) that is optimal for g. [P, N]"""
        soft = self.row_transform(g)
        f = self.tau_a * soft if self.mass is None else saturate(soft, self.a, self.mass.unsqueeze(-1), self.epsilon)[0]
        return torch.where(self.rows, f, 0.0)

    def col_update(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Column potential that is optimal for f [P, M], and the multiplier of the mass [P, 1] (else 0)."""
        soft = self.col_transform(f)
        if self.mass is None:
            return torch.where(self.cols, self.tau_b * soft, 0.0), torch.zeros_like(self.epsilon)
        g, level = saturate(soft, self.b, self.mass.unsqueeze(-1), self.epsilon)
        return torch.where(self.cols, g, 0.0), level

    def start(self, f_init: Tensor | None, g_init: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(f, g, level) before the first iteration."""
        f = torch.zeros_like(self.a) if f_init is None else torch.where(self.rows, f_init, 0.0)
        g = torch.zeros_like(self.b) if g_init is None else torch.where(self.cols, g_init, 0.0)
        level = torch.zeros_like(self.epsilon)
        if self.mass is not None:  # the cap is 0, so each given potential's maximum is its half of the level
            top_f = torch.where(self.rows, f, -torch.inf).amax(-1, keepdim=True).clamp_min(-1e30)
            top_g = torch.where(self.cols, g, -torch.inf).amax(-1, keepdim=True).clamp_min(-1e30)
            f, g = torch.where(self.rows, f - top_f, 0.0), torch.where(self.cols, g - top_g, 0.0)
            level = top_f + top_g
        if f_init is not None and g_init is None:
            g, level = self.col_update(f)
        return f, g, level

    def finish(self, f: Tensor, g: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Potentials of plan = exp((f + g - cost) / epsilon) * a * b, made unique."""
        if self.mass is not None:
            return torch.where(self.rows, f + level / 2, 0.0), torch.where(self.cols, g + level / 2, 0.0)
        if self.tau_a != 1.0 or self.tau_b != 1.0:
            return f, g
        # f + c and g - c are the same plan: choose sum a f = sum b g, which treats rows and columns alike.
        total = (self.a.sum(-1) + self.b.sum(-1)).clamp_min(torch.finfo(self.a.dtype).tiny)
        shift = (((self.a * f).sum(-1) - (self.b * g).sum(-1)) / total).unsqueeze(-1)
        return torch.where(self.rows, f - shift, 0.0), torch.where(self.cols, g + shift, 0.0)


def alternate(
    updates: Alternation,
    broken: Tensor,
    *,
    max_iters: int,
    tol: float,
    acceleration: str | None = None,
    f_init: Tensor | None = None,
    g_init: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Iterate until each problem's residual is below tol; see `sinkhorn` for the results.

    Args:
        updates: the problems.
        broken: [P] bool, True where the input cannot be solved: NaN comes back.
        max_iters: most iterations.
        tol: a problem stops when its residual is smaller.
        acceleration: None, or "anderson" (see `_anderson`).
        f_init: [P, N], potentials to start from.
        g_init: [P, M].

    Returns:
        (f [P, N], g [P, M], n_iters [P] int32, residual [P]).
    """
    rows, cols, eps = updates.rows, updates.cols, updates.epsilon
    empty = (updates.a.sum(-1) <= 0) | (updates.b.sum(-1) <= 0)  # [P]
    for start, real in ((f_init, rows), (g_init, cols)):
        if start is not None:
            broken = broken | (real & ~torch.isfinite(start)).any(-1)
    broken = broken & ~empty
    f, g, level = updates.start(f_init, g_init)
    mixer = None
    if acceleration == "anderson":
        # Exact mass first finds out which marginals are full: extrapolation across such a change is worth nothing.
        exact = updates.mass is not None
        large = (rows.sum(-1) >= LEAST) & (cols.sum(-1) >= LEAST)
        mixer = Anderson(f, large, depth=5, first_pause=10 if exact else 1, forgiving=not exact)
    residual = torch.full_like(eps.squeeze(-1), torch.inf)
    n_iters = torch.zeros_like(residual, dtype=torch.int32)
    running = ~(empty | broken)
    for iteration in range(max_iters):
        if running.device.type == "cpu" and not bool(running.any()):
            break  # reading the flag costs nothing on a CPU; elsewhere it would stop the device once an iteration
        f_new = updates.row_update(g)
        if mixer is not None and iteration + 1 < max_iters:  # the last iteration is a plain one
            f_new = mixer.mix(f, f_new, eps, tol)
            if updates.mass is not None:
                f_new = f_new.clamp_max(0.0)  # caps
        g_new, level_new = updates.col_update(f_new)
        change = torch.cat([f_new - f, g_new - g, level_new - level], dim=-1).detach().abs().amax(-1) / eps.squeeze(-1)
        if mixer is not None:
            change = torch.where(mixer.plain, change, torch.inf)
        keep = running.unsqueeze(-1)
        f, g, level = torch.where(keep, f_new, f), torch.where(keep, g_new, g), torch.where(keep, level_new, level)
        residual = torch.where(running, change, residual)
        n_iters = n_iters + running.int()
        running = running & ~(change < tol)  # NaN keeps running: it is reported, not hidden

    f, g = updates.finish(f, g, level)
    blank = empty.unsqueeze(-1)
    f, g = torch.where(blank, 0.0, f), torch.where(blank, 0.0, g)
    residual = torch.where(empty, 0.0, residual)
    broken = broken | ~(torch.isfinite(f).all(-1) & torch.isfinite(g).all(-1))  # overflowed on the way
    bad = broken.unsqueeze(-1)
    f, g = torch.where(bad & rows, torch.nan, f), torch.where(bad & cols, torch.nan, g)
    residual = torch.where(broken, torch.nan, residual)
    return f, g, n_iters, residual


def dense(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    *,
    tau_a: float = 1.0,
    tau_b: float = 1.0,
    mass: Tensor | None = None,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
) -> tuple[Alternation, Tensor]:
    """Return the iteration of problems whose cost is stored, and [P] bool: which ones hold a non-finite cost."""
    eps = epsilon.to(cost.dtype).unsqueeze(-1)  # [P, 1]
    rows = torch.ones_like(a, dtype=torch.bool) if row_mask is None else row_mask
    cols = torch.ones_like(b, dtype=torch.bool) if col_mask is None else col_mask
    cost = torch.where(rows.unsqueeze(-1) & cols.unsqueeze(-2), cost, 0.0)
    weight_a, weight_b = torch.where(rows, a, 0.0), torch.where(cols, b, 0.0)
    log_a, log_b = log_weights(weight_a), log_weights(weight_b)
    # A problem without weight is given harmless ones so that no NaN arises; `alternate` returns zeros for it.
    empty = ((weight_a.sum(-1) <= 0) | (weight_b.sum(-1) <= 0)).unsqueeze(-1)  # [P, 1]
    log_a, log_b = torch.where(empty, 0.0, log_a), torch.where(empty, 0.0, log_b)
    broken = ~torch.isfinite(cost).all(-1).all(-1)
    cost = torch.where(broken[:, None, None], 0.0, cost)
    updates = Alternation(
        row_transform=lambda g: soft_minimum(cost, g, log_b, eps),
        col_transform=lambda f: soft_minimum(cost.transpose(-1, -2), f, log_a, eps),
        a=weight_a,
        b=weight_b,
        epsilon=eps,
        rows=rows,
        cols=cols,
        tau_a=tau_a,
        tau_b=tau_b,
        mass=mass,
    )
    return updates, broken


def sinkhorn(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    epsilon: Tensor,
    *,
    tau_a: float = 1.0,
    tau_b: float = 1.0,
    mass: Tensor | None = None,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
    max_iters: int = 200,
    tol: float = 1e-3,
    acceleration: str | None = None,
    f_init: Tensor | None = None,
    g_init: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve entropic transport problems by alternating updates in the log domain.

    plan = exp((f + g - cost) / epsilon) * a * b, and one iteration is
    f_i = -tau_a * epsilon * log sum_j b_j exp((g_j - cost_ij) / epsilon), then the same for g.
    With `mass`, f and g are capped so that no marginal is exceeded and the total is the mass (see `saturate`).

    Args:
        cost: [P, N, M].
        a: [P, N], zero where masked.
        b: [P, M], zero where masked.
        epsilon: [P], > 0.
        tau_a: rho_a / (rho_a + epsilon) in (0, 1]; 1 keeps the row marginal.
        tau_b: the same for columns.
        mass: [P], exact transported mass; the taus are then not used.
        row_mask: [P, N] bool, True where the row exists.
        col_mask: [P, M] bool.
        max_iters: most iterations.
        tol: a problem stops when its residual is smaller.
        acceleration: None, or "anderson".
        f_init: [P, N], potentials to start from.
        g_init: [P, M].

    Returns:
        (f [P, N], g [P, M], n_iters [P] int32, residual [P]): residual is the largest change of f/epsilon or
        g/epsilon in the last iteration. Potentials of masked entries are 0. A problem without weight on one
        side gives zeros and residual 0; one with a non-finite cost or start, or whose potentials overflow, gives NaN.
    """
    updates, broken = dense(
        cost, a, b, epsilon, tau_a=tau_a, tau_b=tau_b, mass=mass, row_mask=row_mask, col_mask=col_mask
    )
    return alternate(
        updates, broken, max_iters=max_iters, tol=tol, acceleration=acceleration, f_init=f_init, g_init=g_init
    )


def token_cost(
    text: Tensor,
    video: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    *,
    gamma: float = 0.2,
    eta: float = 0.2,
    normalize: bool = True,
    row_mask: Tensor | None = None,
    col_mask: Tensor | None = None,
) -> Tensor:
    """Cost of matching text tokens with video tokens: semantics, time and place.

    cost_ij = 1 - cos(text_i, video_j) + gamma |t(i) - t_j| / (t_max - t_min) + eta ||s(i) - s_j|| / sqrt(2), with
    t(i) and s(i) the means of frame index and position under the attention row i; then scaled to [0, 1] per
    sample and head.

    Args:
        text: [B, N, D].
        video: [B, M, D].
        attention: [B, H, N, M].
        frame_index: [B, M].
        positions: [B, M, 2].
        gamma: weight of time.
        eta: weight of place.
        normalize: scale each (sample, head) matrix to [0, 1].
        row_mask: [B, N] bool.
        col_mask: [B, M] bool.

    Returns:
        [B, H, N, M], zero where masked.
    """
    batch, n_rows, _ = text.shape
    n_cols = video.shape[1]
    rows = torch.ones(batch, n_rows, dtype=torch.bool, device=text.device) if row_mask is None else row_mask
    cols = torch.ones(batch, n_cols, dtype=torch.bool, device=text.device) if col_mask is None else col_mask
    keep = (rows.unsqueeze(-1) & cols.unsqueeze(-2)).unsqueeze(1)  # [B, 1, N, M]
    text = torch.where(rows.unsqueeze(-1), text, 0.0)
    video = torch.where(cols.unsqueeze(-1), video, 0.0)
    attention = torch.where(keep, attention, 0.0)
    t = torch.where(cols, frame_index, 0.0)  # [B, M]
    s = torch.where(cols.unsqueeze(-1), positions, 0.0)  # [B, M, 2]

    y = torch.nn.functional.normalize(text, dim=-1)
    x = torch.nn.functional.normalize(video, dim=-1)
    semantic = 1.0 - y @ x.transpose(-1, -2)  # [B, N, M], shared by the heads

    weights = attention / attention.sum(-1, keepdim=True).clamp_min(RANGE_FLOOR)  # [B, H, N, M]
    mean_t = torch.einsum("bhnm,bm->bhn", weights, t)
    mean_s = torch.einsum("bhnm,bmc->bhnc", weights, s)
    t_range = torch.where(cols, t, -torch.inf).amax(-1) - torch.where(cols, t, torch.inf).amin(-1)  # [B]
    t_range = torch.where(t_range > 0, t_range, 1.0)
    time = (mean_t.unsqueeze(-1) - t[:, None, None, :]).abs() / t_range[:, None, None, None]
    squared = (mean_s[..., 0:1] - s[:, None, None, :, 0]) ** 2 + (mean_s[..., 1:2] - s[:, None, None, :, 1]) ** 2
    apart = squared > 0  # the distance has no derivative where it is zero: the subgradient 0 is taken
    place = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0) / 2**0.5

    cost = semantic.unsqueeze(1) + gamma * time + eta * place
    if normalize:
        low = torch.where(keep, cost, torch.inf).amin((-2, -1), keepdim=True)
        high = torch.where(keep, cost, -torch.inf).amax((-2, -1), keepdim=True)
        cost = (cost - low) / (high - low).clamp_min(RANGE_FLOOR)
    return torch.where(keep, cost, 0.0)


def row_plan(cost: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """Return the plan's rows scaled to sum 1 for uniform column weights, softmax_j((g_j - cost_ij) / epsilon).

    The row potential cancels, so that rows survive whose plan is too small to represent.

    Args:
        cost: [..., N, M].
        g: [..., M], column potential.
        epsilon: entropic regularisation.

    Returns:
        [..., N, M].
    """
    return torch.softmax((g.unsqueeze(-2) - cost) / epsilon, dim=-1)


def fuse(attention: Tensor, plan: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """Combine attention with a transport plan in the log domain.

    out = softmax_j(log(attention + 1e-6) + log(plan_row + 1e-6)), plan rows scaled to sum 1.

    Args:
        attention: [B, H, N, M].
        plan: [B, H, N, M], non-negative; `row_plan` where it may be too small to represent.
        row_mask: [B, N] bool; other rows of the attention come back as they are.

    Returns:
        [B, H, N, M].
    """
    total = plan.sum(-1, keepdim=True)
    rows = plan / torch.where(total > 0, total, 1.0)
    fused = torch.softmax((attention + ATTENTION_FLOOR).log() + (rows + ATTENTION_FLOOR).log(), dim=-1)
    if row_mask is None:
        return fused
    return torch.where(row_mask[:, None, :, None], fused, attention)


def transport_attention(
    query: Tensor,
    key: Tensor,
    attention: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    *,
    epsilon: float = 0.05,
    tau: float = 0.9,
    mass: float | None = None,
    row_mask: Tensor | None = None,
    max_iters: int = 200,
    tol: float = 1e-3,
    gamma: float = 0.2,
    eta: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Refine cross-attention by a partial transport plan: `token_cost`, `sinkhorn` with uniform marginals, `fuse`.

    Args:
        query: [B, Q, D].
        key: [B, M, D].
        attention: [B, H, Q, M].
        frame_index: [B, M].
        positions: [B, M, 2].
        epsilon: entropic regularisation.
        tau: damping of both sides, used when mass is None.
        mass: exact transported mass in (0, 1].
        row_mask: [B, Q] bool, the rows to refine.
        max_iters: most iterations.
        tol: stop below this residual.
        gamma: weight of time in the cost.
        eta: weight of place in the cost.

    Returns:
        (refined attention [B, H, Q, M], plan [B, H, Q, M], zero in rows that are not selected).
    """
    batch, heads, n_rows, n_cols = attention.shape
    cost = token_cost(query, key, attention, frame_index, positions, gamma=gamma, eta=eta, row_mask=row_mask).reshape(
        batch * heads, n_rows, n_cols
    )
    rows = torch.ones(batch, n_rows, dtype=torch.bool, device=cost.device) if row_mask is None else row_mask
    rows_ph = rows.repeat_interleave(heads, 0)  # [B*H, Q]
    a = rows_ph.to(cost.dtype) / rows_ph.sum(-1, keepdim=True).clamp_min(1)
    b = torch.full((batch * heads, n_cols), 1.0 / n_cols, dtype=cost.dtype, device=cost.device)
    eps = torch.full((batch * heads,), epsilon, dtype=cost.dtype, device=cost.device)
    total = None if mass is None else torch.full_like(eps, mass)
    f, g, _, _ = sinkhorn(
        cost, a, b, eps, tau_a=tau, tau_b=tau, mass=total, row_mask=rows_ph, max_iters=max_iters, tol=tol
    )
    plan = (((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / epsilon).exp() * a.unsqueeze(-1)) * b.unsqueeze(-2)
    plan = torch.where(rows_ph.unsqueeze(-1), plan, 0.0).reshape(batch, heads, n_rows, n_cols)
    scaled = row_plan(cost, g, epsilon).reshape(batch, heads, n_rows, n_cols)
    return fuse(attention, scaled, row_mask), plan

"""The definitions in plain torch: the specification that is read, and the oracle that the back ends are tested against.

Every function works on batches without a loop over samples or heads, in the log domain, and is differentiable by
ordinary autograd (through the iterations that ran). Use float64 for an oracle. Argument checks live in the public
functions of the package; here the shapes are taken as given:

    P problems, N rows (text tokens), M columns (video tokens), B samples, H heads, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

ATTENTION_FLOOR = 1e-6  # added to attention and to plan rows before their logarithms meet (released code of PISCES)
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
        f_init: [P, N], potentials to start from.
        g_init: [P, M].

    Returns:
        (f [P, N], g [P, M], n_iters [P] int32, residual [P]): residual is the largest change of f/epsilon or
        g/epsilon in the last iteration. Potentials of masked entries are 0. A problem without weight on one
        side gives zeros and residual 0; one with a non-finite cost or start, or whose potentials overflow, gives NaN.
    """
    n_problems = cost.shape[0]
    eps = epsilon.to(cost.dtype).unsqueeze(-1)  # [P, 1]
    rows = torch.ones_like(a, dtype=torch.bool) if row_mask is None else row_mask
    cols = torch.ones_like(b, dtype=torch.bool) if col_mask is None else col_mask
    cost = torch.where(rows.unsqueeze(-1) & cols.unsqueeze(-2), cost, 0.0)
    weight_a = torch.where(rows, a, 0.0)
    weight_b = torch.where(cols, b, 0.0)
    log_a, log_b = log_weights(weight_a), log_weights(weight_b)
    empty = (weight_a.sum(-1) <= 0) | (weight_b.sum(-1) <= 0)  # [P]
    # An empty problem is given harmless weights so that no NaN arises, and zeros at the end.
    log_a = torch.where(empty.unsqueeze(-1), 0.0, log_a)
    log_b = torch.where(empty.unsqueeze(-1), 0.0, log_b)
    broken = ~torch.isfinite(cost).all(-1).all(-1)
    for start, real in ((f_init, rows), (g_init, cols)):
        if start is not None:
            broken = broken | (real & ~torch.isfinite(start)).any(-1)
    broken = broken & ~empty
    cost = torch.where(broken[:, None, None], 0.0, cost)
    cost_t = cost.transpose(-1, -2)

    def update(matrix: Tensor, other: Tensor, log_w: Tensor, weight: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        soft = soft_minimum(matrix, other, log_w, eps)
        if mass is None:
            return tau * soft, torch.zeros_like(eps)
        return saturate(soft, weight, mass.unsqueeze(-1), eps)

    f = torch.zeros_like(a) if f_init is None else torch.where(rows, f_init, 0.0)
    g = torch.zeros_like(b) if g_init is None else torch.where(cols, g_init, 0.0)
    level = torch.zeros_like(eps)
    if mass is not None:  # the cap is 0, so each given potential's maximum is its half of the level
        top_f = torch.where(rows, f, -torch.inf).amax(-1, keepdim=True).clamp_min(-1e30)
        top_g = torch.where(cols, g, -torch.inf).amax(-1, keepdim=True).clamp_min(-1e30)
        f, g, level = torch.where(rows, f - top_f, 0.0), torch.where(cols, g - top_g, 0.0), top_f + top_g
    if f_init is not None and g_init is None:
        g, level = update(cost_t, f, log_a, weight_b, tau_b)
        g = torch.where(cols, g, 0.0)

    residual = torch.full_like(epsilon, torch.inf, dtype=cost.dtype)
    n_iters = torch.zeros(n_problems, dtype=torch.int32, device=cost.device)
    running = ~(empty | broken)
    for _ in range(max_iters):
        if cost.device.type == "cpu" and not bool(running.any()):
            break  # reading the flag costs nothing on a CPU; elsewhere it would stop the device once an iteration
        f_new, _ = update(cost, g, log_b, weight_a, tau_a)
        f_new = torch.where(rows, f_new, 0.0)
        g_new, level_new = update(cost_t, f_new, log_a, weight_b, tau_b)
        g_new = torch.where(cols, g_new, 0.0)
        change = torch.cat([f_new - f, g_new - g, level_new - level], dim=-1).detach().abs().amax(-1) / eps.squeeze(-1)
        keep = running.unsqueeze(-1)
        f, g, level = torch.where(keep, f_new, f), torch.where(keep, g_new, g), torch.where(keep, level_new, level)
        residual = torch.where(running, change, residual)
        n_iters = n_iters + running.int()
        running = running & ~(change < tol)  # NaN keeps running: it is reported, not hidden

    if mass is not None:
        f, g = torch.where(rows, f + level / 2, 0.0), torch.where(cols, g + level / 2, 0.0)
    elif tau_a == 1.0 and tau_b == 1.0:
        # f + c and g - c are the same plan: choose sum a f = sum b g, which treats rows and columns alike.
        total = (weight_a.sum(-1) + weight_b.sum(-1)).clamp_min(torch.finfo(a.dtype).tiny)
        shift = (((weight_a * f).sum(-1) - (weight_b * g).sum(-1)) / total).unsqueeze(-1)
        f, g = torch.where(rows, f - shift, 0.0), torch.where(cols, g + shift, 0.0)
    blank = empty.unsqueeze(-1)
    f, g = torch.where(blank, 0.0, f), torch.where(blank, 0.0, g)
    residual = torch.where(empty, 0.0, residual)
    broken = broken | ~(torch.isfinite(f).all(-1) & torch.isfinite(g).all(-1))  # overflowed on the way
    bad = broken.unsqueeze(-1)
    f, g = torch.where(bad & rows, torch.nan, f), torch.where(bad & cols, torch.nan, g)
    residual = torch.where(broken, torch.nan, residual)
    return f, g, n_iters, residual


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

"""Peers in plain torch, written from the formulas: the official loop, batched, compiled, and without exponentials.

Each function takes a problem and returns what is timed (`Prepared`). Conversions, first calls and compilation
happen outside the timed call. All run in float32, as ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contender import Prepared
from .problems import Clouds, Dense, Tokens

FLOOR = 1e-6
SMALLEST = 1e-37  # entries of exp(-cost / epsilon) below it are set to 0: denormal numbers would slow the peers down
compiled = torch.compile(dynamic=False)


# The official loop: one head at a time, log domain, counting reference measure, a host read an iteration.


def official_solve_head(
    cost: Tensor, epsilon: float, tau: float, max_iters: int, tol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_u [N], log_v [M], log kernel [N, M]) of one head."""
    n_rows, n_cols = cost.shape
    log_kernel = -cost / epsilon
    log_a, log_b = -math.log(n_rows), -math.log(n_cols)
    log_u, log_v = cost.new_zeros(n_rows), cost.new_zeros(n_cols)
    for _ in range(max_iters):
        new_u = tau * (log_a - torch.logsumexp(log_kernel + log_v[None, :], dim=1))
        new_v = tau * (log_b - torch.logsumexp(log_kernel + new_u[:, None], dim=0))
        change = torch.maximum((new_u - log_u).abs().max(), (new_v - log_v).abs().max())
        log_u, log_v = new_u, new_v
        if change.item() < tol:
            break
    return log_u, log_v, log_kernel


def official_cost_head(data: Tokens, head: int, gamma: float = 0.2, eta: float = 0.2) -> Tensor:
    """Cost [N, M] of one head; the semantic term is computed again for every head."""
    text = torch.nn.functional.normalize(data.text[0], dim=-1)
    video = torch.nn.functional.normalize(data.video[0], dim=-1)
    rows = data.attention[0, head]
    rows = rows / rows.sum(-1, keepdim=True).clamp_min(FLOOR)
    time, place = rows @ data.frame_index, rows @ data.positions
    span = data.frame_index.max() - data.frame_index.min()
    cost = 1 - text @ video.T
    cost = cost + gamma * (time[:, None] - data.frame_index[None, :]).abs() / span.clamp_min(1)
    cost = cost + eta * torch.cdist(place, data.positions) / math.sqrt(2)
    low, high = cost.min(), cost.max()
    return (cost - low) / (high - low).clamp_min(FLOOR)


def official_solve(problem: Dense) -> Prepared:
    """The released solver, head by head, without its last step (the plan)."""

    def call() -> list[tuple[Tensor, Tensor]]:
        options = (problem.epsilon, problem.tau, problem.n_iters, problem.tol)
        return [official_solve_head(cost, *options)[:2] for cost in problem.cost]

    def result(scalings: list[tuple[Tensor, Tensor]]) -> Tensor:
        log_u, log_v = (torch.stack(side) * problem.epsilon for side in zip(*scalings, strict=True))
        return problem.plan_from_counting(log_u, log_v)

    return Prepared(call, result)


def official_plan(problem: Dense) -> Prepared:
    """The released solver with its plan."""

    def call() -> Tensor:
        plans = []
        for cost in problem.cost:
            log_u, log_v, log_kernel = official_solve_head(
                cost, problem.epsilon, problem.tau, problem.n_iters, problem.tol
            )
            plans.append(torch.exp(log_kernel + log_u[:, None] + log_v[None, :]))
        return torch.stack(plans)

    return Prepared(call, lambda plan: plan.double() * problem.counting_scale)


def official_cost(data: Tokens) -> Prepared:
    """The released cost, head by head."""
    return Prepared(lambda: torch.stack([official_cost_head(data, h) for h in range(data.attention.shape[1])]))


def official_attention(data: Tokens, backward: bool = False) -> Prepared:
    """The released function: cost, plan and fusion head by head; the plan is a constant of the gradient."""
    heads = range(data.attention.shape[1])

    def refine(attention: Tensor) -> Tensor:
        rows = []
        for head in heads:
            with torch.no_grad():
                cost = official_cost_head(data, head)
                log_u, log_v, log_kernel = official_solve_head(cost, data.epsilon, data.tau, 200, data.tol)
                plan = torch.exp(log_kernel + log_u[:, None] + log_v[None, :])
                plan = plan / plan.sum(-1, keepdim=True)
            rows.append(torch.softmax((attention[0, head] + FLOOR).log() + (plan + FLOOR).log(), dim=-1))
        return torch.stack(rows).unsqueeze(0)

    return with_backward(refine, data) if backward else Prepared(lambda: refine(data.attention))


def with_backward(refine: Callable[[Tensor], Tensor], data: Tokens) -> Prepared:
    """Time forward and backward through the attention: (refined, gradient)."""
    attention = data.attention.clone().requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        refined = refine(attention)
        (gradient,) = torch.autograd.grad(refined, attention, data.cotangent)
        return refined.detach(), gradient

    return Prepared(call)


# Batched torch, log domain.


def log_step(scaled: Tensor, f: Tensor, g: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """One iteration on scaled = -cost / epsilon [P, N, M] and potentials over epsilon, product measure."""
    log_n, log_m = math.log(scaled.shape[1]), math.log(scaled.shape[2])
    f = tau * (log_m - torch.logsumexp(scaled + g.unsqueeze(1), 2))
    g = tau * (log_n - torch.logsumexp(scaled + f.unsqueeze(2), 1))
    return f, g


def log_solve(cost: Tensor, epsilon: float, tau: float, n_iters: int, step: Any = log_step) -> tuple[Tensor, Tensor]:
    """Potentials (f, g) after n_iters iterations."""
    scaled = -cost / epsilon
    f, g = cost.new_zeros(cost.shape[:2]), cost.new_zeros(cost.shape[0], cost.shape[2])
    for _ in range(n_iters):
        f, g = step(scaled, f, g, tau)
    return f * epsilon, g * epsilon


def batched_log(problem: Dense) -> Prepared:
    """All problems at once by torch.logsumexp."""

    def call() -> tuple[Tensor, Tensor]:
        return log_solve(problem.cost, problem.epsilon, problem.tau, problem.n_iters)

    return Prepared(call, lambda fg: problem.plan_from(*fg))


def compiled_log(problem: Dense) -> Prepared:
    """The same with torch.compile around one iteration."""
    step = compiled(log_step)

    def call() -> tuple[Tensor, Tensor]:
        return log_solve(problem.cost, problem.epsilon, problem.tau, problem.n_iters, step)

    return Prepared(call, lambda fg: problem.plan_from(*fg))


# Without exponentials: the kernel matrix once, then products.


def power(value: Tensor, tau: float) -> Tensor:
    """value^-tau."""
    return value.reciprocal() if tau == 1 else value.pow(-tau)


def product_step(kernel: Tensor, v: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """One iteration as multiplications and sums that a compiler fuses; kernel holds the weights' product."""
    u = power((kernel * v.unsqueeze(-2)).sum(-1) * kernel.shape[-2], tau)
    return u, power((kernel * u.unsqueeze(-1)).sum(-2) * kernel.shape[-1], tau)


def matvec_step(kernel: Tensor, v: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """One iteration of one problem by matrix-vector products."""
    u = power(torch.mv(kernel, v) * kernel.shape[0], tau)
    return u, power(torch.mv(kernel.T, u) * kernel.shape[1], tau)


def batched_matvec_step(kernel: Tensor, v: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """One iteration of all problems by batched matrix-vector products."""
    u = power(torch.bmm(kernel, v.unsqueeze(-1)).squeeze(-1) * kernel.shape[1], tau)
    return u, power(torch.bmm(u.unsqueeze(1), kernel).squeeze(1) * kernel.shape[2], tau)


def scaled_kernel(cost: Tensor, epsilon: float) -> Tensor:
    """exp(-cost / epsilon) a b for uniform weights."""
    kernel = (cost * (-1 / epsilon)).exp_().div_(cost.shape[-1] * cost.shape[-2])
    return torch.nn.functional.threshold_(kernel, SMALLEST, 0.0)


def exp_free(problem: Dense, step: Any, per_problem: bool) -> Prepared:
    """Kernel matrix and products; per problem it stays in a cache, batched there are fewer calls."""

    def solve(cost: Tensor) -> tuple[Tensor, Tensor]:
        kernel = scaled_kernel(cost, problem.epsilon)
        v = cost.new_ones(*cost.shape[:-2], cost.shape[-1])
        u = v
        for _ in range(problem.n_iters):
            u, v = step(kernel, v, problem.tau)
        return u.log() * problem.epsilon, v.log() * problem.epsilon

    def call() -> tuple[Tensor, Tensor]:
        if not per_problem:
            return solve(problem.cost)
        f, g = zip(*[solve(cost) for cost in problem.cost], strict=True)
        return torch.stack(f), torch.stack(g)

    return Prepared(call, lambda fg: problem.plan_from(*fg))


def exp_free_matvec(problem: Dense) -> Prepared:
    """torch.mv, one problem after the other."""
    return exp_free(problem, matvec_step, per_problem=True)


def exp_free_batched(problem: Dense) -> Prepared:
    """torch.bmm, all problems at once."""
    return exp_free(problem, batched_matvec_step, per_problem=False)


def exp_free_compiled(problem: Dense) -> Prepared:
    """torch.compile around one iteration of all problems."""
    return exp_free(problem, compiled(product_step), per_problem=False)


def exp_free_compiled_each(problem: Dense) -> Prepared:
    """torch.compile around one iteration, one problem after the other."""
    return exp_free(problem, compiled(product_step), per_problem=True)


def with_plan(prepare: Callable[[Dense], Prepared], problem: Dense) -> Prepared:
    """A solver of potentials with the plan behind it, in float32."""
    inner = prepare(problem)
    scale = problem.cost.shape[1] * problem.cost.shape[2]

    def form(cost: Tensor, f: Tensor, g: Tensor) -> Tensor:
        return torch.exp((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / problem.epsilon) / scale

    form = compiled(form)
    return Prepared(lambda: form(problem.cost, *inner.call()))


# Gradients of the plan.


def plan_gradient(problem: Dense, step: Any) -> Prepared:
    """Forward and backward through all iterations by autograd: gradient of sum(plan * cotangent)."""
    cost = problem.cost.clone().requires_grad_()
    scale = cost.shape[1] * cost.shape[2]

    def call() -> Tensor:
        f, g = log_solve(cost, problem.epsilon, problem.tau, problem.n_iters, step)
        plan = torch.exp((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / problem.epsilon) / scale
        (gradient,) = torch.autograd.grad(plan, cost, problem.cotangent)
        return gradient

    return Prepared(call)


def autograd_loop(problem: Dense) -> Prepared:
    """Autograd through the batched log-domain loop."""
    return plan_gradient(problem, log_step)


def autograd_compiled(problem: Dense) -> Prepared:
    """The same with torch.compile around one iteration, forward and backward."""
    return plan_gradient(problem, compiled(log_step))


# Cost and attention, all heads at once.


def token_cost(
    text: Tensor, video: Tensor, attention: Tensor, index: Tensor, places: Tensor, gamma: float = 0.2, eta: float = 0.2
) -> Tensor:
    """Cost [H, N, M] of text [N, D], video [M, D], attention [H, N, M]: one product for the semantic term."""
    text, video = torch.nn.functional.normalize(text, dim=-1), torch.nn.functional.normalize(video, dim=-1)
    total = attention.sum(-1, keepdim=True).clamp_min(FLOOR)
    moments = attention @ torch.cat([index[:, None], places], 1) / total  # [H, N, 3]
    span = (index.amax() - index.amin()).clamp_min(1)
    time = (moments[..., :1] - index).abs() / span
    squared = (moments[..., 1:2] - places[:, 0]).square() + (moments[..., 2:3] - places[:, 1]).square()
    # + 1e-30: at distance 0, which only a gradient meets, the derivative of the root is not finite
    cost = 1 - text @ video.T + gamma * time + eta * (squared + 1e-30).sqrt() / math.sqrt(2)
    low, high = cost.amin((1, 2), keepdim=True), cost.amax((1, 2), keepdim=True)
    return (cost - low) / (high - low).clamp_min(FLOOR)


def cost_arguments(data: Tokens) -> tuple[Tensor, ...]:
    """Inputs of `token_cost`."""
    return data.text[0], data.video[0], data.attention[0], data.frame_index, data.positions


def batched_cost(data: Tokens) -> Prepared:
    """All heads at once."""
    return Prepared(lambda: token_cost(*cost_arguments(data)))


def compiled_cost(data: Tokens) -> Prepared:
    """All heads at once, torch.compile."""
    run = compiled(token_cost)
    return Prepared(lambda: run(*cost_arguments(data)))


def cost_gradient(data: Tokens, run: Any) -> Prepared:
    """Forward and backward of the cost: (gradient of text, of video, of attention)."""
    text, video, attention = (t.clone().requires_grad_() for t in (data.text[0], data.video[0], data.attention[0]))

    def call() -> tuple[Tensor, ...]:
        cost = run(text, video, attention, data.frame_index, data.positions)
        return torch.autograd.grad(cost, (text, video, attention), data.cotangent[0])

    return Prepared(call)


def fuse(attention: Tensor, plan: Tensor) -> Tensor:
    """softmax(log(attention + 1e-6) + log(plan row + 1e-6))."""
    return torch.softmax((attention + FLOOR).log() + (plan / plan.sum(-1, keepdim=True) + FLOOR).log(), dim=-1)


def torch_attention(data: Tokens, compile_it: bool, exponentials: bool, backward: bool = False) -> Prepared:
    """Cost, plan and fusion, all heads at once; stops when the largest change of a log-scaling is below tol.

    The stop test reads the device every fifth iteration.
    """
    wrap = compiled if compile_it else lambda function: function
    build, join = wrap(token_cost), wrap(fuse)
    step = wrap(log_step if exponentials else (product_step if compile_it else batched_matvec_step))

    @torch.no_grad()
    def transport() -> Tensor:
        cost = build(*cost_arguments(data))
        kernel = -cost / data.epsilon if exponentials else scaled_kernel(cost, data.epsilon)
        start = cost.new_zeros if exponentials else cost.new_ones
        u, v = start(cost.shape[:2]), start(cost.shape[0], cost.shape[2])
        for iteration in range(200):
            old_u, old_v = u, v
            u, v = step(kernel, u, v, data.tau) if exponentials else step(kernel, v, data.tau)
            if iteration % 5 == 4:
                if exponentials:
                    change = max((u - old_u).abs().max(), (v - old_v).abs().max())
                else:
                    change = max((u / old_u).log().abs().max(), (v / old_v).log().abs().max())
                if change < data.tol:
                    break
        if exponentials:
            return torch.softmax(kernel + v.unsqueeze(1), -1)
        return kernel * v.unsqueeze(1)  # the row scaling cancels

    def refine(attention: Tensor) -> Tensor:
        return join(attention, transport().unsqueeze(0))

    return with_backward(refine, data) if backward else Prepared(lambda: refine(data.attention))


# Point clouds, the cost in chunks of rows.


def chunk_step(x: Tensor, y: Tensor, norm_x: Tensor, norm_y: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """Potential of some rows: x [n, D], y [M, D], g [M] -> [n]."""
    exponent = torch.addmm((g - norm_y)[None, :], x, y.T, beta=1, alpha=2) / epsilon
    return norm_x - epsilon * (torch.logsumexp(exponent, 1) - math.log(y.shape[0]))


def chunked_clouds(problem: Clouds, step: Any = chunk_step, chunk: int = 512) -> Prepared:
    """Streamed log-sum-exp, the cost of `chunk` rows at a time by one matrix product."""

    def call() -> tuple[Tensor, Tensor]:
        x, y = problem.x, problem.y
        norm_x, norm_y = x.square().sum(-1), y.square().sum(-1)
        f, g = torch.zeros(x.shape[0]), torch.zeros(y.shape[0])
        for _ in range(problem.n_iters):
            parts = zip(x.split(chunk), norm_x.split(chunk), strict=True)
            f = torch.cat([step(rows, y, norms, norm_y, g, problem.epsilon) for rows, norms in parts])
            parts = zip(y.split(chunk), norm_y.split(chunk), strict=True)
            g = torch.cat([step(rows, x, norms, norm_x, f, problem.epsilon) for rows, norms in parts])
        return f, g

    return Prepared(call)


def compiled_clouds(problem: Clouds) -> Prepared:
    """The same with torch.compile around a chunk."""
    return chunked_clouds(problem, compiled(chunk_step))


def one_sgemm(problem: Clouds) -> Prepared:
    """One matrix product of the size of the cost an iteration: what it cannot do without."""
    out = torch.empty(problem.x.shape[0], problem.y.shape[0])

    def call() -> None:
        for _ in range(problem.n_iters):
            torch.mm(problem.x, problem.y.T, out=out)

    return Prepared(call)

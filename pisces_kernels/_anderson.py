"""Anderson acceleration of the alternating iteration, per problem and without reading a value on the host."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 8  # fewest rows and columns: about as many differences as unknowns fit any residual, and lead anywhere
RIDGE = 1e-10  # Tikhonov term of the least squares, relative to the trace of its matrix


class Anderson:
    """Extrapolate the row potential from the last iterates; fall back to the plain iterate where that does not help.

    The iteration is a map f -> T(f) with residual r = T(f) - f. With differences dF, dR of the last `depth` pairs
    (f, r) and gamma = argmin |r - dR gamma| the next point is T(f) - (dF + dR) gamma. The safeguard:

    - the step away from T(f) is no longer than the way from the oldest kept point to T(f);
    - when max |r| at such a point is not smaller than before the extrapolation, the plain iterate of that time takes
      its place, the history is dropped, and extrapolation pauses for 2, 4, 8, ... iterations. A success makes the
      next pause 2 again, if `forgiving`.

    Attributes:
        plain: [P] bool after `mix`: True where the returned point is T(f) itself, so that the change of this iteration
            is the residual of a plain one.

    Source: Walker and Ni 2011 (type II); the safeguard is this library's.
    """

    def __init__(self, f: Tensor, large: Tensor, *, depth: int, first_pause: int, forgiving: bool) -> None:
        problems, rows = f.shape
        self.large = large  # [P] bool, problems with at least LEAST rows and columns; the others stay plain
        self.depth, self.forgiving = depth, forgiving
        self.points = f.new_zeros(problems, depth + 1, rows, dtype=torch.float64)  # the last f / epsilon, newest last
        self.residuals = torch.zeros_like(self.points)
        self.count = torch.zeros(problems, dtype=torch.int64, device=f.device)  # pairs that are kept
        self.pause = torch.full_like(self.count, first_pause)  # iterations before the next extrapolation
        self.next_pause = torch.full_like(self.count, 2)
        self.fallback = torch.zeros_like(f)  # T(f) of the last extrapolation
        self.before = f.new_full((problems,), torch.inf)  # max |r| at that time
        self.extrapolated = torch.zeros_like(self.count, dtype=torch.bool)
        self.plain = torch.ones_like(self.extrapolated)

    def mix(self, f: Tensor, f_plain: Tensor, epsilon: Tensor, tol: float) -> Tensor:
        """Return the next row potential [P, N], given f and T(f) [P, N]; epsilon [P, 1]."""
        residual = (f_plain - f) / epsilon
        size = residual.abs().amax(-1)  # [P]
        worse = self.extrapolated & ~(size < self.before)
        self.points = torch.cat([self.points[:, 1:], (f / epsilon).double().unsqueeze(1)], 1)
        self.residuals = torch.cat([self.residuals[:, 1:], residual.double().unsqueeze(1)], 1)
        self.count = torch.where(worse, 0, (self.count + 1).clamp_max(self.depth + 1))
        self.pause = torch.where(worse, self.next_pause, (self.pause - 1).clamp_min(0))
        if self.forgiving:
            self.next_pause = torch.where(self.extrapolated & ~worse, 2, self.next_pause)
        self.next_pause = torch.where(worse, (2 * self.next_pause).clamp_max(1 << 30), self.next_pause)
        mixed = f_plain + (self._step() * epsilon.double()).to(f.dtype)
        # Residuals of a few roundings are noise.
        floor = 8 * torch.finfo(f.dtype).eps * (1 + (f / epsilon).abs().amax(-1))
        extrapolate = self.large & (self.pause == 0) & (self.count > 1) & ~worse & ~(size < tol) & (size > floor)
        extrapolate = extrapolate & torch.isfinite(mixed).all(-1)
        result = torch.where(extrapolate.unsqueeze(-1), mixed, f_plain)
        result = torch.where(worse.unsqueeze(-1), self.fallback, result)
        self.fallback = torch.where(extrapolate.unsqueeze(-1), f_plain, self.fallback)
        self.before = torch.where(extrapolate, size, torch.inf)
        self.extrapolated = extrapolate
        self.plain = ~(extrapolate | worse)
        return result

    def _step(self) -> Tensor:
        """-(dF + dR) gamma in units of epsilon, cut to the way from the oldest point. [P, N] float64"""
        newest = torch.arange(self.depth, device=self.points.device)  # difference k ends at pair k + 1
        real = newest >= self.depth + 1 - self.count.unsqueeze(-1)  # [P, depth]
        moves = torch.where(real.unsqueeze(-1), self.points.diff(dim=1), 0.0)
        changes = torch.where(real.unsqueeze(-1), self.residuals.diff(dim=1), 0.0)  # [P, depth, N]
        length = changes.norm(dim=-1)
        scale = torch.where(length > 0, 1.0 / torch.where(length > 0, length, 1.0), 0.0)  # the newest are the shortest
        unit = changes * scale.unsqueeze(-1)
        ridge = RIDGE * real.sum(-1, keepdim=True).double() + (length == 0).double()
        system = unit @ unit.transpose(-1, -2) + torch.diag_embed(ridge.expand_as(length))
        target = unit @ self.residuals[:, -1].unsqueeze(-1)
        gamma = torch.linalg.solve_ex(system, target)[0] * scale.unsqueeze(-1)  # no check: it would sync
        step = -((moves + changes).transpose(-1, -2) @ gamma).squeeze(-1)
        way = (moves.sum(1) + self.residuals[:, -1]).abs().amax(-1, keepdim=True)
        reach = step.abs().amax(-1, keepdim=True)
        return step * torch.where(reach > way, way / torch.where(reach > 0, reach, 1.0), 1.0)

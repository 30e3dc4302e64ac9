"""What the three training recipes of the small world share: a resumable loop and two optimizers under one schedule."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pisces.video import atomic_path

Log = Callable[[str], None]


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator that depends on (seed, step) only, so that a resumed run draws what an unbroken one would."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: p <- p - lr * sqrt(max(1, rows/cols)) * U V^T, with momentum = U S V^T.

    torch.optim.Muon takes matrices only; convolutions are most of the small VAE, so this one flattens every weight
    to [out, in * taps]. Five Newton-Schulz steps approximate U V^T (Jordan et al., 2024).
    """

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient; weights of one shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for same in by_shape.values():
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in same]
                grads = torch.stack([p.grad for p in same])
                momenta = torch.stack(buffers).lerp_(grads, 1 - group["momentum"])
                torch._foreach_copy_(buffers, list(momenta))
                update = _orthogonalize(torch.lerp(grads, momenta, group["momentum"]).flatten(2))
                scale = -group["lr"] * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
                torch._foreach_add_(same, list((scale * update).view_as(grads)))


def _orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """U V^T of the singular value decompositions of x [K, R, C], the singular values within about [0.7, 1.2]."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def split_for_muon(
    named: Iterable[tuple[str, nn.Parameter]], *, matrices: Callable[[str, nn.Parameter], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(parameters for Muon, the rest for AdamW)."""
    muon: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in named:
        (muon if matrices(name, p) else rest).append(p)
    return muon, rest


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """lr = factor times the learning rate that the optimizer was made with."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def run_steps(
    name: str,
    *,
    steps: int,
    step: Callable[[int], Mapping[str, float]],
    stateful: Mapping[str, Any],
    state_file: Path,
    settings: Mapping[str, float],
    save_every: int = 100,
    log: Log = print,
) -> None:
    """Call `step(i)` for i in range(steps), saving everything in between, and go on where an earlier run stopped.

    Args:
        name: the word that opens each line of the log.
        steps: total number of steps.
        step: does step i and returns what to log; must draw its randomness from `step_generator(seed, i)`.
        stateful: objects with state_dict/load_state_dict that a resumed run needs.
        state_file: where they are kept; written atomically, removed by the caller when the result is safe.
        settings: what makes this run another one, such as its seed; a state of other settings is refused.
        save_every: steps between two saves, and between two lines of the log.
        log: takes one line.

    Raises:
        ValueError: the state file is of a run with other settings.
    """
    first = 0
    identity = {"steps": steps, **settings}
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        if saved["identity"] != identity:
            raise ValueError(
                f"{name}: {state_file} is of a run with {saved['identity']}, expected {identity}. Remove it, or choose "
                "another output folder."
            )
        for key, thing in stateful.items():
            thing.load_state_dict(saved[key])
        first = saved["step"]
        log(f"{name}: going on at step {first} of {steps}")
    seconds = time.perf_counter()
    for i in range(first, steps):
        report = step(i)
        if (i + 1) % save_every == 0 or i + 1 == steps:
            pace = (time.perf_counter() - seconds) / (i + 1 - first)
            figures = " ".join(f"{key} {value:.4f}" for key, value in report.items())
            log(f"{name}: step {i + 1}/{steps} {figures} ({pace:.2f} s a step)")
            state = {key: thing.state_dict() for key, thing in stateful.items()}
            save_atomically(state_file, {"step": i + 1, "identity": identity, **state})


def save_atomically(path: Path, state: object) -> None:
    """torch.save beside `path`, then rename: a kill leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    torch.save(state, partial)
    os.replace(partial, path)


def write_json(path: Path, content: object) -> None:
    """Readable JSON with a final newline, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")

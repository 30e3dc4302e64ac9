"""Training of the Neural OT map: the paper's max-min recipe or a Sinkhorn divergence, with exact resume."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pisces.ot_map.network import NeuralOTMap
from pisces.signals import StopSignals
from pisces.state import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from pisces_kernels import sinkhorn_divergence

logger = logging.getLogger(__name__)

Objective = Literal["max_min", "sinkhorn"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
MAP_STEPS = 10  # steps of T for one of f (PISCES, arXiv 2602.01624)
WEIGHT_DECAY = 1e-10
CLIP = 1.0
LAST_LR = 0.05  # the cosine schedule ends at this share of lr
SINKHORN_WEIGHT = 20.0  # of the divergence against the transport cost: a shift of the means is left to 1/21
SINKHORN_EPSILON = 0.1  # in units of |y - x|^2
SINKHORN_ITERS = 100
WARM_UP = 0.4  # share of the steps on the divergence's objective that bring T to the identity first

Score = Callable[[NeuralOTMap], tuple[float, ...]]
"""How good a map is; larger is better, later numbers decide between equal ones."""


class FitInterrupted(SystemExit):
    """SIGTERM or SIGINT arrived; the step was finished and a checkpoint written. ``code`` is 128 + the signal."""


@dataclass(frozen=True)
class MapSettings:
    """Settings of the training of a map; see `fit_alignment`.

    Attributes:
        hidden: width of both networks.
        steps: outer steps.
        batch_size: drawn with replacement from each side.
        lr: learning rate of both networks.
        cost_weight: weight of the transport cost.
        objective: "max_min" or "sinkhorn".
        seed: of the weights and the batches.
    """

    hidden: int
    steps: int
    batch_size: int
    lr: float
    cost_weight: float
    objective: Objective
    seed: int


class MapFit:
    """Networks, optimizers and random state of a fit; `step` is one outer step.

    Args:
        source: [n, E] what is mapped.
        target: [m, E] where to.
        settings: of the training.
    """

    def __init__(self, source: Tensor, target: Tensor, settings: MapSettings) -> None:
        dim = source.shape[1]
        self.source, self.target, self.settings = source, target, settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step_number = 0
        with torch.random.fork_rng(devices=[source.device] if source.is_cuda else []):
            torch.manual_seed(settings.seed)
            network, potential = NeuralOTMap(dim, settings.hidden), NeuralOTMap(dim, settings.hidden, dim_out=1)
        self.network, self.potential = network.to(source), potential.to(source)
        # fused: with networks this small the time goes into Python, not into arithmetic
        self.adams = [
            torch.optim.Adam(part.parameters(), settings.lr, weight_decay=WEIGHT_DECAY, fused=True)
            for part in (self.network, self.potential)
        ]

    @property
    def trained(self) -> bool:
        """Whether the objective has been seen: the Sinkhorn divergence comes after the warm-up."""
        return self.settings.objective == "max_min" or self.step_number > WARM_UP * self.settings.steps

    @torch.enable_grad()  # the caller may well be inside no_grad
    def step(self) -> None:
        """One outer step: ten steps of T and one of f, or one of T on the Sinkhorn divergence."""
        done = self.step_number / self.settings.steps
        rate = self.settings.lr * (LAST_LR + (1 - LAST_LR) * (0.5 + 0.5 * math.cos(math.pi * done)))
        for adam in self.adams:
            adam.param_groups[0]["lr"] = rate
        (self._max_min if self.settings.objective == "max_min" else self._sinkhorn)()
        self.step_number += 1

    def _max_min(self) -> None:
        self.potential.requires_grad_(False)
        for _ in range(MAP_STEPS):
            y = self._batch(self.source)
            moved = self.network(y)
            self._descend(self._cost(moved, y) - self.potential(moved).mean(), 0)
        self.potential.requires_grad_(True)
        with torch.no_grad():
            moved = self.network(self._batch(self.source))
        self._descend(self.potential(moved).mean() - self.potential(self._batch(self.target)).mean(), 1)

    def _sinkhorn(self) -> None:
        y = self._batch(self.source)
        moved = self.network(y)
        loss = self._cost(moved, y)
        if self.step_number < WARM_UP * self.settings.steps:
            # From a random map the divergence finds one onto the right cloud that leaves no text near its place.
            self._descend(loss, 0)
            return
        with warnings.catch_warnings():
            # the first maps are far off, where the solver is slow; its error is of second order in the residual
            warnings.simplefilter("ignore", RuntimeWarning)
            divergence = sinkhorn_divergence(
                moved, self._batch(self.target), epsilon=SINKHORN_EPSILON, max_iters=SINKHORN_ITERS
            )
        self._descend(loss + SINKHORN_WEIGHT * divergence, 0)

    def _cost(self, moved: Tensor, y: Tensor) -> Tensor:
        return self.settings.cost_weight * (moved - y).square().sum(1).mean()

    def _batch(self, data: Tensor) -> Tensor:
        index = torch.randint(0, len(data), (self.settings.batch_size,), generator=self.generator)
        return data[index.to(data.device)]

    def _descend(self, loss: Tensor, part: int) -> None:
        adam, network = self.adams[part], (self.network, self.potential)[part]
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        adam.step()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All that the next step depends on, as groups of named tensors."""
        optimizer = {
            f"{part}.{i}.{name}": value
            for part, adam in enumerate(self.adams)
            for i, values in adam.state_dict()["state"].items()
            for name, value in values.items()
        }
        return {
            "network": self.network.state_dict(),
            "potential": self.potential.state_dict(),
            "optimizer": optimizer,
            "random": {"generator": self.generator.get_state()},
        }

    def load_state(self, step: int, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Go on where `state` was taken, after `step` steps."""
        self.step_number = step
        self.network.load_state_dict(tensors["network"])
        self.potential.load_state_dict(tensors["potential"])
        self.generator.set_state(tensors["random"]["generator"])
        for part, adam in enumerate(self.adams):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors["optimizer"].items():
                number, i, name = key.split(".")
                if int(number) == part:
                    state.setdefault(int(i), {})[name] = value
            adam.load_state_dict({"state": state, "param_groups": adam.state_dict()["param_groups"]})


def train_map(
    source: Tensor,
    target: Tensor,
    settings: MapSettings,
    *,
    score: Score | None = None,
    data: str | None = None,
    scored_on: str | None = None,
    check_every: int = 1000,
    checkpoints: Path | None = None,
    save_every: int = 1000,
    progress: bool = True,
) -> tuple[NeuralOTMap, dict[str, Any]]:
    """Train a map from one cloud onto another.

    Args:
        source: [n, E] what is mapped.
        target: [m, E] where to.
        settings: of the training.
        score: the map that scores best at a check is returned; None returns the last one.
        data: what tells the embeddings from others; None is a digest of both sides, which another device may compute
            differently.
        scored_on: what the score depends on besides the map; a checkpoint of another one is refused.
        check_every: steps between checks; the last step is checked, too.
        checkpoints: folder for checkpoints; a fit that was stopped goes on from the newest, bit for bit.
        save_every: steps between checkpoints.
        progress: show a progress bar.

    Returns:
        The map, and the facts {"best_step": ...} if maps were scored.

    Raises:
        CheckpointError: the checkpoint is damaged, or of a fit of other embeddings or settings.
        FitInterrupted: after SIGTERM or SIGINT with `checkpoints`, once the checkpoint is written.
    """
    fit = MapFit(source, target, settings)
    best: dict[str, Tensor] = {}
    best_score: tuple[float, ...] | None = None
    best_step = 0
    identity = {
        **asdict(settings),
        "check_every": check_every if score else None,
        "held_out": scored_on,
        "data": data or digest(source, target),
    }

    def save() -> None:
        if checkpoints is not None:
            meta = {"fit": identity, "best_score": best_score, "best_step": best_step}
            groups = fit.state() | ({"best": best} if best else {})
            save_checkpoint(checkpoints, fit.step_number, groups, meta)

    newest = None if checkpoints is None else latest_checkpoint(checkpoints)
    if newest is not None:
        checkpoint = load_checkpoint(newest)
        _check_identity(newest, checkpoint.meta.get("fit"), identity)
        fit.load_state(checkpoint.step, checkpoint.tensors)
        best = {name: value.to(source.device) for name, value in checkpoint.tensors.get("best", {}).items()}
        stored = checkpoint.meta["best_score"]
        best_score, best_step = None if stored is None else tuple(stored), checkpoint.meta["best_step"]
    bar = tqdm(
        total=settings.steps,
        initial=fit.step_number,
        desc="Neural OT map",
        disable=None if progress else True,
        leave=False,
    )
    signals = StopSignals()
    # without checkpoints there is nothing to save, and a signal acts as ever
    with bar, signals if checkpoints is not None else contextlib.nullcontext():
        while fit.step_number < settings.steps:
            fit.step()
            bar.update()
            last = fit.step_number == settings.steps
            if score is not None and fit.trained and (last or fit.step_number % check_every == 0):
                found = score(fit.network)
                if best_score is None or found > best_score:
                    best = {name: value.clone() for name, value in fit.network.state_dict().items()}
                    best_score, best_step = found, fit.step_number
            if last or fit.step_number % save_every == 0 or signals.noted is not None:
                save()
            if signals.noted is not None and not last:
                logger.warning("signal %d: saved step %d in %s", signals.noted, fit.step_number, checkpoints)
                raise FitInterrupted(128 + signals.noted)
    if best_score is None:
        return fit.network, {}
    fit.network.load_state_dict(best)
    return fit.network, {"best_step": best_step}


def digest(*clouds: Tensor) -> str:
    """Of the shapes, types and bytes of some tensors."""
    hasher = hashlib.sha256()
    for cloud in clouds:
        hasher.update(repr((tuple(cloud.shape), str(cloud.dtype))).encode())
        hasher.update(cloud.cpu().contiguous().view(torch.uint8).numpy())
    return hasher.hexdigest()


def _check_identity(path: Path, got: Any, wanted: dict[str, Any]) -> None:
    if got != wanted:
        other = sorted(name for name in wanted if not isinstance(got, dict) or got.get(name) != wanted[name])
        raise CheckpointError(
            f"fit_alignment: the checkpoint {path} is of a fit with other {', '.join(other)}. "
            "Name another folder of checkpoints, or delete this one."
        )

"""The training loop: one for every algorithm and pipeline, exactly resumable."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from pisces.algorithms import Algorithm
from pisces.algorithms.base import Stateful
from pisces.batches import Batches
from pisces.config import OptimizerConfig, TrainConfig
from pisces.pipelines.base import PipelineAdapter
from pisces.pipelines.trainable import prepare
from pisces.state import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
    step_generator,
    write_text,
)

logger = logging.getLogger(__name__)

# So many steps skipped in a row mean that something is broken, not that one batch was unlucky.
MAX_SKIPPED_IN_A_ROW = 10
# What a resumed run may have changed: how long and where, what the decode takes, where latents are kept.
FREE_SETTINGS = ("steps", "output.", "pipeline.decode.", "pipeline.gradient_checkpointing", "data.cache")


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is good."""


class Interrupted(SystemExit):
    """SIGTERM or SIGINT arrived; the step was finished and a checkpoint written. ``code`` is 128 + the signal."""


class Trainer:
    """AdamW on an algorithm's loss, with accumulation, clipping, EMA, a JSONL log and exact resume.

    Step s draws all its noise from generators seeded by (seed, s, micro-batch), and batch n of the data is a function
    of n, so a run that is stopped and resumed is the same run, bit for bit. A step whose loss or gradient is not
    finite is skipped: logged, counted, and without effect on weights, optimizer or EMA.

    Args:
        adapter: the pipeline, already given to :func:`~pisces.pipelines.prepare`.
        algorithm: the loss.
        config: ``seed``, ``steps``, ``optimizer`` and ``output`` are used; the whole is stored with the checkpoints.
        batches: micro-batches by number, such as ``PromptBatches``.

    Raises:
        ValueError: if nothing in the transformer is trainable.

    Example:
        >>> import tempfile
        >>> from pisces.algorithms import Draft, FrozenBase
        >>> from pisces.batches import PromptBatches
        >>> from pisces.config import LoraConfig, OptimizerConfig, OutputConfig
        >>> from pisces.encoders import load_encoder
        >>> from pisces.pipelines import load_pipeline
        >>> from pisces.rewards import CompositeReward, SemanticReward
        >>> from pisces.world import checkpoint_path
        >>> adapter = load_pipeline(checkpoint_path("wan-base"))
        >>> prepare(adapter, LoraConfig(rank=8, alpha=8.0))
        >>> parts = {"semantic": SemanticReward(load_encoder(checkpoint_path("encoder")))}
        >>> algorithm = Draft(adapter, CompositeReward(parts, {"semantic": 1.0}), FrozenBase(adapter), steps=2)
        >>> batches = PromptBatches(["a red square moves left"], batch_size=1)
        >>> output = OutputConfig(dir=tempfile.mkdtemp())
        >>> config = TrainConfig(steps=1, optimizer=OptimizerConfig(lr=1e-4, accumulation=1), output=output)
        >>> Trainer(adapter, algorithm, config, batches=batches).fit().name
        'final'
    """

    def __init__(
        self, adapter: PipelineAdapter, algorithm: Algorithm, config: TrainConfig, *, batches: Batches
    ) -> None:
        self.adapter = adapter
        self.algorithm = algorithm
        self.config = config
        self.batches = batches
        self.output = Path(config.output.dir)
        self.parameters = {n: p for n, p in adapter.transformer.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("Trainer: no parameter of the transformer requires a gradient. Call prepare first.")
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.ema = {n: p.detach().clone() for n, p in self.parameters.items()} if settings.ema_decay else {}
        self.updates = algorithm.updates if isinstance(algorithm, Stateful) else 1
        self.step = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._signal: int | None = None

    # ------------------------------------------------------------------ the loop

    def fit(self, *, resume: str | Path = "auto") -> Path:
        """Train up to ``config.steps`` steps, then export.

        Args:
            resume: "auto" goes on from the newest checkpoint in the output directory if there is one; "never" deletes
                what an earlier run left there; a path is a checkpoint to go on from.

        Returns:
            ``output.dir/final``: a diffusers directory, or a LoRA directory for ``pipe.load_lora_weights``.

        Raises:
            CheckpointError: if the checkpoint is damaged or of a run with other settings.
            TrainingError: if ten steps in a row had no finite loss or gradient.
            Interrupted: after a SIGTERM or SIGINT, once the checkpoint is written.
        """
        self._open(resume)
        bar = tqdm(total=self.config.steps, initial=self.step, disable=not sys.stderr.isatty(), unit="step")
        saved_at = self.step
        with self._catch_signals(), bar, (self.output / "log.jsonl").open("a") as log:
            while self.step < self.config.steps and self._signal is None:
                record = self.train_step()
                log.write(json.dumps(record) + "\n")
                log.flush()
                if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                    raise TrainingError(
                        f"Trainer: {MAX_SKIPPED_IN_A_ROW} steps in a row skipped (step {self.step}: "
                        f"{record['skipped']}). Lower optimizer.lr, or look at the rewards; see {log.name}."
                    )
                shown = {k: v for k, v in record.items() if k == "loss" or k.startswith("reward")}
                bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items() if v is not None}, refresh=False)
                bar.update()
                if self.step % self.config.output.save_every == 0:
                    self.save()
                    saved_at = self.step
            if saved_at != self.step:
                self.save()
        if self._signal is not None and self.step < self.config.steps:
            logger.warning("signal %d: saved step %d in %s", self._signal, self.step, self.output)
            raise Interrupted(128 + self._signal)
        return self.export()

    def train_step(self) -> dict[str, float | int | str | None]:
        """One optimizer step.

        Returns:
            The log line: step, loss, the algorithm's scalars, grad_norm, lr, seconds; a skipped step has ``skipped``
            with the reason, and null for what was not finite.
        """
        started = time.perf_counter()
        settings = self.config.optimizer
        parts = settings.accumulation
        lr = settings.lr * lr_share(self.step, self.config.steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if isinstance(self.algorithm, Stateful) and self.step % self.updates == 0:
            self.algorithm.begin()
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, float] = {}
        for part in range(parts):
            batch = self.batches[self.step // self.updates * parts + part]
            generator = step_generator(self.config.seed, self.step, part)
            loss, logs = self.algorithm.loss(batch, generator)
            (loss / parts).backward()
            for name, value in {"loss": loss.detach(), **logs}.items():
                totals[name] = totals.get(name, 0.0) + float(value) / parts
            if not math.isfinite(totals["loss"]):
                break
        limit = math.inf if settings.grad_clip is None else settings.grad_clip
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        reason = None
        if not math.isfinite(totals["loss"]):
            reason = "loss is not finite"
        elif not math.isfinite(norm):
            reason = "gradient is not finite"
        if reason is None:
            self.optimizer.step()
            self._update_ema()
        self._count(reason)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        values = {**totals, "grad_norm": norm, "lr": lr, "seconds": time.perf_counter() - started}
        record: dict[str, float | int | str | None] = {"step": self.step}
        record.update({name: value if math.isfinite(value) else None for name, value in values.items()})
        if reason is not None:
            record["skipped"] = reason
        return record

    def _count(self, reason: str | None) -> None:
        """Keep count of skipped steps, and of those in a row."""
        if reason is None:
            self._skipped_in_a_row = 0
            return
        self.skipped += 1
        self._skipped_in_a_row += 1
        if isinstance(self.algorithm, Stateful):
            self.algorithm.begin()  # else the same bad rollout comes again
        logger.warning("step %d skipped: %s", self.step + 1, reason)

    # ------------------------------------------------------------------ averaged weights

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.ema:
            # The ramp keeps the first steps' average from being the initial weights for 1 / (1 - decay) steps.
            decay = min(self.config.optimizer.ema_decay, (1 + self.step) / (10 + self.step))
            averages, now = list(self.ema.values()), [p.detach() for p in self.parameters.values()]
            torch._foreach_lerp_(averages, now, 1.0 - decay)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within the context the model has its averaged weights, if EMA is on; then its own again."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()} if self.ema else {}
        self._set_weights(self.ema)
        try:
            yield
        finally:
            self._set_weights(own)

    @torch.no_grad()
    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            self.parameters[name].copy_(value)

    # ------------------------------------------------------------------ state

    def save(self) -> Path:
        """Write a checkpoint of everything that the next step depends on.

        Returns:
            Its directory, ``output.dir/checkpoints/step-...``.
        """
        moments = {
            f"{name}/{key}": value for name, state in self._optimizer_state().items() for key, value in state.items()
        }
        random_tensors, random_meta = random_states()
        return save_checkpoint(
            self.output / "checkpoints",
            self.step,
            {
                "weights": self.parameters,
                "optimizer": moments,
                "ema": self.ema,
                "random": random_tensors,
                "algorithm": self._algorithm_state(),
            },
            {
                "config": self.config.to_dict(),
                "data": self.batches.fingerprint,
                "skipped": [self.skipped, self._skipped_in_a_row],
                "random": random_meta,
            },
            keep=self.config.output.keep,
        )

    def load(self, path: str | Path) -> None:
        """Take over a checkpoint that :meth:`save` wrote.

        Args:
            path: its directory.

        Raises:
            CheckpointError: if it is damaged, or the settings, the data or the parameters are others.
        """
        checkpoint = load_checkpoint(path)
        missing = {"config", "data", "skipped", "random"} - checkpoint.meta.keys()
        missing |= {"weights", "optimizer", "ema", "random"} - checkpoint.tensors.keys()
        if missing:
            raise CheckpointError(
                f"Trainer: {path} lacks {', '.join(sorted(missing))}. Delete it to go on from the checkpoint before it."
            )
        self._check_same_run(checkpoint.meta, Path(path))
        weights, ema = checkpoint.tensors["weights"], checkpoint.tensors["ema"]
        shapes = {name: p.shape for name, p in self.parameters.items()}
        if {name: value.shape for name, value in weights.items()} != shapes or set(ema) != set(self.ema):
            raise CheckpointError(f"Trainer: {path} holds other parameters than this model trains.")
        self._set_weights(weights)
        # In the order of the parameters: a file returns its tensors sorted by name.
        self.ema = {name: ema[name].to(p.device) for name, p in self.parameters.items() if ema}
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in checkpoint.tensors["optimizer"].items():
            name, _, kind = key.rpartition("/")
            moments.setdefault(name, {})[kind] = value
        number = {name: index for index, name in enumerate(self.parameters)}
        groups = self.optimizer.state_dict()["param_groups"]
        state = {number[name]: values for name, values in moments.items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if isinstance(self.algorithm, Stateful):
            self.algorithm.load_state(checkpoint.tensors.get("algorithm", {}))
        self.step = checkpoint.step
        self.skipped, self._skipped_in_a_row = checkpoint.meta["skipped"]
        set_random_states(checkpoint.tensors["random"], checkpoint.meta["random"])

    def export(self) -> Path:
        """Write the trained model, with averaged weights if EMA is on, to ``output.dir/final``."""
        lora = bool(getattr(self.adapter.transformer, "peft_config", None))
        with self.ema_weights():
            write = self.adapter.save_lora if lora else self.adapter.save_pretrained
            return write(self.output / "final")

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's tensors by parameter name; empty before the first step."""
        state = self.optimizer.state
        return {name: state[p] for name, p in self.parameters.items() if p in state}

    def _algorithm_state(self) -> dict[str, Tensor]:
        """What the algorithm still needs of the batches so far; nothing where the next step begins with new ones."""
        needed = isinstance(self.algorithm, Stateful) and self.step % self.updates
        return self.algorithm.state() if needed else {}  # type: ignore[attr-defined]

    def _check_same_run(self, meta: dict[str, Any], path: Path) -> None:
        """Refuse a checkpoint whose run had other settings, :data:`FREE_SETTINGS` apart."""
        # A learning rate that falls over the steps depends on their number.
        free = FREE_SETTINGS if self.config.optimizer.schedule == "constant" else FREE_SETTINGS[1:]
        mine, theirs = (
            {k: v for k, v in _flat(c).items() if not k.startswith(free)}
            for c in (self.config.to_dict(), meta["config"])
        )
        changed = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if changed:
            lines = [f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} here" for k in changed]
            raise CheckpointError(
                f"Trainer: {path} is of a run with other settings ({'; '.join(lines)}). "
                "Restore them, or choose another output.dir."
            )
        if meta["data"] != self.batches.fingerprint:
            raise CheckpointError(
                f"Trainer: {path} is of a run on other prompts or captions. Choose another output.dir."
            )

    def _open(self, resume: str | Path) -> None:
        """Prepare the output directory and take over a checkpoint."""
        checkpoints, log = self.output / "checkpoints", self.output / "log.jsonl"
        path = latest_checkpoint(checkpoints) if resume == "auto" else None
        if resume == "never":
            # By name: the folder is the user's, and may hold other things. One that stays would be resumed from later.
            for earlier in [*checkpoints.glob("step-*"), *self.output.glob("final")]:
                shutil.rmtree(earlier)
        elif resume != "auto":
            path = Path(resume)
        if path is not None:
            self.load(path)
        self.output.mkdir(parents=True, exist_ok=True)
        write_text(self.output / "config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        # A killed run has logged steps after its last checkpoint: they will be made, and logged, again.
        lines = log.read_text().splitlines() if log.is_file() else []
        write_text(log, "".join(line + "\n" for line in lines if _logged_step(line) <= self.step))

    @contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """SIGTERM and the first SIGINT end the loop after the running step; a second SIGINT acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = number
            signal.signal(number, former[signal.Signals(number)])

        for number in former:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def build_training(config: TrainConfig) -> Trainer:
    """Build pipeline, data, rewards and algorithm from settings.

    Args:
        config: what :func:`pisces.config.load_config` returned.

    Returns:
        The trainer, at step 0; ``fit`` trains, resuming if it can.

    Raises:
        FileNotFoundError: if a file that the settings name is not there.
        ValueError: if the settings do not fit together or the data cannot be used.
    """
    from pisces.build import build_adapter, build_algorithm, build_batches, build_cache, build_rewards

    config.check_inputs()
    settings = config.pipeline
    adapter = build_adapter(config)
    batches = build_batches(config, adapter, build_cache(config, adapter))
    # Before anything is trainable: the rewards' reference batch is drawn from the base model.
    rewards = build_rewards(config, adapter, batches)
    prepare(adapter, config.lora, seed=config.seed, gradient_checkpointing=settings.gradient_checkpointing)
    algorithm = build_algorithm(config, adapter, rewards)
    return Trainer(adapter, algorithm, config, batches=batches)


def run_training(config: TrainConfig, *, resume: str | Path = "auto") -> Path:
    """Build everything from settings, train, and export.

    Args:
        config: what :func:`pisces.config.load_config` returned.
        resume: as for :meth:`Trainer.fit`.

    Returns:
        ``output.dir/final``.

    Raises:
        FileNotFoundError: if a file that the settings name is not there.
        ValueError: if the settings do not fit together or the data cannot be used.
        Interrupted: after a SIGTERM or SIGINT, once the checkpoint is written.
    """
    return build_training(config).fit(resume=resume)


def lr_share(step: int, steps: int, settings: OptimizerConfig) -> float:
    """The learning rate of a step as a share of ``lr``: linear warm-up, then the schedule over the steps that are left.

    Args:
        step: from 0.
        steps: of the run.
        settings: warmup_steps, schedule and final_lr.
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    left = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.final_lr + (1 - settings.final_lr) * left


def _logged_step(line: str) -> float:
    """The step of a log line; infinite for a line that a kill cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``a.b`` -> value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat

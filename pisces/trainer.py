"""The training loop: one for every algorithm and pipeline, exactly resumable."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from pisces.algorithms import Algorithm
from pisces.algorithms.base import Stateful
from pisces.batches import Batches
from pisces.config import OptimizerConfig, TrainConfig
from pisces.guards import alarms, alarms_in_a_row, is_best
from pisces.pipelines.base import PipelineAdapter
from pisces.pipelines.trainable import trained_parameters
from pisces.processes import Processes
from pisces.progress import memory_gb, progress_bar, show, start_memory
from pisces.run_folder import clear, refuse_later, refuse_other_run, refuse_results
from pisces.run_log import Record, RunLog
from pisces.signals import StopSignals
from pisces.state import (
    Checkpoint,
    CheckpointError,
    checkpoint_dir,
    latest_checkpoint,
    load_checkpoint,
    random_states,
    save_checkpoint,
    set_random_states,
    step_generator,
    write_text,
)
from pisces.validation import Validation

logger = logging.getLogger(__name__)

# So many steps skipped in a row mean that something is broken, not that one batch was unlucky.
MAX_SKIPPED_IN_A_ROW = 10


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is good."""


class Interrupted(SystemExit):
    """SIGTERM or SIGINT arrived before all was done; what was done is saved. ``code`` is 128 + the signal."""


class Trainer:
    """AdamW on an algorithm's loss, with accumulation, clipping, EMA, validation, logs and exact resume.

    Step s draws all its noise from generators seeded by (seed, s, micro-batch), and batch n of the data is a function
    of n, so a run that is stopped and resumed is the same run, bit for bit. A step whose loss or gradient is not
    finite is skipped: logged, counted, and without effect on weights, optimizer or EMA.

    Processes that were joined before (:func:`pisces.processes.join_processes`) divide the micro-batches of each step
    among themselves; the run is the same for any number of them, up to the order in which gradients are added.

    Args:
        adapter: the pipeline, already given to :func:`~pisces.pipelines.prepare`.
        algorithm: the loss.
        config: ``seed``, ``steps``, ``optimizer`` and ``output`` are used; the whole is stored with the checkpoints.
        batches: micro-batches by number, such as ``PromptBatches``.
        validation: what is sampled and scored meanwhile; None is nothing.

    Raises:
        ValueError: if nothing in the denoisers is trainable, or a step's micro-batches cannot be divided equally.

    Example:
        >>> import tempfile
        >>> from pisces.algorithms import Draft, FrozenBase
        >>> from pisces.batches import PromptBatches
        >>> from pisces.config import LoraConfig, OptimizerConfig, OutputConfig
        >>> from pisces.encoders import load_encoder
        >>> from pisces.pipelines import load_pipeline, prepare
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
        self,
        adapter: PipelineAdapter,
        algorithm: Algorithm,
        config: TrainConfig,
        *,
        batches: Batches,
        validation: Validation | None = None,
    ) -> None:
        self.adapter = adapter
        self.algorithm = algorithm
        self.config = config
        self.batches = batches
        self.validation = validation
        self.output = Path(config.output.dir)
        self.parameters = trained_parameters(adapter)
        if not self.parameters:
            raise ValueError("Trainer: no parameter of the denoiser requires a gradient. Call prepare first.")
        settings = config.optimizer
        self.processes = Processes()
        if settings.accumulation % self.processes.count:
            raise ValueError(
                f"Trainer: got {settings.accumulation} micro-batches a step for {self.processes.count} processes, "
                "expected a multiple. Set optimizer.accumulation."
            )
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
        self._signals = StopSignals()
        self._stopped_by: int | None = None  # the signal that all processes know of

    # ------------------------------------------------------------------ the loop

    def fit(self, *, resume: str | Path = "auto") -> Path:
        """Train up to ``config.steps`` steps, then export.

        Args:
            resume: "auto" goes on from the newest checkpoint in the output directory if there is one; "never" deletes
                what an earlier run left there; a path is a checkpoint to go on from, if the output
                directory has none of a later step.

        Returns:
            ``output.dir/final``: a diffusers directory, or a LoRA directory for ``pipe.load_lora_weights``.

        Raises:
            CheckpointError: if the checkpoint is damaged, of a run with other settings, or older than those there.
            TrainingError: if ten steps in a row had no finite loss or gradient.
            Interrupted: after a SIGTERM or SIGINT, once the checkpoint is written, if steps or a validation are left.
        """
        self._open(resume)
        self._signals, self._stopped_by = StopSignals(), None
        saved_at = self.step
        bar = progress_bar(self.step, self.config.steps, shown=self.processes.is_main)
        with self._signals, bar, self._log() as log:
            hacked = self._validate(log)
            while self.step < self.config.steps and self._stopped_by is None and not hacked:
                record = self.train_step()
                if log is not None:
                    log.step(record)
                if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                    raise TrainingError(
                        f"Trainer: {MAX_SKIPPED_IN_A_ROW} steps in a row skipped (step {self.step}: "
                        f"{record['skipped']}). Lower optimizer.lr, or look at the rewards; see {self.output}."
                    )
                show(bar, record)
                if self.step % self.config.output.save_every == 0:
                    self.save()
                    saved_at = self.step
                # Whoever sent a signal does not wait for videos: the resumed run makes them.
                if self._stopped_by is None:
                    if self._due() and saved_at != self.step:
                        self.save()
                        saved_at = self.step
                    hacked = self._validate(log)
            if saved_at != self.step:
                self.save()
        if self._stopped_by is not None and (self.step < self.config.steps or self._validation_left(log)):
            done = f"saved step {self.step}" if self.step else "stopped before the first step"
            logger.warning("signal %d: %s in %s", self._stopped_by, done, self.output)
            raise Interrupted(128 + self._stopped_by)
        return self.export()

    def train_step(self) -> Record:
        """One optimizer step.

        Returns:
            The log line: step, loss, the algorithm's scalars, grad_norm, lr, seconds, and memory_gb (the peak on a
            GPU, else what the process holds). A skipped step has ``skipped`` with the reason, and None for what was
            not finite; for all that is computed, if its loss was not, as only some of its batches were looked at.
        """
        started = time.perf_counter()
        start_memory(self.adapter.device)
        settings = self.config.optimizer
        parts = settings.accumulation
        lr = settings.lr * lr_share(self.step, self.config.steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if isinstance(self.algorithm, Stateful) and self.step % self.updates == 0:
            self.algorithm.begin()
        self.optimizer.zero_grad(set_to_none=True)
        mine: dict[str, float] = {}
        for part in self.processes.share(parts):
            batch = self.batches[self.step // self.updates * parts + part]
            generator = step_generator(self.config.seed, self.step, part)
            loss, logs = self.algorithm.loss(batch, generator)
            (loss / parts).backward()
            for name, value in {"loss": loss.detach(), **logs}.items():
                mine[name] = mine.get(name, 0.0) + float(value) / parts
            if not math.isfinite(mine["loss"]):
                break
        self.processes.add_up_gradients(self.parameters.values())
        totals: dict[str, float] = {}
        for numbers in self.processes.gather(mine):
            for name, value in numbers.items():
                totals[name] = totals.get(name, 0.0) + value
        self._agree_to_stop()
        limit = math.inf if settings.grad_clip is None else settings.grad_clip
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        reason = None
        if not math.isfinite(totals["loss"]):
            reason = "loss is not finite"
            totals, norm = dict.fromkeys(totals, math.nan), math.nan  # of some parts only: see the loop above
        elif not math.isfinite(norm):
            reason = "gradient is not finite"
        if reason is None:
            self.optimizer.step()
            self._update_ema()
        self._count(reason)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        values = {**totals, "grad_norm": norm, "lr": lr, "seconds": time.perf_counter() - started}
        values["memory_gb"] = memory_gb(self.adapter.device)
        record: Record = {"step": self.step}
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

    # ------------------------------------------------------------------ validation

    def _validate(self, log: RunLog | None) -> bool:
        """Validate if it is time to, by the averaged weights; whether the guards end the run."""
        if self.validation is None:
            return False
        if self._validation_left(log):
            with self.ema_weights():
                record = self.validation.run(self.step, self.output, stop=lambda: self._signals.noted is not None)
                if record is None:
                    self._agree_to_stop()
                    return False
                if log is not None:
                    # The model first: a kill in between is made good by the resumed run, which validates again.
                    if self.step and is_best([*log.validations, record]):
                        self._write_model(self.output / "best")
                    log.validation(record)
        hacked = log is not None and self._hacked(log.validations)
        return self.processes.gather(hacked)[0]

    def _due(self) -> bool:
        return self.validation is not None and self.validation.due(self.step, self.config.steps)

    def _validation_left(self, log: RunLog | None) -> bool:
        """Whether this step's validation is still to be made."""
        left = log is not None and self._due() and self.step not in {record["step"] for record in log.validations}
        return self.processes.gather(left)[0]

    def _agree_to_stop(self) -> None:
        """Let all processes know of a signal that one of them got."""
        for number in self.processes.gather(self._signals.noted):
            self._stopped_by = self._stopped_by or number

    def _hacked(self, validations: list[Record]) -> bool:
        """Say what alarms the last validation, and whether it is one too many."""
        guards = self.config.validation.guards
        if not validations or validations[-1]["step"] != self.step:
            return False
        for sentence in alarms(validations, guards):
            logger.warning("step %d: %s", self.step, sentence)
        in_a_row = alarms_in_a_row(validations, guards)
        if guards.patience is None or in_a_row < guards.patience:
            return False
        logger.warning(
            "step %d: %d validations in a row with an alarm, training ends (validation.guards.patience)",
            self.step,
            in_a_row,
        )
        return True

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
        root, algorithm = self.output / "checkpoints", self._algorithm_state()
        if self.processes.is_main:
            save_checkpoint(
                root,
                self.step,
                {
                    "weights": self.parameters,
                    "optimizer": moments,
                    "ema": self.ema,
                    "random": random_tensors,
                    "algorithm": algorithm,
                },
                {
                    "config": self.config.to_dict(),
                    "data": self.batches.fingerprint,
                    "skipped": [self.skipped, self._skipped_in_a_row],
                    "random": random_meta,
                },
                keep=self.config.output.keep,
            )
        self.processes.wait()
        return checkpoint_dir(root, self.step)

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
        refuse_other_run(checkpoint, self.config, self.batches.fingerprint)
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
            self.algorithm.load_state(self._own_share(checkpoint))
        self.step = checkpoint.step
        self.skipped, self._skipped_in_a_row = checkpoint.meta["skipped"]
        set_random_states(checkpoint.tensors["random"], checkpoint.meta["random"])

    def export(self) -> Path:
        """Write the trained model, with averaged weights if EMA is on, to ``output.dir/final``."""
        path = self.output / "final"
        if self.processes.is_main:
            with self.ema_weights():
                self._write_model(path)
        self.processes.wait()
        return path

    def _write_model(self, path: Path) -> None:
        """Write the model as it is now, as a LoRA or as a pipeline directory."""
        lora = bool(getattr(self.adapter.transformer, "peft_config", None))
        (self.adapter.save_lora if lora else self.adapter.save_pretrained)(path)

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's tensors by parameter name; empty before the first step."""
        state = self.optimizer.state
        return {name: state[p] for name, p in self.parameters.items() if p in state}

    def _algorithm_state(self) -> dict[str, Tensor]:
        """What the algorithm still needs of the batches so far; nothing where the next step begins with new ones."""
        if not isinstance(self.algorithm, Stateful) or self.step % self.updates == 0:
            return {}
        mine = {name: tensor.cpu() for name, tensor in self.algorithm.state().items()}
        return {name: tensor for state in self.processes.gather_on_main(mine) for name, tensor in state.items()}

    def _own_share(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """What :meth:`_algorithm_state` saved of the batches that are this process's now."""
        parts = self.config.optimizer.accumulation
        first = checkpoint.step // self.updates * parts
        mine = tuple(f"{first + part}/" for part in self.processes.share(parts))
        tensors = checkpoint.tensors.get("algorithm", {})
        return {name: tensor for name, tensor in tensors.items() if name.startswith(mine)}

    def _open(self, resume: str | Path) -> None:
        """Prepare the output directory and take over a checkpoint."""
        path: Path | None = None
        if resume == "never":
            # The others do not look: they would still see what is being deleted.
            if self.processes.is_main:
                clear(self.output)
        else:
            path = latest_checkpoint(self.output / "checkpoints") if resume == "auto" else Path(resume)
            if path is None:
                refuse_results(self.output)
        self.processes.wait()
        if path is not None:
            self.load(path)
            refuse_later(self.output, self.step)
        if self.processes.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            write_text(self.output / "config.yaml", yaml.safe_dump(self.config.to_dict(), sort_keys=False))

    @contextmanager
    def _log(self) -> Iterator[RunLog | None]:
        """The run's log; None where another process writes it."""
        if not self.processes.is_main:
            yield None
            return
        settings = self.config.to_dict()
        with RunLog(self.output, self.step, trackers=self.config.output.trackers, settings=settings) as log:
            yield log


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

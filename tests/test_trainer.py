"""Laws of the training loop: resumed is uninterrupted, bad numbers never reach the weights, what is exported loads."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from meter import memory_meter
from tiny_wan import PROMPTS, SIZE, build_pipeline, build_tiny_wan
from torch import Tensor
from toy_rewards import ColorReward

from pisces.algorithms import Batch, Consistency, Draft, FlowMatching, FrozenBase, OneStep
from pisces.batches import PromptBatches, ShuffledIndices, VideoBatches
from pisces.config import (
    DataConfig,
    DecodeConfig,
    DraftConfig,
    LoraConfig,
    OptimizerConfig,
    OutputConfig,
    PipelineConfig,
    TrainConfig,
)
from pisces.pipelines import WanAdapter, prepare
from pisces.state import CheckpointError, latest_checkpoint, list_checkpoints
from pisces.trainer import Interrupted, Trainer, TrainingError, lr_share

LORA = LoraConfig(rank=2, alpha=4.0)
FULL_AND_LORA = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


@pytest.fixture(scope="module")
def wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan", layers=1, shift_terminal=0.2)


class Videos:
    """Four random captioned videos."""

    def __init__(self) -> None:
        self.frames = torch.rand(4, 9, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        self.captions = PROMPTS

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self.frames[index], self.captions[index]


def settings(output: Path, *, steps: int = 6, lora: LoraConfig | None = None, **optimizer: Any) -> TrainConfig:
    options = {"lr": 2e-3, "accumulation": 1, "ema_decay": 0.9, "warmup_steps": 2, **optimizer}
    return TrainConfig(
        algorithm=DraftConfig(steps=2),
        optimizer=OptimizerConfig(**options),
        lora=lora,
        output=OutputConfig(dir=str(output), save_every=2, trackers=()),
        steps=steps,
        seed=3,
    )


def make(
    wan_dir: Path, config: TrainConfig, *, name: str = "draft", rewards: Any = None, prompts: list[str] = PROMPTS
) -> Trainer:
    """The trainer of an algorithm on the tiny pipeline, two samples a batch."""
    adapter = WanAdapter.from_pretrained(wan_dir)
    batches: Any = VideoBatches(Videos(), adapter, batch_size=2, seed=config.seed)
    if name == "draft":
        batches = PromptBatches(prompts, batch_size=2, seed=config.seed)
    prepare(adapter, config.lora, seed=config.seed)
    base = FrozenBase(adapter)
    rewards = rewards or ColorReward()
    algorithms: dict[str, Callable[[], Any]] = {
        "draft": lambda: Draft(adapter, rewards, base, steps=2),
        "one_step": lambda: OneStep(adapter, rewards, base, steps=5),
        "consistency": lambda: Consistency(adapter, base, steps=5, phases=2),
        "flow_matching": lambda: FlowMatching(adapter),
    }
    return Trainer(adapter, algorithms[name](), config, batches=batches)


def log_of(trainer: Trainer) -> list[dict[str, Any]]:
    lines = (trainer.output / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "memory_gb")} for line in lines]


def assert_same_state(a: Trainer, b: Trainer) -> None:
    """Weights, EMA and both moments, bit for bit."""
    for name, parameter in a.parameters.items():
        assert torch.equal(parameter, b.parameters[name]), name
        assert torch.equal(a.ema[name], b.ema[name]), name
        mine, theirs = a.optimizer.state[parameter], b.optimizer.state[b.parameters[name]]
        assert set(mine) == set(theirs) == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), (name, key)


# ---------------------------------------------------------------------- resume


@FULL_AND_LORA
def test_six_steps_are_three_and_resume_and_three(wan_dir: Path, tmp_path: Path, lora: LoraConfig | None) -> None:
    whole = make(wan_dir, settings(tmp_path / "whole", lora=lora))
    whole.fit()
    first = make(wan_dir, settings(tmp_path / "parts", steps=3, lora=lora))
    first.fit()
    torch.rand(17)  # whatever happens in between
    second = make(wan_dir, settings(tmp_path / "parts", lora=lora))
    second.fit()
    assert second.step == 6
    assert_same_state(whole, second)
    assert log_of(whole) == log_of(second)
    # Negative control: without the optimizer's moments the end is another.
    other = make(wan_dir, settings(tmp_path / "other", lora=lora))
    other.load(list_checkpoints(tmp_path / "parts" / "checkpoints")[0][1])
    other.optimizer.state.clear()
    assert other.step == 4
    for _ in range(2):
        other.train_step()
    assert any(not torch.equal(p, other.parameters[name]) for name, p in whole.parameters.items())


@pytest.mark.parametrize("name", ["one_step", "consistency", "flow_matching"])
def test_every_algorithm_resumes_exactly(wan_dir: Path, tmp_path: Path, name: str) -> None:
    whole = make(wan_dir, settings(tmp_path / "whole", steps=4, lora=LORA), name=name)
    whole.fit()
    make(wan_dir, settings(tmp_path / "parts", steps=3, lora=LORA), name=name).fit()
    second = make(wan_dir, settings(tmp_path / "parts", steps=4, lora=LORA), name=name)
    second.fit()
    assert_same_state(whole, second)


def test_sigterm_finishes_the_step_and_saves(wan_dir: Path, tmp_path: Path) -> None:
    whole = make(wan_dir, settings(tmp_path / "whole", steps=4))
    whole.fit()
    stopped = make(wan_dir, settings(tmp_path / "parts", steps=4))
    loss = stopped.algorithm.loss

    def loss_with_signal(batch: Batch, generator: torch.Generator) -> Any:
        if stopped.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return loss(batch, generator)

    stopped.algorithm.loss = loss_with_signal  # type: ignore[method-assign]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        stopped.fit()
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler
    assert latest_checkpoint(tmp_path / "parts" / "checkpoints") == tmp_path / "parts/checkpoints/step-00000003"
    resumed = make(wan_dir, settings(tmp_path / "parts", steps=4))
    resumed.fit()
    assert_same_state(whole, resumed)
    assert log_of(whole) == log_of(resumed)


def test_steps_after_the_last_checkpoint_are_logged_once(wan_dir: Path, tmp_path: Path) -> None:
    trainer = make(wan_dir, settings(tmp_path, steps=2))
    trainer.fit()
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "loss": 9}\n{"step": 4, "lo')  # killed in step 4, before a save
    make(wan_dir, settings(tmp_path, steps=4)).fit()
    assert [line["step"] for line in log_of(trainer)] == [1, 2, 3, 4]
    assert log_of(trainer)[2]["loss"] != 9


def test_a_new_start_is_new(wan_dir: Path, tmp_path: Path) -> None:
    first = make(wan_dir, settings(tmp_path, steps=2))
    first.fit()
    (tmp_path / "checkpoints" / "mine.txt").write_text("the user's")
    (tmp_path / "final" / "stale").touch()
    again = make(wan_dir, settings(tmp_path, steps=1))
    again._open("never")
    assert not (tmp_path / "final").exists()  # of the earlier run: gone before the new one ends
    again.fit(resume="never")
    assert (tmp_path / "checkpoints" / "mine.txt").is_file()
    assert [line["step"] for line in log_of(again)] == [1]
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [1]


def test_a_model_without_a_checkpoint_is_not_trained_over(wan_dir: Path, tmp_path: Path) -> None:
    make(wan_dir, settings(tmp_path, steps=1)).fit()
    shutil.rmtree(tmp_path / "checkpoints")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "final").rglob("*")}
    with pytest.raises(CheckpointError, match="holds final of an earlier run"):
        make(wan_dir, settings(tmp_path, steps=1)).fit()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "final").rglob("*")} == before
    make(wan_dir, settings(tmp_path, steps=1)).fit(resume="never")


def test_a_checkpoint_that_lacks_a_part_is_named(wan_dir: Path, tmp_path: Path) -> None:
    make(wan_dir, settings(tmp_path, steps=1)).fit()
    file = tmp_path / "checkpoints/step-00000001/state.json"
    state = json.loads(file.read_text())
    del state["config"], state["sha256"]["ema.safetensors"]
    file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="step-00000001 lacks config, ema"):
        make(wan_dir, settings(tmp_path, steps=2)).fit()


def test_a_checkpoint_of_another_run_is_refused(wan_dir: Path, tmp_path: Path) -> None:
    make(wan_dir, settings(tmp_path, steps=1)).fit()
    changed = dataclasses.replace(settings(tmp_path, lr=1e-3), seed=4)
    with pytest.raises(CheckpointError, match=r"optimizer\.lr: 0\.002 there, 0\.001 here; seed: 3 there, 4 here"):
        make(wan_dir, changed).fit()
    with pytest.raises(CheckpointError, match="lora"):
        make(wan_dir, settings(tmp_path, lora=LORA)).fit()
    less_memory = dataclasses.replace(settings(tmp_path), pipeline=PipelineConfig(decode=DecodeConfig(chunk=2)))
    elsewhere = dataclasses.replace(settings(tmp_path), data=DataConfig(cache=str(tmp_path / "cache")))
    for free in (less_memory, elsewhere):
        make(wan_dir, free).load(latest_checkpoint(tmp_path / "checkpoints"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="other prompts or captions"):
        make(wan_dir, settings(tmp_path), prompts=PROMPTS[:3]).fit()
    weights = latest_checkpoint(tmp_path / "checkpoints") / "weights.safetensors"  # type: ignore[operator]
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is corrupt"):
        make(wan_dir, settings(tmp_path)).fit()


# ---------------------------------------------------------------------- one step


class Quadratic:
    """``mean_i |v(x_i) - y_i|^2`` with states and targets that depend on the prompt alone, not on the batch."""

    def __init__(self, adapter: WanAdapter) -> None:
        self.adapter = adapter

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        seeds = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in batch.prompts]
        x, y = (torch.stack([torch.randn(16, 3, 4, 4, generator=g) for g in seeds]) for _ in range(2))
        sigma = torch.full((len(x),), 0.5)
        velocity = self.adapter.velocity(x, sigma, self.adapter.encode_prompts(batch.prompts))
        return (velocity - y).square().mean(), {}


def gradient_after(wan_dir: Path, output: Path, *, batch_size: int, accumulation: int, clip: float | None) -> Tensor:
    """The gradient that reaches the optimizer, as the first moment over .1, and the logged norm."""
    config = settings(output, accumulation=accumulation, grad_clip=clip, betas=(0.9, 0.999))
    adapter = WanAdapter.from_pretrained(wan_dir)
    prepare(adapter, None)
    prompts = [f"{a} {b}" for a, b in itertools.product(PROMPTS, PROMPTS)][:8]
    batches = PromptBatches(prompts, batch_size=batch_size, seed=0)
    trainer = Trainer(adapter, Quadratic(adapter), config, batches=batches)
    record = trainer.train_step()
    moments = [trainer.optimizer.state[p]["exp_avg"] / 0.1 for p in trainer.parameters.values()]
    gradient = torch.cat([m.flatten() for m in moments])
    norm = float(record["grad_norm"])  # type: ignore[arg-type]
    assert float(gradient.norm()) == pytest.approx(norm if clip is None else min(norm, clip), rel=1e-3)
    return gradient


def test_two_times_four_is_one_times_eight(wan_dir: Path, tmp_path: Path) -> None:
    whole = gradient_after(wan_dir, tmp_path, batch_size=8, accumulation=1, clip=None)
    parts = gradient_after(wan_dir, tmp_path, batch_size=4, accumulation=2, clip=None)
    assert float((whole - parts).norm() / whole.norm()) < 1e-5
    # Negative control: half of the batch has another gradient.
    half = gradient_after(wan_dir, tmp_path, batch_size=4, accumulation=1, clip=None)
    assert float((whole - half).norm() / whole.norm()) > 1e-2


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", [0.5, 1, 1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5))]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: str, wanted: list[float]) -> None:
    settings = OptimizerConfig(warmup_steps=2, schedule=schedule, final_lr=0.2)
    assert [lr_share(step, 6, settings) for step in range(6)] == pytest.approx(wanted)


def test_a_falling_schedule_does_not_change_its_length(wan_dir: Path, tmp_path: Path) -> None:
    make(wan_dir, settings(tmp_path, steps=1, schedule="cosine")).fit()
    with pytest.raises(CheckpointError, match="steps: 1 there, 2 here"):
        make(wan_dir, settings(tmp_path, steps=2, schedule="cosine")).fit()


def test_gradient_checkpointing_changes_memory_alone(wan_dir: Path, seed: int) -> None:
    peaks, grads = [], []
    for checkpointing in (False, True):
        adapter = WanAdapter(build_pipeline(layers=6), defaults=SIZE)
        prepare(adapter, None, gradient_checkpointing=checkpointing)
        x0 = torch.randn(4, 16, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        with memory_meter() as memory:
            loss, _ = FlowMatching(adapter).loss(Batch(PROMPTS, latents=x0), torch.Generator().manual_seed(seed))
            loss.backward()
        peaks.append(memory.peak)
        grads.append([p.grad for p in adapter.transformer.parameters() if p.grad is not None])
    assert len(grads[0]) > 10
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    assert peaks[1] < 0.7 * peaks[0]


def test_clipping_shortens_and_does_not_turn(wan_dir: Path, tmp_path: Path) -> None:
    free = gradient_after(wan_dir, tmp_path, batch_size=4, accumulation=1, clip=None)
    limit = 0.25 * float(free.norm())
    clipped = gradient_after(wan_dir, tmp_path, batch_size=4, accumulation=1, clip=limit)
    torch.testing.assert_close(clipped, 0.25 * free, rtol=1e-3, atol=1e-7)
    loose = gradient_after(wan_dir, tmp_path, batch_size=4, accumulation=1, clip=1e6)
    assert torch.equal(loose, free)


def test_warmup_then_constant(wan_dir: Path, tmp_path: Path) -> None:
    trainer = make(wan_dir, settings(tmp_path, steps=4, warmup_steps=2), name="flow_matching")
    trainer.fit()
    assert [line["lr"] for line in log_of(trainer)] == pytest.approx([1e-3, 2e-3, 2e-3, 2e-3])


def test_ema_is_its_recurrence(wan_dir: Path, tmp_path: Path) -> None:
    trainer = make(wan_dir, settings(tmp_path, steps=3, ema_decay=0.25), name="flow_matching")
    average = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    for step in range(3):
        trainer.train_step()
        decay = min(0.25, (1 + step) / (10 + step))
        for name, p in trainer.parameters.items():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    own = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    with trainer.ema_weights():
        for name, p in trainer.parameters.items():
            torch.testing.assert_close(p.detach(), average[name])
    for name, p in trainer.parameters.items():
        assert torch.equal(p, own[name])


# ---------------------------------------------------------------------- numbers that are not finite


class Poisoned(ColorReward):
    """NaN in the listed calls."""

    def __init__(self, calls: set[int]) -> None:
        super().__init__()
        self.calls, self.count = calls, 0

    def terms(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        self.count += 1
        terms = super().terms(frames, prompts)
        return {"color": terms["color"] * math.nan} if self.count in self.calls else terms


def test_a_nan_reward_never_reaches_the_weights(
    wan_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(wan_dir, settings(tmp_path, steps=3, accumulation=2), rewards=Poisoned({3}))
    states: list[dict[str, Tensor]] = []
    step = trainer.train_step

    def watched() -> dict[str, Any]:
        record = step()
        states.append({name: p.detach().clone() for name, p in trainer.parameters.items()})
        return record

    trainer.train_step = watched  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    assert trainer.skipped == 1
    assert "step 2 skipped: loss is not finite" in caplog.text
    lines = log_of(trainer)
    assert [line.get("skipped") for line in lines] == [None, "loss is not finite", None]
    assert all(lines[1][name] is None for name in ("loss", "reward", "reward/color", "anchor", "grad_norm"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[0])
    assert all(torch.isfinite(value).all() for value in states[2].values())
    moment = trainer.optimizer.state[next(iter(trainer.parameters.values()))]
    assert float(moment["step"]) == 2


def test_a_nan_gradient_of_a_finite_loss_is_skipped(wan_dir: Path, tmp_path: Path) -> None:
    class Kink(ColorReward):
        def terms(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
            # sqrt has the slope infinity at zero, and infinity times zero is NaN.
            return {"color": (frames.mean((1, 2, 3, 4)) * 0).sqrt()}

    trainer = make(wan_dir, settings(tmp_path, steps=1), rewards=Kink())
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    record = trainer.train_step()
    assert record["skipped"] == "gradient is not finite"
    assert math.isfinite(record["loss"])  # type: ignore[arg-type]
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


def test_training_stops_when_nothing_is_finite(wan_dir: Path, tmp_path: Path) -> None:
    trainer = make(wan_dir, settings(tmp_path, steps=50), rewards=Poisoned(set(range(100))))
    with pytest.raises(TrainingError, match="10 steps in a row skipped"):
        trainer.fit()
    assert len(log_of(trainer)) == 10


# ---------------------------------------------------------------------- the whole run


@pytest.mark.parametrize("name", ["draft", "one_step"])
def test_the_reward_rises_to_a_known_optimum(wan_dir: Path, tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(
        settings(tmp_path, steps=16, lr=1e-2, ema_decay=0.0), output=OutputConfig(str(tmp_path))
    )
    trainer = make(wan_dir, config, name=name)
    if isinstance(trainer.algorithm, Draft | OneStep):
        trainer.algorithm.anchor_weight = 0.0
    trainer.fit()
    rewards = [line["reward/color"] for line in log_of(trainer)]
    before, after = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert before < after <= 0.0  # 0 is the optimum
    assert after > 0.7 * before


@FULL_AND_LORA
def test_what_is_exported_loads_and_generates_the_same(wan_dir: Path, tmp_path: Path, lora: LoraConfig | None) -> None:
    trainer = make(wan_dir, settings(tmp_path, steps=2, lr=1e-2, lora=lora))
    original = {name: p.detach().clone() for name, p in trainer.adapter.transformer.named_parameters()}
    final = trainer.fit()
    moved = {n for n, p in trainer.adapter.transformer.named_parameters() if not torch.equal(p, original[n])}
    assert moved
    assert moved <= set(trainer.parameters)  # with LoRA: only the adapter
    assert lora is None or all("lora_" in name for name in moved)
    noise = torch.randn(1, 16, 3, 4, 4)
    with trainer.ema_weights():
        wanted = trainer.adapter.sample(PROMPTS[:1], noise=noise)
    if lora is None:
        exported = WanAdapter.from_pretrained(final)
    else:
        pipe = DiffusionPipeline.from_pretrained(str(wan_dir), dtype=torch.float32)
        pipe.load_lora_weights(str(final))
        exported = WanAdapter(pipe, defaults=trainer.adapter.defaults)
    torch.testing.assert_close(exported.sample(PROMPTS[:1], noise=noise), wanted, rtol=0, atol=1e-6)
    base = WanAdapter.from_pretrained(wan_dir).sample(PROMPTS[:1], noise=noise)
    assert (wanted - base).abs().max() > 1e-3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "config.yaml", "final", "log.jsonl"]
    assert set(log_of(trainer)[0]) == {"step", "loss", "reward", "reward/color", "anchor", "grad_norm", "lr"}


def test_nothing_to_train_is_refused(wan_dir: Path, tmp_path: Path) -> None:
    adapter = WanAdapter.from_pretrained(wan_dir)
    adapter.transformer.requires_grad_(False)
    with pytest.raises(ValueError, match="Call prepare first"):
        Trainer(adapter, Quadratic(adapter), settings(tmp_path), batches=PromptBatches(PROMPTS, batch_size=1))


def test_a_bfloat16_model_has_a_float32_adapter(wan_dir: Path, tmp_path: Path) -> None:
    adapter = WanAdapter.from_pretrained(wan_dir, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="would lose small updates"):
        prepare(adapter, None)
    prepare(adapter, LORA)
    algorithm = Draft(adapter, ColorReward(), FrozenBase(adapter), steps=2)
    config = settings(tmp_path, lora=LORA, lr=1e-6, warmup_steps=0)
    trainer = Trainer(adapter, algorithm, config, batches=PromptBatches(PROMPTS, batch_size=2))
    assert adapter.vae.dtype == adapter.transformer.dtype == torch.bfloat16
    assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    assert trainer.train_step()["loss"] is not None
    moved = [name for name, p in trainer.parameters.items() if not torch.equal(p, before[name])]
    assert any("lora_B" in name for name in moved)


# ---------------------------------------------------------------------- batches


def test_each_epoch_is_a_permutation() -> None:
    indices = ShuffledIndices(7, batch_size=3, seed=1)
    sequence = [item for n in range(14) for item in indices[n]]
    epochs = [sequence[7 * e : 7 * e + 7] for e in range(6)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    fresh = ShuffledIndices(7, batch_size=3, seed=1)
    assert [fresh[n] for n in (9, 2, 5)] == [indices[n] for n in (9, 2, 5)]
    assert [ShuffledIndices(7, batch_size=3, seed=2)[n] for n in range(14)] != [indices[n] for n in range(14)]
    with pytest.raises(ValueError, match="expected at least 1"):
        ShuffledIndices(0, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        PromptBatches(["a", " "], batch_size=1)


def test_video_batches_hold_each_videos_latents(wan_dir: Path) -> None:
    adapter, videos = WanAdapter.from_pretrained(wan_dir), Videos()
    batches = VideoBatches(videos, adapter, batch_size=3, seed=0)
    batch = batches[2]
    assert batch.latents is not None
    for prompt, latents in zip(batch.prompts, batch.latents, strict=True):
        frames = videos.frames[videos.captions.index(prompt)]
        assert torch.equal(latents, adapter.encode_frames(frames[None])[0])
    again = batches[2]
    assert again.latents is not None
    assert torch.equal(again.latents, batch.latents)

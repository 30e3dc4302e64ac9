"""Laws of GRPO: the sampler's marginals, the gradient in closed form, clipping, exact resume, a reward that rises."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_wan import PROMPTS, SIZE, build_pipeline, build_tiny_wan
from torch import Tensor
from torch.distributions import Normal
from toy_rewards import ColorReward

from pisces.algorithms import Batch, FrozenBase, Grpo
from pisces.algorithms.grpo import group_advantages, log_density, sde_mean
from pisces.batches import PromptBatches
from pisces.config import GrpoConfig, LoraConfig, OptimizerConfig, OutputConfig, TrainConfig
from pisces.pipelines import WanAdapter, prepare
from pisces.trainer import Trainer


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------- the sampler


def sampled_deviation(score_sign: float, eta: float) -> float:
    """Standard deviation at the end of the stochastic sampler for data N(0, 0.5^2), whose velocity is known."""
    generator, spread = rng(0), 0.5
    x = torch.randn(40_000, generator=generator, dtype=torch.float64)
    sigmas = torch.linspace(1, 0, 301, dtype=torch.float64)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        velocity = x * (sigma - (1 - sigma) * spread**2) / variance
        mean = sde_mean(x, velocity, sigma, sigma_next, eta)
        flat = x - (sigma - sigma_next) * velocity
        mean = flat + score_sign * (mean - flat)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = mean + eta * (sigma - sigma_next).sqrt() * noise * (sigma_next > 0)
    return float(x.std())


@pytest.mark.parametrize("eta", [0.25, 0.7])
def test_the_noisy_sampler_has_the_flows_marginals(eta: float) -> None:
    assert sampled_deviation(1.0, eta) == pytest.approx(0.5, rel=0.03)
    wrong = sampled_deviation(0.0, eta)  # noise without the drift that makes up for it
    assert abs(wrong - 0.5) > 0.02


def test_without_noise_it_is_an_euler_step(seed: int) -> None:
    x, v = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    sigma, sigma_next = torch.tensor(0.7), torch.tensor(0.4)
    torch.testing.assert_close(sde_mean(x, v, sigma, sigma_next, 0.0), x + (sigma_next - sigma) * v)


def test_densities_are_those_of_torch(seed: int) -> None:
    x, mean, std = torch.randn(3, 2, 5), torch.randn(3, 2, 5), torch.tensor(0.3)
    torch.testing.assert_close(log_density(x, mean, std), Normal(mean, std).log_prob(x).flatten(1).mean(1))


def test_advantages_are_standard_within_their_group(seed: int) -> None:
    rewards = torch.randn(3, 8) * torch.tensor([[1.0], [100.0], [0.01]]) + 5
    advantages = group_advantages(rewards.flatten(), 8, 5.0).view(3, 8)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(advantages.std(1, correction=0), torch.ones(3), rtol=1e-2, atol=0)
    assert torch.equal(group_advantages(torch.full((4,), 3.0), 4, 5.0), torch.zeros(4))
    outlier = torch.zeros(100)
    outlier[7] = 1.0
    assert group_advantages(outlier, 100, 5.0)[7] == 5.0
    assert float(group_advantages(outlier, 100, 50.0)[7]) == pytest.approx(math.sqrt(99), rel=1e-3)
    # Rewards whose mean float32 cannot hold: no drift of all samples of the group.
    assert group_advantages(torch.tensor([5.0, 5.00001]), 2, 5.0).sum().abs() < 1e-6


# ---------------------------------------------------------------------- the gradient


class Line:
    """A flow whose velocity is ``rate * x``, its latents the frames."""

    def __init__(self, rate: float) -> None:
        self.rate = torch.tensor(rate, requires_grad=True)
        self.device = torch.device("cpu")

    def latent_shape(self, **size: Any) -> tuple[int, int, int, int]:
        return 3, 2, 2, 2

    def sigmas(self, steps: int, shape: Any = None) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": torch.zeros(len(prompts), 1, 1)}

    def velocity(self, x: Tensor, sigma: Tensor, embeds: Any, *, denoisers: Any = None) -> Tensor:
        return self.rate * x

    def decode(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2)


class Base:
    def velocity(self, x: Tensor, sigma: Tensor, embeds: Any) -> Tensor:
        return 0.3 * x


class TwoRewards:
    weights: ClassVar[dict[str, float]] = {"bright": 0.7, "red": -0.2}

    def terms(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        return {"bright": frames.mean((1, 2, 3, 4)), "red": frames[:, :, 0].square().mean((1, 2, 3))}


def make_line(**options: Any) -> Grpo:
    settings = {"steps": 5, "group_size": 4, "eta": 0.4, "anchor_weight": 0.0, "checkpointing": False, **options}
    return Grpo(Line(0.3), TwoRewards(), Base(), **settings)  # type: ignore[arg-type]


def test_the_gradient_is_the_policy_gradient_in_closed_form(seed: int) -> None:
    algorithm = make_line(updates=2)
    batch = Batch(["a", "b", "c"])
    loss, logs = algorithm.loss(batch, rng(seed))
    rate: Tensor = algorithm.adapter.rate  # type: ignore[attr-defined]
    (grad,) = torch.autograd.grad(loss, rate)
    rollout = algorithm.rollouts[0]
    sigmas = torch.linspace(1, 0, 6)
    wanted = torch.zeros(())
    for n in range(4):
        x, x_next = rollout.states[n], rollout.states[n + 1]
        d, variance = sigmas[n] - sigmas[n + 1], 0.16 * (sigmas[n] - sigmas[n + 1])
        mean = x * (1 - 0.3 * d - 0.08 * d / sigmas[n] * (1 + 0.3 * (1 - sigmas[n])))
        slope = -x * d * (1 + 0.08 * (1 - sigmas[n]) / sigmas[n])  # of the mean in the rate
        score = ((x_next - mean) / variance * slope).mean((1, 2, 3, 4))
        weighted = 0.7 * rollout.advantages[0] - 0.2 * rollout.advantages[1]
        wanted -= (weighted * score).mean() / 4
    assert float(grad) == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)
    assert float(logs["ratio"]) < 1e-5  # on-policy
    # Frames are the last states, and so the advantages are those of these videos.
    terms = TwoRewards().terms(rollout.states[-1].transpose(1, 2), [])
    for row, name in enumerate(TwoRewards.weights):
        torch.testing.assert_close(rollout.advantages[row], group_advantages(terms[name], 4, 5.0))


def test_a_ratio_beyond_its_bound_has_no_gradient_where_it_is_better(seed: int) -> None:
    algorithm = make_line(updates=2, clip=1e-6)
    batch = Batch(["a", "b"])
    algorithm.loss(batch, rng(seed))
    rollout = algorithm.rollouts[0]
    rate: Tensor = algorithm.adapter.rate  # type: ignore[attr-defined]
    with torch.no_grad():
        rate.add_(0.2)
    loss, logs = algorithm.loss(batch, rng(seed + 1))
    (grad,) = torch.autograd.grad(loss, rate)
    sigmas, leaf = torch.linspace(1, 0, 6), rate.detach().clone().requires_grad_()
    total, beyond = torch.zeros(()), []
    for n in range(4):
        x, d = rollout.states[n], sigmas[n] - sigmas[n + 1]
        mean = sde_mean(x, leaf * x, sigmas[n], sigmas[n + 1], 0.4)
        ratio = (log_density(rollout.states[n + 1], mean, 0.4 * d.sqrt()) - rollout.log_densities[n]).exp()
        beyond += ((ratio - 1).abs() > 1e-6).tolist()
        for weight, advantage in zip((0.7, -0.2), rollout.advantages, strict=True):
            better = torch.where(advantage > 0, ratio > 1 + 1e-6, ratio < 1 - 1e-6)
            total = total - weight * torch.where(better, 0.0, advantage * ratio).mean() / 4
    (wanted,) = torch.autograd.grad(total, leaf)
    assert float(grad) == pytest.approx(float(wanted), rel=1e-4, abs=1e-7)
    assert float(logs["clipped"]) == pytest.approx(sum(beyond) / len(beyond))
    assert sum(beyond) > 0.9 * len(beyond)
    algorithm.begin()
    assert not algorithm.rollouts


def test_the_divergence_from_the_base_is_that_of_two_normals(seed: int) -> None:
    algorithm = make_line(kl_weight=2.0, trained_steps=1, updates=2)
    _, logs = algorithm.loss(Batch(["a"]), rng(seed))
    assert float(logs["kl"]) == 0.0  # the student is the base
    with torch.no_grad():
        algorithm.adapter.rate.add_(0.2)  # type: ignore[attr-defined]
    generator = rng(seed)
    _, logs = algorithm.loss(Batch(["a"]), generator)
    states = make_rollout_states(seed)
    sigmas = torch.linspace(1, 0, 6)
    candidates = []
    for n in range(4):
        means = [sde_mean(states[n], r * states[n], sigmas[n], sigmas[n + 1], 0.4) for r in (0.5, 0.3)]
        std = 0.4 * (sigmas[n] - sigmas[n + 1]).sqrt()
        kl = torch.distributions.kl_divergence(Normal(means[0], std), Normal(means[1], std))
        candidates.append(float(kl.mean()))
    assert min(abs(float(logs["kl"]) - value) / value for value in candidates) < 1e-3


@pytest.mark.parametrize("term", ["kl_weight", "anchor_weight", "gradient_weight"])
def test_each_further_term_enters_the_loss_by_its_weight(term: str, seed: int) -> None:
    batch = Batch(["a", "b"], latents=torch.randn(2, 3, 2, 2, 2))
    found = []
    for weight in (0.0, 3.0):
        algorithm = make_line(updates=2, **{term: weight})
        algorithm.loss(batch, rng(seed))
        rate: Tensor = algorithm.adapter.rate  # type: ignore[attr-defined]
        with torch.no_grad():
            rate.add_(0.2)  # the samples are those of the base, the student is another
        loss, _ = algorithm.loss(batch, rng(seed + 1))
        found.append((loss.detach(), *torch.autograd.grad(loss, rate)))
    leaf, generator = torch.tensor(0.5, requires_grad=True), rng(seed + 1)
    torch.randperm(4, generator=generator)  # of the steps, which are all trained
    wanted = 3.0 * TERMS[term](leaf, algorithm.rollouts[0].states, batch, generator)
    (slope,) = torch.autograd.grad(wanted, leaf)
    for difference, value in zip((b - a for a, b in zip(*found, strict=True)), (wanted.detach(), slope), strict=True):
        assert float(difference) == pytest.approx(float(value), rel=1e-3, abs=1e-4)


def divergence(rate: Tensor, states: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """From the base's steps: normal distributions of one spread."""
    sigmas, total = torch.linspace(1, 0, 6), torch.zeros(())
    for n in range(4):
        d, x = sigmas[n] - sigmas[n + 1], states[n]
        apart = d * x * (rate - 0.3) * (1 + 0.08 * (1 - sigmas[n]) / sigmas[n])  # of the student's mean and the base's
        total = total + (apart.square() / (2 * 0.16 * d)).mean() / 4
    return total


def consistency(rate: Tensor, states: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Of real videos, at a random one of 50 levels; one phase, which ends at 0."""
    assert batch.latents is not None
    noise = torch.randn(batch.latents.shape, generator=generator)
    n = torch.randint(50, (2,), generator=generator).view(2, 1, 1, 1, 1)
    s, s_next = 1 - n / 50, 1 - (n + 1) / 50
    x = s * noise + (1 - s) * batch.latents
    y = x * (1 + (s_next - s) * 0.3)
    apart = x * (1 - s * rate) - (y * (1 - s_next * rate)).detach()
    return ((apart.square() + 1e-6).sqrt() - 1e-3).mean()


def direct_reward(rate: Tensor, states: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """Minus that of the first sample of each group, as one prediction at a random step estimates it."""
    n = int(torch.randint(4, (), generator=generator))
    x0 = states[n, ::4] * (1 - (1 - n / 5) * rate)
    return -0.7 * x0.mean() + 0.2 * x0[:, 0].square().mean()


TERMS = {"kl_weight": divergence, "anchor_weight": consistency, "gradient_weight": direct_reward}


def make_rollout_states(seed: int) -> Tensor:
    algorithm = make_line(updates=2)
    algorithm.loss(Batch(["a"]), rng(seed))
    return algorithm.rollouts[0].states


# ---------------------------------------------------------------------- with a pipeline


@pytest.fixture(scope="module")
def wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan", layers=1, shift_terminal=0.2)


def make(
    wan_dir: Path, output: Path, *, updates_in_all: int, lr: float = 2e-3, lora: bool = True, **options: Any
) -> Trainer:
    options = {"steps": 3, "group_size": 4, "kl_weight": 0.01, **options}
    settings = GrpoConfig(anchor_weight=0.0, **options)
    config = TrainConfig(
        algorithm=settings,
        optimizer=OptimizerConfig(lr=lr, accumulation=1, weight_decay=0.0),
        lora=LoraConfig(rank=2, alpha=4.0) if lora else None,
        output=OutputConfig(dir=str(output), save_every=100),
        steps=updates_in_all,
        seed=3,
    )
    adapter = WanAdapter.from_pretrained(wan_dir)
    prepare(adapter, config.lora, seed=config.seed)
    algorithm = Grpo(adapter, ColorReward(), FrozenBase(adapter), **dataclasses.asdict(settings))
    return Trainer(adapter, algorithm, config, batches=PromptBatches(PROMPTS, batch_size=2, seed=config.seed))


def test_resume_between_two_updates_of_a_rollout_is_exact(wan_dir: Path, tmp_path: Path) -> None:
    whole = make(wan_dir, tmp_path / "whole", updates_in_all=5, updates=2, clip=0.1)
    whole.fit()
    make(wan_dir, tmp_path / "parts", updates_in_all=3, updates=2, clip=0.1).fit()
    second = make(wan_dir, tmp_path / "parts", updates_in_all=5, updates=2, clip=0.1)
    second.fit()
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name
    # Negative control: a forgotten rollout is sampled anew from another policy.
    other = make(wan_dir, tmp_path / "other", updates_in_all=5, updates=2, clip=0.1)
    (checkpoint,) = (tmp_path / "parts" / "checkpoints").glob("step-00000003")
    other.load(checkpoint)
    assert other.algorithm.rollouts  # type: ignore[attr-defined]
    other.algorithm.rollouts.clear()  # type: ignore[attr-defined]
    other.train_step()
    other.train_step()
    assert any(not torch.equal(p, other.parameters[n]) for n, p in whole.parameters.items())


def test_checkpointing_does_not_change_the_gradient(wan_dir: Path, tmp_path: Path, seed: int) -> None:
    trainer = make(wan_dir, tmp_path, updates_in_all=1, updates=2)
    grads = []
    for checkpointing in (True, False):
        trainer.algorithm.checkpointing = checkpointing  # type: ignore[attr-defined]
        trainer.algorithm.rollouts.clear()  # type: ignore[attr-defined]
        loss, _ = trainer.algorithm.loss(Batch(PROMPTS[:2]), rng(seed))
        grads.append(torch.autograd.grad(loss, list(trainer.parameters.values()), allow_unused=True))
    for one, other in zip(*grads, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_reward_rises_to_a_known_optimum(wan_dir: Path, tmp_path: Path) -> None:
    options = {"steps": 4, "group_size": 8, "kl_weight": 0.0, "eta": 0.5, "clip": 0.2}
    trainer = make(wan_dir, tmp_path, updates_in_all=30, lr=2e-2, lora=False, **options)
    rewards = [float(trainer.train_step()["reward"]) for _ in range(30)]  # type: ignore[arg-type]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert last > 0.8 * first  # both negative, 0 is the optimum


def test_results_do_not_depend_on_the_micro_batch(wan_dir: Path, tmp_path: Path, seed: int) -> None:
    grads = []
    for micro_batch in (1, 3, 100):
        trainer = make(wan_dir, tmp_path, updates_in_all=1, micro_batch=micro_batch)
        loss, _ = trainer.algorithm.loss(Batch(PROMPTS[:2]), rng(seed))
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in trainer.parameters.values() if p.grad is not None]))
    for grad in grads[1:]:
        assert float((grad - grads[0]).norm() / grads[0].norm()) < 1e-2  # float32 advantages of nearly equal rewards


def test_no_noise_is_added_that_the_next_level_does_not_have() -> None:
    """diffusers' own grid for Wan ends at .278, .0089, 0: noise of the step between would stay in the videos."""
    adapter = WanAdapter(build_pipeline(shift=3.0), defaults=SIZE)
    algorithm = Grpo(adapter, ColorReward(), steps=10, group_size=2, anchor_weight=0.0)
    sigmas = adapter.sigmas(10)
    assert float(sigmas[-2]) < 0.01
    assert algorithm.noisy == list(range(8))
    rollout = algorithm.sample(PROMPTS[:1], adapter.encode_prompts(PROMPTS[:1] * 2), rng(0))
    velocity = adapter.velocity(rollout.states[8], sigmas[8], adapter.encode_prompts(PROMPTS[:1] * 2))
    torch.testing.assert_close(rollout.states[9], rollout.states[8] + (sigmas[9] - sigmas[8]) * velocity)
    assert (rollout.log_densities[8:] == 0).all()
    assert (rollout.log_densities[:8] != 0).all()


def test_a_skipped_step_samples_anew(wan_dir: Path, tmp_path: Path) -> None:
    trainer = make(wan_dir, tmp_path, updates_in_all=3, updates=3)
    good = trainer.algorithm.rewards  # type: ignore[attr-defined]

    class Broken(ColorReward):
        def terms(self, frames: Tensor, prompts: list[str]) -> dict[str, Tensor]:
            return {"color": super().terms(frames, prompts)["color"] * torch.nan}

    trainer.algorithm.rewards = Broken()  # type: ignore[attr-defined]
    assert "skipped" in trainer.train_step()
    trainer.algorithm.rewards = good  # type: ignore[attr-defined]
    assert "skipped" not in trainer.train_step()


def test_all_parts_of_the_loss_run_together(wan_dir: Path, seed: int) -> None:
    adapter = WanAdapter.from_pretrained(wan_dir)
    prepare(adapter, LoraConfig(rank=2, alpha=4.0))
    options = {"steps": 3, "group_size": 2, "trained_steps": 1, "kl_weight": 0.1, "gradient_weight": 0.5}
    algorithm = Grpo(adapter, ColorReward(), FrozenBase(adapter), anchor_weight=1.0, **options)  # type: ignore[arg-type]
    batch = Batch(PROMPTS[:2], frames=torch.rand(2, 9, 3, 32, 32))
    loss, logs = algorithm.loss(batch, rng(seed))
    loss.backward()
    assert set(logs) == {"reward", "reward/color", "ratio", "clipped", "kl", "consistency", "reward_gradient"}
    assert all(math.isfinite(float(value)) for value in logs.values())
    with pytest.raises(ValueError, match="prompts only"):
        algorithm.loss(Batch(PROMPTS[:2]), rng(seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "got steps 1, expected at least 2"),
        ({"group_size": 1}, "got group_size 1, expected at least 2"),
        ({"updates": 0}, "got updates 0, expected at least 1"),
        ({"micro_batch": 0}, "got micro_batch 0, expected at least 1"),
        ({"eta": 5.0}, "expected 1 to 0: of 5 steps so many end where there is more noise than eta 5.0 adds"),
        ({"eta": 0.0}, "got eta 0.0, expected a positive number"),
        ({"trained_steps": 5}, r"got trained_steps 5, expected 1 to 4: of 5 steps"),
    ],
)
def test_what_is_not_possible_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_line(**options)
    with pytest.raises(ValueError, match="base is None"):
        Grpo(Line(0.3), TwoRewards(), None)  # type: ignore[arg-type]

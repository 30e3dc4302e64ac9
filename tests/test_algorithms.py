"""Laws of the training objectives: hand-written formulas, plain autograd, closed forms."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from meter import memory_meter
from tiny_wan import PROMPTS, build_tiny_wan
from torch import Tensor
from toy_rewards import ColorReward, LinearReward

from pisces.algorithms import Batch, Consistency, Draft, FlowMatching, FrozenBase, OneStep, base_anchor, pseudo_huber
from pisces.config import LoraConfig
from pisces.pipelines import WanAdapter, prepare


@pytest.fixture(scope="module")
def wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan", shift_terminal=0.2)


@pytest.fixture
def adapter(wan_dir: Path) -> WanAdapter:
    return WanAdapter.from_pretrained(wan_dir)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(adapter: WanAdapter, loss: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in adapter.transformer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grads[name].flatten() for name in sorted(grads)])


def disturb(adapter: WanAdapter, scale: float) -> None:
    """Move the trainable weights away from the base."""
    with torch.no_grad():
        for parameter in adapter.transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=scale)


class LinearAdapter:
    """A flow whose velocity is ``rate * x``: everything has a closed form."""

    def __init__(self, rate: float, levels: list[float]) -> None:
        self.rate = torch.tensor(rate, requires_grad=True)
        self.levels = torch.tensor(levels)
        self.device = torch.device("cpu")

    def sigmas(self, steps: int, shape: Any = None) -> Tensor:
        return self.levels

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        return torch.zeros(len(prompts), 1, 1)

    def velocity(self, latents: Tensor, sigma: Tensor, embeds: Tensor, *, denoisers: Any = None) -> Tensor:
        return self.rate * latents


class LinearBase:
    def __init__(self, rate: float) -> None:
        self.rate = rate

    def velocity(self, latents: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
        return self.rate * latents


# ---------------------------------------------------------------------- flow matching


def test_flow_matching_is_the_formula_in_float64(adapter: WanAdapter, seed: int) -> None:
    x0 = torch.randn(3, 16, 3, 4, 4)
    loss, _ = FlowMatching(adapter, caption_dropout=0.5).loss(Batch(PROMPTS[:3], latents=x0), rng(seed))
    g = rng(seed)
    noise = torch.randn(x0.shape, generator=g).double()
    u = torch.randn(3, generator=g).double().sigmoid()
    dropped = torch.rand(3, generator=g) < 0.5
    sigma = 2.0 * u / (1.0 + u)  # shift 2
    prompts = ["" if d else p for d, p in zip(dropped, PROMPTS[:3], strict=True)]
    model = copy.deepcopy(adapter.transformer).double()
    errors = []
    for i in range(3):
        x = sigma[i] * noise[i] + (1 - sigma[i]) * x0[i].double()
        (embeds,) = adapter.encode_prompts([prompts[i]]).values()
        v = model(
            hidden_states=x[None],
            timestep=1000 * sigma[i : i + 1],
            encoder_hidden_states=embeds.double(),
            return_dict=False,
        )[0][0]
        errors.append((v - (noise[i] - x0[i].double())).square().mean())
    assert float(loss.detach()) == pytest.approx(float(torch.stack(errors).mean().detach()), rel=1e-4)


def test_flow_matching_needs_videos(adapter: WanAdapter) -> None:
    with pytest.raises(ValueError, match="prompts only"):
        FlowMatching(adapter).loss(Batch(PROMPTS[:1]), rng(0))
    with pytest.raises(ValueError, match="caption_dropout"):
        FlowMatching(adapter, caption_dropout=1.5)


def test_frames_and_latents_of_a_batch_are_the_same_videos(adapter: WanAdapter, seed: int) -> None:
    frames = torch.rand(2, 9, 3, 32, 32)
    algorithm = FlowMatching(adapter)
    by_frames, _ = algorithm.loss(Batch(PROMPTS[:2], frames=frames), rng(seed))
    by_latents, _ = algorithm.loss(Batch(PROMPTS[:2], latents=adapter.encode_frames(frames)), rng(seed))
    assert torch.equal(by_frames, by_latents)


# ---------------------------------------------------------------------- one step


@pytest.mark.parametrize("anchor_weight", [0.0, 1e4])  # the reward's gradient, and beside that the anchor's
def test_one_step_is_the_formula_in_float64(adapter: WanAdapter, seed: int, anchor_weight: float) -> None:
    """With diffusers' own denoiser, decoder and noise levels, without the adapter."""
    rewards, base = LinearReward(seed), FrozenBase(adapter)
    teacher = copy.deepcopy(adapter.transformer).double()
    disturb(adapter, 0.02)
    student, vae = (copy.deepcopy(part).double() for part in (adapter.transformer, adapter.vae))
    x0 = torch.randn(2, 16, 3, 4, 4)
    algorithm = OneStep(adapter, rewards, base, steps=6, anchor_weight=anchor_weight)
    loss, logs = algorithm.loss(Batch(PROMPTS[:2], latents=x0), rng(seed))
    scheduler: Any = copy.deepcopy(adapter.pipe.scheduler)
    scheduler.set_timesteps(6)
    (embeds,) = adapter.encode_prompts(PROMPTS[:2]).values()

    def velocity(model: Any, x: Tensor, sigma: Tensor) -> Tensor:
        output: Tensor = model(
            hidden_states=x,
            timestep=1000 * sigma.flatten(),
            encoder_hidden_states=embeds.double(),
            return_dict=False,
        )[0]
        return output

    generator = rng(seed)
    noise = torch.randn(x0.shape, generator=generator).double()
    n = torch.randint(6, (2,), generator=generator).view(2, 1, 1, 1, 1)
    levels = scheduler.sigmas.double()
    s, s_next = levels[n], levels[n + 1]
    x = s * noise + (1 - s) * x0.double()
    estimate = x - s * velocity(student, x, s)
    mean, std = (
        torch.tensor(vae.config[f"latents_{key}"], dtype=torch.float64).view(-1, 1, 1, 1) for key in ("mean", "std")
    )
    frames = (vae.decode(estimate * std + mean, return_dict=False)[0] / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    inner = (frames * rewards.direction.double()).sum((1, 2, 3, 4))
    reward = 0.7 * inner.mean() - 0.2 * frames.mean()
    with torch.no_grad():
        y = x + (s_next - s) * velocity(teacher, x, s)
        target = y - s_next * velocity(student, y, s_next)
    anchor = ((estimate - target).square() + 1e-6).sqrt().sub(1e-3).mean()

    assert float(logs["reward"]) == pytest.approx(float(reward.detach()), rel=1e-4, abs=1e-2)  # a sum of 27,648 pixels
    if anchor_weight:
        assert float(logs["consistency"]) == pytest.approx(float(anchor.detach()), rel=1e-4, abs=1e-6)
    total = anchor_weight * anchor - reward
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-4, abs=1e-2)
    ours = flat(gradients(adapter, loss)).double()
    names, parameters = zip(*student.named_parameters(), strict=True)
    slopes = torch.autograd.grad(total, parameters, allow_unused=True)
    wanted = flat({name: slope for name, slope in zip(names, slopes, strict=True) if slope is not None})
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-3


def test_one_step_without_anchor_is_the_reward_alone(adapter: WanAdapter, seed: int) -> None:
    rewards = LinearReward(seed)
    algorithm = OneStep(adapter, rewards, FrozenBase(adapter), anchor_weight=0.0)
    loss, logs = algorithm.loss(Batch(PROMPTS[:1], latents=torch.randn(1, 16, 3, 4, 4)), rng(seed))
    assert set(logs) == {"reward", "reward/inner", "reward/bright"}
    assert float(loss.detach()) == -float(logs["reward"])


# ---------------------------------------------------------------------- consistency


def test_pseudo_huber_is_its_formula() -> None:
    x, y = torch.tensor([0.0, 3.0, 1e-5]), torch.zeros(3)
    expected = sum((float(d) ** 2 + 1e-6) ** 0.5 - 1e-3 for d in x) / 3
    assert float(pseudo_huber(x, y)) == pytest.approx(expected, rel=1e-4)
    assert float(pseudo_huber(x, x)) == 0.0


@pytest.mark.parametrize(("phases", "ends"), [(1, [4, 4, 4, 4]), (2, [2, 2, 4, 4]), (4, [1, 2, 3, 4])])
def test_consistency_on_a_linear_flow_has_a_closed_form(phases: int, ends: list[int], seed: int) -> None:
    levels = [1.0, 0.8, 0.5, 0.2, 0.0]
    student, teacher, c = 0.6, -0.9, 1e-3
    adapter = LinearAdapter(student, levels)
    algorithm = Consistency(adapter, LinearBase(teacher), steps=4, phases=phases)  # type: ignore[arg-type]
    assert algorithm.phase_end.tolist() == ends
    x = torch.randn(4, 1, 1, 1, 2)
    index = torch.arange(4)
    loss = algorithm.distance(x, index, torch.zeros(4, 1, 1), adapter.velocity(x, x, x))
    expected, slope = 0.0, 0.0
    for n, value in itertools.product(range(4), range(2)):
        s, s1, se = levels[n], levels[n + 1], levels[ends[n]]
        x_n = float(x[n].flatten()[value])
        reached = x_n * (1 + (se - s) * student)
        target = x_n * (1 + (s1 - s) * teacher) * (1 + (se - s1) * student)
        d = reached - target
        expected += ((d * d + c * c) ** 0.5 - c) / 8
        # The target is a constant: only the student's own extrapolation carries gradient.
        slope += d / (d * d + c * c) ** 0.5 * x_n * (se - s) / 8
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert adapter.rate.grad is not None
    assert float(adapter.rate.grad) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_a_straight_flow_is_consistent(seed: int) -> None:
    class Straight(LinearAdapter):
        """All probability at x0 = 0: v = x / sigma, so every level extrapolates to 0."""

        def velocity(self, latents: Tensor, sigma: Tensor, embeds: Tensor, *, denoisers: Any = None) -> Tensor:
            return self.rate * latents / sigma.view(-1, 1, 1, 1, 1).clamp(min=1e-6)

    levels = [1.0, 0.7, 0.3, 0.0]
    base: Any = Straight(1.0, levels)
    batch = Batch(PROMPTS[:3], latents=torch.zeros(3, 1, 1, 2, 2))
    exact, _ = Consistency(Straight(1.0, levels), base, steps=3).loss(batch, rng(seed))  # type: ignore[arg-type]
    wrong, _ = Consistency(Straight(0.9, levels), base, steps=3).loss(batch, rng(seed))  # type: ignore[arg-type]
    assert float(exact.detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(wrong.detach()) > 1e-3


def test_phases_must_fit_the_steps(adapter: WanAdapter) -> None:
    with pytest.raises(ValueError, match="got 5 phases, expected 1 to 4"):
        Consistency(adapter, FrozenBase(adapter), steps=4, phases=5)


# ---------------------------------------------------------------------- the frozen base


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=2.0)])
def test_the_base_stays_the_base_bit_for_bit(adapter: WanAdapter, seed: int, lora: LoraConfig | None) -> None:
    state = torch.randn(2, 16, 3, 4, 4)
    sigma = torch.tensor([0.9, 0.3])
    embeds = adapter.encode_prompts(PROMPTS[:2])
    original = adapter.velocity(state, sigma, embeds).detach()
    prepare(adapter, lora)
    base = FrozenBase(adapter)
    assert float(base_anchor(adapter, base, state, sigma, embeds).detach()) == 0.0
    disturb(adapter, 0.1)
    assert torch.equal(base.velocity(state, sigma, embeds), original)
    student = adapter.velocity(state, sigma, embeds)
    assert (student - original).abs().max() > 1e-3  # the adapter is on again
    anchor = base_anchor(adapter, base, state, sigma, embeds)
    torch.testing.assert_close(anchor, (student - original).square().mean())
    grads = gradients(adapter, anchor)
    assert grads
    if lora is not None:
        assert all("lora_" in name for name in grads)
        # A weight under an adapter is the one that was loaded.
        fresh = dict(WanAdapter.from_pretrained(adapter.pipe.config._name_or_path).transformer.named_parameters())
        for name, parameter in adapter.transformer.named_parameters():
            if "lora_" not in name:
                assert torch.equal(parameter, fresh[name.replace(".base_layer", "")])


# ---------------------------------------------------------------------- DRaFT


def hand_written(adapter: WanAdapter, rewards: LinearReward, noise: Tensor, steps: int, last_k: int) -> Tensor:
    """The DRaFT loss by a sampler that is written out, decoded in one piece, gradient cut before the last K steps."""
    embeds = adapter.encode_prompts(PROMPTS[: len(noise)])
    sigmas = adapter.sigmas(steps)
    x = noise
    for n in range(steps):
        if n == steps - last_k:
            x = x.detach()
        x = x + (sigmas[n + 1] - sigmas[n]) * adapter.velocity(x, sigmas[n], embeds)
    whole = WanAdapter(adapter.pipe, defaults=adapter.defaults, decoding={"memory": "plain"})
    return -rewards.total(whole.decode(x))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("last_k", [1, 3])
def test_draft_gradient_is_plain_autograd(adapter: WanAdapter, seed: int, last_k: int, checkpointing: bool) -> None:
    rewards = LinearReward(seed)
    algorithm = Draft(adapter, rewards, steps=3, last_k=last_k, anchor_weight=0.0, checkpointing=checkpointing)
    loss, _ = algorithm.loss(Batch(PROMPTS[:2]), rng(seed))
    ours = flat(gradients(adapter, loss))
    noise = torch.randn(2, *adapter.latent_shape(), generator=rng(seed))
    wanted = flat(gradients(adapter, hand_written(adapter, rewards, noise, 3, last_k)))
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-5
    # Negative control: the other K is the same loss with another gradient.
    other = hand_written(adapter, rewards, noise, 3, 4 - last_k)
    torch.testing.assert_close(loss, other, rtol=1e-4, atol=1e-4)
    wrong = flat(gradients(adapter, other))
    assert float((ours - wrong).norm() / wrong.norm()) > 0.05


def test_random_truncation_draws_k(adapter: WanAdapter, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"steps": 3, "anchor_weight": 0.0}
    drawn: list[int] = []
    whole = Draft.rollout

    def rollout(self: Draft, noise: Tensor, embeds: Any, last_k: int) -> Any:
        drawn.append(last_k)
        return whole(self, noise, embeds, last_k)

    def only_draw(self: Draft, noise: Tensor, embeds: Any, last_k: int) -> Any:
        drawn.append(last_k)
        raise InterruptedError

    monkeypatch.setattr(Draft, "rollout", rollout)
    random_k = Draft(adapter, LinearReward(0), last_k=2, truncation="random", **options)  # type: ignore[arg-type]
    loss, _ = random_k.loss(Batch(PROMPTS[:1]), rng(seed))
    ours = flat(gradients(adapter, loss))
    monkeypatch.setattr(Draft, "rollout", only_draw)
    for offset in range(1, 40):  # all alike by chance once in 5e11 runs
        with pytest.raises(InterruptedError):
            random_k.loss(Batch(PROMPTS[:1]), rng(seed + offset))
    monkeypatch.setattr(Draft, "rollout", whole)
    assert set(drawn) == {1, 2}
    fixed = Draft(adapter, LinearReward(0), last_k=drawn[0], **options)  # type: ignore[arg-type]
    wanted = flat(gradients(adapter, fixed.loss(Batch(PROMPTS[:1]), rng(seed))[0]))
    assert torch.equal(ours, wanted)


def test_renoised_samples_take_the_last_step_once_more(adapter: WanAdapter, seed: int) -> None:
    rewards = LinearReward(0)
    algorithm = Draft(adapter, rewards, steps=3, last_k=1, renoised=2, anchor_weight=0.0)
    loss, _ = algorithm.loss(Batch(PROMPTS[:2]), rng(seed))
    ours = flat(gradients(adapter, loss))
    generator = rng(seed)
    first, *others = (torch.randn(2, *adapter.latent_shape(), generator=generator) for _ in range(3))
    embeds, sigmas = adapter.encode_prompts(PROMPTS[:2]), adapter.sigmas(3)
    latents, _ = algorithm.rollout(first, embeds, 1)
    total = rewards.total(adapter.decode(latents))
    for noise in others:
        state = sigmas[2] * noise + (1 - sigmas[2]) * latents.detach()
        total = total + rewards.total(adapter.decode(state - sigmas[2] * adapter.velocity(state, sigmas[2], embeds)))
    wanted = flat(gradients(adapter, -total / 3))
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-4
    torch.testing.assert_close(loss.detach(), -total.detach() / 3, rtol=1e-4, atol=1e-4)


def test_a_draft_step_decodes_in_the_memory_of_a_chunk(adapter: WanAdapter, seed: int) -> None:
    peaks = {}
    for memory in ("plain", "chunked"):
        adapter.decoding = {"memory": memory}
        algorithm = Draft(adapter, ColorReward(), steps=2, last_k=1, anchor_weight=0.0, n_frames=65)
        with memory_meter() as meter:
            loss, _ = algorithm.loss(Batch(PROMPTS[:1]), rng(seed))
            loss.backward()
        peaks[memory] = meter.peak
    assert peaks["chunked"] < 0.5 * peaks["plain"]


def test_draft_samples_what_the_pipeline_samples(adapter: WanAdapter, seed: int) -> None:
    rewards = LinearReward(seed)
    algorithm = Draft(adapter, rewards, steps=3, anchor_weight=0.0)
    with torch.no_grad():
        loss, _ = algorithm.loss(Batch(PROMPTS[:2]), rng(seed))
    assert not loss.requires_grad
    sampled = adapter.sample(PROMPTS[:2], steps=3, generator=rng(seed))
    assert torch.equal(rewards.seen[0], adapter.decode(sampled))


def test_draft_anchor_is_at_a_visited_state(adapter: WanAdapter, seed: int) -> None:
    rewards = LinearReward(seed)
    base = FrozenBase(adapter)
    disturb(adapter, 0.05)
    with_anchor, logs = Draft(adapter, rewards, base, steps=3, last_k=2, anchor_weight=5.0).loss(
        Batch(PROMPTS[:2]), rng(seed)
    )
    free = Draft(adapter, rewards, base, steps=3, last_k=2, anchor_weight=0.0)
    without, _ = free.loss(Batch(PROMPTS[:2]), rng(seed))
    noise = torch.randn(2, *free.shape, generator=rng(seed))
    embeds = adapter.encode_prompts(PROMPTS[:2])
    _, visited = free.rollout(noise, embeds)
    assert torch.equal(visited[0], noise)
    assert len(visited) == 3
    candidates = [
        float(base_anchor(adapter, base, state, sigma, embeds).detach())
        for state, sigma in zip(visited, adapter.sigmas(3)[:3], strict=True)
    ]
    assert min(abs(float(logs["anchor"]) - value) for value in candidates) < 1e-6
    assert float((with_anchor - without).detach()) == pytest.approx(5.0 * float(logs["anchor"]), rel=1e-3, abs=1e-3)


def test_draft_checks_its_arguments(adapter: WanAdapter, tmp_path: Path) -> None:
    rewards = LinearReward(0)
    with pytest.raises(ValueError, match="got last_k 5, expected 1 to 4"):
        Draft(adapter, rewards, steps=4, last_k=5, anchor_weight=0.0)
    with pytest.raises(ValueError, match="base is None"):
        Draft(adapter, rewards, steps=4)
    # diffusers' Euler scheduler ends at sigma .004 unless told otherwise: one step back from there is nothing.
    plain = WanAdapter.from_pretrained(build_tiny_wan(tmp_path / "plain"))
    with pytest.warns(UserWarning, match="almost no gradient"):
        Draft(plain, rewards, steps=4, last_k=1, anchor_weight=0.0)

"""Laws of the rewards: one number a sample, differentiable, deterministic, and transport where it belongs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny_encoder import some_videos, tiny_encoder
from torch import Tensor

from pisces.encoders import load_encoder
from pisces.ot_map import Alignment
from pisces.rewards import (
    CompositeReward,
    Features,
    QualityReward,
    Reward,
    SemanticReward,
    Standardized,
    Transport,
    TransportRefiner,
    leverage,
    standardize,
)
from pisces.rewards.semantic import ROWS
from pisces.tokens import TokenGrid
from pisces.world import checkpoint_path, scene
from pisces_kernels import transport_attention


def rewards() -> dict[str, Reward]:
    encoder = tiny_encoder()
    center = Alignment("center", text_mean=torch.full((8,), 0.1), video_mean=torch.full((8,), -0.2))
    return {
        "quality": QualityReward(encoder),
        "quality_center": QualityReward(encoder, center),
        "semantic": SemanticReward(encoder, transport=None),
        "semantic_probability": SemanticReward(encoder, transport=None, log=False),
        "semantic_tau": SemanticReward(encoder, transport=Transport()),
        "semantic_mass": SemanticReward(encoder, transport=Transport(mass=0.7)),
        "semantic_weighted": SemanticReward(encoder, transport=Transport(mass=0.7, rows="mass")),
        "composite": CompositeReward(
            {"q": Standardized(QualityReward(encoder), 0.1, 0.5), "s": SemanticReward(encoder, transport=Transport())},
            {"q": 1.0, "s": 0.5},
        ),
    }


NAMES = list(rewards())


def test_rewards_need_no_pipeline(offline_environment: dict[str, str]) -> None:
    """They know nothing of the generator, and importing its adapters takes seconds."""
    program = "import sys, pisces.rewards; print([name for name in sys.modules if name.startswith('pisces.pipelines')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=offline_environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_each_sample_has_its_own_reward(name: str, seed: int) -> None:
    reward = rewards()[name]
    frames, prompts = some_videos(5, seed)
    values = reward(frames, prompts)
    assert values.shape == (5,)
    assert values.std() > 0
    assert torch.equal(reward(frames, prompts), values)
    order = [3, 0, 4, 1, 2]
    permuted = reward(frames[order], [prompts[i] for i in order])
    torch.testing.assert_close(permuted, values[order], rtol=1e-4, atol=1e-4)
    alone = torch.cat([reward(frames[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_a_sample_stays_in_the_sample(name: str, seed: int) -> None:
    reward = rewards()[name]
    frames, prompts = some_videos(3, seed)
    frames.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(frames, prompts)[1], frames)
    assert torch.isfinite(gradient).all()
    assert gradient[1].abs().max() > 0
    assert (gradient[[0, 2]] == 0).all()
    assert all(not p.requires_grad for p in reward.parameters())


def test_gradients_are_those_of_finite_differences(seed: int) -> None:
    # the plan is held constant by the definition of the gradient, so only rewards without one can be differenced
    encoder = tiny_encoder().double()
    reward = CompositeReward({"q": QualityReward(encoder), "s": SemanticReward(encoder)}, {"q": 1.0, "s": 0.3})
    frames, prompts = some_videos(2, seed)
    frames = frames.double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(frames, prompts).sum(), frames)
    generator = torch.Generator().manual_seed(seed)
    step, base = 1e-5, 0.01 + 0.98 * frames.detach()
    (gradient,) = torch.autograd.grad(reward(base.requires_grad_(), prompts).sum(), base)
    for _ in range(3):
        direction = torch.randn(frames.shape, generator=generator, dtype=torch.float64)
        ahead, back = (reward((base + s * direction).detach(), prompts).sum() for s in (step, -step))
        torch.testing.assert_close((gradient * direction).sum(), (ahead - back) / (2 * step), rtol=1e-4, atol=1e-7)


def test_quality_is_the_cosine_of_the_aligned_embeddings(seed: int) -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(4, seed)
    y, x = encoder.encode_text(prompts).embedding, encoder.encode_video(frames).embedding
    torch.testing.assert_close(QualityReward(encoder)(frames, prompts), torch.cosine_similarity(y, x))
    m_y, m_x = torch.randn(8) * 0.1, torch.randn(8) * 0.1
    alignment = Alignment("center", text_mean=m_y, video_mean=m_x)
    expected = torch.cosine_similarity(y - m_y, x - m_x)
    torch.testing.assert_close(QualityReward(encoder, alignment)(frames, prompts), expected)


def test_semantic_is_the_probability_of_a_match(seed: int) -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(4, seed)
    logit = encoder.match(encoder.encode_text(prompts), encoder.encode_video(frames))
    torch.testing.assert_close(SemanticReward(encoder, log=False)(frames, prompts), logit.sigmoid())
    torch.testing.assert_close(SemanticReward(encoder)(frames, prompts), logit.sigmoid().log())


def test_transport_changes_the_words_rows_only(seed: int) -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(4, seed)
    text, video = encoder.encode_text(prompts), encoder.encode_video(frames)
    refiner, calls = TransportRefiner(Transport()), []

    def watch(*arguments: Tensor) -> Tensor:
        refined = refiner(*arguments)
        calls.append((arguments[2], refined, arguments[5]))
        return refined

    refined_logit = encoder.match(text, video, refine=watch)
    assert len(calls) == encoder.config.fusion_layers  # one call a layer for the whole batch
    for attention, refined, lexical in calls:
        rows = lexical[:, None].expand(-1, attention.shape[1], -1)
        assert not rows.all()
        assert torch.equal(refined[~rows], attention[~rows])
        assert ((refined - attention).abs().amax(-1)[rows] > 1e-6).all()
        torch.testing.assert_close(refined.sum(-1), torch.ones_like(refined[..., 0]))
    assert (refined_logit - encoder.match(text, video)).abs().max() > 1e-4
    reward = SemanticReward(encoder, transport=Transport())
    torch.testing.assert_close(reward(frames, prompts), torch.nn.functional.logsigmoid(refined_logit))


def test_the_batched_hook_is_the_hook_of_each_pair(seed: int) -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(4, seed)
    prompts[0] = "please watch this very smooth beautiful cinematic clip of " + prompts[0]
    text, video = encoder.encode_text(prompts), encoder.encode_video(frames)
    lengths = text.lexical.sum(1).tolist()
    assert len(set(lengths)) > 1  # ragged
    # enough iterations for every pair: a batch may go on longer than one of its pairs would alone
    refiner = TransportRefiner(Transport(max_iters=2000, tol=1e-6))
    together = encoder.match(text, video, refine=refiner)
    for i in range(4):
        alone = encoder.match(
            encoder.encode_text(prompts[i : i + 1]), encoder.encode_video(frames[i : i + 1]), refine=refiner
        )
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-3)


def test_every_setting_of_the_transport_reaches_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    from pisces.rewards import semantic

    seen: dict[str, object] = {}

    def spy(*arguments: Tensor, **settings: object) -> Tensor:
        seen.update(settings)
        return arguments[2]

    monkeypatch.setattr(semantic, "transport_attention", spy)
    common: dict[str, Any] = {"epsilon": 0.1, "max_iters": 7, "tol": 1e-2, "gamma": 0.3, "eta": 0.4}
    for transport in (Transport(tau=0.8, differentiable_plan=True, **common), Transport(mass=0.6, **common)):
        seen.clear()
        frames, prompts = some_videos(2, seed=1)
        SemanticReward(tiny_encoder(), transport=transport)(frames, prompts)
        wanted = {name: value for name, value in vars(transport).items() if name != "rows"}
        assert {name: seen[name] for name in wanted} == wanted
        assert seen["row_mask"].dtype == torch.bool  # type: ignore[attr-defined]


def hook_inputs(seed: int, words: int, frames: int, side: int) -> tuple[Tensor, ...]:
    """What an encoder hands to a refiner: two heads, the last word of the first sample is none."""
    grid, draw = TokenGrid(frames, side, side, cls=True), torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, size, 32, generator=draw) for size in (words, grid.n_tokens))
    attention = torch.softmax(3 * torch.randn(2, 2, words, grid.n_tokens, generator=draw), -1)
    lexical = torch.ones(2, words, dtype=torch.bool)
    lexical[0, -1] = False
    return query, key, attention, grid.frame_index(), grid.positions(), lexical


@pytest.mark.parametrize("setting", [{"tau": 0.9}, {"mass": 0.6}])
def test_a_plan_may_be_fused_with_its_masses(setting: dict[str, float], seed: int) -> None:
    """As the formula says, and between no transport and normalised rows where the floor is small."""
    inputs = hook_inputs(seed, words=6, frames=2, side=4)
    attention, lexical = inputs[2], inputs[5]
    refine = TransportRefiner(Transport(rows="mass", **setting))
    refined, plan = refine.with_plan(*inputs)
    _, same = TransportRefiner(Transport(**setting)).with_plan(*inputs)
    assert torch.equal(plan, same)
    wanted = torch.softmax((attention.double() + 1e-6).log() + (plan.double() + 1e-6).log(), -1)
    chosen = lexical[:, None, :, None].expand_as(attention)
    torch.testing.assert_close(refined[chosen].double(), wanted[chosen], rtol=1e-4, atol=1e-6)
    assert torch.equal(refined[~chosen], attention[~chosen])
    assert torch.equal(refine(*inputs), refined)


def test_masses_count_where_they_meet_the_floor(seed: int) -> None:
    """A row's factor cancels in the softmax; only the floor tells the forms apart, so their size decides."""

    def distance(words: int, frames: int, side: int) -> float:
        inputs = hook_inputs(seed, words, frames, side)
        normalised, weighted = (TransportRefiner(Transport(mass=0.9, rows=rows))(*inputs) for rows in ROWS)
        return float((normalised - weighted).abs().sum(-1).mean() / 2)

    small, official = distance(6, 2, 4), distance(40, 8, 16)
    assert small < 0.02 < official


def test_the_gradient_runs_through_the_plan_if_asked(seed: int) -> None:
    """Finite differences of the whole semantic reward in float64, plan and all; without being asked they disagree."""
    encoder = tiny_encoder().double()
    frames, prompts = some_videos(2, seed)
    frames = (0.2 + 0.6 * frames).double()
    for rows in ROWS:
        gradients = []
        for through in (True, False):
            transport = Transport(rows=rows, differentiable_plan=through, tol=1e-12, max_iters=5000)
            reward = SemanticReward(encoder, transport=transport)
            leaf = frames.clone().requires_grad_()
            gradients += torch.autograd.grad(reward(leaf, prompts).sum(), leaf)
        apart = gradients[0] - gradients[1]
        assert apart.norm() > 1e-4 * gradients[0].norm(), rows
        # along what tells them apart, no chance can hide which one is the slope
        for direction in (apart / apart.norm(), torch.randn_like(frames)):
            with torch.no_grad():
                step = 2e-4 / float(direction.norm())
                up, down = (reward(frames + sign * step * direction, prompts).sum() for sign in (1, -1))
            wanted = (up - down) / (2 * step)
            scale = float(gradients[0].norm() * direction.norm())
            assert abs((gradients[0] * direction).sum() - wanted) < 1e-6 * scale, rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": -1.0}, "epsilon is -1.0, expected a finite number above 0"),
        ({"tau": 0.0}, r"tau is 0.0, expected a number in \(0, 1\]"),
        ({"mass": 1.5}, r"mass is 1.5, expected a number in \(0, 1\]"),
        ({"max_iters": 0}, "max_iters is 0"),
        ({"tol": float("nan")}, "tol is nan"),
        ({"gamma": float("inf")}, "gamma is inf"),
        ({"rows": "normal"}, "rows is 'normal', expected 'normalized' or 'mass'"),
        ({"tau": 0.5, "mass": 0.9}, "mass is 0.9 and tau 0.5, expected one of them"),
    ],
)
def test_settings_out_of_range_are_refused_when_they_are_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Transport: {message}"):
        Transport(**settings)


def test_plans_hold_no_gradient(seed: int) -> None:
    """Gradients run through the attention: with the plan as a constant prior the same gradient comes out."""
    encoder = tiny_encoder()
    frames, prompts = some_videos(2, seed)
    text = encoder.encode_text(prompts)
    plans: list[Tensor] = []

    def remember(q: Tensor, k: Tensor, attention: Tensor, f: Tensor, p: Tensor, lexical: Tensor) -> Tensor:
        refined, plan = transport_attention(q, k, attention, f, p, row_mask=lexical, return_plan=True)
        plans.append((plan / plan.sum(-1, keepdim=True).clamp_min(1e-30)).detach())
        return refined

    def prior(q: Tensor, k: Tensor, attention: Tensor, f: Tensor, p: Tensor, lexical: Tensor) -> Tensor:
        fused = ((attention + 1e-6).log() + (waiting.pop(0) + 1e-6).log()).softmax(-1)
        return torch.where(lexical[:, None, :, None], fused, attention)

    frames.requires_grad_()
    refined = encoder.match(text, encoder.encode_video(frames), refine=remember)
    waiting = list(plans)
    fixed = encoder.match(text, encoder.encode_video(frames), refine=prior)
    torch.testing.assert_close(refined, fixed, rtol=1e-4, atol=1e-4)
    first, second = (torch.autograd.grad(value.sum(), frames)[0] for value in (refined, fixed))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_standardized_has_mean_0_and_std_1_on_its_reference(seed: int) -> None:
    frames, prompts = some_videos(11, seed)
    reward = QualityReward(tiny_encoder())
    scaled = standardize(reward, frames, prompts, batch_size=4)
    values = scaled(frames, prompts)
    torch.testing.assert_close(values.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(values * scaled.std + scaled.mean, reward(frames, prompts))
    assert not scaled.mean.requires_grad
    parts = [reward(frames[i : i + 4], prompts[i : i + 4]).detach() for i in (0, 4, 8)]
    again = Standardized.over(reward, torch.cat(parts))
    assert torch.equal(again.mean, scaled.mean)
    assert torch.equal(again.std, scaled.std)


def test_standardizing_what_has_no_spread_is_refused() -> None:
    frames, prompts = some_videos(1, seed=2)
    reward = QualityReward(tiny_encoder())
    with pytest.raises(ValueError, match="at least two"):
        standardize(reward, frames, prompts)
    with pytest.raises(ValueError, match="expected a spread"):
        standardize(reward, frames.expand(3, -1, -1, -1, -1), prompts * 3)
    with pytest.raises(ValueError, match="batch_size"):
        standardize(reward, frames.expand(3, -1, -1, -1, -1), prompts * 3, batch_size=0)
    for values, message in ((torch.ones(1), "rewards of 1 videos"), (torch.ones(3), "expected a spread")):
        with pytest.raises(ValueError, match=message):
            Standardized.over(reward, values)
    for std in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive"):
            Standardized(reward, 0.0, std)


def test_a_composite_is_the_weighted_sum_and_encodes_once(seed: int) -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(3, seed)
    parts: dict[str, Reward] = {
        "q": QualityReward(encoder),
        "s": Standardized(SemanticReward(encoder, transport=Transport()), -1.0, 2.0),
    }
    reward = CompositeReward(parts, {"q": 2.0, "s": -0.5})
    calls = []
    real = encoder.encode_video
    encoder.encode_video = lambda x: calls.append(1) or real(x)  # type: ignore[method-assign,assignment]
    total = reward(frames, prompts)
    assert len(calls) == 1
    terms = reward.terms(frames, prompts)
    assert list(terms) == ["q", "s"]
    for name, part in parts.items():
        torch.testing.assert_close(terms[name], part(frames, prompts))
    torch.testing.assert_close(total, 2.0 * terms["q"] - 0.5 * terms["s"])
    torch.testing.assert_close(reward.total(terms), total)
    other = CompositeReward({"a": QualityReward(encoder), "b": QualityReward(tiny_encoder(seed=1))}, {"a": 1, "b": 1})
    values = other.terms(frames, prompts)
    assert (values["a"] - values["b"]).abs().max() > 1e-3  # two encoders are not mixed up


def test_composites_need_the_same_names() -> None:
    reward = QualityReward(tiny_encoder())
    for weights in ({}, {"r": 1.0}, {"q": 1.0, "r": 1.0}):
        with pytest.raises(ValueError, match=r"expected \['q'\]"):
            CompositeReward({"q": reward}, weights)
    with pytest.raises(ValueError, match="at least one"):
        CompositeReward({}, {})


def test_leverage_by_hand(seed: int) -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(6, seed)
    text, video = encoder.encode_text(prompts), encoder.encode_video(frames)

    def uniform(q: Tensor, k: Tensor, attention: Tensor, f: Tensor, p: Tensor, lexical: Tensor) -> Tensor:
        result = attention.clone()
        for i in range(6):
            result[i, :, lexical[i]] = 1 / 64
        return result

    transport = Transport(tau=0.5)
    report = leverage(encoder, frames, prompts, transport)
    with torch.no_grad():
        plain = encoder.match(text, video)
        flat = encoder.match(text, video, refine=uniform)
        refined = encoder.match(text, video, refine=TransportRefiner(transport))
    assert report["logit_std"] == pytest.approx(float(plain.std()), rel=1e-4)
    assert report["uniform"] == pytest.approx(float((flat - plain).abs().mean()), rel=1e-3)
    assert report["partial_ot"] == pytest.approx(float((refined - plain).abs().mean()), rel=1e-3)
    assert report["partial_ot"] != leverage(encoder, frames, prompts)["partial_ot"]
    with pytest.raises(ValueError, match="at least two"):
        leverage(encoder, frames[:1], prompts[:1])


@pytest.mark.parametrize("name", ["quality", "semantic_tau", "composite"])
def test_bad_input_is_named(name: str) -> None:
    reward = rewards()[name]
    frames, prompts = some_videos(2, seed=3)
    with pytest.raises(ValueError, match="1 prompts for 2 videos"):
        reward(frames, prompts[:1])
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        reward(frames, [prompts[0], " "])
    with pytest.raises(ValueError, match="B, T, 3"):
        reward(frames[0], prompts)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        reward(frames * 255, prompts)
    with pytest.raises(TypeError, match="uint8"):
        reward((frames * 255).to(torch.uint8), prompts)
    with pytest.raises(TypeError, match="one string"):
        reward(frames, "a red square")


def test_a_broken_video_breaks_its_own_reward_only(seed: int) -> None:
    frames, prompts = some_videos(3, seed)
    reward = QualityReward(tiny_encoder())
    whole = reward(frames, prompts)
    frames[1, 2, 0, 5, 5] = torch.nan
    values = reward(frames, prompts)
    assert torch.isnan(values[1])
    torch.testing.assert_close(values[[0, 2]], whole[[0, 2]], rtol=1e-4, atol=1e-5)


def test_other_parts_must_fit() -> None:
    alignment = Alignment("center", text_mean=torch.zeros(5), video_mean=torch.zeros(5))
    with pytest.raises(ValueError, match="width 5, expected 8"):
        QualityReward(tiny_encoder(), alignment)
    frames, prompts = some_videos(1, seed=4)
    with pytest.raises(NotImplementedError, match="defines no score"):
        Reward()(frames, prompts)


def test_features_encode_once_per_encoder() -> None:
    frames, prompts = some_videos(2, seed=5)
    features, encoder = Features(frames, prompts), tiny_encoder()
    assert features.encode(encoder)[1] is features.encode(encoder)[1]
    assert features.encode(tiny_encoder())[1] is not features.encode(encoder)[1]


def test_the_packaged_rewards_prefer_what_was_asked_for() -> None:
    encoder = load_encoder(checkpoint_path("encoder"))
    generator = torch.Generator().manual_seed(123)
    scenes = scene.sample_scenes(48, generator, split="held_out")
    prompts = scene.captions(scenes)
    right = scene.render(scenes, generator)
    wrong = scene.render(scene.flip_attribute(scenes, generator), generator)
    quality = QualityReward(encoder)
    semantic = SemanticReward(encoder, transport=Transport())
    for reward in (quality, semantic):
        assert (reward(right, prompts) > reward(wrong, prompts)).float().mean() >= 0.95
    bad = scene.corrupt_frames(right, generator, 1.0)
    assert (quality(right, prompts) > quality(bad, prompts)).float().mean() >= 0.95

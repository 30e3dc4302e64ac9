"""Laws of the rewards: one number a sample, differentiable, deterministic, and transport where it belongs."""

from __future__ import annotations

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
        "composite": CompositeReward(
            {"q": Standardized(QualityReward(encoder), 0.1, 0.5), "s": SemanticReward(encoder, transport=Transport())},
            {"q": 1.0, "s": 0.5},
        ),
    }


NAMES = list(rewards())


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
    transport = Transport(epsilon=0.1, tau=0.8, mass=0.6, max_iters=7, tol=1e-2, gamma=0.3, eta=0.4)
    frames, prompts = some_videos(2, seed=1)
    SemanticReward(tiny_encoder(), transport=transport)(frames, prompts)
    assert {name: seen[name] for name in vars(transport)} == vars(transport)
    assert seen["row_mask"].dtype == torch.bool  # type: ignore[attr-defined]


def test_the_mass_of_a_word_cancels_in_the_fusion(seed: int) -> None:
    """Why there is no mass-weighted form of the plan: the softmax of a row forgets a factor of the row."""
    attention, plan = torch.rand(2, 3, 5, 64).softmax(-1), torch.rand(2, 3, 5, 64).softmax(-1)  # entries of 0.01
    mass = 0.05 + 0.95 * torch.rand(2, 3, 5, 1)
    normalised, weighted = (((attention + 1e-6).log() + (p + 1e-6).log()).softmax(-1) for p in (plan, mass * plan))
    torch.testing.assert_close(weighted, normalised, rtol=4e-3, atol=0)  # up to 1e-6 / (mass * plan)
    other = ((attention + 1e-6).log() + 0.5 * (plan + 1e-6).log()).softmax(-1)
    assert (other - normalised).abs().max() > 1e-4


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

"""InternVideo2: its formulas, its gradients, its words, and the hook into its attention."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import internvideo2_peer as peer
import pytest
import torch
from meter import memory_meter
from tiny_internvideo2 import SMALL, VOCABULARY, small_model, some_frames, some_prompts
from torch import Tensor

from pisces.digests import module_digest
from pisces.encoders import InternVideo2, resample
from pisces.encoders.internvideo2.wordpiece import WordPieces
from pisces.rewards import CompositeReward, QualityReward, SemanticReward, Transport, TransportRefiner, leverage
from pisces_kernels.compat import pisces as released

DOUBLE = {"rtol": 1e-10, "atol": 1e-10}


pytestmark = pytest.mark.usefixtures("one_thread")


def test_forward_equals_the_formulas() -> None:
    model = small_model()
    frames, prompts = some_frames(3), some_prompts(3)
    text, video = model.encode_text(prompts), model.encode_video(frames)
    logit = model.match(text, video)
    weights, cut = dict(model.state_dict()), SMALL.embedding_tokens
    for i, ids in enumerate(model.words.encode(prompts, max_tokens=SMALL.max_tokens)):
        tokens, pooled = peer.vision(weights, frames[i], SMALL)
        torch.testing.assert_close(video.tokens[i], tokens, **DOUBLE)
        words = peer.text(weights, ids, SMALL)
        torch.testing.assert_close(text.tokens[i, : len(ids)], words, **DOUBLE)
        short = ids if len(ids) <= cut else [*ids[: cut - 1], ids[-1]]
        y, x = peer.embeddings(weights, peer.text(weights, short, SMALL)[0], pooled)
        torch.testing.assert_close(text.embedding[i], y, **DOUBLE)
        torch.testing.assert_close(video.embedding[i], x, **DOUBLE)
        torch.testing.assert_close(logit[i].sigmoid(), peer.match(weights, words, tokens, SMALL), **DOUBLE)
    # every weight but the unused temperature shows in what was compared
    for name, value in weights.items():
        if name != "temp" and value.is_floating_point():
            other = {**weights, name: value + 0.1 * torch.randn_like(value)}
            got = peer_values(other, frames[1], model.words.encode(prompts, max_tokens=16)[1])
            base = peer_values(weights, frames[1], model.words.encode(prompts, max_tokens=16)[1])
            # what is added to all keys adds a constant to all scores of a row, which drops out of a softmax
            silent = name.endswith((".key.bias", ".k_bias", "norm1_k.bias"))
            assert ((got - base).abs().max() < 1e-12) == silent, name


def peer_values(weights: dict[str, Tensor], frames: Tensor, ids: list[int]) -> Tensor:
    tokens, pooled = peer.vision(weights, frames, SMALL)
    words = peer.text(weights, ids, SMALL)
    return torch.cat([*peer.embeddings(weights, words[0], pooled), peer.match(weights, words, tokens, SMALL)[None]])


def test_the_text_tower_is_berts() -> None:
    from transformers import BertConfig, BertModel

    model = small_model()
    config = BertConfig(
        vocab_size=SMALL.vocabulary_size, hidden_size=SMALL.text_width, num_hidden_layers=SMALL.text_layers,
        num_attention_heads=SMALL.text_heads, intermediate_size=SMALL.text_mlp,
        max_position_embeddings=SMALL.text_positions,
    )  # fmt: skip
    bert = BertModel(config, add_pooling_layer=False).double().eval()
    prefix = "text_encoder.bert."
    state = {name.removeprefix(prefix): value for name, value in model.state_dict().items() if name.startswith(prefix)}
    wanted = bert.state_dict()
    bert.load_state_dict({name: state[name] for name in wanted})
    ids = model.token_ids(some_prompts(3))
    text = model.encode_ids(ids)
    peer_tokens = bert(input_ids=ids, attention_mask=text.mask.long()).last_hidden_state
    torch.testing.assert_close(text.tokens[text.mask], peer_tokens[text.mask], **DOUBLE)


def test_word_pieces_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    theirs = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=True)
    ours = WordPieces(tmp_path / "vocab.txt")
    assert ours.size == len(VOCABULARY)
    prompts = [*some_prompts(6), "The RED dogs, running\tfast.", "Réd  dög over 犬 the hill", "a" * 101, "dog\u200bs"]
    assert ours.encode(prompts, max_tokens=40) == theirs(prompts)["input_ids"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cut = ours.encode(prompts, max_tokens=6)
    assert any(re.search(r"prompts\[1\] has \d+ word pieces, only 4 are read", str(w.message)) for w in caught)
    assert cut == theirs(prompts, truncation=True, max_length=6)["input_ids"]
    # the names of the special tokens cannot be written
    assert ours.encode(["[SEP]"], max_tokens=40) == [[2, *map(VOCABULARY.index, ("[", "sep", "]")), 3]]


def test_prompts_without_words_and_encoders_without_vocabulary_are_named(tmp_path: Path) -> None:
    model = small_model()
    for bad in ("", " \n", "?!", "_"):
        with pytest.raises(ValueError, match=r"prompts\[1\]"):
            model.encode_text(["a red dog", bad])
    with pytest.raises(TypeError, match="one string"):
        model.encode_text("a red dog")
    with pytest.raises(ValueError, match="this encoder has no vocabulary"):
        InternVideo2(SMALL).encode_text(["a red dog"])
    with pytest.raises(ValueError, match=r"no \['\[PAD\]'"):
        InternVideo2(SMALL, ["dog"])
    with pytest.raises(ValueError, match="22 word pieces, expected 21"):
        InternVideo2(SMALL, [*VOCABULARY, "cat"])
    with pytest.raises(FileNotFoundError, match="no file"):
        InternVideo2(SMALL, tmp_path / "vocab.txt")


def test_the_embedding_is_of_the_cut_prompt_and_the_tokens_of_the_whole() -> None:
    model = small_model()
    long = "a red dog run over the hill"
    text, cut = model.encode_text([long, "a dog"]), model.encode_text(["a red dog run", "a dog"])
    assert text.tokens.shape[1] == 9
    assert cut.tokens.shape[1] == SMALL.embedding_tokens
    torch.testing.assert_close(text.embedding, cut.embedding, **DOUBLE)
    other = model.encode_text(["a red dog run over the dog", "a dog"])
    assert torch.equal(other.embedding[1], text.embedding[1])
    assert (other.tokens[0, 0] - text.tokens[0, 0]).abs().max() > 1e-3
    assert text.lexical.sum(1).tolist() == [7, 2]
    assert text.mask.sum(1).tolist() == [9, 4]


def test_pixel_gradients_are_those_of_finite_differences() -> None:
    model = small_model()
    prompts = some_prompts(2)
    text = model.encode_text(prompts)

    def value(x: Tensor) -> Tensor:
        video = model.encode_video(x)
        return (model.match(text, video) + (text.embedding * video.embedding).sum(-1)).sum()

    # other frames and pixels than the encoder's; far from 0 and 1, where interpolation cuts off what it overshoots
    frames = (0.3 + 0.4 * some_frames(2, 4, 41, 33)).requires_grad_()
    (gradient,) = torch.autograd.grad(value(frames), frames)
    picked = [0, 2, 3]  # of the four frames the encoder reads three
    assert (gradient[:, picked].abs().amax((0, 2, 3, 4)) > 0).all()
    assert (gradient[:, 1] == 0).all()
    step, base = 1e-6, frames.detach()
    for _ in range(4):
        direction = torch.randn_like(base)
        slope = (value(base + step * direction) - value(base - step * direction)) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-7)


def test_a_ragged_batch_is_its_samples() -> None:
    model = small_model()
    frames, prompts = some_frames(5), some_prompts(5)
    text, video = model.encode_text(prompts), model.encode_video(frames)
    assert len(set(text.lexical.sum(1).tolist())) > 1
    refine = TransportRefiner(Transport(max_iters=2000, tol=1e-11))
    together = [model.match(text, video), model.match(text, video, refine=refine)]
    for i in range(5):
        text_i, video_i = model.encode_text(prompts[i : i + 1]), model.encode_video(frames[i : i + 1])
        torch.testing.assert_close(text_i.embedding[0], text.embedding[i], **DOUBLE)
        torch.testing.assert_close(video_i.embedding[0], video.embedding[i], **DOUBLE)
        torch.testing.assert_close(model.match(text_i, video_i)[0], together[0][i], **DOUBLE)
        torch.testing.assert_close(model.match(text_i, video_i, refine=refine)[0], together[1][i], rtol=1e-7, atol=1e-7)
    assert (together[0] - together[1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="5 texts and 1 videos"):
        model.match(text, video_i)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 14, 60), (3, 28, 28), (17, 90, 31), (2, 5, 7)])
def test_any_length_and_size_is_read_the_same_way_twice(shape: tuple[int, int, int]) -> None:
    model = small_model()
    frames = some_frames(2, *shape)
    first, second = model.encode_video(frames), model.encode_video(frames)
    assert torch.equal(first.embedding, second.embedding)
    assert first.tokens.shape == (2, 1 + 3 * 4, SMALL.vision_width)
    torch.testing.assert_close(first.embedding.norm(dim=1), torch.ones(2, dtype=torch.float64))
    ready = resample(frames, 3, 28, mode="bicubic")
    assert torch.equal(model.encode_video(ready).embedding, first.embedding)
    if shape[1:] != (28, 28):
        linear = model.encode_video(resample(frames, 3, 28)).embedding
        assert (linear - first.embedding).abs().max() > 1e-6  # bicubic it is
    assert torch.equal(first.frame_index, torch.tensor([-1.0, *([0.0] * 4), *([1.0] * 4), *([2.0] * 4)]))
    assert first.positions[:5].tolist() == [[-1, -1], [0, 0], [0, 1], [1, 0], [1, 1]]
    with pytest.raises(ValueError, match="B, T, 3"):
        model.encode_video(frames[0])


def test_the_hook_sees_every_fusion_layer_once() -> None:
    model = small_model()
    text, video = model.encode_text(some_prompts(3)), model.encode_video(some_frames(3))
    calls: list[tuple[Tensor, ...]] = []

    def look(*arguments: Tensor) -> Tensor:
        calls.append(arguments)
        return arguments[2]

    torch.testing.assert_close(model.match(text, video, refine=look), model.match(text, video), **DOUBLE)
    assert len(calls) == SMALL.fusion_layers
    n = text.tokens.shape[1]
    for query, key, attention, frame_index, positions, lexical in calls:
        assert query.shape == (3, n, 20)
        assert key.shape == (3, 13, 20)
        assert attention.shape == (3, 2, n, 13)
        q, k = (x.unflatten(-1, (2, 10)).transpose(1, 2) for x in (query, key))
        torch.testing.assert_close((q @ k.transpose(-1, -2) / 10**0.5).softmax(-1), attention, **DOUBLE)
        assert frame_index is video.frame_index
        assert positions is video.positions
        assert lexical is text.lexical


def test_transport_in_the_hook_is_the_released_code_head_by_head() -> None:
    model = small_model()
    text, video = model.encode_text(some_prompts(3)), model.encode_video(some_frames(3))
    transport = Transport(tau=0.9, max_iters=3000, tol=1e-12)
    refiner, calls = TransportRefiner(transport), []

    def watch(*arguments: Tensor) -> Tensor:
        calls.append((arguments, refiner(*arguments)))
        return calls[-1][1]

    model.match(text, video, refine=watch)
    assert len(calls) == SMALL.fusion_layers
    for (query, key, attention, frame_index, positions, lexical), refined in calls:
        for b in range(3):
            rows = lexical[b].nonzero()[:, 0]
            for h in range(SMALL.text_heads):
                a = attention[b, h, rows]
                cost = released.compute_spatiotemporal_cost(query[b, rows], key[b], a, frame_index, positions)
                plans = [
                    released.solve_partial_ot(cost, transported_mass=m, max_iterations=3000, tolerance=1e-12)
                    for m in (0.9, 0.5)
                ]
                priors = [released.normalize_transport_rows(plan) for plan in plans]
                fused = [(a + 1e-6) * (prior + 1e-6) for prior in priors]
                fused = [x / x.sum(-1, keepdim=True) for x in fused]
                torch.testing.assert_close(refined[b, h, rows], fused[0], rtol=1e-7, atol=1e-9)
                if len(rows) > 1:
                    assert (refined[b, h, rows] - fused[1]).abs().max() > 1e-6  # another m is another attention
            rest = ~lexical[b]
            assert torch.equal(refined[b, :, rest], attention[b, :, rest])


def test_activation_checkpointing_gives_the_same_gradient_in_less_memory() -> None:
    sizes = {"n_frames": 8, "size": 56, "vision_layers": 24}
    model = small_model(**sizes)
    frugal = InternVideo2(replace(model.config, checkpoint=True), VOCABULARY).double().requires_grad_(False)
    frugal.load_state_dict(model.state_dict())
    frames, gradients, peaks = some_frames(2, 8, 56, 56).requires_grad_(), [], []
    for m in (model, frugal):
        m.encode_video(frames)  # what is made once is made
        with memory_meter() as memory:
            gradients.append(torch.autograd.grad(m.encode_video(frames).embedding[:, 0].sum(), frames)[0])
        peaks.append(memory.peak)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0
    assert peaks[1] < 0.5 * peaks[0]
    with torch.no_grad():
        assert torch.equal(model.encode_video(frames).tokens, frugal.encode_video(frames).tokens)


@pytest.mark.parametrize("transport", [None, Transport(tol=1e-9), Transport(mass=0.8, differentiable_plan=True)])
def test_fusion_layers_keep_no_attention_under_checkpointing(transport: Transport | None) -> None:
    model = small_model(fusion_layers=6, size=112, n_frames=4, text_heads=8, text_width=32)
    frugal = InternVideo2(replace(model.config, checkpoint=True), VOCABULARY).double().requires_grad_(False)
    frugal.load_state_dict(model.state_dict())
    refine = None if transport is None else TransportRefiner(transport)
    text, tokens = model.encode_text(some_prompts(2)), model.encode_video(some_frames(2)).tokens.requires_grad_()
    video, gradients, peaks = replace(model.encode_video(some_frames(2)), tokens=tokens), [], []
    for m in (model, frugal):
        with memory_meter() as memory:
            gradients.append(torch.autograd.grad(m.match(text, video, refine=refine).sum(), tokens)[0])
        peaks.append(memory.peak)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
    assert gradients[0].abs().max() > 0
    assert peaks[1] < 0.5 * peaks[0]


def test_sixteen_bits_are_finite_and_near() -> None:
    model = small_model().float()
    frames, prompts = some_frames(16).float(), some_prompts(16)
    half = InternVideo2(SMALL, VOCABULARY).bfloat16().requires_grad_(False)
    half.load_state_dict(model.state_dict())
    model.load_state_dict(
        {name: value.float() for name, value in half.state_dict().items() if "ids" not in name}, False
    )
    values = []
    for m in (model, half):
        text, video = m.encode_text(prompts), m.encode_video(frames)
        refined = m.match(text, video, refine=TransportRefiner(Transport()))
        values.append([text.embedding, video.embedding, m.match(text, video), refined])
        assert all(x.dtype == torch.float32 for x in values[-1])
    assert video.tokens.dtype == text.tokens.dtype == torch.bfloat16
    assert torch.equal(video.positions, SMALL.grid.positions())
    for wide, narrow in zip(*values, strict=True):
        assert torch.isfinite(narrow).all()
        assert not torch.equal(narrow, wide)
        # a few samples of a random model hang on the last digit of an attention score
        assert (narrow - wide).abs().median() < (0.02 if wide.dim() == 2 else 0.2)


def test_the_rewards_run_on_it() -> None:
    model = small_model()
    parts = {"q": QualityReward(model), "s": SemanticReward(model, transport=Transport())}
    reward = CompositeReward(parts, {"q": 1.0, "s": 0.5})
    frames, prompts = some_frames(4, 5, 30, 40).requires_grad_(), some_prompts(4)
    values = reward(frames, prompts)
    assert values.shape == (4,)
    assert values.std() > 0
    for part in (*parts.values(), reward):
        (gradient,) = torch.autograd.grad(part(frames, prompts)[2], frames)
        assert torch.isfinite(gradient).all()
        assert gradient[2].abs().max() > 0
        assert (gradient[[0, 1, 3]] == 0).all()
    report = leverage(model, frames.detach(), prompts)
    assert report["partial_ot"] > 0
    with torch.no_grad():
        broken = frames.detach().clone()
        broken[1, 2, 0, 15, 20] = torch.nan
        assert reward(broken, prompts).isnan().tolist() == [False, True, False, False]


def test_the_fused_layers_gelu_is_another_one() -> None:
    model = small_model()
    other = InternVideo2(replace(SMALL, gelu="tanh"), VOCABULARY).double()
    other.load_state_dict(model.state_dict())
    frames = some_frames(1)
    difference = (other.encode_video(frames).embedding - model.encode_video(frames).embedding).abs().max()
    assert 1e-7 < difference < 1e-2


def test_activation_checkpointing_is_no_other_encoder() -> None:
    """What a folder of embeddings or a cache is known by depends on what the encoder computes."""
    model = small_model()
    digest = module_digest(model)
    model.config = replace(model.config, checkpoint=True)
    assert module_digest(model) == digest
    model.config = replace(model.config, gelu="tanh")
    assert module_digest(model) != digest

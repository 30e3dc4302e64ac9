"""Encoders over models of transformers: equal to the models' own calls, differentiable, clear about what they lack."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import NAMES, save_tiny, tiny_model
from torch import Tensor

from pisces.encoders import AttentionRefiner, BlipEncoder, DualEncoder, load_encoder
from pisces.encoders.pretrained import Pixels
from pisces.ot_map import Alignment
from pisces.ot_map.encoder_digest import encoder_digest
from pisces.rewards import QualityReward, SemanticReward, Transport, TransportRefiner

DOUBLE = {"rtol": 1e-9, "atol": 1e-9}
DUAL = [name for name in NAMES if name != "blip"]


pytestmark = pytest.mark.usefixtures("one_thread")


def encoder_of(name: str, path: Path) -> Any:
    save_tiny(name, path)
    return load_encoder(path).double().requires_grad_(False)


def some_prompts(n: int) -> list[str]:
    lengths = [1, 5, *(random.randint(1, 5) for _ in range(n))][:n]
    return [" ".join(random.choices(["a", "red", "blue", "dog", "runs", "over", "hill"], k=k)) for k in lengths]


def pictures(n: int, t: int) -> Tensor:
    """Videos of 16 x 16 whole bytes, which image processors do not change but for the normalisation."""
    return torch.randint(0, 256, (n, t, 3, 16, 16)).double() / 255


def processed(path: Path, frames: Tensor, name: str) -> dict[str, Tensor]:
    """Frames [T, 3, 16, 16] as the saved image processor of transformers has them."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(path)
    images = list((frames * 255).round().byte().permute(0, 2, 3, 1).numpy())
    sizes: dict[str, Any] = {"do_resize": False, "do_center_crop": False} if name in ("clip", "xclip") else {}
    if name in ("siglip", "blip"):
        sizes = {"do_resize": False}
    if name == "siglip2":
        sizes = {"max_num_patches": 4, "patch_size": 8}
    batch = processor(images=images, return_tensors="pt", **sizes)
    return {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}


def test_what_makes_other_embeddings_has_another_digest(tmp_path: Path) -> None:
    model = encoder_of("clip", tmp_path / "clip")
    digests = [encoder_digest(model), encoder_digest(model)]
    assert digests[0] == digests[1]
    model.pixels = dataclasses.replace(model.pixels, mean=(0.1, 0.2, 0.3))
    digests.append(encoder_digest(model))
    model.model.config.text_config.hidden_act = "relu"
    digests.append(encoder_digest(model))
    model.tokenizer.add_tokens(["somethingnew"])
    digests.append(encoder_digest(model))
    assert len(set(digests)) == 4


@pytest.mark.parametrize("name", DUAL)
def test_embeddings_are_those_of_the_model_itself(name: str, tmp_path: Path) -> None:
    encoder = encoder_of(name, tmp_path)
    model, prompts = encoder.model, some_prompts(3)
    siglip = name.startswith("siglip")
    full = {"padding": "max_length", "max_length": model.config.text_config.max_position_embeddings} if siglip else {}
    ids = encoder.tokenizer(prompts, return_tensors="pt", **(full or {"padding": True}))
    if siglip:
        del ids["attention_mask"]
    frames = pictures(2, encoder.n_frames)
    pixels = [processed(tmp_path, video, name) for video in frames]
    if name == "xclip":
        outputs = model(**ids, pixel_values=torch.stack([p["pixel_values"] for p in pixels]))
        video = outputs.video_embeds
        text = torch.nn.functional.normalize(model.get_text_features(**ids).pooler_output, dim=-1)
    else:
        images = [torch.cat([model(**ids, **row(p, i)).image_embeds for i in range(8)]) for p in pixels]
        video = torch.stack([torch.nn.functional.normalize(x, dim=-1).mean(0) for x in images])
        video = video / video.norm(dim=1, keepdim=True)
        text = model(**ids, **row(pixels[0], 0)).text_embeds
    got = encoder.encode_video(frames)
    # image processors work in float32
    torch.testing.assert_close(got.embedding, video, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(encoder.encode_text(prompts).embedding, text, **DOUBLE)
    assert (video[0] - video[1]).abs().max() > 1e-3
    assert (text[0] - text[1]).abs().max() > 1e-3
    assert got.embedding.shape == (2, encoder.embed_dim)
    assert got.tokens.shape[:2] == (2, encoder.n_frames)
    assert got.frame_index.tolist() == list(range(encoder.n_frames))
    if name != "xclip":
        # the mean of normalised embeddings, and not of those that the model returns
        order = torch.randperm(encoder.n_frames)
        torch.testing.assert_close(encoder.encode_video(frames[:, order]).embedding, got.embedding, **DOUBLE)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_siglip_reads_small_letters(name: str, tmp_path: Path) -> None:
    """Also where the directory's tokenizer knows capitals, as that of SigLIP 2's checkpoints of one resolution does."""
    encoder = encoder_of(name, tmp_path)
    one, other, third = encoder.encode_text(["A Red DOG", "a red dog", "a blue dog"]).embedding
    assert torch.equal(one, other)
    assert (one - third).abs().max() > 1e-6


def row(batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {key: value[i : i + 1] for key, value in batch.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_ragged_batch_is_its_samples(name: str, tmp_path: Path) -> None:
    encoder = encoder_of(name, tmp_path)
    frames, prompts = torch.rand(3, 5, 3, 20, 31, dtype=torch.float64), some_prompts(3)
    text, video = encoder.encode_text(prompts), encoder.encode_video(frames)
    assert len(set(text.lexical.sum(1).tolist())) > 1
    letters = name == "siglip2"  # its pieces are letters and the spaces between words
    assert text.lexical.sum(1).tolist() == [len(p if letters else p.split()) for p in prompts]
    assert (text.mask | ~text.lexical).all()
    for i in range(3):
        text_i, video_i = encoder.encode_text(prompts[i : i + 1]), encoder.encode_video(frames[i : i + 1])
        torch.testing.assert_close(text_i.embedding[0], text.embedding[i], **DOUBLE)
        torch.testing.assert_close(video_i.embedding[0], video.embedding[i], **DOUBLE)
        if name == "blip":
            refine = TransportRefiner(Transport(max_iters=3000, tol=1e-11))
            for hook in (None, refine):
                together = encoder.match(text, video, refine=hook)
                torch.testing.assert_close(
                    encoder.match(text_i, video_i, refine=hook)[0], together[i], rtol=0, atol=1e-7
                )


@pytest.mark.parametrize("name", NAMES)
def test_the_quality_reward_runs_on_it_and_its_gradient_is_that_of_finite_differences(
    name: str, tmp_path: Path
) -> None:
    encoder = encoder_of(name, tmp_path)
    width = encoder.embed_dim
    reward = QualityReward(encoder, Alignment("center", text_mean=torch.zeros(width), video_mean=torch.zeros(width)))
    reward = reward.double()
    frames = (0.3 + 0.4 * torch.rand(2, 4, 3, 22, 19, dtype=torch.float64)).requires_grad_()
    prompts = some_prompts(2)
    (gradient,) = torch.autograd.grad(reward(frames, prompts)[1], frames)
    assert (gradient[0] == 0).all()
    assert (gradient[1].abs().amax((1, 2, 3)) > 0).all()
    step, base = 1e-5, frames.detach()
    for _ in range(3):
        direction = torch.randn_like(base)
        ahead, back = (reward(base + s * direction, prompts)[1] for s in (step, -step))
        torch.testing.assert_close((gradient * direction).sum(), (ahead - back) / (2 * step), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", DUAL)
def test_there_is_no_semantic_reward_without_a_match_head(name: str, tmp_path: Path) -> None:
    encoder = encoder_of(name, tmp_path)
    with pytest.raises(ValueError, match="DualEncoder without a match head"):
        SemanticReward(encoder, transport=Transport())
    text, video = encoder.encode_text(["a dog"]), encoder.encode_video(torch.rand(1, 2, 3, 16, 16))
    with pytest.raises(ValueError, match=f"{name} has no match head"):
        encoder.match(text, video)


def test_blip_scores_frames_as_transformers_does(tmp_path: Path) -> None:
    encoder = encoder_of("blip", tmp_path)
    frames, prompts = pictures(2, 8), some_prompts(2)
    text, video = encoder.encode_text(prompts), encoder.encode_video(frames)
    got = encoder.match(text, video)
    for i in range(2):
        ids = encoder.tokenizer(prompts[i : i + 1], return_tensors="pt")
        ids = {key: ids[key].expand(8, -1) for key in ("input_ids", "attention_mask")}
        pixels = processed(tmp_path, frames[i], "blip")["pixel_values"]
        scores = encoder.model(**ids, pixel_values=pixels).itm_score
        odds = scores[:, 1] - scores[:, 0]
        assert odds.std() > 1e-3
        torch.testing.assert_close(got[i], odds.mean(), rtol=1e-4, atol=1e-6)
        cosines = encoder.model(**ids, pixel_values=pixels, use_itm_head=False).itm_score[:, 0]
        one = BlipEncoder(encoder.model, encoder.tokenizer, pixels=encoder.pixels, n_frames=1)
        singles = torch.cat([one.encode_video(frames[i : i + 1, t : t + 1]).embedding for t in range(8)])
        torch.testing.assert_close(singles @ text.embedding[i], cosines, rtol=1e-4, atol=1e-6)
        mean = torch.nn.functional.normalize(singles.mean(0), dim=0)
        torch.testing.assert_close(video.embedding[i], mean, **DOUBLE)
    # padding changes nothing
    long = encoder.encode_text([*prompts, "a red dog runs over a blue hill"])
    assert long.tokens.shape[1] > text.tokens.shape[1]
    torch.testing.assert_close(long.embedding[:2], text.embedding, **DOUBLE)


def test_the_hook_sees_every_layer_of_blip_once_with_one_frame_a_row(tmp_path: Path) -> None:
    encoder = encoder_of("blip", tmp_path)
    frames, prompts = torch.rand(3, 8, 3, 16, 16, dtype=torch.float64), some_prompts(3)
    text, video = encoder.encode_text(prompts), encoder.encode_video(frames)
    assert video.frame_index.tolist() == [x for t in range(8) for x in (-1, t, t, t, t)]
    assert video.positions[5:10].tolist() == [[-1, -1], [0, 0], [0, 1], [1, 0], [1, 1]]
    calls: list[tuple[Tensor, ...]] = []

    def look(*arguments: Tensor) -> Tensor:
        calls.append(arguments)
        return arguments[2]

    torch.testing.assert_close(encoder.match(text, video, refine=look), encoder.match(text, video), **DOUBLE)
    n = text.tokens.shape[1]
    assert len(calls) == 2
    for query, key, attention, frame_index, positions, lexical in calls:
        assert query.shape == (24, n, 16)
        assert key.shape == (24, 5, 16)
        assert attention.shape == (24, 2, n, 5)
        assert frame_index.tolist() == [-1, 0, 0, 0, 0]
        assert positions.shape == (5, 2)
        assert torch.equal(lexical.unflatten(0, (3, 8))[:, 3], text.lexical)
    refined = encoder.match(text, video, refine=TransportRefiner(Transport()))
    assert (refined - encoder.match(text, video)).abs().max() > 1e-5
    with pytest.raises(ValueError, match="2 texts and 3 videos"):
        encoder.match(encoder.encode_text(prompts[:2]), video)


@pytest.mark.parametrize("hook", [None, TransportRefiner(Transport(max_iters=3000, tol=1e-11))])
def test_the_match_of_blip_is_the_mean_of_its_frames_and_each_is_a_video_of_its_own(
    hook: AttentionRefiner | None, tmp_path: Path
) -> None:
    encoder = encoder_of("blip", tmp_path)
    frames, prompts = torch.rand(3, 8, 3, 16, 16, dtype=torch.float64), some_prompts(3)
    text = encoder.encode_text(prompts)
    each = encoder.match_frames(text, encoder.encode_video(frames), refine=hook)
    assert each.shape == (3, 8)
    assert (each.std(1) > 1e-4).all()
    torch.testing.assert_close(encoder.match(text, encoder.encode_video(frames), refine=hook), each.mean(1), **DOUBLE)
    one = BlipEncoder(encoder.model, encoder.tokenizer, pixels=encoder.pixels, n_frames=1)
    for t in range(8):
        alone = one.encode_video(frames[:, t : t + 1])
        torch.testing.assert_close(one.match_frames(text, alone, refine=hook)[:, 0], each[:, t], rtol=0, atol=1e-7)
        torch.testing.assert_close(one.match(text, alone, refine=hook), each[:, t], rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="3 texts and 1 videos"):
        encoder.match_frames(text, encoder.encode_video(frames[:1]))


def test_the_semantic_reward_runs_on_blip(tmp_path: Path) -> None:
    reward = SemanticReward(encoder_of("blip", tmp_path), transport=Transport())
    frames, prompts = torch.rand(3, 5, 3, 20, 20, dtype=torch.float64, requires_grad=True), some_prompts(3)
    values = reward(frames, prompts)
    assert values.shape == (3,)
    (gradient,) = torch.autograd.grad(values[1], frames)
    assert gradient[1].abs().max() > 0
    assert (gradient[[0, 2]] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_give_float32_embeddings(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    kind = BlipEncoder if name == "blip" else DualEncoder
    wide, half = (kind.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert not half.training
    frames, prompts = torch.rand(2, 4, 3, 16, 16), some_prompts(2)
    for first, second in (
        (wide.encode_video(frames).embedding, half.encode_video(frames).embedding),
        (wide.encode_text(prompts).embedding, half.encode_text(prompts).embedding),
    ):
        assert second.dtype == torch.float32
        torch.testing.assert_close(second, first, rtol=0, atol=0.1)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    from transformers import BlipModel

    encoder = encoder_of("clip", tmp_path / "clip")
    assert encoder.pixels == Pixels(16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "bicubic")
    with pytest.raises(ValueError, match=r"prompts\[1\] is '\?!'"):
        encoder.encode_text(["a dog", "?!"])
    with pytest.warns(UserWarning, match=r"prompts\[0\] has 14 tokens, only 12 are read"):
        assert encoder.encode_text(["dog " * 12]).tokens.shape[1] == 12
    with pytest.raises(ValueError, match="B, T, 3"):
        encoder.encode_video(torch.rand(4, 3, 16, 16))
    with pytest.raises(ValueError, match="no tokenizer"):
        DualEncoder(encoder.model).encode_text(["a dog"])
    with pytest.raises(ValueError, match="n_frames is 5, expected 4"):
        DualEncoder(tiny_model("xclip"), n_frames=5)
    with pytest.raises(ValueError, match="'blip', expected one of"):
        DualEncoder(tiny_model("blip"))
    with pytest.raises(ValueError, match=r"'clip', expected one of \['blip'\]"):
        BlipEncoder.from_pretrained(tmp_path / "clip")
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        DualEncoder.from_pretrained(tmp_path / "nowhere")
    save_tiny("blip", tmp_path / "blip")
    BlipModel(tiny_model("blip").config).save_pretrained(tmp_path / "blip")
    with pytest.raises(ValueError, match=r"\d+ missing: .*Expected a model for image-text retrieval"):
        BlipEncoder.from_pretrained(tmp_path / "blip")


def changed_processor(path: Path, **changes: object) -> None:
    """Settings of the saved image processor, replaced."""
    (file,) = (path / name for name in ("preprocessor_config.json", "processor_config.json") if (path / name).is_file())
    settings = json.loads(file.read_text())
    part = settings.get("image_processor", settings)
    part |= changes
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize("name", NAMES)
def test_what_an_image_processor_asks_for_is_done_or_refused(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    for number, mode in ((2, "bilinear"), (3, "bicubic")):
        changed_processor(tmp_path, resample=number)
        assert load_encoder(tmp_path).interpolation == mode
    for number in (0, 1, 4, 5):
        changed_processor(tmp_path, resample=number)
        with pytest.raises(ValueError, match=r"resample .*, expected 2 \(bilinear\) or 3 \(bicubic\)\. Set"):
            load_encoder(tmp_path)
    changed_processor(tmp_path, resample=2, do_normalize=False)
    plain = load_encoder(tmp_path)
    frames = pictures(1, plain.n_frames)
    prepared = plain.pixels.prepare(frames, plain.n_frames, torch.float64, "test")
    torch.testing.assert_close(prepared, frames, rtol=0, atol=1e-12)
    if name in ("clip", "siglip", "blip"):  # as transformers does it
        want = processed(tmp_path, frames[0], name)["pixel_values"]
        torch.testing.assert_close(prepared[0], want, rtol=0, atol=1e-6)
    for changes in ({"do_rescale": False}, {"rescale_factor": 1 / 127.5}):
        changed_processor(tmp_path, **{"do_rescale": True, **changes})
        with pytest.raises(ValueError, match=r"multiplies bytes by .*, expected 1/255"):
            load_encoder(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_a_directory_lacks_are_named_and_not_made_up(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    gone = random.sample(sorted(state), 3)
    save_file({key: value for key, value in state.items() if key not in gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(f"3 missing: {', '.join(sorted(gone))}. Expected")):
        load_encoder(tmp_path)
    odd = random.choice([key for key, value in state.items() if value.dim() > 0])
    save_file(state | {odd: torch.zeros(2, 3, 5, 7)}, file, metadata={"format": "pt"})
    shape = tuple(state[odd].shape)
    with pytest.raises(ValueError, match=re.escape(f"{odd} has shape (2, 3, 5, 7), expected {shape}")):
        load_encoder(tmp_path)
    save_file(state | {"more.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"does not use\. 1 unexpected: more\.weight"):
        loaded = load_encoder(tmp_path)
    assert all(torch.equal(value, loaded.model.state_dict()[key]) for key, value in state.items())

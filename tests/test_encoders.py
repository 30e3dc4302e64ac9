"""The encoder's laws: what may and what may not change its answers; and what the packaged one knows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_encoder import some_videos, tiny_encoder
from torch import Tensor

from pisces.data import read_video, write_video
from pisces.encoders import TinyEncoder, TinyEncoderConfig, load_encoder, resample
from pisces.encoders.base import check_frames, check_prompts, log_odds
from pisces.world import checkpoint_path, scene
from pisces.world.encoder_recipe import attribute_loss, damage, scene_key, train_encoder
from pisces.world.encoder_scores import attribute_accuracy, encoder_scores, within_group_spearman

SMALL = ("[pad]", "[unk]", "[sep]", "red", "dot")


def test_save_and_load_give_the_same_encoder(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    encoder.save_pretrained(tmp_path / "full")
    loaded = load_encoder(tmp_path / "full")
    assert loaded.config == encoder.config
    assert not loaded.training
    frames, prompts = some_videos(3, seed=1)
    before = encoder.match(encoder.encode_text(prompts), encoder.encode_video(frames))
    after = loaded.match(loaded.encode_text(prompts), loaded.encode_video(frames))
    assert torch.equal(before, after)


def test_half_precision_files_load_as_float32(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    encoder.save_pretrained(tmp_path, dtype=torch.float16)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    loaded = TinyEncoder.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, encoder.state_dict()[name], rtol=2e-3, atol=1e-5)


def test_missing_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        load_encoder(tmp_path / "nowhere")
    tiny_encoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert', expected one of"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="'bert', expected 'tiny_encoder'"):
        TinyEncoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        TinyEncoder.from_pretrained(tmp_path)


def test_a_batch_is_its_samples() -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(5, seed=2)
    text, video = encoder.encode_text(prompts), encoder.encode_video(frames)
    match = encoder.match(text, video)
    for i in range(5):
        text_i, video_i = encoder.encode_text(prompts[i : i + 1]), encoder.encode_video(frames[i : i + 1])
        torch.testing.assert_close(text_i.embedding[0], text.embedding[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(video_i.embedding[0], video.embedding[i], rtol=1e-4, atol=1e-5)
        # the alone one has no padding, the one in the batch has
        torch.testing.assert_close(encoder.match(text_i, video_i)[0], match[i], rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing_but_words_do() -> None:
    encoder = tiny_encoder()
    frames, _ = some_videos(1, seed=3)
    video = encoder.encode_video(frames)
    ids = encoder.token_ids(["a red square moves left"])
    padded = torch.nn.functional.pad(ids, (0, 7), value=encoder.word_index["[pad]"])
    text, long = encoder.encode_ids(ids), encoder.encode_ids(padded)
    assert long.mask.sum() == text.mask.sum() == ids.shape[1]
    assert long.lexical.sum() == ids.shape[1] - 2
    torch.testing.assert_close(long.embedding, text.embedding, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.match(long, video), encoder.match(text, video), rtol=1e-4, atol=1e-4)
    other = encoder.encode_text(["a red square moves right"])
    assert (other.embedding - text.embedding).abs().max() > 1e-2
    assert (encoder.match(other, video) - encoder.match(text, video)).abs() > 1e-3


def test_embeddings_are_normalised_and_shapes_are_as_promised() -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(4, seed=4)
    text, video = encoder.encode_text(prompts), encoder.encode_video(frames)
    for embedding in (text.embedding, video.embedding):
        assert embedding.shape == (4, encoder.embed_dim)
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(4))
    grid = encoder.config.grid
    assert video.tokens.shape == (4, grid.n_tokens, 16) == (4, 64, 16)
    assert torch.equal(video.frame_index, grid.frame_index())
    assert torch.equal(video.positions, grid.positions())
    assert encoder.match(text, video).shape == (4,)


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 32, 32), (9, 32, 32), (25, 48, 80), (4, 7, 5), (13, 100, 33)])
def test_any_length_and_size_is_read_the_same_way_twice(shape: tuple[int, int, int]) -> None:
    encoder = tiny_encoder()
    t, h, w = shape
    frames = torch.rand(2, t, 3, h, w)
    first, second = encoder.encode_video(frames), encoder.encode_video(frames)
    assert torch.equal(first.embedding, second.embedding)
    assert first.tokens.shape[1] == 64


def test_resampling_takes_the_nearest_frames_and_the_centre() -> None:
    frames = torch.arange(17.0).view(1, 17, 1, 1, 1).expand(1, 17, 3, 8, 8)
    assert resample(frames, 9, 8)[0, :, 0, 0, 0].tolist() == list(range(0, 17, 2))
    assert resample(frames[:, :1], 3, 8)[0, :, 0, 0, 0].tolist() == [0, 0, 0]
    assert resample(frames, 1, 8)[0, :, 0, 0, 0].tolist() == [8]
    same = torch.rand(2, 9, 3, 32, 32)
    assert resample(same, 9, 32) is same
    wide = torch.zeros(1, 1, 3, 16, 64)
    wide[..., 24:40] = 1
    assert torch.equal(resample(wide, 1, 16), torch.ones(1, 1, 3, 16, 16))
    assert torch.allclose(resample(torch.full((1, 2, 3, 50, 30), 0.25), 4, 16), torch.tensor(0.25))
    with pytest.raises(ValueError, match="five dimensions"):
        resample(torch.zeros(3, 8, 8), 9, 32)


def test_the_gradient_of_the_scores_reaches_the_pixels() -> None:
    encoder = tiny_encoder().double().requires_grad_(False)
    frames, prompts = some_videos(1, seed=5)
    frames = frames.double().requires_grad_()
    text = encoder.encode_text(prompts)

    def value(x: Tensor) -> Tensor:
        video = encoder.encode_video(x)
        return (encoder.match(text, video) + (text.embedding * video.embedding).sum(-1)).sum()

    (gradient,) = torch.autograd.grad(value(frames), frames)
    # no frame and no part of the picture escapes
    assert (gradient.abs().amax((0, 2, 3, 4)) > 0).all()
    assert (gradient.abs().amax((0, 1, 2)) > 0).all()
    step, base = 1e-5, frames.detach()
    for place in [(0, 0, 0, 3, 4), (0, 4, 1, 16, 20), (0, 8, 2, 31, 31)]:
        change = torch.zeros_like(base)
        change[place] = step
        slope = (value(base + change) - value(base - change)) / (2 * step)
        torch.testing.assert_close(gradient[place], slope, rtol=1e-5, atol=1e-9)


def test_words_are_read_in_lower_case_without_punctuation() -> None:
    encoder = tiny_encoder(vocabulary=SMALL)
    red, dot, unknown, sep = (encoder.word_index[w] for w in ("red", "dot", "[unk]", "[sep]"))
    assert encoder.token_ids(["Red, DOT!"]).tolist() == [[sep, red, dot, sep]]
    assert encoder.token_ids(["a zebra"]).tolist() == [[sep, unknown, unknown, sep]]
    # the names of the special tokens cannot be written
    assert encoder.token_ids(["[pad] [sep] red"]).tolist() == [[sep, unknown, unknown, red, sep]]
    assert encoder.encode_text(["a zebra"]).lexical.tolist() == [[False, True, True, False]]


def test_prompts_without_words_are_named() -> None:
    encoder = tiny_encoder()
    for bad in ("", "  \n", "?!"):
        with pytest.raises(ValueError, match=r"prompts\[1\]"):
            encoder.encode_text(["a red square", bad])
    with pytest.raises(TypeError, match="one string"):
        encoder.encode_text("a red square")
    with pytest.raises(ValueError, match="prompts is empty"):
        encoder.encode_text([])
    with pytest.raises(TypeError, match=r"prompts\[0\] is int"):
        check_prompts([3], "test")  # type: ignore[list-item]


def test_long_prompts_are_cut_with_a_warning() -> None:
    encoder = tiny_encoder(max_tokens=6)
    with pytest.warns(UserWarning, match="has 7 words, only 4 are read"):
        cut = encoder.token_ids(["red dot red dot blue blue blue"])
    assert torch.equal(cut, encoder.token_ids(["red dot red dot"]))


@pytest.mark.parametrize(
    ("frames", "error", "words"),
    [
        (torch.zeros(9, 3, 8, 8), ValueError, "five|B, T, 3"),
        (torch.zeros(1, 9, 4, 8, 8), ValueError, "B, T, 3"),
        (torch.zeros(1, 0, 3, 8, 8), ValueError, "none empty"),
        (torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), TypeError, "uint8"),
        (torch.full((1, 2, 3, 8, 8), -1.0), ValueError, r"from -1 to -1"),
        (torch.full((1, 2, 3, 8, 8), 255.0), ValueError, "255"),
        (torch.full((1, 2, 3, 8, 8), torch.inf), ValueError, "inf"),
    ],
)
def test_what_is_no_video_is_refused(frames: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_frames(frames, "test")


def test_mismatched_batches_and_impossible_configurations_are_refused() -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(2, seed=6)
    with pytest.raises(ValueError, match="1 texts and 2 videos"):
        encoder.match(encoder.encode_text(prompts[:1]), encoder.encode_video(frames))
    with pytest.raises(ValueError, match="expected \\(B, T, 3, H, W\\)"):
        encoder.encode_video(frames[:, :, :2])
    for bad in ({"n_frames": 8}, {"size": 30}, {"width": 15}, {"max_tokens": 2}, {"vocabulary": ("red",)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            tiny_encoder(**bad)
    with pytest.raises(ValueError, match="twice"):
        TinyEncoderConfig(vocabulary=(*SMALL, "red"))


def test_the_refiner_sees_every_fusion_layer_once_and_identity_changes_no_bit() -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(3, seed=7)
    text, video = encoder.encode_text(prompts), encoder.encode_video(frames)
    calls: list[tuple[Tensor, ...]] = []

    def look(*arguments: Tensor) -> Tensor:
        calls.append(arguments)
        return arguments[2]

    assert torch.equal(encoder.match(text, video, refine=look), encoder.match(text, video))
    assert len(calls) == encoder.config.fusion_layers
    n = text.tokens.shape[1]
    for query, key, attention, frame_index, positions, lexical in calls:
        assert query.shape == (3, n, 16)
        assert key.shape == (3, 64, 16)
        assert attention.shape == (3, 2, n, 64)
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 2, n))
        assert torch.equal(lexical, text.lexical)
        assert frame_index.shape == (64,)
        assert positions.shape == (64, 2)
        # the probabilities belong to the projections: they can be recomputed from them
        q, k = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in (query, key))
        torch.testing.assert_close((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1), attention)


def test_attention_of_the_words_reaches_the_score_but_that_of_special_tokens_is_ours_to_keep() -> None:
    encoder = tiny_encoder()
    frames, prompts = some_videos(3, seed=8)
    text, video = encoder.encode_text(prompts), encoder.encode_video(frames)

    def uniform(q: Tensor, k: Tensor, attention: Tensor, f: Tensor, p: Tensor, lexical: Tensor) -> Tensor:
        return torch.full_like(attention, 1 / attention.shape[-1])

    assert (encoder.match(text, video, refine=uniform) - encoder.match(text, video)).abs().max() > 1e-3


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Gathering rows that repeat has a backward pass whose order of adding depends on the threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    from pisces.world import encoder_recipe

    monkeypatch.setattr(encoder_recipe, "N_VIDEOS", 64)
    monkeypatch.setattr(encoder_recipe, "BATCH", 8)
    monkeypatch.setattr(encoder_recipe, "DAMAGED", 2)
    monkeypatch.setattr(encoder_recipe, "encoder_scores", lambda encoder: {})
    lines: list[str] = []
    train_encoder(tmp_path / "straight", steps=12, log=lines.append)
    assert any("12" in line for line in lines)

    class Killed(Exception):
        pass

    state = tmp_path / "state.pt"
    real_step = encoder_recipe._Training.step

    def step_until_killed(self: object, i: int) -> dict[str, float]:
        if i == 8:
            raise Killed
        return real_step(self, i)  # type: ignore[arg-type]

    real_run = encoder_recipe.run_steps
    monkeypatch.setattr(encoder_recipe, "run_steps", lambda *a, **k: real_run(*a, **k, save_every=4))
    monkeypatch.setattr(encoder_recipe._Training, "step", step_until_killed)
    with pytest.raises(Killed):
        train_encoder(tmp_path / "killed", steps=12, log=lines.append, state_file=state)
    assert state.is_file()
    monkeypatch.setattr(encoder_recipe._Training, "step", real_step)
    train_encoder(tmp_path / "killed", steps=12, log=lines.append, state_file=state)
    assert any("going on at step 8" in line for line in lines)
    assert not (tmp_path / "straight" / "training.state").exists()
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "killed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    with pytest.raises(ValueError, match="at least 10"):
        train_encoder(tmp_path / "short", steps=3)


def test_damage_and_labels_of_the_recipe() -> None:
    generator = torch.Generator().manual_seed(9)
    scenes = scene.sample_scenes(64, generator, two_objects=0.5)
    frames = scene.render(scenes, generator)
    worse = damage(frames, frames, generator)
    assert worse.shape == frames.shape
    assert float(worse.min()) >= 0
    assert float(worse.max()) <= 1
    changed = (worse != frames).flatten(1).any(1).float().mean()
    assert 0.5 < changed < 1  # most are damaged, some are not
    keys, sentences = scene_key(scenes), scene.captions(scenes)
    for i in range(64):
        for j in range(64):
            assert (keys[i] == keys[j]) == (sentences[i] == sentences[j])
    # a head that knows the scene has no loss, one that says the opposite has a large one
    right = torch.zeros(64, 6, 8)
    for i in range(64):
        for k in range(int(scenes.count[i])):
            right[i, scenes.color[i, k], [0, 1 + scenes.shape[i, k], 4 + scenes.direction[i, k]]] = 2.0
    right[..., 0] -= 1
    assert attribute_loss(50 * right.flatten(1), scenes) < 1e-4
    assert attribute_loss(-50 * right.flatten(1), scenes) > 10


def test_within_group_spearman() -> None:
    x = torch.tensor([[1.0, 2, 3, 4], [4.0, 3, 2, 1], [1.0, 1, 1, 1]])
    y = torch.tensor([[10.0, 20, 30, 99], [0.0, 1, 2, 3], [1.0, 2, 3, 4]])
    assert within_group_spearman(x, y) == 0  # 1 and -1; the constant row does not count
    assert within_group_spearman(x[:1], y[:1]) == 1


@pytest.fixture(scope="module")
def packaged() -> TinyEncoder:
    return load_encoder(checkpoint_path("encoder"))


@pytest.mark.parametrize("split", [None, "held_out"])
def test_the_packaged_encoder_knows_colour_shape_and_direction(
    packaged: TinyEncoder, split: scene.Split | None
) -> None:
    generator = torch.Generator().manual_seed(4321)
    scenes = scene.sample_scenes(192, generator, split=split)
    scores = attribute_accuracy(packaged, scenes, scene.render(scenes, generator), seed=11, fillers=0.5)
    for name in scene.ATTRIBUTE_VALUES:
        assert scores[name] >= 0.95, scores


def test_the_packaged_encoder_ranks_damaged_videos_below_clean_ones(packaged: TinyEncoder) -> None:
    generator = torch.Generator().manual_seed(987)
    scenes = scene.sample_scenes(96, generator)
    clean = scene.render(scenes, generator)
    bad = scene.corrupt_frames(clean, generator, 1.0)
    text = packaged.encode_text(scene.captions(scenes)).embedding
    gain = ((packaged.encode_video(clean).embedding - packaged.encode_video(bad).embedding) * text).sum(-1)
    assert (gain > 0).float().mean() > 0.95
    # the control: an untrained encoder sees no difference of this kind
    control = tiny_encoder()
    text = control.encode_text(scene.captions(scenes)).embedding
    gain = ((control.encode_video(clean).embedding - control.encode_video(bad).embedding) * text).sum(-1)
    assert 0.02 < (gain > 0).float().mean() < 0.98


def test_scores_tell_a_trained_encoder_from_an_untrained_one(packaged: TinyEncoder) -> None:
    trained, untrained = encoder_scores(packaged, n=72, seed=3), encoder_scores(tiny_encoder(), n=72, seed=3)
    assert trained["r_at_1"]["embedding"] >= 0.9
    assert trained["r_at_1"]["match"] >= 0.9
    assert untrained["r_at_1"]["embedding"] < 0.15
    assert 0.2 < untrained["attributes"]["all"]["shape"] < 0.8
    assert trained["ranking"]["embedding"]["total"] > 0.5 > untrained["ranking"]["embedding"]["total"]
    written = json.loads((checkpoint_path("encoder") / "scores.json").read_text())
    assert written["attributes"]["all"]["shape"] >= 0.95
    assert written["r_at_1"]["embedding"] >= 0.9


def test_config_is_frozen_but_replaceable() -> None:
    config = replace(TinyEncoderConfig(vocabulary=SMALL), n_frames=5, size=16)
    assert config.grid.n_tokens == 2 * 2 * 2


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_file_is_read_as_an_encoder_would_look_at_it(mode: str, seed: int, tmp_path: Path) -> None:
    """What a reward gives in training for frames is what `pisces score` gives for their file."""
    for _ in range(5):
        shape = random.randint(1, 40), 3, 2 * random.randint(8, 40), 2 * random.randint(8, 40)
        sharp = torch.rand(shape).round()  # black and white: bicubic interpolation overshoots
        write_video(tmp_path / "v.mp4", sharp, lossless=True)
        frames = read_video(tmp_path / "v.mp4")
        n_frames, size = random.randint(1, 12), random.randint(4, 48)
        wanted = resample(frames[None], n_frames, size, mode=mode)[0]
        read = read_video(tmp_path / "v.mp4", n_frames=n_frames, size=size, interpolation=mode)
        torch.testing.assert_close(read, wanted, rtol=0, atol=1e-6)
        assert -1e-6 <= wanted.min() <= wanted.max() <= 1 + 1e-6  # weights that sum to 1 but for rounding


@pytest.mark.parametrize("outputs", [1, 2])
def test_log_odds_keep_their_digits_inside_autocast(outputs: int, seed: int) -> None:
    head, x = torch.nn.Linear(9, outputs), torch.randn(5, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.bfloat16  # it is on
        got = log_odds(head, x)
    assert torch.equal(got, log_odds(head, x))
    assert got.dtype == torch.float32

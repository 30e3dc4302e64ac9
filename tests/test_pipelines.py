"""Laws of the pipeline adapters: they do what the diffusers pipeline does, and say what is missing."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_wan import PROMPTS, SIZE, TEXT_TOKENS, build_pipeline, build_tiny_wan
from torch import Tensor

from pisces.config import LoraConfig
from pisces.pipelines import PipelineAdapter, WanAdapter, load_pipeline, prepare
from pisces.pipelines.files import whole_dir


@pytest.fixture(scope="module")
def wan_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_wan(tmp_path_factory.mktemp("tiny") / "wan", half=True)


@pytest.fixture
def adapter(wan_dir: Path) -> WanAdapter:
    return WanAdapter.from_pretrained(wan_dir)


def call_pipeline(adapter: WanAdapter, prompts: list[str], noise: Tensor, *, steps: int, guidance: float) -> Tensor:
    """Frames of the diffusers pipeline's own __call__."""
    return adapter.pipe(
        prompts,
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=TEXT_TOKENS,
        latents=noise.clone(),
        output_type="pt",
    ).frames


@pytest.mark.parametrize(("steps", "guidance"), [(3, 1.0), (4, 2.5)])
@pytest.mark.parametrize("terminal", [None, 0.2])
def test_sample_is_the_pipelines_own_call(
    adapter: WanAdapter, seed: int, steps: int, guidance: float, terminal: float | None
) -> None:
    if terminal is not None:
        adapter = WanAdapter(build_pipeline(shift_terminal=terminal), defaults=SIZE)
    noise = adapter.noise(3, generator=torch.Generator().manual_seed(seed))
    ours = adapter.decode(adapter.sample(PROMPTS[:3], steps=steps, guidance_scale=guidance, noise=noise))
    theirs = call_pipeline(adapter, PROMPTS[:3], noise, steps=steps, guidance=guidance)
    assert ours.shape == (3, 9, 3, 32, 32)
    assert ours.std() > 0.02  # neither grey nor saturated: the comparison means something
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    # Negative control: another number of steps is another video.
    other = adapter.decode(adapter.sample(PROMPTS[:3], steps=steps + 1, guidance_scale=guidance, noise=noise))
    assert (other - theirs).abs().max() > 1e-4


def test_weights_are_float32_however_stored(wan_dir: Path, adapter: WanAdapter) -> None:
    stored = DiffusionPipeline.from_pretrained(str(wan_dir), dtype=torch.float16)
    for name in ("transformer", "vae", "text_encoder"):
        assert {p.dtype for p in getattr(adapter.pipe, name).parameters()} == {torch.float32}
    assert next(stored.vae.parameters()).dtype == torch.float16


def test_only_the_transformer_can_be_trained(adapter: WanAdapter) -> None:
    assert not any(p.requires_grad for part in (adapter.vae, adapter.pipe.text_encoder) for p in part.parameters())


def test_prompt_embeddings_do_not_depend_on_the_batch(adapter: WanAdapter) -> None:
    (together,) = adapter.encode_prompts(PROMPTS).values()
    adapter.clear_prompt_cache()
    alone = torch.cat([*(v for p in reversed(PROMPTS) for v in adapter.encode_prompts([p]).values())]).flip(0)
    assert torch.equal(together, alone)
    torch.testing.assert_close(together, adapter.embed_prompts(PROMPTS)["encoder_hidden_states"])
    words = len(PROMPTS[0].split()) + 1  # and [sep]
    assert together[0, :words].abs().sum(-1).min() > 0
    assert together[0, words:].abs().max() == 0
    with pytest.raises(TypeError, match="expected a list"):
        adapter.encode_prompts(PROMPTS[0])  # type: ignore[arg-type]


def test_a_batch_of_videos_equals_single_videos(adapter: WanAdapter, seed: int) -> None:
    latents = adapter.noise(3, generator=torch.Generator().manual_seed(seed))
    frames = adapter.decode(latents)
    single = torch.cat([adapter.decode(latents[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(frames, single, rtol=0, atol=1e-5)
    encoded = adapter.encode_frames(frames)
    assert encoded.shape == latents.shape
    single = torch.cat([adapter.encode_frames(frames[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(encoded, single, rtol=1e-4, atol=1e-4)


def test_latents_are_normalised_by_the_vaes_statistics(adapter: WanAdapter, seed: int) -> None:
    frames = torch.rand(2, 9, 3, 32, 32)
    raw = adapter.vae.encode(frames.permute(0, 2, 1, 3, 4) * 2 - 1).latent_dist.mode()
    mean = torch.tensor(adapter.vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(adapter.vae.config.latents_std).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(adapter.encode_frames(frames), (raw - mean) / std)


def test_decode_has_the_right_gradient(seed: int) -> None:
    pipe = build_pipeline()
    pipe.vae.double()
    adapter = WanAdapter(pipe, defaults=SIZE)
    latents = adapter.noise(1).double().requires_grad_(True)
    weight = torch.randn(1, 9, 3, 32, 32)
    (adapter.decode(latents).double() * weight).sum().backward()
    assert latents.grad is not None
    # Half along the gradient: along a random direction alone the slope may be next to nothing.
    direction = torch.randn_like(latents)
    direction = direction / direction.norm() + latents.grad / latents.grad.norm()

    def value(shift: float) -> float:
        # decode returns float32: sum in float64 and step far enough that its rounding does not count.
        return float((adapter.decode(latents.detach() + shift * direction).double() * weight).sum())

    step = 1e-3 * latents[0].numel() ** 0.5
    slope = (value(step) - value(-step)) / (2 * step)
    assert float((latents.grad * direction).sum()) == pytest.approx(slope, rel=0.02)


def test_velocity_takes_scalar_and_vector_sigmas(adapter: WanAdapter, seed: int) -> None:
    noise = adapter.noise(2)
    embeds = adapter.encode_prompts(PROMPTS[:2])
    scalar = adapter.velocity(noise, torch.tensor(0.4), embeds)
    assert torch.equal(scalar, adapter.velocity(noise, torch.full((2,), 0.4), embeds))
    assert not torch.equal(scalar, adapter.velocity(noise, torch.tensor(0.9), embeds))


def test_save_and_load(adapter: WanAdapter, tmp_path: Path, seed: int) -> None:
    target = adapter.save_pretrained(tmp_path / "out" / "wan")
    again = load_pipeline(target)
    assert isinstance(again, PipelineAdapter)
    noise = adapter.noise(1)
    assert torch.equal(again.sample(PROMPTS[:1], noise=noise), adapter.sample(PROMPTS[:1], noise=noise))
    assert json.loads((target / "pisces.json").read_text())["steps"] == 3
    assert [p.name for p in target.parent.iterdir()] == ["wan"]


def test_lora_goes_through_diffusers_own_format(adapter: WanAdapter, wan_dir: Path, tmp_path: Path, seed: int) -> None:
    noise = adapter.noise(1)
    before = adapter.sample(PROMPTS[:1], noise=noise)
    prepare(adapter, LoraConfig(rank=3, alpha=6.0), seed=seed)
    assert torch.equal(adapter.sample(PROMPTS[:1], noise=noise), before)  # B starts at zero
    trainable = {n: p for n, p in adapter.transformer.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    wanted = adapter.sample(PROMPTS[:1], noise=noise)
    assert (wanted - before).abs().max() > 1e-3
    pipe = DiffusionPipeline.from_pretrained(str(wan_dir), dtype=torch.float32)
    pipe.load_lora_weights(str(adapter.save_lora(tmp_path / "lora")))  # alpha != rank: metadata must travel along
    again = WanAdapter(pipe, defaults=adapter.defaults).sample(PROMPTS[:1], noise=noise)
    torch.testing.assert_close(again, wanted, rtol=0, atol=1e-6)


def test_a_loaded_lora_is_saved_again(adapter: WanAdapter, wan_dir: Path, tmp_path: Path, seed: int) -> None:
    prepare(adapter, LoraConfig(rank=3, alpha=6.0), seed=seed)
    (first,) = adapter.save_lora(tmp_path / "first").glob("*.safetensors")
    again = WanAdapter.from_pretrained(wan_dir)
    again.load_lora(first)
    (second,) = again.save_lora(tmp_path / "second").glob("*.safetensors")
    for name, value in load_file(first).items():
        assert torch.equal(load_file(second)[name], value)


def test_the_autoencoder_has_its_own_precision(wan_dir: Path) -> None:
    adapter = WanAdapter.from_pretrained(wan_dir, dtype=torch.bfloat16, vae_dtype=torch.float32, device="cpu")
    assert {p.dtype for p in adapter.vae.parameters()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in adapter.transformer.parameters()}
    frames = adapter.decode(adapter.sample(PROMPTS[:1], steps=2))
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "final.former").mkdir()
    (tmp_path / "final.former" / "weights").write_text("good")
    with pytest.raises(RuntimeError), whole_dir(tmp_path / "final"):
        raise RuntimeError("disk full")
    assert (tmp_path / "final" / "weights").read_text() == "good"


def test_prepare_names_layers_that_are_not_there(adapter: WanAdapter) -> None:
    with pytest.raises(ValueError, match="nonesuch"):
        prepare(adapter, LoraConfig(rank=2, targets=("to_q", "nonesuch")))
    prepare(adapter, LoraConfig(rank=2, targets=("to_q",)))
    with pytest.raises(ValueError, match="already has a LoRA adapter"):
        prepare(adapter, LoraConfig(rank=2))


def test_errors_name_what_is_missing(adapter: WanAdapter, wan_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such directory.*nowhere"):
        load_pipeline(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match=r"FluxPipeline, expected one of: CogVideoXPipeline, .*, WanPipeline"):
        load_pipeline(tmp_path)
    with pytest.raises(TypeError, match="expected a diffusers WanPipeline"):
        WanAdapter(object())
    half = build_pipeline()
    half.register_to_config(boundary_ratio=0.875)
    with pytest.raises(ValueError, match=r"got boundary_ratio 0\.875 with \['transformer'\], expected None"):
        WanAdapter(half)
    with pytest.raises(ValueError, match="unknown defaults"):
        WanAdapter(build_pipeline(), defaults={"frames": 9})
    with pytest.raises(ValueError, match="n_frames is not given"):
        WanAdapter(build_pipeline()).noise(1, height=32, width=32)
    with pytest.raises(ValueError, match="got 8 frames, expected 1 \\+ a multiple of 4"):
        adapter.latent_shape(n_frames=8)
    with pytest.raises(ValueError, match="got width 30, expected a multiple of 8"):
        adapter.latent_shape(width=30)
    with pytest.raises(ValueError, match=r"expected \[B, T, C, H, W\]"):
        adapter.encode_frames(torch.rand(9, 3, 32, 32))
    with pytest.raises(ValueError, match=r"guidance_scale 0\.5"):
        adapter.sample(PROMPTS, guidance_scale=0.5)
    with pytest.raises(ValueError, match="got 0 steps"):
        adapter.sigmas(0)
    stretched = WanAdapter(build_pipeline(shift_terminal=0.2), defaults=SIZE)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError, match="no grid of 1 step"):
        stretched.sigmas(1)
    assert not caught


def test_a_broken_defaults_file_is_named(tmp_path: Path) -> None:
    root = build_tiny_wan(tmp_path / "wan")
    for broken in ('{"n_frames": "nine"}', '{"fps": 29.97}', "[]"):
        (root / "pisces.json").write_text(broken)
        with pytest.raises(ValueError, match=r"pisces\.json"):
            load_pipeline(root)

"""Every family of pipelines: samples are those of diffusers' own call, and training moves the denoiser alone."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from toy_rewards import ColorReward
from typer.testing import CliRunner

from pisces.algorithms import Batch, Draft, FlowMatching, FrozenBase, Grpo, OneStep
from pisces.cli import app
from pisces.config import LoraConfig, OptimizerConfig, OutputConfig, TrainConfig
from pisces.pipelines import ADAPTERS, LTXAdapter, PipelineAdapter, load_pipeline, prepare
from pisces.pipelines.files import find_pipeline
from pisces.pipelines.tiny import TINY, make_tiny
from pisces.trainer import Trainer

PROMPTS = ["a red square moves left", "blue"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=TINY)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param, seed=0)


@pytest.fixture
def adapter(directory: Path) -> PipelineAdapter:
    return load_pipeline(directory)


def own_call(adapter: PipelineAdapter, noise: Tensor, *, steps: int, guidance: float) -> Tensor:
    """Frames of the diffusers pipeline's own __call__."""
    n_frames, height, width = adapter.video_size()
    name = type(adapter.pipe).__name__
    pipe = adapter.pipe
    options: dict[str, Any] = {"guidance_scale": guidance}
    if name == "HunyuanVideoPipeline":
        options = {"true_cfg_scale": guidance, "negative_prompt": ["", ""]}
    if name == "HunyuanVideo15Pipeline":
        pipe.guider = pipe.guider.new(guidance_scale=guidance)
        options = {"negative_prompt": ["", ""]}
    if name == "CogVideoXPipeline":
        noise = noise.transpose(1, 2)
        options["max_sequence_length"] = 64
    if name == "LTXPipeline":
        noise = pipe._pack_latents(noise)
        options["frame_rate"] = adapter.defaults["fps"]
    if name == "WanPipeline":
        options["max_sequence_length"] = 64
    single = name == "HunyuanVideo15Pipeline"  # its VAE decodes no batch (diffusers 0.42)
    output: Tensor = pipe(
        PROMPTS,
        height=height,
        width=width,
        num_frames=n_frames,
        num_inference_steps=steps,
        latents=noise.clone(),
        output_type="latent" if single else "pt",
        **options,
    ).frames
    if not single:
        return output
    videos = [pipe.vae.decode(z / pipe.vae.config.scaling_factor, return_dict=False)[0] for z in output.split(1)]
    return (torch.cat(videos) / 2 + 0.5).clamp(0, 1).transpose(1, 2)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_are_those_of_the_pipelines_call(adapter: PipelineAdapter, guidance: float) -> None:
    noise = adapter.noise(2)
    ours = adapter.decode(adapter.sample(PROMPTS, steps=4, guidance_scale=guidance, noise=noise))
    theirs = own_call(adapter, noise, steps=4, guidance=guidance)
    n_frames, height, width = adapter.video_size()
    assert ours.shape == theirs.shape == (2, n_frames, 3, height, width)
    assert ours.std() > 0.02  # neither grey nor saturated
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    # Negative controls: other steps, and prompts that do not arrive
    other = adapter.decode(adapter.sample(PROMPTS, steps=5, guidance_scale=guidance, noise=noise))
    assert (other - theirs).abs().max() > 1e-3
    exchanged = adapter.sample(PROMPTS[::-1], steps=4, guidance_scale=guidance, noise=noise)
    assert (adapter.decode(exchanged) - theirs).abs().max() > 1e-3


def test_the_velocity_is_that_of_the_flow(adapter: PipelineAdapter) -> None:
    """One Euler step from sigma to 0 is the model's own estimate of x0, and a batch is its samples."""
    noise, embeds = adapter.noise(2), adapter.encode_prompts(PROMPTS)
    sigma = adapter.sigmas(4, tuple(noise.shape[1:]))[1].expand(2)
    together = adapter.velocity(noise, sigma, embeds)
    for k in range(2):
        alone = adapter.velocity(noise[k : k + 1], sigma[k], {n: v[k : k + 1] for n, v in embeds.items()})
        torch.testing.assert_close(alone, together[k : k + 1], rtol=1e-4, atol=1e-4)


def test_latents_are_encoded_and_decoded_alike(adapter: PipelineAdapter) -> None:
    latents = adapter.noise(1)
    torch.testing.assert_close(adapter.normalize(adapter.denormalize(latents)), latents, rtol=1e-5, atol=1e-5)
    n_frames, height, width = adapter.video_size()
    frames = torch.rand(2, n_frames, 3, height, width)
    encoded = adapter.encode_frames(frames)
    assert encoded.shape[1:] == latents.shape[1:]
    torch.testing.assert_close(encoded[1:], adapter.encode_frames(frames[1:]), rtol=1e-3, atol=1e-4)


def test_a_step_moves_the_adapter_alone_and_it_loads(
    adapter: PipelineAdapter, directory: Path, tmp_path: Path, seed: int
) -> None:
    prepare(adapter, LoraConfig(rank=2, alpha=4.0), seed=seed)
    parameters = dict(named_parameters(adapter))
    before = {n: p.detach().clone() for n, p in parameters.items()}
    last_k = 1 + len(adapter.denoisers)  # of Wan 2.2 the first of the steps is the first expert's
    algorithm = Draft(adapter, ColorReward(), FrozenBase(adapter), steps=3, last_k=last_k, checkpointing=True)
    optimizer = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad], lr=0.05)
    for step in range(2):  # in the first one B is zero, so A does not move
        optimizer.zero_grad()
        loss, _ = algorithm.loss(Batch(PROMPTS), torch.Generator().manual_seed(seed + step))
        loss.backward()
        optimizer.step()
    moved = {n for n, p in parameters.items() if not torch.equal(p, before[n])}
    wanted = {n for n in before if "lora_" in n}
    assert moved <= wanted
    assert len(moved) > 0.7 * len(wanted)  # the rest does not reach the last layer's video tokens
    assert not any(p.requires_grad for p in adapter.vae.parameters())

    check_it_loads(adapter, directory, adapter.save_lora(tmp_path / "lora"))


def check_it_loads(adapter: PipelineAdapter, directory: Path, lora: Path) -> None:
    """A fresh diffusers pipeline samples what the trained adapter does with the exported LoRA, and not without it."""
    noise = adapter.noise(1)
    trained = adapter.sample(PROMPTS[:1], steps=3, noise=noise)
    pipe = DiffusionPipeline.from_pretrained(str(directory), dtype=torch.float32)
    fresh = type(adapter)(pipe, defaults=adapter.defaults)
    assert (fresh.sample(PROMPTS[:1], steps=3, noise=noise) - trained).abs().max() > 1e-4
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(str(lora))
    else:  # HunyuanVideo 1.5
        pipe.transformer.load_lora_adapter(str(lora), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    if len(adapter.denoisers) > 1:
        pipe.load_lora_weights(f"{lora}/transformer_2", load_into_transformer_2=True)
    torch.testing.assert_close(fresh.sample(PROMPTS[:1], steps=3, noise=noise), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["one_step", "grpo"])
def test_the_other_algorithms_move_the_adapter_alone(
    adapter: PipelineAdapter, directory: Path, tmp_path: Path, name: str, seed: int
) -> None:
    """Two steps through the trainer; what it exports is loaded and generates the same."""
    prepare(adapter, LoraConfig(rank=2, alpha=4.0), seed=seed)
    base = FrozenBase(adapter)
    latents = adapter.encode_frames(torch.rand(1, adapter.video_size()[0], 3, *adapter.video_size()[1:]))
    algorithm: Any
    if name == "one_step":
        algorithm = OneStep(adapter, ColorReward(), base, steps=3)
    else:
        algorithm = Grpo(adapter, ColorReward(), base, steps=3, group_size=2, micro_batch=2)
    before = {key: p.detach().clone() for key, p in named_parameters(adapter)}
    config = TrainConfig(
        steps=2,
        seed=seed,
        optimizer=OptimizerConfig(lr=0.05, accumulation=1),
        output=OutputConfig(dir=str(tmp_path), trackers=()),
    )
    final = Trainer(adapter, algorithm, config, batches=OneBatch(Batch(PROMPTS[:1], latents=latents))).fit()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(value is not None for line in lines for value in line.values())
    moved = {key for key, p in named_parameters(adapter) if not torch.equal(p, before[key])}
    assert moved
    assert all("lora_" in key for key in moved)
    check_it_loads(adapter, directory, final)


class OneBatch:
    """The same batch without end."""

    fingerprint = "one"

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __getitem__(self, index: int) -> Batch:
        return dataclasses.replace(self.batch, number=index)


def named_parameters(adapter: PipelineAdapter) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"{name}.{key}", p) for name, model in adapter.denoisers.items() for key, p in model.named_parameters()]


def test_names_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'sora', expected one of wan, wan22, wan22-5b, hunyuanvideo"):
        make_tiny("sora", tmp_path)


def test_the_same_seed_is_the_same_pipeline(tmp_path: Path) -> None:
    one, other = (load_pipeline(make_tiny("wan", tmp_path / str(k), seed=5)) for k in range(2))
    for a, b in zip(one.transformer.parameters(), other.transformer.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_hub_name_is_looked_up_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--tiny-wan" / "snapshots" / "0123abc"
    make_tiny("wan", snapshot)
    (tmp_path / "models--someone--tiny-wan" / "refs").mkdir()
    (tmp_path / "models--someone--tiny-wan" / "refs" / "main").write_text("0123abc")
    assert find_pipeline("someone/tiny-wan") == snapshot
    with pytest.raises(FileNotFoundError, match="fetch it: hf download someone/other"):
        find_pipeline("someone/other")
    with pytest.raises(FileNotFoundError, match="no such file or directory: a/b/c"):
        find_pipeline("a/b/c")


def test_the_command_writes_what_train_reads(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["make-tiny", "ltx", str(tmp_path / "ltx")])
    assert result.exit_code == 0, result.output
    assert isinstance(load_pipeline(tmp_path / "ltx"), LTXAdapter)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    result = CliRunner().invoke(app, ["make-tiny", "ltx", str(tmp_path / "mine")])
    assert result.exit_code == 2
    assert "is not empty and holds no pipeline" in result.stderr


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("cogvideox", lambda pipe: pipe.transformer.register_to_config(patch_size_t=4), "patch_size_t 4"),
        ("cogvideox", lambda pipe: pipe.scheduler.register_to_config(prediction_type="epsilon"), "'v_prediction'"),
        ("cogvideox", lambda pipe: pipe.scheduler.register_to_config(timestep_spacing="linspace"), "'trailing'"),
        ("mochi", lambda pipe: pipe.scheduler.register_to_config(invert_sigmas=False), "invert_sigmas false"),
    ],
)
def test_kinds_that_are_not_covered_are_refused(name: str, change: Any, message: str) -> None:
    pipe, defaults = TINY[name]()
    change(pipe)
    with pytest.raises(ValueError, match=message):
        ADAPTERS[type(pipe).__name__](pipe, defaults=defaults)


def test_cogvideox_takes_pairs_of_latents() -> None:
    pipe, defaults = TINY["cogvideox"]()
    with pytest.raises(ValueError, match=r"got 5 frames, expected 1 \+ a multiple of 8 .* Use 9"):
        ADAPTERS["CogVideoXPipeline"](pipe, defaults=defaults).latent_shape(n_frames=5)


def test_cogvideox15_has_one_latent_frame_in_front() -> None:
    pipe, defaults = TINY["cogvideox15"]()
    adapter = ADAPTERS["CogVideoXPipeline"](pipe, defaults=defaults)
    assert adapter.latent_shape() == (4, 4, 4, 4)
    frames = torch.rand(1, 9, 3, 32, 32)
    latents = adapter.encode_frames(frames)
    older = ADAPTERS["CogVideoXPipeline"](TINY["cogvideox"]()[0], defaults=defaults)
    older.pipe.register_modules(vae=pipe.vae)
    assert torch.equal(latents[:, :, 1:], older.encode_frames(frames))
    assert torch.equal(latents[:, :, 0], latents[:, :, 1])
    assert torch.equal(adapter.decode(latents), older.decode(latents[:, :, 1:]))


def test_the_shift_of_ltx_is_that_of_the_videos() -> None:
    pipe, _ = TINY["ltx"]()
    adapter = ADAPTERS["LTXPipeline"](pipe)  # without defaults
    adapter.defaults["fps"] = 8
    losses = FlowMatching(adapter).loss(Batch(PROMPTS, latents=torch.randn(2, 4, 3, 4, 4)), torch.Generator())
    assert losses[0].isfinite()
    slope = (2.05 - 0.95) / (4096 - 1024)
    assert adapter.shift((4, 3, 4, 4)) == pytest.approx(math.exp(0.95 + slope * (48 - 1024)))
    assert adapter.shift((4, 16, 16, 16)) == pytest.approx(math.exp(2.05))


def test_mochi_and_stretched_grids_need_two_steps() -> None:
    for name in ("mochi", "ltx"):
        pipe, defaults = TINY[name]()
        with pytest.raises(ValueError, match=r"no grid of 1 step\(s\)"):
            ADAPTERS[type(pipe).__name__](pipe, defaults=defaults).sigmas(1)

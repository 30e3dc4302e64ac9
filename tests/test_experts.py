"""Laws of pipelines with two denoisers (Wan 2.2): each sample meets the expert for its noise, both are trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from toy_rewards import ColorReward
from typer.testing import CliRunner

from pisces.algorithms import Batch, Consistency, Draft, FlowMatching, FrozenBase, Grpo, OneStep, base_anchor
from pisces.batches import PromptBatches
from pisces.cli import app
from pisces.config import LoraConfig, OptimizerConfig, OutputConfig, TrainConfig
from pisces.pipelines import PipelineAdapter, load_pipeline, prepare
from pisces.pipelines.tiny import make_tiny
from pisces.pipelines.trainable import trained_parameters
from pisces.trainer import Trainer

PROMPTS = ["a red square moves left", "blue", "a green circle"]
BOUNDARY = 0.875
LORA = LoraConfig(rank=2, alpha=4.0)
FULL_AND_LORA = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("wan22", tmp_path_factory.mktemp("tiny") / "wan22", seed=1)


@pytest.fixture
def adapter(directory: Path) -> PipelineAdapter:
    return load_pipeline(directory)


def expert(adapter: PipelineAdapter, name: str, x: Tensor, sigma: float, prompt: str) -> Tensor:
    """One denoiser of the pipeline, called by hand for one sample [1, C, t, h, w]."""
    output: Tensor = getattr(adapter.pipe, name)(
        hidden_states=x,
        timestep=torch.tensor([1000 * sigma]),
        return_dict=False,
        **adapter.encode_prompts([prompt]),
    )[0]
    return output


@torch.no_grad()
def test_each_sample_meets_the_expert_for_its_noise(adapter: PipelineAdapter, seed: int) -> None:
    levels = [0.3, 1.0, BOUNDARY, 0.874, 0.9, 0.0]
    wanted = ["transformer_2", "transformer", "transformer", "transformer_2", "transformer", "transformer_2"]
    x, prompts = torch.randn(6, 4, 3, 4, 4), [*PROMPTS, *PROMPTS]
    ours = adapter.velocity(x, torch.tensor(levels), adapter.encode_prompts(prompts))
    for k, (level, name) in enumerate(zip(levels, wanted, strict=True)):
        by_hand = expert(adapter, name, x[k : k + 1], level, prompts[k])
        torch.testing.assert_close(ours[k : k + 1], by_hand, rtol=1e-5, atol=1e-5)
        alone = adapter.velocity(x[k : k + 1], torch.tensor(level), adapter.encode_prompts([prompts[k]]))
        torch.testing.assert_close(alone, by_hand, rtol=1e-5, atol=1e-5)
        assert adapter.denoiser_name(torch.tensor(level)) == name
    other = expert(adapter, "transformer", x[:1], levels[0], prompts[0])
    assert (other - ours[:1]).abs().max() > 1e-2  # negative control: the experts differ


def test_the_second_guidance_is_that_of_the_pipelines_call(adapter: PipelineAdapter) -> None:
    noise = adapter.noise(2)
    ours = adapter.sample(PROMPTS[:2], steps=4, guidance_scale=4.0, guidance_scale_2=1.5, noise=noise)
    theirs = adapter.pipe(
        PROMPTS[:2],
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=4.0,
        guidance_scale_2=1.5,
        max_sequence_length=64,
        latents=noise.clone(),
        output_type="latent",
    ).frames
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (adapter.sample(PROMPTS[:2], steps=4, guidance_scale=4.0, noise=noise) - theirs).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"got guidance_scale_2 2\.0 with guidance_scale 1 \(off\)"):
        adapter.sample(PROMPTS[:2], guidance_scale_2=2.0)
    with pytest.raises(ValueError, match=r"got guidance_scale_2 0\.5, expected a number >= 1"):
        adapter.sample(PROMPTS[:2], guidance_scale=2.0, guidance_scale_2=0.5)


def test_one_denoiser_has_one_guidance(tmp_path: Path) -> None:
    adapter = load_pipeline(make_tiny("wan22-5b", tmp_path / "wan22-5b"))
    with pytest.raises(ValueError, match=r"got guidance_scale_2 2\.0 for a pipeline with one denoiser"):
        adapter.sample(PROMPTS[:1], guidance_scale=2.0, guidance_scale_2=2.0)


def test_the_command_takes_the_second_guidance(directory: Path, tmp_path: Path) -> None:
    for name, more in (("one", []), ("two", ["--guidance-2", "1"])):
        arguments = ["sample", "--pipeline", str(directory), "--prompt", "blue", "--guidance", "5", *more]
        result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / name), "--device", "cpu"])
        assert result.exit_code == 0, result.output
    one, two = (json.loads((tmp_path / name / "prompts.jsonl").read_text()) for name in ("one", "two"))
    assert two == one | {"guidance_2": 1.0}
    assert (tmp_path / "one/0000.mp4").read_bytes() != (tmp_path / "two/0000.mp4").read_bytes()


@pytest.mark.parametrize("second", [None, "transformer_2"])
def test_half_a_pipeline_is_refused(adapter: PipelineAdapter, second: str | None) -> None:
    pipe = adapter.pipe
    if second is None:
        pipe.register_modules(transformer_2=None)
    else:
        pipe.register_to_config(boundary_ratio=None)
    with pytest.raises(ValueError, match=r"got boundary_ratio .* expected None with transformer alone \(Wan 2\.1\)"):
        type(adapter)(pipe)


# ---------------------------------------------------------------------- training


@FULL_AND_LORA
def test_the_base_stays_the_base(adapter: PipelineAdapter, seed: int, lora: LoraConfig | None) -> None:
    x, sigma = torch.randn(3, 4, 3, 4, 4), torch.tensor([0.95, 0.3, 0.9])
    embeds = adapter.encode_prompts(PROMPTS)
    original = adapter.velocity(x, sigma, embeds).detach()
    prepare(adapter, lora, seed=seed)
    base = FrozenBase(adapter)
    assert float(base_anchor(adapter, base, x, sigma, embeds).detach()) < 1e-12  # copies may be aligned otherwise
    with torch.no_grad():
        for parameter in trained_parameters(adapter).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.testing.assert_close(base.velocity(x, sigma, embeds), original, rtol=0, atol=1e-5)
    apart = (adapter.velocity(x, sigma, embeds) - original).abs().amax((1, 2, 3, 4))
    assert apart.min() > 1e-3  # both adapters are on again


def algorithms(adapter: PipelineAdapter) -> dict[str, Callable[[], Any]]:
    rewards, base = ColorReward(), FrozenBase(adapter)
    return {
        "flow_matching": lambda: FlowMatching(adapter, shift=20.0),  # nearer to noise: both experts in a batch
        "consistency": lambda: Consistency(adapter, base, steps=4),
        "one_step": lambda: OneStep(adapter, rewards, base, steps=4),
        "draft": lambda: Draft(adapter, rewards, base, steps=3),
        "grpo": lambda: Grpo(adapter, rewards, base, steps=4, group_size=2, eta=0.1, anchor_weight=0.0, kl_weight=0.1),
    }


@pytest.mark.parametrize("name", ["flow_matching", "consistency", "one_step", "draft", "grpo"])
def test_every_algorithm_moves_both_adapters_alone(adapter: PipelineAdapter, seed: int, name: str) -> None:
    prepare(adapter, LORA, seed=seed, gradient_checkpointing=True)
    parameters = {f"{d}.{n}": p for d, m in adapter.denoisers.items() for n, p in m.named_parameters()}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    algorithm = algorithms(adapter)[name]()
    optimizer = torch.optim.AdamW(trained_parameters(adapter).values(), lr=0.05)
    latents = torch.randn(8, 4, 3, 4, 4)
    visits, step = dict.fromkeys(adapter.denoisers, 0), 0
    # A is still in the first step that an expert sees, where B is 0; which experts a step sees is left to chance.
    while min(visits.values()) < 2 and step < 30:
        optimizer.zero_grad()
        batch = Batch(["blue"] * 8, latents=latents) if name != "grpo" else Batch(PROMPTS[:1])
        algorithm.loss(batch, torch.Generator().manual_seed(seed + step))[0].backward()
        for seen in {key.split(".")[0] for key, p in trained_parameters(adapter).items() if p.grad is not None}:
            visits[seen] += 1
        optimizer.step()
        step += 1
    moved = {n for n, p in parameters.items() if not torch.equal(p, before[n])}
    assert moved <= {n for n in parameters if "lora_" in n}
    for denoiser in adapter.denoisers:
        mine = {n for n in parameters if n.startswith(f"{denoiser}.") and "lora_" in n}
        assert len(moved & mine) > 0.7 * len(mine), denoiser


def test_an_expert_without_a_sample_stands_still(adapter: PipelineAdapter, seed: int) -> None:
    """No weight decay, no moments: the other expert's steps are not its own."""
    prepare(adapter, None)
    v = adapter.velocity(torch.randn(2, 4, 3, 4, 4), torch.tensor([0.9, 1.0]), adapter.encode_prompts(PROMPTS[:2]))
    v.square().mean().backward()
    found = {n.split(".")[0] for n, p in trained_parameters(adapter).items() if p.grad is not None}
    assert found == {"transformer"}


def settings(output: Path, *, steps: int, lora: LoraConfig | None) -> TrainConfig:
    return TrainConfig(
        optimizer=OptimizerConfig(lr=5e-3, accumulation=1, ema_decay=0.9),
        lora=lora,
        output=OutputConfig(dir=str(output), save_every=2, trackers=()),
        steps=steps,
        seed=3,
    )


def make(directory: Path, config: TrainConfig) -> Trainer:
    adapter = load_pipeline(directory)
    prepare(adapter, config.lora, seed=config.seed)
    # last_k 2 of 3: the first expert learns from the anchor alone, in some of the steps
    algorithm = Draft(adapter, ColorReward(), FrozenBase(adapter), steps=3, last_k=2)
    return Trainer(adapter, algorithm, config, batches=PromptBatches(PROMPTS, batch_size=2, seed=config.seed))


@FULL_AND_LORA
def test_resumed_is_uninterrupted_and_what_is_exported_loads(
    directory: Path, tmp_path: Path, lora: LoraConfig | None
) -> None:
    whole = make(directory, settings(tmp_path / "whole", steps=4, lora=lora))
    final = whole.fit()
    make(directory, settings(tmp_path / "parts", steps=1, lora=lora)).fit()
    resumed = make(directory, settings(tmp_path / "parts", steps=4, lora=lora))
    resumed.fit()
    assert {name.split(".")[0] for name in whole.parameters} == {"transformer", "transformer_2"}
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
        assert torch.equal(whole.ema[name], resumed.ema[name]), name
        mine, theirs = whole.optimizer.state[parameter], resumed.optimizer.state[resumed.parameters[name]]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items()), name

    noise = whole.adapter.noise(1)
    with whole.ema_weights():
        wanted = whole.adapter.sample(PROMPTS[:1], noise=noise)
    if lora is None:
        exported = load_pipeline(final)
        assert exported.pipe.config.boundary_ratio == BOUNDARY
    else:
        pipe = DiffusionPipeline.from_pretrained(str(directory), dtype=torch.float32)
        pipe.load_lora_weights(str(final))
        half = type(whole.adapter)(pipe, defaults=whole.adapter.defaults).sample(PROMPTS[:1], noise=noise)
        pipe.load_lora_weights(str(final / "transformer_2"), load_into_transformer_2=True)
        exported = type(whole.adapter)(pipe, defaults=whole.adapter.defaults)
        assert (half - wanted).abs().max() > 1e-4  # both files count
    torch.testing.assert_close(exported.sample(PROMPTS[:1], noise=noise), wanted, rtol=0, atol=1e-6)
    assert (load_pipeline(directory).sample(PROMPTS[:1], noise=noise) - wanted).abs().max() > 1e-3


def test_a_lora_is_both_or_none(adapter: PipelineAdapter, directory: Path, tmp_path: Path, seed: int) -> None:
    prepare(adapter, LORA, seed=seed)
    first, second = ({n: p for n, p in m.named_parameters() if "lora_A" in n} for m in adapter.denoisers.values())
    assert not any(torch.equal(p, second[n]) for n, p in first.items())  # each has its own noise
    with torch.no_grad():
        for parameter in trained_parameters(adapter).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    noise = adapter.noise(1)
    file = adapter.save_lora(tmp_path / "lora") / "pytorch_lora_weights.safetensors"
    again = load_pipeline(directory)
    again.load_lora(file)
    wanted = adapter.sample(PROMPTS[:1], noise=noise)
    torch.testing.assert_close(again.sample(PROMPTS[:1], noise=noise), wanted, rtol=0, atol=1e-6)
    (tmp_path / "lora/transformer_2/pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no such file: .*transformer_2.* transformer and transformer_2"):
        load_pipeline(directory).load_lora(file)

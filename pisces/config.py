"""Settings of a training run: dataclasses, read from YAML with errors that say which key and what to write.

Every default stands beside its source: "PISCES" is arXiv 2602.01624 with its authors' HunyuanVideo scripts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pisces.algorithms.settings import (
    ALGORITHMS,
    AlgorithmConfig,
    ConsistencyConfig,
    DraftConfig,
    FlowMatchingConfig,
    GrpoConfig,
    OneStepConfig,
    need,
)
from pisces.data import find_videos
from pisces.decode.decoding import MEMORY
from pisces.decode.replay import SWEEPS
from pisces.pipelines.files import find_pipeline
from pisces.rewards.semantic import Transport
from pisces.run_log import TRACKERS
from pisces.sections import override, plain, section

__all__ = [
    "ALGORITHMS",
    "AlgorithmConfig",
    "ConsistencyConfig",
    "DataConfig",
    "DecodeConfig",
    "DraftConfig",
    "FlowMatchingConfig",
    "GrpoConfig",
    "GuardsConfig",
    "LoraConfig",
    "OneStepConfig",
    "OptimizerConfig",
    "OutputConfig",
    "PipelineConfig",
    "RewardsConfig",
    "TrainConfig",
    "ValidationConfig",
    "load_config",
    "pipeline_path",
    "presets",
    "resolve_path",
]

PACKAGED, PRESET = "packaged:", "preset:"
UNSET = "???"  # what a preset leaves to its user
PRESETS = Path(__file__).parent / "presets"
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class DecodeConfig:
    """How videos are decoded for rewards: see :func:`pisces.decode.decode`; all give the same gradient.

    Attributes:
        memory: "chunked", in the memory of one chunk, or "plain", in that of the whole video.
        states: what becomes of the caches between chunks: "keep", "sqrt", "cbrt" or "offload".
        chunk: latent frames of a chunk.
        checkpoint: recompute inside a chunk too.
    """

    memory: str = "chunked"
    states: str = "sqrt"
    chunk: int = 1
    checkpoint: bool = False

    def __post_init__(self) -> None:
        need(self.memory in MEMORY, "pipeline.decode.memory", self.memory, " or ".join(MEMORY))
        need(self.states in SWEEPS, "pipeline.decode.states", self.states, " or ".join(SWEEPS))
        need(self.chunk >= 1, "pipeline.decode.chunk", self.chunk, "at least 1")


@dataclass(frozen=True)
class PipelineConfig:
    """The generator to train.

    Attributes:
        path: a local diffusers directory, a hub name that is in the local Hugging Face cache, or ``packaged:NAME``
            for one that comes with the package.
        dtype: float32, or bfloat16.
        vae_dtype: of the autoencoder, likewise.
        device: such as "cuda:1"; None is the first GPU if there is one, else the CPU. Of several processes each has its
            own, and this is None or its kind, such as "cuda".
        decode: how its videos are decoded.
        gradient_checkpointing: recompute the denoiser's blocks in the backward pass.
        n_frames: frames of a video; None takes the directory's ``pisces.json``, as below.
        height: in pixels.
        width: in pixels.
    """

    path: str = "packaged:wan-base"
    dtype: str = "float32"  # PISCES trains in bfloat16 on GPUs; float32 is what a CPU is quick in
    vae_dtype: str = "float32"  # as diffusers' own Wan example: rewards and their gradients go through it
    device: str | None = None
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    gradient_checkpointing: bool = False  # PISCES: on; a second forward pass for the memory of one block
    n_frames: int | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for key in ("dtype", "vae_dtype"):
            value = getattr(self, key)
            need(value in ("float32", "bfloat16"), f"pipeline.{key}", value, "float32 or bfloat16")


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
        prompts: a .txt, .jsonl or .csv file of prompts; enough for the algorithm ``draft``.
        videos: a folder of captioned videos, or WebDataset shards (a .tar, a brace pattern, a folder of .tar files);
            needed by ``one_step``, ``consistency`` and ``flow_matching``.
        batch_size: samples of one forward pass.
        cache: a folder where latents and prompt embeddings are kept from run to run; None keeps them in memory.
    """

    prompts: str | None = None
    videos: str | None = None
    batch_size: int = 1  # PISCES: 1 a GPU
    cache: str | None = None

    def __post_init__(self) -> None:
        need(self.batch_size >= 1, "data.batch_size", self.batch_size, "at least 1")
        need(not (self.prompts and self.videos), "data", "prompts and videos", "one of the two")


@dataclass(frozen=True)
class RewardsConfig:
    """What is rewarded.

    Attributes:
        encoder: directory of the video-text encoder, or ``packaged`` for the small one of the package.
        ot_map: a file that ``pisces fit-ot-map`` wrote; None compares the embeddings as they are.
        quality: weight of the quality reward; 0 leaves it out.
        semantic: weight of the semantic reward; 0 leaves it out.
        transport: settings of the partial transport in the semantic reward; None leaves the attention as it is.
        standardize: bring each reward to mean 0 and standard deviation 1 over samples of the base model.
        reference_batch: number of those samples.
    """

    encoder: str = "packaged"
    ot_map: str | None = None
    quality: float = 1.0  # PISCES: all weights 1
    semantic: float = 1.0  # PISCES: all weights 1
    transport: Transport | None = field(default_factory=Transport)  # PISCES: on
    # Not in PISCES: a modality gap changes a reward's spread 16-20 times, which acts like another learning rate.
    standardize: bool = True
    reference_batch: int = 64  # the mean is then known to an eighth of a standard deviation

    def __post_init__(self) -> None:
        for key in ("quality", "semantic"):
            need(getattr(self, key) >= 0, f"rewards.{key}", getattr(self, key), "at least 0")
        need(self.quality + self.semantic > 0, "rewards", "quality 0 and semantic 0", "a positive weight")
        need(self.reference_batch >= 2, "rewards.reference_batch", self.reference_batch, "at least 2")


@dataclass(frozen=True)
class GuardsConfig:
    """Signs that a reward is being hacked: see :func:`pisces.guards.alarms`. All compare with the base; null is off.

    Attributes:
        sharpness: least share of the base's sharpness.
        motion: least share of the base's motion.
        saturation: most times the base's saturation.
        watched: how far the watched rewards may be below their best, in the base's standard deviations.
        patience: validations in a row with an alarm after which training stops; null warns only.
    """

    sharpness: float | None = 0.5  # ours, as all below: half of it gone is seen at once
    motion: float | None = 0.5
    saturation: float | None = 1.5
    watched: float | None = 0.5
    patience: int | None = None

    def __post_init__(self) -> None:
        for key in ("sharpness", "motion", "saturation", "watched"):
            value = getattr(self, key)
            need(value is None or value > 0, f"validation.guards.{key}", value, "a positive number or null")
        need(self.patience is None or self.patience >= 1, "validation.guards.patience", self.patience, "1 or more")


@dataclass(frozen=True)
class ValidationConfig:
    """Videos of the same prompts and the same noise, made, scored and kept while training goes on.

    Attributes:
        every: optimizer steps between validations, the first before training; 0 is off.
        prompts: a .txt, .jsonl or .csv file; null takes the first prompts of the data.
        n: number of videos.
        steps: sampler steps; null takes the algorithm's if it has a sampler, else the pipeline directory's.
        guidance: classifier-free guidance; 1 is off.
        watched: rewards that are not trained on, only looked at; their weights say what they are summed by.
        guards: what raises an alarm.
    """

    every: int = 64  # PISCES validates every 64 steps
    prompts: str | None = None
    n: int = 8
    steps: int | None = None
    guidance: float = 1.0
    watched: RewardsConfig | None = None
    guards: GuardsConfig = field(default_factory=GuardsConfig)

    def __post_init__(self) -> None:
        need(self.every >= 0, "validation.every", self.every, "at least 0 (off)")
        need(self.n >= 1, "validation.n", self.n, "at least 1")
        need(self.steps is None or self.steps >= 1, "validation.steps", self.steps, "at least 1 or null")
        need(self.guidance >= 1, "validation.guidance", self.guidance, "at least 1 (off)")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; the learning rate warms up linearly, then follows a schedule down to ``final_lr`` of itself."""

    lr: float = 1e-6  # PISCES, for a 13 B model with LoRA; 0.62 M parameters in full want about 3e-4
    betas: tuple[float, float] = (0.9, 0.999)  # PISCES
    weight_decay: float = 1e-3  # PISCES
    warmup_steps: int = 0  # PISCES: none
    schedule: str = "constant"  # PISCES; linear and cosine fall over ``steps``
    final_lr: float = 0.0  # share of lr at the end of a falling schedule
    grad_clip: float | None = 1.0  # PISCES; None does not clip
    accumulation: int = 32  # PISCES: 32 micro-batches an optimizer step
    ema_decay: float = 0.0  # PISCES: no EMA; 0 is off

    def __post_init__(self) -> None:
        need(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        need(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        need(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0")
        need(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "at least 0")
        need(self.schedule in SCHEDULES, "optimizer.schedule", self.schedule, " or ".join(SCHEDULES))
        need(0 <= self.final_lr <= 1, "optimizer.final_lr", self.final_lr, "a share, 0 to 1")
        clip = self.grad_clip
        need(clip is None or clip > 0, "optimizer.grad_clip", clip, "a positive number or null")
        need(self.accumulation >= 1, "optimizer.accumulation", self.accumulation, "at least 1")
        need(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "0 (off) or a number below 1")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of full fine-tuning.

    Attributes:
        rank: r.
        alpha: the adapter is scaled by alpha / rank.
        targets: names of the layers; None takes the pipeline's attention and MLP projections.
    """

    rank: int = 256  # PISCES
    alpha: float = 32.0  # PISCES
    targets: tuple[str, ...] | None = None  # PISCES: attention and MLP projections

    def __post_init__(self) -> None:
        need(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        need(self.alpha > 0, "lora.alpha", self.alpha, "a positive number")


@dataclass(frozen=True)
class OutputConfig:
    """Where results go.

    Attributes:
        dir: receives config.yaml, log.jsonl, checkpoints/, validation/ and final/.
        save_every: optimizer steps between checkpoints.
        keep: newest checkpoints to leave.
        trackers: "tensorboard" writes to ``dir/tensorboard``; "wandb" sends the log to where its own settings say.
    """

    dir: str = "runs/pisces"
    save_every: int = 64  # PISCES validates every 64 steps
    keep: int = 2  # one to go on from, one in case that a disk damages it
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        need(self.save_every >= 1, "output.save_every", self.save_every, "at least 1")
        need(self.keep >= 1, "output.keep", self.keep, "at least 1")
        need(set(self.trackers) <= set(TRACKERS), "output.trackers", list(self.trackers), f"some of {list(TRACKERS)}")


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run; every section may be left out.

    Attributes:
        pipeline: the generator.
        data: prompts or captioned videos.
        rewards: what is rewarded.
        validation: what is looked at meanwhile.
        algorithm: one of the five, named by the key ``name``.
        optimizer: AdamW.
        lora: low-rank adapters; None (``null``) trains every weight of the transformer.
        output: where results go.
        steps: optimizer steps in all.
        seed: of the data order, the noise and the adapter's first weights.
    """

    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    algorithm: AlgorithmConfig = field(default_factory=OneStepConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    steps: int = 256  # PISCES: 192-256
    seed: int = 0

    def __post_init__(self) -> None:
        need(self.steps >= 1, "steps", self.steps, "at least 1")
        need(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from nested mappings, refusing unknown keys and wrong types.

        Raises:
            ValueError: naming the key, what it got and what it expects; an unknown key with the nearest known one.
        """
        return section(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values that :meth:`from_dict` reads back."""
        values = plain(dataclasses.asdict(self))
        values["algorithm"] = {"name": self.algorithm.name, **values["algorithm"]}
        return values

    def check_inputs(self) -> None:
        """Check that the files and folders named are there and that they are enough for the algorithm.

        Raises:
            FileNotFoundError: naming the key and the path.
            ValueError: if the algorithm has no data it can use.
        """
        if self.algorithm.needs_videos and not self.data.videos:
            raise ValueError(f"data.videos: the algorithm {self.algorithm.name} needs a folder of captioned videos.")
        if self.data.videos:
            try:
                find_videos(resolve_path(self.data.videos))
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(f"data.videos: {error}") from error
        if not self.data.videos and not self.data.prompts:
            raise ValueError("data: got neither prompts nor videos, expected one of the two.")
        if "wandb" in self.output.trackers and find_spec("wandb") is None:
            raise ValueError(
                "output.trackers: wandb is not installed. Install it (pip install wandb), or leave it out."
            )
        named = {
            "pipeline.path": self.pipeline.path,
            "data.prompts": self.data.prompts,
            "validation.prompts": self.validation.prompts,
        }
        for key, rewards in self.reward_sections().items():
            named[f"{key}.encoder"] = None if rewards.encoder == UNSET else rewards.encoder
            named[f"{key}.ot_map"] = rewards.ot_map
        for key, name in named.items():
            if name is not None:
                try:
                    path = pipeline_path(name) if key == "pipeline.path" else resolve_path(name)
                except FileNotFoundError as error:
                    raise FileNotFoundError(f"{key}: {error}") from error
                if not path.exists():
                    raise FileNotFoundError(f"{key}: no such file or directory: {path}")

    def check_encoders(self) -> None:
        """Check that every reward has an encoder; who reads no reward does without.

        Raises:
            ValueError: naming the setting that a preset leaves open.
        """
        for key, rewards in self.reward_sections().items():
            if rewards.encoder == UNSET:
                raise ValueError(
                    f"{key}.encoder: say where your encoder is, such as --set {key}.encoder=models/internvideo2; "
                    "`packaged` knows 32-pixel videos of moving shapes and nothing else."
                )

    def reward_sections(self) -> dict[str, RewardsConfig]:
        """The settings of the rewards that are trained on and watched, by their keys."""
        found = {"rewards": self.rewards} if self.algorithm.needs_rewards else {}
        if self.validation.watched is not None:
            found["validation.watched"] = self.validation.watched
        return found


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file of settings.

    Args:
        path: the file, or ``preset:NAME`` for one of :func:`presets`.
        overrides: settings of the form ``a.b=value`` that replace the file's; values are read as YAML.

    Returns:
        The checked settings; files that they name exist.

    Raises:
        FileNotFoundError: if the file, or one that it names, is not there.
        ValueError: if it is no YAML mapping, or a key or value is wrong.
    """
    path = _preset(str(path)) if str(path).startswith(PRESET) else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_config: no such file: {path}")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a {type(values).__name__}, expected sections such as 'pipeline:'.")
    for setting in overrides:
        override(values, setting)
    try:
        config = TrainConfig.from_dict(values)
        config.check_inputs()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from error
    return config


def presets() -> dict[str, str]:
    """Names of the settings that come with the package, each with the first sentence that it says of itself."""
    return {file.stem: file.read_text().splitlines()[0].removeprefix("# ") for file in sorted(PRESETS.glob("*.yaml"))}


def _preset(name: str) -> Path:
    file = PRESETS / f"{name.removeprefix(PRESET)}.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"load_config: no preset {name!r}, expected one of {', '.join(presets())}.")
    return file


def resolve_path(name: str) -> Path:
    """The path that a setting names: ``packaged`` and ``packaged:NAME`` are checkpoints and prompts of the package.

    Raises:
        FileNotFoundError: if the package has no such checkpoint.
    """
    if name == "packaged":
        name = PACKAGED + "encoder"
    if name.startswith(PACKAGED) and name.endswith(".txt"):
        return PRESETS / name.removeprefix(PACKAGED)
    if name.startswith(PACKAGED):
        from pisces.world import checkpoint_path

        return checkpoint_path(name.removeprefix(PACKAGED))
    return Path(name).expanduser()


def pipeline_path(name: str) -> Path:
    """The directory of a pipeline: ``packaged:NAME``, a path, or a name in the local Hugging Face cache.

    Raises:
        FileNotFoundError: if it is none of these.
    """
    return resolve_path(name) if name.startswith(PACKAGED) else find_pipeline(name)

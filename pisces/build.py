"""From settings to the parts of a training run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pisces.algorithms import (
    Algorithm,
    Consistency,
    Draft,
    FlowMatching,
    FrozenBase,
    Grpo,
    OneStep,
    RewardModule,
)
from pisces.batches import PromptBatches, VideoBatches
from pisces.config import (
    PACKAGED,
    ConsistencyConfig,
    DraftConfig,
    FlowMatchingConfig,
    GrpoConfig,
    RewardsConfig,
    TrainConfig,
    pipeline_path,
    resolve_path,
)
from pisces.data import open_videos, read_prompts
from pisces.encoders import Encoder, load_encoder
from pisces.encoders.base import refused_prompts
from pisces.encoders.tiny import unknown_words
from pisces.latent_cache import LatentCache
from pisces.ot_map import Alignment
from pisces.pipelines import load_pipeline
from pisces.pipelines.base import PipelineAdapter
from pisces.pipelines.files import files_fingerprint
from pisces.pipelines.trainable import best_device, prepare
from pisces.processes import Processes, join_processes, own_device
from pisces.reference import REFERENCE_FILE, ReferenceVideos, standardized
from pisces.rewards import CompositeReward, QualityReward, Reward, SemanticReward
from pisces.trainer import Trainer
from pisces.validation import Validation

logger = logging.getLogger(__name__)

_NAMED = 3  # refused prompts of a message


def build_training(config: TrainConfig) -> Trainer:
    """Build pipeline, data, rewards and algorithm from settings.

    Args:
        config: what :func:`pisces.config.load_config` returned.

    Returns:
        The trainer, at step 0; ``fit`` trains, resuming if it can.

    Raises:
        FileNotFoundError: if a file that the settings name is not there.
        ValueError: if the settings do not fit together or the data cannot be used.
    """
    config.check_inputs()
    config.check_encoders()
    adapter = build_adapter(config, device=join_processes())
    batches = build_batches(config, adapter, build_cache(config, adapter))
    encoders = build_encoders(config, adapter)
    check_texts(config, encoders, batches)
    # Before anything is trainable: the rewards' reference batch is drawn from the base model.
    rewards = None
    if config.algorithm.needs_rewards:
        rewards = build_rewards(config.rewards, config, adapter, batches, encoders)
    validation = build_validation(config, adapter, batches, rewards, encoders)
    checkpointing = config.pipeline.gradient_checkpointing
    prepare(adapter, config.lora, seed=config.seed, gradient_checkpointing=checkpointing)
    algorithm = build_algorithm(config, adapter, rewards)
    return Trainer(adapter, algorithm, config, batches=batches, validation=validation)


def run_training(config: TrainConfig, *, resume: str | Path = "auto") -> Path:
    """Build everything from settings, train, and export.

    Args:
        config: what :func:`pisces.config.load_config` returned.
        resume: as for :meth:`Trainer.fit`.

    Returns:
        ``output.dir/final``.

    Raises:
        FileNotFoundError: if a file that the settings name is not there.
        ValueError: if the settings do not fit together or the data cannot be used.
        Interrupted: after a SIGTERM or SIGINT, once the checkpoint is written.
    """
    return build_training(config).fit(resume=resume)


def build_adapter(config: TrainConfig, device: torch.device | None = None) -> PipelineAdapter:
    """The pipeline of ``config.pipeline``, as it is on the disk.

    Args:
        config: the settings.
        device: of this process among several, out of :func:`~pisces.processes.join_processes`; None where it is alone.

    Returns:
        The pipeline, on that device, or that of the settings, or else the first GPU or the CPU.

    Raises:
        ValueError: if there are several processes and the setting asks for another device than each has.
    """
    settings = config.pipeline
    return load_pipeline(
        pipeline_path(settings.path),
        dtype=getattr(torch, settings.dtype),
        vae_dtype=getattr(torch, settings.vae_dtype),
        device=own_device(settings.device, device, "pipeline.device") if device else settings.device or best_device(),
        decoding=asdict(settings.decode),
    )


def build_cache(config: TrainConfig, adapter: PipelineAdapter) -> LatentCache | None:
    """The folder ``data.cache``, where the adapter now looks its prompt embeddings up; None if none is named."""
    if config.data.cache is None:
        return None
    cache = LatentCache(resolve_path(config.data.cache), adapter)
    adapter.prompt_memory.store = cache
    return cache


def build_batches(
    config: TrainConfig, adapter: PipelineAdapter, cache: LatentCache | None = None
) -> PromptBatches | VideoBatches:
    """The data of ``config.data``: captioned videos if they are named, else prompts.

    For an algorithm that looks at no videos their captions are the prompts.
    """
    size, seed = config.data.batch_size, config.seed
    if config.data.videos is None:
        return PromptBatches(read_prompts(resolve_path(str(config.data.prompts))), batch_size=size, seed=seed)
    n_frames, height, width = adapter.video_size(**video_size(config))
    videos = open_videos(resolve_path(config.data.videos), n_frames=n_frames, size=(height, width))
    if not config.algorithm.needs_videos:
        return PromptBatches(videos.captions, batch_size=size, seed=seed)
    return VideoBatches(videos, adapter, batch_size=size, seed=seed, cache=cache)


def computed_rewards(config: TrainConfig) -> dict[str, RewardsConfig]:
    """The sections of rewards that a run computes, by their keys: without validation nothing is watched."""
    sections = config.reward_sections()
    return sections if config.validation.every else {key: sections[key] for key in sections if key == "rewards"}


def build_encoders(config: TrainConfig, adapter: PipelineAdapter) -> dict[str, Encoder]:
    """The encoders of all rewards, by the names that the settings have for them; each is loaded once."""
    names = {settings.encoder for settings in computed_rewards(config).values()}
    return {name: load_encoder(resolve_path(name)).to(adapter.device) for name in sorted(names)}


def check_texts(config: TrainConfig, encoders: Mapping[str, Encoder], batches: PromptBatches | VideoBatches) -> None:
    """Refuse prompts that an encoder of the rewards does not read, before any video is made for them.

    Words that it does not know are a warning, and so is the packaged encoder beside a pipeline that is not.

    Args:
        config: of the run.
        encoders: of :func:`build_encoders`.
        batches: the data.

    Raises:
        ValueError: naming the section, and number and text of the first few prompts.
    """
    validated = validation_prompts(config, batches) if config.validation.every else []
    for key, settings in computed_rewards(config).items():
        encoder = encoders[settings.encoder]
        texts: dict[str, list[str]] = {}
        if key == "rewards":
            texts["prompts of the data"] = batches.texts
        elif settings.standardize:
            texts["prompts of the reference videos"] = first_prompts(batches, settings.reference_batch)
        texts["validation prompts"] = validated
        for what, prompts in texts.items():
            refused = refused_prompts(encoder, prompts)
            if refused:
                first, *_ = refused
                named = ", ".join(f"number {number + 1} {prompts[number]!r}" for number in list(refused)[:_NAMED])
                raise ValueError(
                    f"{key}.encoder: {settings.encoder} refuses {len(refused)} of {len(prompts)} {what}: {named}"
                    f"{' and so on' if len(refused) > _NAMED else ''}. Remove or rewrite them. ({refused[first]})"
                )
        if Processes().is_main:
            if settings.encoder == "packaged" and not config.pipeline.path.startswith(PACKAGED):
                logger.warning(
                    "%s.encoder: the packaged small one knows 32-pixel videos of moving shapes and nothing else; "
                    "name another for other videos.",
                    key,
                )
            note = unknown_words(encoder, [prompt for prompts in texts.values() for prompt in prompts])
            if note:
                logger.warning("%s.encoder: %s", key, note)


def build_rewards(
    settings: RewardsConfig,
    config: TrainConfig,
    adapter: PipelineAdapter,
    batches: PromptBatches | VideoBatches,
    encoders: Mapping[str, Encoder],
) -> CompositeReward:
    """The rewards of a section such as ``config.rewards``.

    With ``standardize`` the scale is taken over samples of the model as it is now, for prompts of the data: the
    reward then counts in standard deviations of what the base makes. The output folder remembers it.
    """
    encoder = encoders[settings.encoder]
    alignment = None if settings.ot_map is None else Alignment.load(resolve_path(settings.ot_map)).to(adapter.device)
    parts: dict[str, Reward] = {}
    if settings.quality:
        parts["quality"] = QualityReward(encoder, alignment)
    if settings.semantic:
        parts["semantic"] = SemanticReward(encoder, transport=settings.transport)
    if settings.standardize:
        videos = reference_videos(settings.reference_batch, config, adapter, batches)
        identity = _reference_identity(settings, config, videos, batches)
        parts = standardized(parts, videos, file=Path(config.output.dir) / REFERENCE_FILE, identity=identity)
    return CompositeReward(parts, {name: getattr(settings, name) for name in parts})


def build_validation(
    config: TrainConfig,
    adapter: PipelineAdapter,
    batches: PromptBatches | VideoBatches,
    rewards: CompositeReward | None,
    encoders: Mapping[str, Encoder],
) -> Validation | None:
    """The validation of ``config.validation``; None if it is off."""
    settings = config.validation
    if not settings.every:
        return None
    watched = None
    if settings.watched is not None:
        watched = build_rewards(settings.watched, config, adapter, batches, encoders)
    return Validation(
        adapter,
        validation_prompts(config, batches),
        rewards=rewards,
        watched=watched,
        every=settings.every,
        steps=settings.steps or sampler_steps(config, adapter),
        guidance=settings.guidance,
        size=video_size(config),
        seed=config.seed,
    )


def validation_prompts(config: TrainConfig, batches: PromptBatches | VideoBatches) -> list[str]:
    """What the videos of the validation are of."""
    settings = config.validation
    if settings.prompts is None:
        return first_prompts(batches, settings.n)
    return read_prompts(resolve_path(settings.prompts))[: settings.n]


def first_prompts(batches: PromptBatches | VideoBatches, n: int) -> list[str]:
    """The first n prompts of the data's order; it begins anew where the data are fewer."""
    prompts: list[str] = []
    index = 0
    while len(prompts) < n:
        prompts += [batches.texts[item] for item in batches.indices[index]]
        index += 1
    return prompts[:n]


def sampler_steps(config: TrainConfig, adapter: PipelineAdapter) -> int:
    """Steps of the sampler that is trained; an algorithm without one takes the one that the directory recommends."""
    settings = config.algorithm
    return settings.steps if isinstance(settings, DraftConfig | GrpoConfig) else adapter.defaults.get("steps", 50)


def reference_videos(
    wanted: int, config: TrainConfig, adapter: PipelineAdapter, batches: PromptBatches | VideoBatches
) -> ReferenceVideos:
    """Videos of the model as it is now, for the first prompts of the data order."""
    return ReferenceVideos(
        adapter,
        first_prompts(batches, wanted),
        batch_size=config.data.batch_size,
        steps=sampler_steps(config, adapter),
        size=video_size(config),
        seed=config.seed,
    )


def _reference_identity(
    settings: RewardsConfig, config: TrainConfig, videos: ReferenceVideos, batches: PromptBatches | VideoBatches
) -> dict[str, Any]:
    """All that the scale of the rewards depends on."""
    pipeline = config.pipeline
    files = (pipeline_path(pipeline.path), resolve_path(settings.encoder))
    return {
        "rewards": asdict(settings),
        "pipeline": [pipeline.path, pipeline.dtype, pipeline.vae_dtype, videos.size],
        "sampler": [videos.steps, config.data.batch_size, config.seed],
        "prompts": batches.fingerprint,
        "files": [files_fingerprint(file) for file in files]
        + ([files_fingerprint(resolve_path(settings.ot_map))] if settings.ot_map else []),
    }


def build_algorithm(config: TrainConfig, adapter: PipelineAdapter, rewards: RewardModule | None) -> Algorithm:
    """The algorithm of ``config.algorithm``; the adapter is already given to ``prepare``."""
    settings = config.algorithm
    if isinstance(settings, FlowMatchingConfig):
        return FlowMatching(adapter, shift=settings.shift, caption_dropout=settings.caption_dropout)
    if isinstance(settings, ConsistencyConfig):
        base = FrozenBase(adapter)
        return Consistency(adapter, base, steps=settings.steps, phases=settings.phases, huber_c=settings.huber_c)
    if rewards is None:
        raise ValueError(f"build_algorithm: {settings.name} needs rewards, got None. Use build_rewards.")
    if isinstance(settings, DraftConfig):
        options: dict[str, Any] = {**asdict(settings), **video_size(config)}
        return Draft(adapter, rewards, FrozenBase(adapter) if settings.anchor_weight else None, **options)
    if isinstance(settings, GrpoConfig):
        anchored = settings.anchor_weight or settings.kl_weight
        base_or_none = FrozenBase(adapter) if anchored else None
        return Grpo(adapter, rewards, base_or_none, **asdict(settings), size=video_size(config))
    return OneStep(
        adapter,
        rewards,
        FrozenBase(adapter),
        steps=settings.steps,
        anchor_weight=settings.anchor_weight,
        phases=settings.phases,
        huber_c=settings.huber_c,
    )


def video_size(config: TrainConfig) -> dict[str, int | None]:
    """The keyword arguments n_frames, height and width of the adapter's methods."""
    return {
        "n_frames": config.pipeline.n_frames,
        "height": config.pipeline.height,
        "width": config.pipeline.width,
    }

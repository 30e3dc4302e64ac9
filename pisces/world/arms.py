"""The arms of the demo's comparison: what each one trains, and how the judge scores the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pisces.algorithms.base import Batch
from pisces.config import (
    DataConfig,
    DecodeConfig,
    DraftConfig,
    FlowMatchingConfig,
    OptimizerConfig,
    OutputConfig,
    PipelineConfig,
    RewardsConfig,
    TrainConfig,
    ValidationConfig,
)
from pisces.ot_map import Kind
from pisces.pipelines.wan import WanAdapter
from pisces.rewards import Transport
from pisces.world.judge import judge, mean_scores
from pisces.world.scene import Scenes, captions, sample_scenes


@dataclass(frozen=True)
class Arm:
    """One way to spend the same compute on the base generator.

    Attributes:
        name: in file names and results.
        label: in tables.
        alignment: how the quality reward aligns its embeddings; None: no reward, flow matching on videos.
        transport: whether partial transport refines the attention of the semantic reward.
        data: "clean" videos with true captions, or "web": damaged ones with captions that lie, as the base was
            pre-trained on.
    """

    name: str
    label: str
    alignment: Kind | None
    transport: bool = False
    data: Literal["clean", "web"] = "clean"


FURTHER = Arm("further", "further pre-training", None, data="web")
SUPERVISED = Arm("supervised", "supervised on the clean videos", None)
NO_OT = Arm("no-ot", "rewards without OT", "none")
PISCES = Arm("pisces", "both OT rewards", "center_ot", transport=True)
ARMS = (
    FURTHER,
    SUPERVISED,
    NO_OT,
    Arm("mean-shift", "mean shift", "mean_shift"),
    Arm("centred", "centred", "center"),
    Arm("ot-map", "OT map", "ot"),
    Arm("centred-ot-map", "centred OT map", "center_ot"),
    PISCES,
)
BASE_NAME, BASE_LABEL = "base", "base"

BATCH = 8
SAMPLER_STEPS = 4
LEARNING_RATE = 5e-4
ANCHOR_WEIGHT = 3.0
EMA_DECAY = 0.9  # batches of 8 are noisy: the average is steadier over seeds than the last step
JUDGE_SEED = 11


@dataclass(frozen=True)
class DemoPaths:
    """Where the demo keeps things below its output folder."""

    root: Path

    @property
    def videos(self) -> Path:
        """The captioned videos that alignments are fitted on and whose captions are the prompts."""
        return self.root / "videos" / "clean"

    @property
    def web_videos(self) -> Path:
        """Videos like those of the base's pre-training, for more of it."""
        return self.root / "videos" / "web"

    @property
    def check_videos(self) -> Path:
        """Captioned videos that only diagnostics look at."""
        return self.root / "videos" / "check"

    def alignment(self, kind: Kind) -> Path:
        """The fitted alignment of a kind."""
        return self.root / "alignments" / f"{kind}.safetensors"

    def run(self, arm: Arm, seed: int) -> Path:
        """The training run of an arm."""
        return self.root / "runs" / f"{arm.name}-seed{seed}"


def arm_config(arm: Arm, seed: int, paths: DemoPaths, *, steps: int, base: str = "packaged:wan-base") -> TrainConfig:
    """The settings with which `pisces train` repeats an arm.

    Args:
        arm: what to train.
        seed: of the data order and the noise.
        paths: the demo's folders.
        steps: optimizer steps.
        base: the generator that all arms start from.
    """
    rewarded = arm.alignment is not None
    return TrainConfig(
        pipeline=PipelineConfig(path=base, device="cpu", decode=DecodeConfig(memory="plain")),  # nine frames fit
        data=DataConfig(videos=str(paths.web_videos if arm.data == "web" else paths.videos), batch_size=BATCH),
        rewards=RewardsConfig(
            ot_map=str(paths.alignment(arm.alignment)) if arm.alignment is not None else None,
            transport=Transport() if arm.transport else None,
        ),
        validation=ValidationConfig(every=0),  # the judge looks at the end
        algorithm=DraftConfig(steps=SAMPLER_STEPS, anchor_weight=ANCHOR_WEIGHT) if rewarded else FlowMatchingConfig(),
        optimizer=OptimizerConfig(
            lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, warmup_steps=10, accumulation=1, ema_decay=EMA_DECAY
        ),
        lora=None,
        output=OutputConfig(dir=str(paths.run(arm, seed)), save_every=20, keep=1, trackers=()),
        steps=steps,
        seed=seed,
    )


def equal_compute_steps(paths: DemoPaths, steps: int) -> int:
    """How many steps of further pre-training cost what `steps` steps of reward training cost, in counted FLOPs.

    Counted are the matrix products, convolutions and attentions of one training step of each kind, forward and
    backward, by torch's FlopCounterMode.
    """
    from pisces.build import build_training

    cost = {}
    for arm in (FURTHER, PISCES):
        trainer = build_training(arm_config(arm, 0, paths, steps=1))
        batch: Batch = trainer.batches[0]
        with FlopCounterMode(display=False) as counter:
            loss, _ = trainer.algorithm.loss(batch, torch.Generator().manual_seed(0))
            loss.backward()
        cost[arm.name] = counter.get_total_flops()
    return round(steps * cost[PISCES.name] / cost[FURTHER.name])


def judged_scenes(n: int) -> Scenes:
    """The captions on which every generator is judged: combinations that none of them was trained on."""
    return sample_scenes(n, torch.Generator().manual_seed(JUDGE_SEED), split="held_out")


@torch.no_grad()
def sample_videos(adapter: WanAdapter, prompts: list[str], *, seed: int = JUDGE_SEED, chunk: int = 32) -> Tensor:
    """One video a prompt [n, T, 3, H, W]; the noise is the same for every generator."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, len(prompts), chunk):
        latents = adapter.sample(prompts[start : start + chunk], steps=SAMPLER_STEPS, generator=generator)
        parts.append(adapter.decode(latents))
    return torch.cat(parts)


def shown_captions(n_judged: int, n_shown: int) -> dict[str, int]:
    """The captions that the pictures show, all different -> their place among the judged ones."""
    first: dict[str, int] = {}
    for i, caption in enumerate(captions(judged_scenes(n_judged))):
        first.setdefault(caption, i)
    return dict(list(first.items())[:n_shown])


def judge_generator(path: str | Path, n_judged: int, n_shown: int) -> dict[str, Any]:
    """The judge's mean scores of a generator on held-out captions, and some of its videos.

    Args:
        path: a diffusers directory.
        n_judged: captions that are judged.
        n_shown: videos for the pictures, of `shown_captions`.

    Returns:
        scores: name -> mean; shown: [n_shown, T, 3, H, W].
    """
    scenes = judged_scenes(n_judged)
    frames = sample_videos(WanAdapter.from_pretrained(path), captions(scenes))
    shown = frames[list(shown_captions(n_judged, n_shown).values())]
    return {"scores": mean_scores(judge(frames, scenes)), "shown": shown}


def run_arm(config: dict[str, Any], n_judged: int, n_shown: int) -> dict[str, Any]:
    """Train one arm and judge it; runs in a process of its own, on one thread.

    Args:
        config: of `TrainConfig.to_dict`.
        n_judged: held-out captions.
        n_shown: videos to return for the pictures.

    Returns:
        As `judge_generator`.
    """
    from pisces.build import run_training

    torch.set_num_threads(1)
    final = run_training(TrainConfig.from_dict(config))
    return judge_generator(final, n_judged, n_shown)

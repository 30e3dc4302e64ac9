"""A short training run for `test_processes` and `test_resume`, in this process or, as a script, in several."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tiny_wan import PROMPTS
from toy_rewards import ColorReward

from pisces.algorithms import Draft, FrozenBase, Grpo
from pisces.batches import PromptBatches
from pisces.config import OptimizerConfig, OutputConfig, TrainConfig
from pisces.pipelines import WanAdapter, prepare
from pisces.processes import join_processes
from pisces.trainer import Trainer
from pisces.validation import Validation

ALGORITHMS = ("draft", "grpo")


def build(wan_dir: Path, output: Path, name: str, steps: int) -> Trainer:
    """Two micro-batches a step; GRPO makes two updates of each rollout."""
    adapter = WanAdapter.from_pretrained(wan_dir)
    prepare(adapter, None)
    base = FrozenBase(adapter)
    if name == "draft":
        algorithm = Draft(adapter, ColorReward(), base, steps=2)
    else:
        algorithm = Grpo(
            adapter, ColorReward(), base, steps=3, group_size=2, updates=2, kl_weight=0.1, anchor_weight=0.0
        )
    config = TrainConfig(
        optimizer=OptimizerConfig(lr=1e-3, accumulation=2, ema_decay=0.5),
        output=OutputConfig(dir=str(output), save_every=3, trackers=()),
        steps=steps,
    )
    batches = PromptBatches(PROMPTS, batch_size=1, seed=1)
    validation = Validation(adapter, PROMPTS[:3], rewards=ColorReward(), every=2, steps=2)
    return Trainer(adapter, algorithm, config, batches=batches, validation=validation)


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_processes()
    for algorithm_name in ALGORITHMS:
        for steps_in_all in map(int, sys.argv[3:]):  # the second and further ones resume, with everything built anew
            build(Path(sys.argv[1]), Path(sys.argv[2]) / algorithm_name, algorithm_name, steps_in_all).fit()

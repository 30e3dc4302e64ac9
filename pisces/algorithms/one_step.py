"""Direct reward back-propagation through one prediction: the recipe of PISCES."""

from __future__ import annotations

import torch
from torch import Tensor

from pisces.algorithms.base import Batch, FrozenBase, Logs, RewardModule, expand, real_latents, reward_loss
from pisces.algorithms.consistency import Consistency
from pisces.pipelines.base import PipelineAdapter


class OneStep:
    """Reward of the one-step estimate of x0, with the consistency anchor (PISCES, arXiv 2602.01624).

    A real video is noised to a random level of the sampler's grid, ``x_n = sigma_n noise + (1 - sigma_n) x0``; one
    student prediction is extrapolated to noise level 0, ``x0_hat = x_n - sigma_n v``, decoded and rewarded:

        loss = -sum_k w_k mean(R_k(decode(x0_hat), prompt)) + anchor_weight * L_consistency

    The consistency loss uses the same prediction. No sampling loop is differentiated.

    Args:
        adapter: the pipeline.
        rewards: reward terms and their weights.
        base: the frozen base, teacher of the consistency loss.
        steps: Euler steps of the grid (PISCES: 50).
        anchor_weight: weight of the consistency loss (PISCES: 1); 0 leaves it out.
        phases: phases of the consistency loss (PISCES: 1).
        huber_c: its c (PISCES: .001).
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        rewards: RewardModule,
        base: FrozenBase,
        *,
        steps: int = 50,
        anchor_weight: float = 1.0,
        phases: int = 1,
        huber_c: float = 0.001,
    ) -> None:
        self.adapter = adapter
        self.rewards = rewards
        self.anchor_weight = anchor_weight
        self.consistency = Consistency(adapter, base, steps=steps, phases=phases, huber_c=huber_c)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """The loss of a batch of captioned videos.

        Args:
            batch: prompts with frames or latents.
            generator: source of the noise and the noise levels.

        Returns:
            The scalar loss, and the logs ``reward``, ``reward/NAME`` and ``consistency``.
        """
        x0 = real_latents(self.adapter, batch, who="OneStep")
        embeds = self.adapter.encode_prompts(batch.prompts)
        x_n, index = self.consistency.noised(x0, generator)
        sigma = self.consistency.levels(index, x_n)
        velocity = self.adapter.velocity(x_n, sigma, embeds)
        frames = self.adapter.decode(x_n - expand(sigma) * velocity)
        loss, logs = reward_loss(self.rewards, frames, batch.prompts)
        if self.anchor_weight:
            anchor = self.consistency.distance(x_n, index, embeds, velocity)
            loss = loss + self.anchor_weight * anchor
            logs["consistency"] = anchor.detach()
        return loss, logs

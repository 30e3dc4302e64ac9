"""Direct reward back-propagation through the last steps of the sampler."""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pisces.algorithms.base import Batch, FrozenBase, Logs, RewardModule, reward_loss
from pisces.algorithms.consistency import base_anchor
from pisces.pipelines.base import PipelineAdapter, PromptEmbeds


class Draft:
    """DRaFT-K (Clark et al. 2024, arXiv 2309.17400): reward gradients through the last K sampler steps.

    From noise, ``steps`` Euler steps ``x <- x + (sigma_next - sigma) v`` as the pipeline takes them, without
    guidance; the last ``last_k`` carry gradient. The video is decoded and rewarded:

        loss = -sum_k w_k mean(R_k(decode(x), prompt)) + anchor_weight * mean((v(x_n) - v_base(x_n))^2)

    with ``x_n`` one random visited state, taken as a constant. The prompts alone are needed.

    Args:
        adapter: the pipeline.
        rewards: reward terms and their weights.
        base: the frozen base; None is allowed where ``anchor_weight`` is 0.
        steps: sampler steps.
        last_k: steps with gradient, 1 to ``steps``; None means all.
        anchor_weight: weight of the anchor to the base.
        checkpointing: recompute each step in the backward pass: memory of one step instead of K.
        n_frames: T of the videos; None takes the pipeline directory's default, as below.
        height: H in pixels.
        width: W in pixels.

    Raises:
        ValueError: if ``last_k`` is outside 1..``steps``, or an anchor is asked for without a base.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        rewards: RewardModule,
        base: FrozenBase | None = None,
        *,
        steps: int = 4,
        last_k: int | None = None,
        anchor_weight: float = 1.0,
        checkpointing: bool = False,
        n_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        last_k = steps if last_k is None else last_k
        if not 1 <= last_k <= steps:
            raise ValueError(f"Draft: got last_k {last_k}, expected 1 to {steps} (the sampler's steps).")
        if anchor_weight and base is None:
            raise ValueError(f"Draft: anchor_weight is {anchor_weight} but base is None. Pass FrozenBase(adapter).")
        self.adapter = adapter
        self.rewards = rewards
        self.base = base
        self.steps = steps
        self.last_k = last_k
        self.anchor_weight = anchor_weight
        self.checkpointing = checkpointing
        self.shape = adapter.latent_shape(n_frames=n_frames, height=height, width=width)
        reach = float(adapter.sigmas(steps, self.shape)[steps - last_k])
        if reach < 0.02:
            warnings.warn(
                f"Draft: the last {last_k} of {steps} steps only go from sigma {reach:.3f} to 0, so almost no gradient "
                "reaches the model. Raise last_k, or set shift_terminal in the pipeline's scheduler.",
                stacklevel=2,
            )

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """The loss of a batch of prompts.

        Args:
            batch: the prompts; videos are not looked at.
            generator: source of the noise and of the anchor's state.

        Returns:
            The scalar loss, and the logs ``reward``, ``reward/NAME`` and ``anchor``.
        """
        adapter = self.adapter
        embeds = adapter.encode_prompts(batch.prompts)
        noise = torch.randn((len(batch.prompts), *self.shape), generator=generator, device=generator.device).to(
            adapter.device
        )
        latents, visited = self.rollout(noise, embeds)
        loss, logs = reward_loss(self.rewards, adapter.decode(latents), batch.prompts)
        if self.anchor_weight and self.base is not None:
            n = int(torch.randint(self.steps, (), generator=generator, device=generator.device))
            anchor = base_anchor(adapter, self.base, visited[n], adapter.sigmas(self.steps, self.shape)[n], embeds)
            loss = loss + self.anchor_weight * anchor
            logs["anchor"] = anchor.detach()
        return loss, logs

    def rollout(self, noise: Tensor, prompt_embeds: PromptEmbeds) -> tuple[Tensor, list[Tensor]]:
        """Sample from ``noise``, the last K steps with gradient.

        Args:
            noise: [B, C, t, h, w].
            prompt_embeds: of B prompts.

        Returns:
            The final latents, and the detached state before each step.
        """
        latents, visited = noise, []
        for n, (sigma, sigma_next) in enumerate(itertools.pairwise(self.adapter.sigmas(self.steps, self.shape))):
            visited.append(latents.detach())
            with torch.set_grad_enabled(torch.is_grad_enabled() and n >= self.steps - self.last_k):
                if self.checkpointing and torch.is_grad_enabled():
                    velocity = checkpoint(self.adapter.velocity, latents, sigma, prompt_embeds, use_reentrant=False)
                else:
                    velocity = self.adapter.velocity(latents, sigma, prompt_embeds)
                latents = latents + (sigma_next - sigma) * velocity
        return latents, visited

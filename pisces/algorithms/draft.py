"""Direct reward back-propagation through the last steps of the sampler."""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor

from pisces.algorithms.base import Batch, FrozenBase, Logs, RewardModule, draw, recomputed_velocity, reward_loss
from pisces.algorithms.consistency import base_anchor
from pisces.pipelines.base import PipelineAdapter, PromptEmbeds

TRUNCATIONS = ("last", "random")


class Draft:
    """DRaFT-K (Clark et al. 2024, arXiv 2309.17400): reward gradients through the last K sampler steps.

    From noise, ``steps`` Euler steps ``x <- x + (sigma_next - sigma) v`` as the pipeline takes them, without
    guidance; the last ``last_k`` carry gradient, or, with ``truncation="random"``, the last k of a k drawn from
    1..``last_k`` for each batch (AlignProp, Prabhudesai et al. 2023, arXiv 2310.03739), which also reaches early steps
    without holding on to them alone. The video is decoded and rewarded:

        loss = -sum_k w_k mean(R_k(decode(x), prompt)) + anchor_weight * mean((v(x_n) - v_base(x_n))^2)

    with ``x_n`` one random visited state, taken as a constant. With ``renoised`` m > 0 the reward is also that of m
    more videos, each x noised again to the level of the last step and taken through it once more: the low-variance
    variant DRaFT-LV. The prompts alone are needed.

    Args:
        adapter: the pipeline.
        rewards: reward terms and their weights.
        base: the frozen base; None is allowed where ``anchor_weight`` is 0.
        steps: sampler steps.
        last_k: steps with gradient, 1 to ``steps``; None means all.
        truncation: "last" or "random".
        renoised: further gradient estimates from each sample, for one more step and decode each.
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
        truncation: str = "last",
        renoised: int = 0,
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
        if truncation not in TRUNCATIONS:
            raise ValueError(f"Draft: got truncation {truncation!r}, expected {' or '.join(TRUNCATIONS)}.")
        self.adapter = adapter
        self.rewards = rewards
        self.base = base
        self.steps = steps
        self.last_k = last_k
        self.truncation = truncation
        self.renoised = renoised
        self.anchor_weight = anchor_weight
        self.checkpointing = checkpointing
        self.shape = adapter.latent_shape(n_frames=n_frames, height=height, width=width)
        fewest = 1 if renoised or truncation == "random" else last_k
        reach = float(adapter.sigmas(steps, self.shape)[steps - fewest])
        if reach < 0.02:
            warnings.warn(
                f"Draft: the last {fewest} of {steps} steps only go from sigma {reach:.3f} to 0, so almost no gradient "
                "reaches the model. Raise last_k, or set shift_terminal in the pipeline's scheduler.",
                stacklevel=2,
            )

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """The loss of a batch of prompts.

        Args:
            batch: the prompts; videos are not looked at.
            generator: source of the noise, of what is noised again, of k, and of the anchor's state, in this order.

        Returns:
            The scalar loss, and the logs ``reward``, ``reward/NAME`` and ``anchor``.
        """
        adapter = self.adapter
        embeds = adapter.encode_prompts(batch.prompts)
        noise = torch.randn((len(batch.prompts), *self.shape), generator=generator, device=generator.device).to(
            adapter.device
        )
        again = [draw(tuple(noise.shape), generator, adapter.device) for _ in range(self.renoised)]
        last_k = self.last_k
        if self.truncation == "random":
            last_k = 1 + int(torch.randint(self.last_k, (), generator=generator, device=generator.device))
        latents, visited = self.rollout(noise, embeds, last_k)
        videos = torch.cat([latents, *(self._renoised(latents, other, embeds) for other in again)])
        loss, logs = reward_loss(self.rewards, adapter.decode(videos), batch.prompts * (1 + self.renoised))
        if self.anchor_weight and self.base is not None:
            n = int(torch.randint(self.steps, (), generator=generator, device=generator.device))
            anchor = base_anchor(adapter, self.base, visited[n], adapter.sigmas(self.steps, self.shape)[n], embeds)
            loss = loss + self.anchor_weight * anchor
            logs["anchor"] = anchor.detach()
        return loss, logs

    def _renoised(self, latents: Tensor, noise: Tensor, prompt_embeds: PromptEmbeds) -> Tensor:
        """The last step once more, from the sample with other noise."""
        sigma, sigma_next = self.adapter.sigmas(self.steps, self.shape)[-2:]
        state = sigma * noise + (1 - sigma) * latents.detach()
        return state + (sigma_next - sigma) * self._velocity(state, sigma, prompt_embeds)

    def rollout(
        self, noise: Tensor, prompt_embeds: PromptEmbeds, last_k: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample from ``noise``, the last K steps with gradient.

        Args:
            noise: [B, C, t, h, w].
            prompt_embeds: of B prompts.
            last_k: K; None is the setting.

        Returns:
            The final latents, and the detached state before each step.
        """
        latents, visited, last_k = noise, [], last_k or self.last_k
        for n, (sigma, sigma_next) in enumerate(itertools.pairwise(self.adapter.sigmas(self.steps, self.shape))):
            visited.append(latents.detach())
            with torch.set_grad_enabled(torch.is_grad_enabled() and n >= self.steps - last_k):
                latents = latents + (sigma_next - sigma) * self._velocity(latents, sigma, prompt_embeds)
        return latents, visited

    def _velocity(self, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return recomputed_velocity(self.adapter, latents, sigma, prompt_embeds)
        return self.adapter.velocity(latents, sigma, prompt_embeds)

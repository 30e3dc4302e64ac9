"""Group-relative policy optimisation on the flow's SDE: rewards need not be differentiable."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pisces.algorithms.base import (
    Batch,
    FrozenBase,
    Logs,
    RewardModule,
    draw,
    expand,
    real_latents,
    recomputed_velocity,
    reward_loss,
)
from pisces.algorithms.consistency import Consistency
from pisces.pipelines.base import PipelineAdapter, PromptEmbeds

# Below it a group's rewards count as equal: no sample is better than another.
LEAST_DEVIATION = 1e-6


def sde_mean(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float) -> Tensor:
    """Mean of the next state of the stochastic sampler.

    With noise = x + (1 - sigma) v, the noise that the model believes in, and d = sigma - sigma_next,

        x_next ~ N(x - d v - eta^2 d / 2 * noise / sigma, eta^2 d)

    is an Euler step of an SDE with the flow's own marginals, whose score is -noise / sigma: as long as the step's own
    noise is small beside sigma_next.

    Args:
        x: [B, C, t, h, w].
        velocity: the model's, likewise.
        sigma: noise level, 0-dim or broadcastable.
        sigma_next: of the next state, smaller.
        eta: strength of the noise; 0 is the deterministic sampler.

    Returns:
        [B, C, t, h, w].

    Source:
        Flow-GRPO (arXiv 2505.05470) and DanceGRPO (arXiv 2505.07818).
    """
    step = sigma - sigma_next
    noise = x + (1 - sigma) * velocity
    return x - step * velocity - 0.5 * eta**2 * step / sigma * noise


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Logarithm of the density of N(mean, std^2) at x, averaged over the elements of a sample: [B].

    The average, not the sum: the clipped ratio then does not depend on the video's size.
    """
    element = -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    return element.flatten(1).mean(1)


def group_advantages(rewards: Tensor, group_size: int, limit: float) -> Tensor:
    """(reward - mean of its group) / standard deviation of its group, clipped to +-limit: [B * G].

    Samples of a group are neighbours. A group whose rewards are equal has no advantage.
    """
    # In float64 a group's advantages add up to 0 also if its rewards differ in their last digits.
    groups = rewards.double().view(-1, group_size)
    deviation = groups.std(1, correction=0, keepdim=True)
    advantages = (groups - groups.mean(1, keepdim=True)) / deviation.clamp_min(LEAST_DEVIATION)
    return torch.where(deviation < LEAST_DEVIATION, 0.0, advantages).clamp(-limit, limit).flatten().to(rewards.dtype)


@dataclass
class Rollout:
    """Samples of one batch of prompts, as the policy of that time made them.

    Attributes:
        states: [K + 1, B * G, C, t, h, w], from noise to latents.
        log_densities: [K, B * G] of each step; 0 for deterministic ones.
        advantages: [R, B * G], a row a reward.
        rewards: [R], their means.
    """

    states: Tensor
    log_densities: Tensor
    advantages: Tensor
    rewards: Tensor


@dataclass
class Grpo:
    """GRPO of a flow model (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818; the variant of PISCES).

    For each prompt ``group_size`` videos are sampled by :func:`sde_mean`, decoded and rewarded, without gradient. With
    A the advantages of each reward inside its group and r the ratio of the densities of a step, now and at sampling,

        loss = sum_k w_k mean_{i, n} max(-A_ki r_in, -A_ki clip(r_in, 1 - clip, 1 + clip))
             + kl_weight * mean |mean - mean_base|^2 / (2 std^2)
             + anchor_weight * L_consistency - gradient_weight * sum_k w_k mean R_k(decode(x_n - sigma_n v))

    over a random subset of the noisy steps n, the same for all samples. Steps that would add more noise than their next
    level has, eta sqrt(sigma - sigma_next) > sigma_next, are deterministic and not trained: the last one, and the one
    before it on grids that end close to 0. ``updates`` optimizer steps are made of each rollout.

    Args:
        adapter: the pipeline.
        rewards: reward terms and their weights.
        base: the frozen base; None is allowed where ``kl_weight`` and ``anchor_weight`` are 0.
        steps: sampler steps, at least 2.
        group_size: G, videos a prompt, at least 2 (PISCES: 16).
        eta: strength of the sampler's noise (PISCES: .25).
        trained_steps: noisy steps that an update looks at; None is all.
        updates: optimizer steps a rollout.
        clip: of the ratio (PISCES: 1e-4).
        advantage_clip: of the advantages (PISCES: 5).
        kl_weight: of the divergence from the base's steps.
        anchor_weight: of the consistency loss (PISCES: 1); needs real videos.
        gradient_weight: of the reward's own gradient through one prediction, at one random state a prompt.
        micro_batch: samples that go through the denoiser, the decoder and the rewards at a time.
        checkpointing: recompute each prediction in the backward pass: memory of one instead of all trained steps.
        size: n_frames, height and width of the videos; what is missing is the pipeline directory's default.

    Raises:
        ValueError: if a number is not possible, or an anchor is asked for without a base.
    """

    adapter: PipelineAdapter
    rewards: RewardModule
    base: FrozenBase | None = None
    steps: int = 10
    group_size: int = 16
    eta: float = 0.25
    trained_steps: int | None = None
    updates: int = 1
    clip: float = 1e-4
    advantage_clip: float = 5.0
    kl_weight: float = 0.0
    anchor_weight: float = 1.0
    gradient_weight: float = 0.0
    micro_batch: int = 4
    checkpointing: bool = True
    size: Mapping[str, int | None] = field(default_factory=dict)
    rollouts: dict[int, Rollout] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("group_size", 2), ("updates", 1), ("micro_batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Grpo: got {name} {getattr(self, name)}, expected at least {least}.")
        if not self.eta > 0:
            raise ValueError(f"Grpo: got eta {self.eta}, expected a positive number: without noise nothing is tried.")
        if (self.kl_weight or self.anchor_weight) and self.base is None:
            raise ValueError("Grpo: kl_weight or anchor_weight is set but base is None. Pass FrozenBase(adapter).")
        self.shape = self.adapter.latent_shape(**self.size)
        levels = self.adapter.sigmas(self.steps, self.shape)
        self.noisy = (self._std(levels[:-1], levels[1:]) <= levels[1:]).nonzero().flatten().tolist()
        self.trained_steps = len(self.noisy) if self.trained_steps is None else self.trained_steps
        if not 1 <= self.trained_steps <= len(self.noisy):
            raise ValueError(
                f"Grpo: got trained_steps {self.trained_steps}, expected 1 to {len(self.noisy)}: of {self.steps} steps "
                f"so many end where there is more noise than eta {self.eta} adds."
            )
        self._consistency = Consistency(self.adapter, self.base) if self.anchor_weight and self.base else None

    # ------------------------------------------------------------------ the loss

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """The loss of one update of a batch's rollout, which is sampled at the first one after :meth:`begin`.

        Args:
            batch: prompts; with ``anchor_weight`` real videos too.
            generator: source of the noise, the trained steps, and what the anchors draw, in this order.

        Returns:
            The scalar loss, and the logs ``reward``, ``reward/NAME``, ``ratio`` (mean distance from 1), ``clipped``
            (share), ``kl``, ``consistency``, ``reward_gradient``.
        """
        embeds = self.adapter.encode_prompts([p for p in batch.prompts for _ in range(self.group_size)])
        rollout = self.rollouts.get(batch.number)
        if rollout is None:
            rollout = self.sample(batch.prompts, embeds, generator)
            if self.updates > 1:
                self.rollouts[batch.number] = rollout
        loss, logs = self._surrogate(rollout, embeds, generator)
        if self._consistency is not None:
            x0 = real_latents(self.adapter, batch, who="Grpo")
            anchor, _ = self._consistency.loss(Batch(batch.prompts, latents=x0), generator)
            loss = loss + self.anchor_weight * anchor
            logs["consistency"] = anchor.detach()
        if self.gradient_weight:
            direct = self._reward_of_one_prediction(rollout, batch.prompts, generator)
            loss = loss + self.gradient_weight * direct
            logs["reward_gradient"] = -direct.detach()
        return loss, logs

    @torch.no_grad()
    def sample(self, prompts: list[str], embeds: PromptEmbeds, generator: torch.Generator) -> Rollout:
        """Videos of all groups, their rewards and advantages.

        Args:
            prompts: B texts.
            embeds: of B * G prompts, those of a group behind each other.
            generator: source of the noise.

        Returns:
            The rollout.
        """
        adapter, count = self.adapter, len(prompts) * self.group_size
        x = draw((count, *self.shape), generator, adapter.device)
        sigmas = adapter.sigmas(self.steps, self.shape)
        states, densities = [x], []
        for n, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
            velocity = torch.cat([adapter.velocity(z, sigma, e) for z, e in self._parts(x, embeds)])
            if n not in self.noisy:
                x = x + (sigma_next - sigma) * velocity
                densities.append(x.new_zeros(count))
            else:
                mean, std = sde_mean(x, velocity, sigma, sigma_next, self.eta), self._std(sigma, sigma_next)
                x = mean + std * draw(tuple(x.shape), generator, adapter.device)
                densities.append(log_density(x, mean, std))
            states.append(x)
        parts: list[Mapping[str, Tensor]] = []
        texts = [prompt for prompt in prompts for _ in range(self.group_size)]
        for start in range(0, count, self.micro_batch):
            few = slice(start, start + self.micro_batch)
            parts.append(self.rewards.terms(adapter.decode(x[few]), texts[few]))
        values = torch.stack([torch.cat([part[name] for part in parts]) for name in self.rewards.weights])
        advantages = torch.stack([group_advantages(v, self.group_size, self.advantage_clip) for v in values])
        return Rollout(torch.stack(states), torch.stack(densities), advantages, values.mean(1))

    def _surrogate(self, rollout: Rollout, embeds: PromptEmbeds, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """The clipped surrogate and the divergence from the base, over some of the steps."""
        sigmas = self.adapter.sigmas(self.steps, self.shape)
        order = torch.randperm(len(self.noisy), generator=generator, device=generator.device)
        chosen = sorted(self.noisy[place] for place in order[: self.trained_steps])
        weights = torch.tensor([*self.rewards.weights.values()], device=self.adapter.device)
        total = torch.zeros((), device=self.adapter.device)
        sums = {"ratio": total.clone(), "clipped": total.clone(), "kl": total.clone()}
        for n in chosen:
            x, sigma, sigma_next = rollout.states[n], sigmas[n], sigmas[n + 1]
            velocity = torch.cat([self._velocity(z, sigma, e) for z, e in self._parts(x, embeds)])
            mean, std = sde_mean(x, velocity, sigma, sigma_next, self.eta), self._std(sigma, sigma_next)
            ratio = (log_density(rollout.states[n + 1], mean, std) - rollout.log_densities[n]).exp()
            bounded = ratio.clamp(1 - self.clip, 1 + self.clip)
            worse = torch.maximum(-rollout.advantages * ratio, -rollout.advantages * bounded)
            total = total + (weights @ worse.mean(1)) / len(chosen)
            sums["ratio"] += (ratio.detach() - 1).abs().mean() / len(chosen)
            sums["clipped"] += (ratio != bounded).float().mean() / len(chosen)
            if self.kl_weight and self.base is not None:
                v = torch.cat([self.base.velocity(z, sigma, e) for z, e in self._parts(x, embeds)])
                divergence = 0.5 * ((mean - sde_mean(x, v, sigma, sigma_next, self.eta)) / std).square().mean()
                total = total + self.kl_weight * divergence / len(chosen)
                sums["kl"] += divergence.detach() / len(chosen)
        names = list(self.rewards.weights)
        logs = {"reward": (weights * rollout.rewards).sum()}
        logs |= {f"reward/{name}": value for name, value in zip(names, rollout.rewards, strict=True)}
        logs |= {name: value for name, value in sums.items() if name != "kl" or self.kl_weight}
        return total, logs

    def _reward_of_one_prediction(self, rollout: Rollout, prompts: list[str], generator: torch.Generator) -> Tensor:
        """Minus the rewards of x0 as one prediction estimates it, at a random state of each group's first sample."""
        n = int(torch.randint(self.steps - 1, (), generator=generator, device=generator.device))
        x = rollout.states[n, :: self.group_size]
        sigma = self.adapter.sigmas(self.steps, self.shape)[n].expand(len(x))
        velocity = self._velocity(x, sigma, self.adapter.encode_prompts(prompts))
        return reward_loss(self.rewards, self.adapter.decode(x - expand(sigma) * velocity), prompts)[0]

    def _velocity(self, x: Tensor, sigma: Tensor, embeds: PromptEmbeds) -> Tensor:
        if self.checkpointing:
            return recomputed_velocity(self.adapter, x, sigma, embeds)
        return self.adapter.velocity(x, sigma, embeds)

    def _std(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return self.eta * (sigma - sigma_next).sqrt()

    def _parts(self, x: Tensor, embeds: PromptEmbeds) -> list[tuple[Tensor, PromptEmbeds]]:
        """Samples and embeddings, a few at a time."""
        parts = {name: value.split(self.micro_batch) for name, value in embeds.items()}
        return [(z, {name: part[k] for name, part in parts.items()}) for k, z in enumerate(x.split(self.micro_batch))]

    # ------------------------------------------------------------------ state

    def begin(self) -> None:
        """Forget the rollouts: the policy samples anew. The trainer calls it every ``updates`` steps."""
        self.rollouts.clear()

    def state(self) -> dict[str, Tensor]:
        """Rollouts of which more updates are to be made, as tensors ``NUMBER/NAME``: what a resumed run needs."""
        tensors = {}
        for number, rollout in self.rollouts.items():
            for name in ("states", "log_densities", "advantages", "rewards"):
                tensors[f"{number}/{name}"] = getattr(rollout, name)
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        self.rollouts = {}
        for number in sorted({int(key.partition("/")[0]) for key in tensors}):
            values = {
                name: tensors[f"{number}/{name}"].to(self.adapter.device)
                for name in ("states", "log_densities", "advantages", "rewards")
            }
            self.rollouts[number] = Rollout(**values)

"""The two anchors that keep a rewarded model near its base: consistency distillation and the base's velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from pisces.algorithms.base import Batch, FrozenBase, Logs, draw, expand, real_latents
from pisces.pipelines.base import PipelineAdapter, PromptEmbeds


def pseudo_huber(x: Tensor, y: Tensor, c: float = 0.001) -> Tensor:
    """``mean(sqrt((x - y)^2 + c^2) - c)``: squared near zero, absolute far from it."""
    return ((x - y).square() + c * c).sqrt().sub(c).mean()


def base_anchor(
    adapter: PipelineAdapter, base: FrozenBase, latents: Tensor, sigma: Tensor, prompt_embeds: PromptEmbeds
) -> Tensor:
    """``mean((v_student - v_base)^2)`` at the given states, which are taken as constants.

    Args:
        adapter: the student.
        base: the frozen model.
        latents: [B, C, t, h, w] visited states.
        sigma: [B] or 0-dim, their noise levels.
        prompt_embeds: of B prompts.

    Returns:
        A scalar, zero as long as the student is the base.
    """
    latents = latents.detach()
    target = base.velocity(latents, sigma, prompt_embeds)
    return (adapter.velocity(latents, sigma, prompt_embeds) - target).square().mean()


class Consistency:
    """Multi-phase consistency distillation (Wang et al. 2024, arXiv 2405.18407), as PISCES anchors its student.

    The noise levels ``sigma_0 > ... > sigma_steps = 0`` are split into ``phases`` runs. At a random level n, with e
    the end of its phase and ``x_n = sigma_n noise + (1 - sigma_n) x0``,

        student  x_e = x_n + (sigma_e - sigma_n) v_student(x_n)
        teacher  y = x_n + (sigma_{n+1} - sigma_n) v_base(x_n)
        target   y_e = y + (sigma_e - sigma_{n+1}) v_student(y)      without gradient
        loss = mean(sqrt((x_e - y_e)^2 + c^2) - c)

    The teacher is not guided.

    Args:
        adapter: the student.
        base: the teacher.
        steps: Euler steps of the discretisation (PISCES: 50).
        phases: number of phases (PISCES: 1).
        huber_c: c (PISCES: .001).

    Raises:
        ValueError: if ``phases`` is not between 1 and ``steps``.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        base: FrozenBase,
        *,
        steps: int = 50,
        phases: int = 1,
        huber_c: float = 0.001,
    ) -> None:
        if not 1 <= phases <= steps:
            raise ValueError(f"Consistency: got {phases} phases, expected 1 to {steps} (the steps).")
        self.adapter = adapter
        self.base = base
        self.steps = steps
        self.huber_c = huber_c
        edges = torch.linspace(0, steps, phases + 1).round().long()
        # The first edge behind each level: level n belongs to the phase that ends there.
        self.phase_end = edges[torch.searchsorted(edges, torch.arange(steps), right=True)]

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """The consistency loss alone, on captioned videos.

        Args:
            batch: prompts with frames or latents.
            generator: source of the noise and the noise levels, in this order.

        Returns:
            The scalar, and the log ``consistency``.
        """
        x0 = real_latents(self.adapter, batch, who="Consistency")
        embeds = self.adapter.encode_prompts(batch.prompts)
        x_n, index = self.noised(x0, generator)
        velocity = self.adapter.velocity(x_n, self.levels(index, x_n), embeds)
        loss = self.distance(x_n, index, embeds, velocity)
        return loss, {"consistency": loss.detach()}

    def levels(self, index: Tensor, latents: Tensor) -> Tensor:
        """The noise levels [B] of the step numbers ``index`` [B], for latents [B, C, t, h, w]."""
        return self.adapter.sigmas(self.steps, tuple(latents.shape[1:]))[index]

    def noised(self, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Videos at random levels: ``(x_n [B, C, t, h, w], n [B])``."""
        noise = draw(tuple(x0.shape), generator, x0.device)
        index = torch.randint(self.steps, (len(x0),), generator=generator, device=generator.device)
        index = index.to(x0.device)
        sigma = expand(self.levels(index, x0))
        return sigma * noise + (1.0 - sigma) * x0, index

    def distance(self, x_n: Tensor, index: Tensor, prompt_embeds: PromptEmbeds, velocity: Tensor) -> Tensor:
        """The loss for states ``x_n`` at step numbers ``index`` where the student predicted ``velocity``.

        Args:
            x_n: [B, C, t, h, w].
            index: [B] step numbers n.
            prompt_embeds: of B prompts.
            velocity: [B, C, t, h, w] ``v_student(x_n)``, with gradient.

        Returns:
            The scalar loss.
        """
        sigma, sigma_next = self.levels(index, x_n), self.levels(index + 1, x_n)
        sigma_end = self.levels(self.phase_end.to(index.device)[index], x_n)
        student = x_n + expand(sigma_end - sigma) * velocity
        with torch.no_grad():
            y = x_n + expand(sigma_next - sigma) * self.base.velocity(x_n, sigma, prompt_embeds)
            # At a phase's last level the second factor is zero, whatever the student says.
            target = y + expand(sigma_end - sigma_next) * self.adapter.velocity(y, sigma_next, prompt_embeds)
        return pseudo_huber(student, target, self.huber_c)

"""Supervised flow matching: further pre-training, the control that costs the same and uses no reward."""

from __future__ import annotations

import torch
from torch import Tensor

from pisces.algorithms.base import Batch, Logs, draw, expand, real_latents
from pisces.pipelines.base import PipelineAdapter


class FlowMatching:
    """Regression of the velocity on captioned videos.

    ``loss = mean((v(x_sigma, sigma, prompt) - (noise - x0))^2)`` with ``x_sigma = sigma noise + (1 - sigma) x0``
    and ``sigma = s u / (1 + (s - 1) u)``, ``u = sigmoid(N(0, 1))``, s the time shift (Esser et al. 2024,
    arXiv 2403.03206, sections 2-3: logit-normal density, resolution shift).

    Args:
        adapter: the pipeline.
        shift: the time shift s; None takes the scheduler's.
        caption_dropout: share of captions replaced by the empty one, which keeps guidance usable
            (Ho and Salimans 2022, arXiv 2207.12598).

    Raises:
        ValueError: if ``caption_dropout`` is outside [0, 1].
    """

    def __init__(self, adapter: PipelineAdapter, *, shift: float | None = None, caption_dropout: float = 0.1) -> None:
        if not 0.0 <= caption_dropout <= 1.0:
            raise ValueError(f"FlowMatching: got caption_dropout {caption_dropout}, expected 0 to 1.")
        self.adapter = adapter
        self.shift = shift
        self.caption_dropout = caption_dropout

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Logs]:
        """The mean squared velocity error of a batch of captioned videos.

        Args:
            batch: prompts with frames or latents.
            generator: source of the noise, the noise levels and the dropped captions, in this order.

        Returns:
            The scalar loss, and no further logs.
        """
        x0 = real_latents(self.adapter, batch, who="FlowMatching")
        noise = draw(tuple(x0.shape), generator, x0.device)
        u = torch.sigmoid(draw((len(x0),), generator, x0.device))
        shift = self.adapter.shift(tuple(x0.shape[1:])) if self.shift is None else self.shift
        sigma = shift * u / (1.0 + (shift - 1.0) * u)
        dropped = torch.rand(len(x0), generator=generator, device=generator.device) < self.caption_dropout
        prompts = ["" if drop else prompt for drop, prompt in zip(dropped.tolist(), batch.prompts, strict=True)]
        x_sigma = expand(sigma) * noise + (1.0 - expand(sigma)) * x0
        velocity = self.adapter.velocity(x_sigma, sigma, self.adapter.encode_prompts(prompts))
        return (velocity - (noise - x0)).square().mean(), {}

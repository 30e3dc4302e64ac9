"""Euler steps from noise to latents, with classifier-free guidance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pisces.pipelines.base import PipelineAdapter, PromptEmbeds


def guidance_scales(first: float, second: float | None, *, n_denoisers: int) -> dict[str, float]:
    """The guidance of each denoiser: see :meth:`PipelineAdapter.sample`.

    Args:
        first: of ``transformer``; 1 is off.
        second: of ``transformer_2``; None is ``first``.
        n_denoisers: of the pipeline.

    Raises:
        ValueError: if a scale is below 1, or there is a second one for a single denoiser or without a first.
    """
    for name, scale in (("guidance_scale", first), ("guidance_scale_2", first if second is None else second)):
        if not math.isfinite(scale) or scale < 1.0:
            raise ValueError(f"sample: got {name} {scale}, expected a number >= 1 (1 is off).")
    if second is None:
        return {"transformer": first, "transformer_2": first}
    if n_denoisers == 1:
        raise ValueError(f"sample: got guidance_scale_2 {second} for a pipeline with one denoiser, expected None.")
    if second > first == 1.0:  # the pipeline's call would leave it out without a word
        raise ValueError(f"sample: got guidance_scale_2 {second} with guidance_scale 1 (off), expected both above 1.")
    return {"transformer": first, "transformer_2": second}


def euler(
    adapter: PipelineAdapter,
    latents: Tensor,
    sigmas: Tensor,
    prompt_embeds: PromptEmbeds,
    scales: Mapping[str, float],
) -> Tensor:
    """``x <- x + (sigma_next - sigma) v`` over all levels; with guidance v is ``v_empty + scale (v - v_empty)``.

    Args:
        adapter: the pipeline.
        latents: [B, C, t, h, w], noise.
        sigmas: [steps + 1].
        prompt_embeds: of B prompts.
        scales: as :func:`guidance_scales` returns them.

    Returns:
        [B, C, t, h, w].
    """
    empty = adapter.encode_prompts([""] * len(latents)) if scales["transformer"] > 1.0 else None
    for sigma, sigma_next in itertools.pairwise(sigmas):
        velocity = adapter.velocity(latents, sigma, prompt_embeds)
        if empty is not None:
            unconditional = adapter.velocity(latents, sigma, empty)
            velocity = unconditional + scales[adapter.denoiser_name(sigma)] * (velocity - unconditional)
        latents = latents + (sigma_next - sigma) * velocity
    return latents

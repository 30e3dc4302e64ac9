"""Decoding in one piece: as autograd keeps it, or recomputed in the backward pass for classes that nobody taught."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.checkpoint import set_checkpoint_early_stop


def decode_plain(vae: Any, latents: Tensor, temb: Tensor | None) -> Tensor:
    """The class's own decode; a class for pictures gets them one batch of frames at a time."""
    arguments = () if temb is None else (temb,)
    if is_image_class(vae):
        pictures = [vae.decode(latents[:, :, k], return_dict=False)[0] for k in range(latents.shape[2])]
        return torch.stack(pictures, dim=2)
    frames: Tensor = vae.decode(latents, *arguments, return_dict=False)[0]
    return frames


def decode_recomputed(vae: Any, latents: Tensor, temb: Tensor | None) -> Tensor:
    """One video at a time, all of its activations recomputed in the backward pass.

    Its recomputation runs to its end, and the class's own gradient checkpointing is left alone: a class may keep caches
    inside its modules, as AutoencoderKLMagvit does, and clear them when it is through.
    """
    if not torch.is_grad_enabled():
        return decode_plain(vae, latents, temb)
    embeddings = [None] * len(latents) if temb is None else list(temb.split(1))
    videos = zip(latents.split(1), embeddings, strict=True)
    with set_checkpoint_early_stop(False):
        return torch.cat([recomputed(decode_plain, vae, video, own, use_reentrant=False) for video, own in videos])


def is_image_class(vae: Any) -> bool:
    """Whether a class decodes pictures [B, C, h, w], not videos."""
    names = {base.__name__ for base in type(vae).__mro__}
    return bool(names & {"AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL", "AutoencoderDC"})

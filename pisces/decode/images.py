"""Image autoencoders: every latent frame is decoded by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pisces.decode.stream import Chain, Stream, grouped, plain_stage

EXACT = "Exact for the class's own decode of each frame by itself."


def stream(vae: Any, latents: Tensor, temb: Tensor | None) -> tuple[Stream, Tensor]:
    """The decoder as a stream of independent frames, and what it reads."""
    n = latents.shape[2]

    def one(frame: Tensor) -> Tensor:
        pictures: Tensor = vae.decode(frame[:, :, 0], return_dict=False)[0]
        return pictures.unsqueeze(2)

    return Chain([plain_stage(one)], grouped(n, 1), [1] * n, EXACT, causal=False), latents

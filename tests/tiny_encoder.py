"""An untrained encoder of the small world's vocabulary: quick to build, the same for the same seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pisces.encoders import TinyEncoder, TinyEncoderConfig
from pisces.world import scene


def tiny_encoder(seed: int = 0, **changes: Any) -> TinyEncoder:
    """Untrained, width 16, in eval mode; its projections are scaled up so that scores differ between inputs."""
    settings: dict[str, Any] = {
        "vocabulary": scene.VOCABULARY,
        "width": 16,
        "heads": 2,
        "video_layers": 1,
        "text_layers": 1,
        "fusion_layers": 2,
        "embed_dim": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = TinyEncoder(TinyEncoderConfig(**(settings | changes)))
        for name, p in encoder.named_parameters():
            if p.dim() > 1 and not name.startswith("stem"):
                torch.nn.init.normal_(p, std=0.4)
    return encoder.eval()


def some_videos(n: int, seed: int) -> tuple[Tensor, list[str]]:
    """n videos of the world with their captions, some with filler words, so of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    scenes = scene.sample_scenes(n, generator, two_objects=0.3)
    return scene.render(scenes, generator), scene.captions(scenes, generator, fillers=0.5)

"""A small InternVideo2 with random weights, its checkpoint in the official layout, and videos with prompts for it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pisces.encoders import InternVideo2, InternVideo2Config

WORDS = ["a", "red", "blue", "dog", "run", "##s", "##ning", "fast", "over", "the", "hill", ",", ".", "[", "]", "sep"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]

# widths, heads and depths that all differ, so that none can stand for another
SMALL = InternVideo2Config(
    n_frames=3, size=28, patch_size=14, vision_width=24, vision_layers=3, vision_heads=4, vision_mlp=40, pool_heads=3,
    pool_width=12, text_width=20, text_heads=2, text_mlp=28, text_layers=2, fusion_layers=3,
    vocabulary_size=len(VOCABULARY), text_positions=32, embed_dim=8, max_tokens=16, embedding_tokens=6,
)  # fmt: skip


def randomize(model: torch.nn.Module) -> None:
    """Weights of a size at which every part of the model shows in what comes out, norms and scales included."""
    for name, p in model.named_parameters():
        if p.dim() < 2:
            torch.nn.init.normal_(p, mean=0.0 if "bias" in name else 1.0, std=0.3)
        else:
            # larger ones saturate every attention, and then no row of it matters
            torch.nn.init.normal_(p, std=0.7 if "embed" in name or "token" in name else 0.8 / p[0].numel() ** 0.5)


def small_model(**changes: Any) -> InternVideo2:
    """Random weights in float64 and eval mode."""
    model = InternVideo2(replace(SMALL, **changes), VOCABULARY).double()
    randomize(model)
    return model.requires_grad_(False).eval()


def official_state(model: InternVideo2) -> dict[str, Tensor]:
    """Its state with what the official checkpoint has besides."""
    config = model.config
    width, pool, side = config.vision_width, config.pool_width, (config.size // config.patch_size) ** 2
    shapes = {
        "vision_encoder.clip_pos_embed": (1, config.grid.n_tokens, width),
        "vision_encoder.img_pos_embed": (1, 1 + side, width),
        "vision_encoder.clip_img_pos_embed": (1, 1 + side, width),
        "vision_encoder.clip_decoder.0.head.weight": (30, width),
        "vision_encoder.clip_decoder.0.norm.bias": (30,),
        "vision_encoder.final_clip_decoder.head.weight": (pool, pool),
        "text_encoder.cls.predictions.bias": (config.vocabulary_size,),
        "text_encoder.cls.predictions.transform.dense.weight": (config.text_width, config.text_width),
    }
    return dict(model.state_dict()) | {name: torch.randn(shape) for name, shape in shapes.items()}


def save_official(model: InternVideo2, path: Path, **extra: object) -> Path:
    """A checkpoint file as the official one is laid out."""
    torch.save({"module": official_state(model), **extra}, path)
    return path


def some_frames(n: int, t: int = 3, h: int = 28, w: int = 28) -> Tensor:
    """Random videos in float64."""
    return torch.rand(n, t, 3, h, w, dtype=torch.float64)


def some_prompts(n: int) -> list[str]:
    """Prompts of 1 to 14 word pieces, the first two of the extremes, some words not in the vocabulary."""
    lengths = [1, 7, *(random.randint(1, 7) for _ in range(n))][:n]
    return [" ".join(random.choices(["a", "red", "dogs", "running", "zebra", "hill,"], k=k)) for k in lengths]

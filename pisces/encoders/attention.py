"""Cross-attention with the hook that rewards refine it by, for encoders whose layers are shaped as BERT's."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pisces.encoders.base import AttentionRefiner


class Projections(Protocol):
    """The three projections of an attention."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [B, H, N, D / H]."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, D / H] -> [B, N, D]."""
    return rearrange(x, "b h n d -> b n (h d)")


def cross_attention(
    projections: Projections,
    heads: int,
    x: Tensor,
    video: Tensor,
    frame_index: Tensor,
    positions: Tensor,
    lexical: Tensor,
    refine: AttentionRefiner | None,
) -> Tensor:
    """Attention of the text to the video; its probabilities exist only where `refine` asks for them.

    Args:
        projections: of the attention.
        heads: H.
        x: [B, N, D] text.
        video: [B, M, any] video tokens.
        frame_index, positions, lexical, refine: see `AttentionRefiner`.

    Returns:
        [B, N, D], heads side by side, before the output projection.
    """
    query, key = projections.query(x), projections.key(video)
    q, k, v = (split_heads(part, heads) for part in (query, key, projections.value(video)))
    if refine is None:
        return merge_heads(F.scaled_dot_product_attention(q, k, v))
    wide = torch.promote_types(x.dtype, torch.float32)  # logarithms are taken of the probabilities
    attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1, dtype=wide)  # [B, H, N, M]
    attention = refine(query, key, attention, frame_index, positions, lexical)
    return merge_heads(attention.to(v.dtype) @ v)

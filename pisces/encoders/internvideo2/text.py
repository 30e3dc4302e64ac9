"""The text tower and the fusion tower: one BERT, whose upper layers also look at the video.

Names are those of the checkpoint. transformers' BertModel cannot hold it: cross-attention in the upper layers only, and
keys of another width than the text's.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pisces.encoders.attention import cross_attention, merge_heads, split_heads
from pisces.encoders.base import AttentionRefiner, VideoFeatures
from pisces.encoders.internvideo2.config import InternVideo2Config

_EPS = 1e-12  # of BERT's layer norms


class Embeddings(nn.Module):
    """Word + token type 0 + position, normalised."""

    position_ids: Tensor

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        width = config.text_width
        self.word_embeddings = nn.Embedding(config.vocabulary_size, width)
        self.position_embeddings = nn.Embedding(config.text_positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_EPS)
        self.register_buffer("position_ids", torch.arange(config.text_positions)[None])

    def forward(self, ids: Tensor) -> Tensor:
        """[B, N] -> [B, N, D]."""
        place = self.position_embeddings(self.position_ids[:, : ids.shape[1]])
        return self.LayerNorm(self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + place)


class Projections(nn.Module):
    """Query of the text; key and value of what it looks at."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context, width)
        self.value = nn.Linear(context, width)


class AddNorm(nn.Module):
    """LayerNorm(dense(x) + residual)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, out)
        self.LayerNorm = nn.LayerNorm(out, eps=_EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[B, N, width], [B, N, out] -> [B, N, out]."""
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nn.Module):
    """Attention of the text to itself or to the video, residual and norm included."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.self = Projections(width, context)
        self.output = AddNorm(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Self-attention of x [B, N, D]; mask [B, 1, 1, N] is True where a token may be seen."""
        p = self.self
        q, k, v = (split_heads(part(x), self.heads) for part in (p.query, p.key, p.value))
        return self.output(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)), x)

    def cross(self, x: Tensor, video: VideoFeatures, lexical: Tensor, refine: AttentionRefiner | None) -> Tensor:
        """Attention of x [B, N, D] to the video."""
        context = cross_attention(
            self.self, self.heads, x, video.tokens, video.frame_index, video.positions, lexical, refine
        )
        return self.output(context, x)


class Layer(nn.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        width = config.text_width
        self.attention = Attention(width, config.text_heads, width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.text_mlp)})
        self.output = AddNorm(config.text_mlp, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.mlp(self.attention(x, mask))

    def mlp(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D], residual and norm included."""
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class FusionLayer(Layer):
    """A layer that looks at the video between self-attention and MLP."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__(config)
        self.crossattention = Attention(config.text_width, config.text_heads, config.vision_width)

    def fuse(
        self, x: Tensor, mask: Tensor, video: VideoFeatures, lexical: Tensor, refine: AttentionRefiner | None
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.mlp(self.crossattention.cross(self.attention(x, mask), video, lexical, refine))


class Bert(nn.Module):
    """Both towers.

    Args:
        config: sizes.
    """

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        self.text_layers = config.text_layers
        self.checkpoint = config.checkpoint
        self.embeddings = Embeddings(config)
        layers = [Layer(config) for _ in range(config.text_layers)]
        layers += [FusionLayer(config) for _ in range(config.fusion_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Word pieces [B, N] through the text tower -> [B, N, D]; mask [B, N] is False for padding."""
        x = self.embeddings(ids)
        for layer in self.encoder["layer"][: self.text_layers]:
            x = layer(x, mask[:, None, None])
        return x

    def fuse(
        self, x: Tensor, mask: Tensor, video: VideoFeatures, lexical: Tensor, refine: AttentionRefiner | None
    ) -> Tensor:
        """Text features [B, N, D] through the fusion tower -> [B, N, D]; `refine` is called once in every layer.

        With `checkpoint` a layer and its `refine` run again in the backward pass; no attention [B, H, N, M] is kept.
        """
        for layer in self.encoder["layer"][self.text_layers :]:
            if self.checkpoint and torch.is_grad_enabled():
                again = partial(layer.fuse, video=video, lexical=lexical, refine=refine)
                x = checkpoint(again, x, mask[:, None, None], use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer.fuse(x, mask[:, None, None], video, lexical, refine)
        return x

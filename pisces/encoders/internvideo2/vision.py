"""The vision tower: patches of all frames in one sequence, and attention pooling. Names are those of the checkpoint."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pisces.encoders.attention import merge_heads, split_heads
from pisces.encoders.internvideo2.config import InternVideo2Config


class PatchEmbedding(nn.Module):
    """One token for each patch of each frame."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch))

    def forward(self, frames: Tensor) -> Tensor:
        """[B, T, 3, S, S] -> [B, T (S / patch)^2, D], frames first, then rows, then columns."""
        return rearrange(self.proj(rearrange(frames, "b t c h w -> b c t h w")), "b d t h w -> b (t h w) d")


class Attention(nn.Module):
    """Self-attention whose queries and keys are normalised, all heads together."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = nn.RMSNorm(width, eps=1e-6)
        self.k_norm = nn.RMSNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, M, D] -> [B, M, D]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (self.q_norm(q), self.k_norm(k), v))
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class LayerScale(nn.Module):
    """x * gamma. The official code does this in float32; PyTorch multiplies 16-bit numbers in float32 anyway."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, gelu: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class Block(nn.Module):
    """Pre-norm transformer block with layer scale."""

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        width = config.vision_width
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = Attention(width, config.vision_heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = Mlp(width, config.vision_mlp, config.gelu)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, M, D] -> [B, M, D]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PoolAttention(nn.Module):
    """Attention of one query over the tokens; the biases of its projections have names of their own."""

    def __init__(self, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, out)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, 1, D], [B, M, D], [B, M, D] -> [B, out]."""
        parts = (self.q(query) + self.q_bias, self.k(key) + self.k_bias, self.v(value) + self.v_bias)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))[:, 0]


class AttentionPool(nn.Module):
    """Attention pooling: the mean of the tokens looks at all of them."""

    def __init__(self, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.norm1_q = nn.LayerNorm(width, eps=1e-5)
        self.norm1_k = nn.LayerNorm(width, eps=1e-5)
        self.norm1_v = nn.LayerNorm(width, eps=1e-5)
        self.cross_attn = PoolAttention(width, heads, out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, M, D] -> [B, out]."""
        query = self.norm1_q(x.mean(1, keepdim=True))
        return self.cross_attn(query, self.norm1_k(x), self.norm1_v(x))


class VisionEncoder(nn.Module):
    """The vision tower, without the distillation heads and the image positions of the checkpoint.

    Args:
        config: sizes.
    """

    def __init__(self, config: InternVideo2Config) -> None:
        super().__init__()
        width = config.vision_width
        self.checkpoint = config.checkpoint
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, config.grid.n_tokens, width))
        self.patch_embed = PatchEmbedding(width, config.patch_size)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.vision_layers)])
        self.clip_projector = AttentionPool(width, config.pool_heads, config.pool_width)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalised frames.

        Args:
            frames: [B, T, 3, S, S], ImageNet-normalised, in the dtype of the parameters.

        Returns:
            Tokens [B, 1 + T (S / patch)^2, D], CLS first, without a final norm; pooled features [B, pool width].
        """
        patches = self.patch_embed(frames)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            # nothing in a block is random, so there is no random state to keep
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if self.checkpoint else block(x)
        return x, self.clip_projector(x)

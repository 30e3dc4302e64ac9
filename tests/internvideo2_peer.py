"""InternVideo2 stage 2 once more, from its formulas: one sample at a time, one head at a time, plain products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pisces.encoders import InternVideo2Config

State = dict[str, Tensor]


def linear(w: State, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))


def layer_norm(w: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(w: State, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[N, D], [M, D], [M, D] -> [N, D]."""
    size = q.shape[-1] // heads
    mixed = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        weights = (scores - scores.amax(1, keepdim=True)).exp()
        mixed.append(weights / weights.sum(1, keepdim=True) @ v[:, part])
    return torch.cat(mixed, dim=1)


def vision(w: State, frames: Tensor, c: InternVideo2Config) -> tuple[Tensor, Tensor]:
    """Frames [T, 3, S, S] in [0, 1] -> tokens [M, D], pooled."""
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=frames.dtype)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=frames.dtype)[:, None, None]
    frames = (frames - mean) / std
    kernel, bias = w["vision_encoder.patch_embed.proj.weight"], w["vision_encoder.patch_embed.proj.bias"]
    rows = [w["vision_encoder.cls_token"][0, 0]]
    for frame in frames:
        for top in range(0, c.size, c.patch_size):
            for left in range(0, c.size, c.patch_size):
                patch = frame[:, top : top + c.patch_size, left : left + c.patch_size]
                rows.append((kernel[:, :, 0] * patch).sum((1, 2, 3)) + bias)
    x = torch.stack(rows) + w["vision_encoder.pos_embed"][0]
    for i in range(c.vision_layers):
        name = f"vision_encoder.blocks.{i}"
        q, k, v = linear(w, f"{name}.attn.qkv", rms_norm(w, f"{name}.norm1", x)).split(c.vision_width, dim=1)
        q, k = rms_norm(w, f"{name}.attn.q_norm", q), rms_norm(w, f"{name}.attn.k_norm", k)
        mixed = linear(w, f"{name}.attn.proj", attend(q, k, v, c.vision_heads))
        x = x + w[f"{name}.ls1.gamma"] * mixed
        hidden = gelu(linear(w, f"{name}.mlp.fc1", rms_norm(w, f"{name}.norm2", x)))
        x = x + w[f"{name}.ls2.gamma"] * linear(w, f"{name}.mlp.fc2", hidden)
    pool = "vision_encoder.clip_projector"
    parts = []
    for letter, source in (("q", x.mean(0)[None]), ("k", x), ("v", x)):
        normed = layer_norm(w, f"{pool}.norm1_{letter}", source, 1e-5)
        parts.append(linear(w, f"{pool}.cross_attn.{letter}", normed) + w[f"{pool}.cross_attn.{letter}_bias"])
    return x, linear(w, f"{pool}.cross_attn.proj", attend(*parts, c.pool_heads))[0]


def text(w: State, ids: list[int], c: InternVideo2Config) -> Tensor:
    """Word pieces -> [N, D] after the text tower."""
    name = "text_encoder.bert.embeddings"
    x = w[f"{name}.word_embeddings.weight"][ids] + w[f"{name}.position_embeddings.weight"][: len(ids)]
    x = layer_norm(w, f"{name}.LayerNorm", x + w[f"{name}.token_type_embeddings.weight"][0], 1e-12)
    for i in range(c.text_layers):
        x = bert_layer(w, i, x, None, c)
    return x


def bert_layer(w: State, i: int, x: Tensor, video: Tensor | None, c: InternVideo2Config) -> Tensor:
    name = f"text_encoder.bert.encoder.layer.{i}"
    sources = [("attention", x)] if video is None else [("attention", x), ("crossattention", video)]
    for kind, source in sources:
        own = f"{name}.{kind}.self"
        source = x if kind == "attention" else source
        q, k, v = linear(w, f"{own}.query", x), linear(w, f"{own}.key", source), linear(w, f"{own}.value", source)
        mixed = linear(w, f"{name}.{kind}.output.dense", attend(q, k, v, c.text_heads))
        x = layer_norm(w, f"{name}.{kind}.output.LayerNorm", mixed + x, 1e-12)
    mixed = linear(w, f"{name}.output.dense", gelu(linear(w, f"{name}.intermediate.dense", x)))
    return layer_norm(w, f"{name}.output.LayerNorm", mixed + x, 1e-12)


def match(w: State, x: Tensor, video: Tensor, c: InternVideo2Config) -> Tensor:
    """Text features [N, D] and video tokens [M, D] -> probability of a match."""
    for i in range(c.text_layers, c.text_layers + c.fusion_layers):
        x = bert_layer(w, i, x, video, c)
    return linear(w, "itm_head", x[0]).softmax(0)[1]


def embeddings(w: State, cls: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Text and video embedding, of length 1."""
    y, x = linear(w, "text_proj", cls), linear(w, "vision_proj", pooled)
    return y / y.norm(), x / x.norm()

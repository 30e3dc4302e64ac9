"""A tiny random WanPipeline directory: the real classes, 9 frames of 32 x 32, latents 16 x 3 x 4 x 4."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ["[pad]", "[unk]", "[sep]", *"a red green blue square circle triangle moves left right up down".split()]
PROMPTS = ["a red square moves left", "a blue circle moves up", "a green triangle", "a red circle moves down"]
SIZE = {"n_frames": 9, "height": 32, "width": 32}
TEXT_TOKENS = 12


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends each prompt with [sep]."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A [sep]", special_tokens=[("[sep]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[pad]",
        unk_token="[unk]",
        eos_token="[sep]",
        model_max_length=TEXT_TOKENS,
    )


def build_pipeline(
    *, seed: int = 0, base_dim: int = 8, layers: int = 2, heads: int = 2, **scheduler: float
) -> WanPipeline:
    """A WanPipeline with random weights whose videos are neither grey nor saturated."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=16,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=torch.randn(16).mul(0.1).tolist(),
        latents_std=torch.rand(16).add(0.5).tolist(),
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48 * heads,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(WORDS),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 2.0, **scheduler}),
        transformer=transformer,
    )


def build_tiny_wan(path: Path, *, steps: int = 3, half: bool = False, **options: float) -> Path:
    """Write the pipeline to ``path`` (weights in float16 if ``half``) with its ``pisces.json``."""
    pipe = build_pipeline(**options)  # type: ignore[arg-type]
    if half:
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
            part.half()
    pipe.save_pretrained(str(path))
    (path / "pisces.json").write_text(json.dumps({**SIZE, "steps": steps, "fps": 8}))
    return path

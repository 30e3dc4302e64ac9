"""Tiny pipelines of the real diffusers classes with random weights: to try a configuration, and for tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pisces.pipelines import ADAPTERS
from pisces.pipelines.tiny_tokenizers import byte_tokenizer, chat_tokenizer, template_tokenizer

SIZE = {"n_frames": 9, "height": 32, "width": 32, "steps": 4, "fps": 8}
"""Defaults of a tiny pipeline; Wan 2.2 with a timestep for each token, Mochi and LTX have their own."""


def make_tiny(name: str, path: str | Path, *, seed: int = 0) -> Path:
    """Write a tiny pipeline as a diffusers directory with its ``pisces.json``.

    Every part is of the class that the real pipeline has and goes through the same loading code; the weights are
    random, so its videos are noise.

    Args:
        name: a key of :data:`TINY`.
        path: the directory; an older one of that name is replaced.
        seed: of the weights.

    Returns:
        The directory.

    Raises:
        ValueError: if there is no tiny pipeline of that name.
    """
    if name not in TINY:
        raise ValueError(f"make-tiny: got {name!r}, expected one of {', '.join(TINY)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe, defaults = TINY[name]()
    adapter = ADAPTERS[type(pipe).__name__](pipe, defaults=defaults)
    return adapter.save_pretrained(path)


def _t5(**config: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    options = {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(**{**options, "dropout_rate": 0.0, "decoder_start_token_id": 0, **config})).eval()


def _flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _wan_vae(**config: Any) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[0.9, 1.1, 1.0, 1.2],
        **config,
    )


def _wan_transformer() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _wan(vae: Any = None, **more: Any) -> tuple[Any, dict[str, int]]:
    from diffusers import WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    vae, transformer = vae or _wan_vae(), _wan_transformer()
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    ).eval()
    pipe = WanPipeline(
        tokenizer=byte_tokenizer(64),
        text_encoder=text,
        vae=vae,
        transformer=transformer,
        scheduler=_flow(shift=3.0),
        **more,
    )
    return pipe, SIZE


def _wan22() -> tuple[Any, dict[str, int]]:
    return _wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)  # as Wan2.2-T2V-A14B


def _wan22_5b() -> tuple[Any, dict[str, int]]:
    vae = _wan_vae(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16)
    pipe, defaults = _wan(vae, expand_timesteps=True)
    return pipe, defaults | {"width": 64}  # its tokens are 32 pixels a side


def _hunyuanvideo() -> tuple[Any, dict[str, int]]:
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    )
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
    ).eval()
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=384,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=8,
            eos_token_id=1,
            bos_token_id=0,
        )
    ).eval()
    pipe = HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=template_tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=_flow(shift=7.0),
        text_encoder_2=clip,
        tokenizer_2=byte_tokenizer(77),
    )
    return pipe, SIZE


def _hunyuanvideo15() -> tuple[Any, dict[str, int]]:
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(4, 8, 8, 8, 8), layers_per_block=1)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=8,
        rope_axes_dim=(4, 4, 4),
        target_size=32,
        task_type="t2v",
    )
    text = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=512,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        )
    ).eval()
    pipe = HunyuanVideo15Pipeline(
        text_encoder=text,
        tokenizer=chat_tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=_flow(shift=5.0),
        text_encoder_2=_t5(),
        tokenizer_2=byte_tokenizer(256),
        guider=ClassifierFreeGuidance(guidance_scale=1.0),
    )
    return pipe, SIZE


def _cogvideox(patch_size_t: int | None = None) -> tuple[Any, dict[str, int]]:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    vae = AutoencoderKLCogVideoX(
        latent_channels=4,
        block_out_channels=(4, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        patch_size_t=patch_size_t,
        max_text_seq_length=64,
        use_rotary_positional_embeddings=True,
    )
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    pipe = CogVideoXPipeline(
        tokenizer=byte_tokenizer(64), text_encoder=_t5(), vae=vae, transformer=transformer, scheduler=scheduler
    )
    return pipe, SIZE


def _ltx() -> tuple[Any, dict[str, int]]:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 8, 8, 8),
        decoder_block_out_channels=(4, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
    )
    scheduler = _flow(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    pipe = LTXPipeline(
        scheduler=scheduler, vae=vae, text_encoder=_t5(), tokenizer=byte_tokenizer(128), transformer=transformer
    )
    return pipe, SIZE | {"n_frames": 17}


def _mochi() -> tuple[Any, dict[str, int]]:
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    vae = AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=256,
    )
    pipe = MochiPipeline(
        scheduler=_flow(invert_sigmas=True),
        vae=vae,
        text_encoder=_t5(),
        tokenizer=byte_tokenizer(256),
        transformer=transformer,
    )
    return pipe, SIZE | {"n_frames": 7}


TINY: dict[str, Callable[[], tuple[Any, dict[str, int]]]] = {
    "wan": _wan,
    "wan22": _wan22,
    "wan22-5b": _wan22_5b,
    "hunyuanvideo": _hunyuanvideo,
    "hunyuanvideo15": _hunyuanvideo15,
    "cogvideox": _cogvideox,
    "cogvideox15": partial(_cogvideox, patch_size_t=2),
    "ltx": _ltx,
    "mochi": _mochi,
}
"""Tiny pipelines by name: functions that return the pipeline and its defaults."""

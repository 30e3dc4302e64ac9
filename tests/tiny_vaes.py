"""Small random autoencoders of the real diffusers classes: one a back end of pisces.decode, and its variants."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def wan(**config: Any) -> Any:
    """Wan 2.1: a latent frame becomes 4 frames of 4 x 4 pixels a latent pixel."""
    from diffusers import AutoencoderKLWan

    options = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
    }
    return AutoencoderKLWan(**{**options, "scale_factor_spatial": 4, **config})


def wan22(**config: Any) -> Any:
    """Wan 2.2: with shortcuts around the resolutions, and pixels in patches of 2."""
    return wan(
        **{
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 8,
            **config,
        }
    )


def cogvideox(**config: Any) -> Any:
    """CogVideoX: two latent frames at a time."""
    from diffusers import AutoencoderKLCogVideoX

    options = {"latent_channels": 4, "block_out_channels": (4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    kinds = {"down_block_types": ("CogVideoXDownBlock3D",) * 3, "up_block_types": ("CogVideoXUpBlock3D",) * 3}
    return AutoencoderKLCogVideoX(**{**options, **kinds, **config})


def mochi(**config: Any) -> Any:
    """Mochi: a latent frame becomes 6 frames, 5 of the first are dropped."""
    from diffusers import AutoencoderKLMochi

    widths = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    return AutoencoderKLMochi(**{"latent_channels": 4, "layers_per_block": (1,) * 5, **widths, **config})


def hunyuan(**config: Any) -> Any:
    """HunyuanVideo 1.0: its own decode of more than 4 latent frames is in tiles of time."""
    from diffusers import AutoencoderKLHunyuanVideo

    options = {"latent_channels": 4, "block_out_channels": (4, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    return AutoencoderKLHunyuanVideo(**{**options, **config})


def hunyuan15(**config: Any) -> Any:
    """HunyuanVideo 1.5: attention back in time at the size of the latents."""
    from diffusers import AutoencoderKLHunyuanVideo15

    options = {"latent_channels": 4, "block_out_channels": (4, 8, 8, 8, 8), "layers_per_block": 1}
    return AutoencoderKLHunyuanVideo15(**{**options, **config})


def ltx(**config: Any) -> Any:
    """LTX: its decoder looks ahead."""
    from diffusers import AutoencoderKLLTXVideo

    options: dict[str, Any] = {
        "latent_channels": 4,
        "block_out_channels": (4, 8, 8, 8),
        "decoder_block_out_channels": (4, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "decoder_inject_noise": (False,) * 5,
        "upsample_residual": (False,) * 4,
        "upsample_factor": (1,) * 4,
        "patch_size": 2,
    }
    return AutoencoderKLLTXVideo(**{**options, **config})


def ltx_conditioned(**config: Any) -> Any:
    """LTX 0.9.1 and later: conditioned on a timestep, residual upsampling, wider where it is small."""
    residual = {"upsample_residual": (True,) * 4, "upsample_factor": (2, 2, 1, 1), "timestep_conditioning": True}
    return ltx(**{**residual, "decoder_block_out_channels": (8, 16, 16, 16), **config})


def image(**config: Any) -> Any:
    """An autoencoder for pictures."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**{"latent_channels": 4, "block_out_channels": (4,), "norm_num_groups": 2, **config})


VAES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (wan, wan22, cogvideox, mochi, hunyuan, hunyuan15, ltx, ltx_conditioned, image)
}


def build(name: str, *, seed: int, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A frozen autoencoder with random weights, in which every parameter matters."""
    torch.manual_seed(seed)
    vae = VAES[name](**config).to(dtype).eval().requires_grad_(False)
    for parameter in vae.parameters():
        if parameter.dim() <= 1 or bool((parameter == 0).all()):  # biases and what starts as zero
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vae


def random_latents(vae: Any, n_latents: int, *, batch: int = 2, size: int = 3) -> Tensor:
    """Latents [B, C, t, h, w] in the autoencoder's dtype."""
    parameter = next(vae.parameters())
    return torch.randn(batch, 4, n_latents, size, size + 1, dtype=parameter.dtype)


def timestep(vae: Any, latents: Tensor) -> Tensor | None:
    """A decode timestep, where the class takes one and the decoder uses it."""
    if "temb" not in inspect.signature(vae.decode).parameters or not vae.config.timestep_conditioning:
        return None
    return torch.full((len(latents),), 0.05, dtype=latents.dtype)


def own_decode(vae: Any, latents: Tensor) -> Tensor:
    """The class's own decode; pictures one by one."""
    if type(vae).__name__ == "AutoencoderKL":
        return torch.stack([vae.decode(z, return_dict=False)[0] for z in latents.unbind(2)], dim=2)
    arguments = () if timestep(vae, latents) is None else (timestep(vae, latents),)
    if type(vae).__name__ == "AutoencoderKLHunyuanVideo15":  # it cannot decode a batch (diffusers 0.42)
        return torch.cat([vae.decode(video, return_dict=False)[0] for video in latents.split(1)])
    frames: Tensor = vae.decode(latents, *arguments, return_dict=False)[0]
    return frames

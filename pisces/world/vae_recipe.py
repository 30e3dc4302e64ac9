"""Training the small causal video VAE: a real AutoencoderKLWan that turns 9x32x32 videos into 3x4x4x16 latents.

A small causal VAE trained on videos from scratch stays at the empty background (17 dB). What works: single frames
first, with the temporal taps nearly off and temporal resampling that starts as copy and average; a loss that first
looks for the foreground, then for edges; Muon on the convolutions.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from pisces.world.recipe import Log, Muon, run_steps, set_learning_rate, split_for_muon, step_generator
from pisces.world.scene import render, sample_scenes

VAE_CONFIG = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}
IMAGE_STEPS, VIDEO_STEPS = 1200, 1500
IMAGE_BATCH, VIDEO_BATCH = 16, 8
BANK = 4096
TWO_OBJECTS = 0.15
KL_WEIGHT = 1e-6
EDGE_WEIGHT = 0.5
FOREGROUND_WEIGHT = 2.0


def video_bank(n: int, seed: int, *, chunk: int = 256) -> Tensor:
    """n training videos as the VAE takes them: [n, 3, T, H, W] float16 in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, n, chunk):
        scenes = sample_scenes(min(chunk, n - start), generator, two_objects=TWO_OBJECTS)
        parts.append((render(scenes, generator).transpose(1, 2) * 2 - 1).half())
    return torch.cat(parts)


def build_vae(mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """The architecture, with the latents' statistics once they are known."""
    z = VAE_CONFIG["z_dim"]
    return AutoencoderKLWan(latents_mean=mean or [0.0] * z, latents_std=std or [1.0] * z, **VAE_CONFIG)  # type: ignore[operator]


@torch.no_grad()
def start_as_image_model(vae: AutoencoderKLWan, taps: float = 0.1) -> None:
    """Scale the taps on past frames down, let temporal resampling copy and average, and start with little noise."""
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv3d):
            continue
        weight = module.weight
        if name.endswith("time_conv"):
            weight.mul_(3 * taps)
            module.bias.zero_()
            identity = torch.eye(weight.shape[1])
            if weight.shape[0] == 2 * weight.shape[1]:  # upsampling: both new frames copy the last one
                weight[..., 2, 0, 0] += torch.cat([identity, identity])
            else:  # downsampling: a weighted mean of three frames
                weight[..., 0, 0] += identity[..., None] * torch.tensor([0.25, 0.25, 0.5])
        elif module.kernel_size == (3, 3, 3):
            weight[:, :, :2] *= taps
    z = VAE_CONFIG["z_dim"]
    vae.quant_conv.weight[z:] *= 0.1
    vae.quant_conv.bias[z:] = -6.0


def edges(x: Tensor) -> list[Tensor]:
    """Differences along height, width and, for videos, time."""
    found = [x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]]
    return found + ([x[:, :, 1:] - x[:, :, :-1]] if x.shape[2] > 1 else [])


def vae_loss(vae: AutoencoderKLWan, videos: Tensor, generator: torch.Generator, *, sharpness: float) -> Tensor:
    """(1-s) 2 MSE + s (L1 + edge L1), foreground weighted, + KL; s = `sharpness` in [0, 1].

    Args:
        vae: the model in training.
        videos: [B, 3, T, H, W] in [-1, 1].
        generator: draws the posterior's noise.
        sharpness: 0 finds the objects (a mean), 1 draws their outlines (a median).
    """
    posterior = vae.encode(videos).latent_dist
    mean, logvar = posterior.mean, posterior.logvar.clamp(-12, -2)
    noise = torch.randn(mean.shape, generator=generator)
    rebuilt = vae.decode(mean + (0.5 * logvar).exp() * noise, return_dict=False)[0]
    difference = rebuilt - videos
    colourful = (videos.amax(1, keepdim=True) - videos.amin(1, keepdim=True)) > 0.3
    weight = 1 + FOREGROUND_WEIGHT * colourful
    loss = (1 - sharpness) * 2 * (weight * difference**2).mean() + sharpness * (weight * difference.abs()).mean()
    if sharpness:
        pairs = zip(edges(rebuilt), edges(videos), strict=True)
        loss = loss + sharpness * EDGE_WEIGHT * sum((a - b).abs().mean() for a, b in pairs)
    return loss + KL_WEIGHT * 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()


def train_vae(state_file: Path, *, seed: int = 0, log: Log = print) -> AutoencoderKLWan:
    """Train from scratch, or go on from `state_file`; about 15 minutes on one core.

    Args:
        state_file: everything that resuming needs; left behind for the caller to remove.
        seed: of the weights and of every batch.
        log: takes one line of progress.

    Returns:
        The VAE in evaluation mode, with the mean and standard deviation of its latents in its configuration.
    """
    torch.manual_seed(seed)
    vae = build_vae()
    start_as_image_model(vae)
    big, rest = split_for_muon(vae.named_parameters(), matrices=_is_inner_convolution)
    muon, adam = Muon(big, lr=0.02), torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0, betas=(0.9, 0.97))
    bank = video_bank(BANK, seed=200 + seed)
    steps = IMAGE_STEPS + VIDEO_STEPS

    def step(i: int) -> dict[str, float]:
        generator = step_generator(seed, i)
        image = i < IMAGE_STEPS
        index = torch.randint(0, BANK, (IMAGE_BATCH if image else VIDEO_BATCH,), generator=generator)
        videos = bank[index].float()
        if image:
            frame = torch.randint(0, videos.shape[2], (1,), generator=generator)
            videos = videos[:, :, frame]
        done = i / steps
        loss = vae_loss(vae, videos, generator, sharpness=min(1.0, max(0.0, (done - 0.07) / 0.1)))
        vae.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in (muon, adam):
            set_learning_rate(optimizer, min(1, (i + 1) / 30) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * done)))
            optimizer.step()
        return {"loss": loss.item()}

    stateful = {"vae": vae, "muon": muon, "adam": adam}
    run_steps("vae", steps=steps, step=step, stateful=stateful, state_file=state_file, settings={"seed": seed}, log=log)
    return _with_latent_statistics(vae.eval(), bank[:1024])


def _is_inner_convolution(name: str, p: nn.Parameter) -> bool:
    """Muon is for weights between hidden layers; the layers at pixels and latents keep AdamW."""
    outer = name.startswith(("quant_conv", "post_quant_conv")) or name.endswith(
        ("encoder.conv_in.weight", "decoder.conv_out.weight")
    )
    return p.dim() >= 4 and min(p.shape[0], p.shape[1]) > 8 and not outer


@torch.no_grad()
def _with_latent_statistics(vae: AutoencoderKLWan, bank: Tensor) -> AutoencoderKLWan:
    parts = [vae.encode(bank[i : i + 64].float()).latent_dist.mean for i in range(0, len(bank), 64)]
    latents = torch.cat(parts)
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    finished = build_vae(mean.tolist(), std.tolist())
    finished.load_state_dict(vae.state_dict())
    return finished.eval()

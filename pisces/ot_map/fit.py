"""Fitting an alignment: means in closed form, the transport map by the paper's max-min recipe."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pisces.ot_map.alignment import Alignment, Kind, NeuralOTMap, check_kind

MAP_STEPS = 10  # steps of T for one of f (PISCES, arXiv 2602.01624)
WEIGHT_DECAY = 1e-10
CLIP = 1.0
LAST_LR = 0.05  # the cosine schedule ends at this share of lr


def fit_alignment(
    text: Tensor,
    video: Tensor,
    *,
    kind: Kind = "center_ot",
    hidden: int = 1024,
    steps: int = 160_000,
    batch_size: int = 128,
    lr: float = 1e-4,
    cost_weight: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> Alignment:
    """Fit an alignment of text embeddings with real-video embeddings; pairs are not needed.

    The Neural OT map T and its potential f solve

        sup_f inf_T  E_x[f(x)] + E_y[cost_weight * |T(y) - y|^2 - f(T(y))].

    One step is ten steps of T, then one of f, each on a fresh batch; Adam with weight decay 1e-10, gradients clipped to
    norm 1, cosine schedule to 5 % of `lr`. The defaults are the paper's, for embeddings of width 512 and a day on one
    A100; for width 32, `hidden=128, steps=150, lr=1e-3` takes seconds.

    Args:
        text: [n, E] text embeddings; normalised here.
        video: [m, E] embeddings of real videos; normalised here.
        kind: "none", "mean_shift", "center", "ot" or "center_ot"; see `Alignment`. The last two train a map, the last
            one between the centred embeddings.
        hidden: width of both networks.
        steps: outer steps.
        batch_size: drawn with replacement from each side.
        lr: learning rate of both networks.
        cost_weight: weight of the transport cost. The released code averages the squares over the E features, which is
            1 / E here; in the small world (E = 32) that leaves the map too free to keep captions apart.
        seed: of the weights and the batches; global random state is left alone.
        progress: show a progress bar.

    Returns:
        The alignment, frozen, in eval mode, on the device of `text`.

    Raises:
        ValueError: shapes that do not fit, non-finite values, fewer than two embeddings or bad settings.

    Source:
        PISCES (arXiv 2602.01624), the distributional reward; the max-min form is Neural OT (Korotin et al., 2023).

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> text = torch.randn(256, 8, generator=generator)
        >>> alignment = fit_alignment(text, text + 1, kind="center")
        >>> alignment.text(text).shape
        torch.Size([256, 8])
    """
    check_kind(kind, "fit_alignment")
    text, video = _embeddings(text, "text"), _embeddings(video, "video")
    if text.shape[1] != video.shape[1]:
        raise ValueError(
            f"fit_alignment: text has width {text.shape[1]} and video {video.shape[1]}, expected the same. "
            "Use the two embeddings of one encoder."
        )
    for name, value in (("hidden", hidden), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"fit_alignment: {name} is {value}, expected at least 1.")
    text_mean, video_mean = text.mean(0), video.mean(0)
    network = None
    if kind in ("ot", "center_ot"):
        if kind == "center_ot":
            text, video = F.normalize(text - text_mean, dim=-1), F.normalize(video - video_mean, dim=-1)
        network = _fit_map(text, video, hidden, steps, batch_size, lr, cost_weight, seed, progress)
    info = {"n_text": len(text), "n_video": len(video)}
    if network is not None:
        info |= {"hidden": hidden, "steps": steps, "batch_size": batch_size, "seed": seed}
    alignment = Alignment(kind, text_mean=text_mean, video_mean=video_mean, network=network, info=info)
    return alignment.requires_grad_(False).eval()


@torch.enable_grad()  # the caller may well be inside no_grad
def _fit_map(
    source: Tensor,
    target: Tensor,
    hidden: int,
    steps: int,
    batch_size: int,
    lr: float,
    cost_weight: float,
    seed: int,
    progress: bool,
) -> NeuralOTMap:
    dim, device = source.shape[1], source.device
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, potential = NeuralOTMap(dim, hidden), NeuralOTMap(dim, hidden, dim_out=1)
    network, potential = network.to(source), potential.to(source)
    # fused: with networks this small the time goes into Python, not into arithmetic
    adams = [
        torch.optim.Adam(part.parameters(), lr, weight_decay=WEIGHT_DECAY, fused=True) for part in (network, potential)
    ]
    map_adam, potential_adam = adams

    def batch(data: Tensor) -> Tensor:
        return data[torch.randint(0, len(data), (batch_size,), generator=generator).to(device)]

    bar = tqdm(range(steps), desc="Neural OT map", disable=None if progress else True, leave=False)
    for i in bar:
        rate = lr * (LAST_LR + (1 - LAST_LR) * (0.5 + 0.5 * math.cos(math.pi * i / steps)))
        for adam in adams:
            adam.param_groups[0]["lr"] = rate
        potential.requires_grad_(False)
        for _ in range(MAP_STEPS):
            y = batch(source)
            moved = network(y)
            _descend(cost_weight * (moved - y).square().sum(1).mean() - potential(moved).mean(), network, map_adam)
        potential.requires_grad_(True)
        with torch.no_grad():
            moved = network(batch(source))
        _descend(potential(moved).mean() - potential(batch(target)).mean(), potential, potential_adam)
    return network


def _descend(loss: Tensor, part: nn.Module, adam: torch.optim.Optimizer) -> None:
    adam.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(part.parameters(), CLIP)
    adam.step()


def _embeddings(x: Tensor, name: str) -> Tensor:
    """x, checked, detached, normalised and at least float32."""
    if x.dim() != 2 or len(x) < 2 or not x.is_floating_point():
        raise ValueError(
            f"fit_alignment: {name} is {x.dtype} of shape {tuple(x.shape)}, expected at least two floating-point "
            "embeddings (n, E)."
        )
    if not torch.isfinite(x).all():
        raise ValueError(f"fit_alignment: {name} has non-finite values, expected finite embeddings.")
    return F.normalize(x.detach().to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

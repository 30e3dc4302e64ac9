"""Fitting an alignment: in closed form, by one entropic solve, or by training the transport map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pisces.ot_map.alignment import NEURAL, PAIRED, Alignment, Kind, check_kind
from pisces.ot_map.barycentric import entropic_map
from pisces.ot_map.linear import affine_ot, procrustes, ridge
from pisces.ot_map.metrics import caption_numbers, retrieval_at_1, rho
from pisces.ot_map.network import NeuralOTMap
from pisces.ot_map.neural import OBJECTIVES, MapSettings, Objective, Score, digest, train_map

_LINEAR = {"affine": affine_ot, "procrustes": procrustes, "ridge": ridge}
_UNIT = 1e-3  # lengths within it of 1 are those of normalised embeddings


@dataclass(frozen=True)
class HeldOut:
    """Pairs by which the best of the maps that a training goes through is chosen; they are not fitted on.

    Attributes:
        text: [k, E], as those of the fit.
        video: [k, E] embeddings of the videos of these texts.
        captions: k captions; a video of an equal caption counts as found.
        metric: "r_at_1", the largest one, of equal ones that with the smallest `rho`; or "rho", the other way round.
    """

    text: Tensor
    video: Tensor
    captions: Sequence[str]
    metric: Literal["r_at_1", "rho"] = "r_at_1"


def paper_settings(dim: int) -> dict[str, Any]:
    """The paper's settings of `fit_alignment` for embeddings of a width: a day on one A100 for 512.

    The released code averages the squares of the transport cost over the features, so its weight 1 is 1 / dim here.

    Args:
        dim: width E of the embeddings.

    Source:
        PISCES (arXiv 2602.01624) and its released code.

    Example:
        >>> paper_settings(512)["steps"], paper_settings(512)["cost_weight"]
        (160000, 0.001953125)
    """
    return {
        "kind": "ot",
        "hidden": 1024,
        "steps": 160_000,
        "batch_size": 128,
        "lr": 1e-4,
        "cost_weight": 1 / dim,
        "objective": "max_min",
    }


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
    objective: Objective = "max_min",
    normalize_text: bool = True,
    held_out: HeldOut | None = None,
    check_every: int = 1000,
    checkpoints: str | Path | None = None,
    save_every: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Alignment:
    """Fit an alignment of text embeddings with real-video embeddings; only procrustes and ridge need pairs.

    The Neural OT map T and its potential f solve

        sup_f inf_T  E_x[f(x)] + E_y[cost_weight * |T(y) - y|^2 - f(T(y))]             objective "max_min"
        inf_T        20 S(T(y), x) + E_y[cost_weight * |T(y) - y|^2]                   objective "sinkhorn"

    with S the `sinkhorn_divergence` of a batch, epsilon 0.1. One step of "max_min" is ten steps of T, then one of f,
    each on a fresh batch; one of "sinkhorn" is one of T, of which the first 40 % bring T
    to the identity, by the second term alone. Adam with weight decay 1e-10, gradients clipped to norm 1,
    cosine schedule to 5 % of `lr`. The defaults are the paper's but for `kind` and `cost_weight` (`paper_settings` has
    them all), for embeddings of width 512 and a day on one A100; for width 32, `hidden=128, steps=150, lr=1e-3` takes
    seconds.

    Args:
        text: [n, E] text embeddings; normalised here.
        video: [m, E] embeddings of real videos; normalised here. For "procrustes" and "ridge" row i belongs to text i.
        kind: see `Alignment`. "affine" is optimal transport between Gaussians, "procrustes" a rotation and "ridge" a
            regression, all in closed form in float64; "barycentric" is the entropic map; "ot" and "center_ot" train a
            map, the latter between the centred embeddings.
        hidden: width of both networks.
        steps: outer steps.
        batch_size: drawn with replacement from each side.
        lr: learning rate of both networks.
        cost_weight: weight of the transport cost. The released code averages the squares over the E features, which is
            1 / E here; in the small world (E = 32) that leaves the map too free to keep captions apart.
        objective: of the map.
        normalize_text: False, for kind "ot", fits on the texts as they are, of any length, while the alignment still
            normalises them in use: the mismatch of the released code, there to reproduce it and for nothing else.
        held_out: pairs to choose the best map by. None takes the last one.
        check_every: steps between two such checks; the last step is checked, too.
        checkpoints: folder for checkpoints of a long fit, which goes on from there bit for bit, also after SIGTERM.
        save_every: steps between two checkpoints.
        seed: of the weights and the batches; global random state is left alone.
        progress: show a progress bar.

    Returns:
        The alignment, frozen, in eval mode, on the device of `text`.

    Raises:
        ValueError: shapes that do not fit, non-finite values, fewer than two embeddings or bad settings.
        CheckpointError: a checkpoint that is damaged or of another fit.
        FitInterrupted: after SIGTERM or SIGINT with `checkpoints`, once the checkpoint is written.

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
    raw, raw_video = text, video
    text, video = _embeddings(text, "text"), _embeddings(video, "video")
    if text.shape[1] != video.shape[1]:
        raise ValueError(
            f"fit_alignment: text has width {text.shape[1]} and video {video.shape[1]}, expected the same. "
            "Use the two embeddings of one encoder."
        )
    if kind in PAIRED and len(text) != len(video):
        raise ValueError(
            f"fit_alignment: got {len(text)} texts and {len(video)} videos, expected pairs for kind {kind!r}. "
            "Use kind 'affine', which needs none."
        )
    settings = {"hidden": hidden, "steps": steps, "batch_size": batch_size}
    for name, value in {**settings, "check_every": check_every, "save_every": save_every}.items():
        if value < 1:
            raise ValueError(f"fit_alignment: {name} is {value}, expected at least 1.")
    if objective not in OBJECTIVES:
        raise ValueError(f"fit_alignment: objective is {objective!r}, expected one of {', '.join(OBJECTIVES)}.")
    info: dict[str, Any] = {"n_text": len(text), "n_video": len(video)}
    parts: dict[str, Any] = {"text_mean": text.mean(0), "video_mean": video.mean(0)}
    if kind in _LINEAR:
        matrix, offset = _LINEAR[kind](text, video)
        parts |= {"matrix": matrix.to(text), "offset": offset.to(text)}
    elif kind == "barycentric":
        parts |= entropic_map(text, video, seed=seed)
    elif kind in NEURAL:
        source = text
        if not normalize_text:
            source = _lengths_kept(raw, text, kind)
            info["normalize_text"] = False
        target = video
        if kind == "center_ot":
            source, target = F.normalize(text - text.mean(0), dim=-1), F.normalize(video - video.mean(0), dim=-1)
        parts["network"], facts = train_map(
            source,
            target,
            MapSettings(hidden, steps, batch_size, lr, cost_weight, objective, seed),
            score=None if held_out is None else _scorer(kind, parts, held_out),
            data=f"{kind} {normalize_text} {digest(raw, raw_video)}",
            scored_on=None if held_out is None else _identity(held_out),
            check_every=check_every,
            checkpoints=None if checkpoints is None else Path(checkpoints),
            save_every=save_every,
            progress=progress,
        )
        info |= {**settings, "lr": lr, "cost_weight": cost_weight, "objective": objective, "seed": seed, **facts}
    return Alignment(kind, **parts, info=info).requires_grad_(False).eval()


def _identity(held_out: HeldOut) -> str:
    """What a score depends on beside the map."""
    return f"{held_out.metric} {digest(held_out.text, held_out.video, caption_numbers(held_out.captions))}"


def _scorer(kind: Kind, parts: dict[str, Any], held_out: HeldOut) -> Score:
    """How well an alignment with a given map does on held-out pairs."""
    n = len(held_out.text)
    if held_out.text.shape != held_out.video.shape or n < 2 or len(held_out.captions) != n:
        raise ValueError(
            f"fit_alignment: held_out has text {tuple(held_out.text.shape)}, video {tuple(held_out.video.shape)} and "
            f"{len(held_out.captions)} captions, expected (k, E), (k, E) and k of them, k at least 2."
        )
    label = caption_numbers(held_out.captions)

    @torch.no_grad()
    def score(network: NeuralOTMap) -> tuple[float, ...]:
        alignment = Alignment(kind, **parts, network=network)
        q, v = alignment.text(held_out.text), alignment.video(held_out.video)
        found = retrieval_at_1(q, v, label), -rho(q, v)
        return found if held_out.metric == "r_at_1" else found[::-1]

    return score


def _lengths_kept(raw: Tensor, text: Tensor, kind: Kind) -> Tensor:
    """The texts as they are, if that makes a difference."""
    if kind != "ot":
        raise ValueError(f"fit_alignment: normalize_text=False with kind {kind!r}, expected kind 'ot'.")
    raw = raw.detach().to(text.dtype)
    if bool(((raw.norm(dim=-1) - 1).abs() < _UNIT).all()):
        raise ValueError(
            "fit_alignment: normalize_text=False, and every text has length 1: it would change nothing. "
            "Pass the text features from before their normalisation."
        )
    return raw


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

"""Which encoder an alignment belongs to: several encoders have embeddings of the same width."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

import torch

from pisces.encoders.base import VideoTextEncoder
from pisces.latent_cache import module_digest, tokenizer_digest
from pisces.ot_map.alignment import Alignment

EXACT, ROUNDED, FRAMES = "encoder_sha256", "encoder_bf16_sha256", "encoder_frames"


def encoder_digest(model: VideoTextEncoder, *, rounded: bool = False) -> str:
    """A digest of all that an encoder's embeddings depend on: weights, settings, words, pixels, frames and size.

    All weights are read once: seconds for a model of 1 B parameters.

    Args:
        model: the encoder, on any device.
        rounded: take the weights as bfloat16 holds them and leave their type out, so that a model and the same in
            bfloat16 have one digest. In float16 it has another: rounded twice, some weights end elsewhere.
    """
    if isinstance(model, torch.nn.Module):
        weights = module_digest(model, rounded=rounded)
    else:
        weights = type(model).__qualname__
    # A model of transformers inside: its heads and activations are in its own configuration.
    inner = getattr(getattr(model, "model", None), "config", None)
    settings = inner.to_json_string(use_diff=False) if inner is not None else ""
    if rounded and settings:
        settings = json.dumps(_without_dtype(json.loads(settings)), sort_keys=True)
    tokenizer = getattr(model, "tokenizer", None)
    words = tokenizer_digest(tokenizer) if hasattr(tokenizer, "get_vocab") else ""
    words = words or getattr(getattr(model, "words", None), "rules", "")
    looks = (model.n_frames, model.size, model.interpolation)
    parts = (weights, settings, words, repr(getattr(model, "pixels", None)), *looks)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def encoder_facts(model: VideoTextEncoder) -> dict[str, str | int]:
    """What the info of an alignment says of the encoder whose embeddings it was fitted on.

    Example:
        >>> from pisces.encoders import load_encoder
        >>> from pisces.world import checkpoint_path
        >>> sorted(encoder_facts(load_encoder(checkpoint_path("encoder"))))
        ['encoder', 'encoder_bf16_sha256', 'encoder_frames', 'encoder_sha256']
    """
    return {
        "encoder": type(model).__name__,
        FRAMES: model.n_frames,
        EXACT: encoder_digest(model),
        ROUNDED: encoder_digest(model, rounded=True),
    }


def check_alignment(alignment: Alignment, encoder: VideoTextEncoder, who: str) -> None:
    """Refuse an alignment that was fitted with another encoder.

    The encoder is read only where the alignment's info has a digest. One that was fitted in this process with
    `fit_alignment`, which sees embeddings and no encoder, has none and is taken as it is; add `encoder_facts` to its
    info before you save it. The same weights in bfloat16 are the same encoder.

    Warns:
        UserWarning: the alignment is of a file without a digest, such as the map of the paper's authors; or it was
            fitted with an encoder of the same class that looks at another number of frames, as the paper's is (8 in
            fitting, 26 in use): positions differ then, and weights cannot be compared.

    Raises:
        ValueError: another width, or another digest.
    """
    if alignment.dim not in (None, encoder.embed_dim):
        raise ValueError(
            f"{who}: alignment has width {alignment.dim}, expected {encoder.embed_dim}. "
            "Use the encoder with which the alignment was fitted."
        )
    if alignment.dim is None:
        return  # nothing was fitted
    wanted = {name: alignment.info[name] for name in (EXACT, ROUNDED) if name in alignment.info}
    if not wanted:
        if alignment.file is not None:
            warnings.warn(
                f"{who}: {alignment.file} does not say with which encoder it was fitted, and only its width "
                f"{alignment.dim} could be compared. Make sure that it was this {type(encoder).__name__}.",
                stacklevel=3,
            )
        return
    got = ""
    for name, digest in wanted.items():  # the exact one first: it is nearly always equal
        found = encoder_digest(encoder, rounded=name == ROUNDED)
        if found == digest:
            return
        got = got or found
    fitted, source = alignment.info.get("encoder", "encoder"), alignment.file or "alignment"
    frames = alignment.info.get(FRAMES, encoder.n_frames)
    if fitted == type(encoder).__name__ and frames != encoder.n_frames:
        warnings.warn(
            f"{who}: {source} was fitted with a {fitted} of {frames} frames, and this one looks at {encoder.n_frames}. "
            "Whether it has the same weights could not be compared; make sure that it does.",
            stacklevel=3,
        )
        return
    raise ValueError(
        f"{who}: {source} was fitted with another encoder: got {type(encoder).__name__} {got[:12]}, expected {fitted} "
        f"{next(iter(wanted.values()))[:12]} (SHA-256 of weights, words, frames and size). Use that encoder, or fit an "
        "alignment with this one."
    )


def _without_dtype(settings: Any) -> Any:
    """The settings of transformers without those that say how precise the weights are."""
    if isinstance(settings, dict):
        return {k: _without_dtype(v) for k, v in settings.items() if k not in ("dtype", "torch_dtype")}
    return settings

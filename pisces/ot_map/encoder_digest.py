"""Which encoder an alignment belongs to: several encoders have embeddings of the same width."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

from torch import nn

from pisces.digests import module_digest, plain, tokenizer_digest
from pisces.encoders.base import VideoTextEncoder
from pisces.ot_map.alignment import Alignment

EXACT, ROUNDED, FRAMES = "encoder_sha256", "encoder_bf16_sha256", "encoder_frames"
ANY_FRAMES = "encoder_any_frames_sha256"


def encoder_digest(model: VideoTextEncoder, *, rounded: bool = False, any_frames: bool = False) -> str:
    """A digest of all that an encoder's embeddings depend on: weights, settings, words, pixels, frames and size.

    All weights are read once: seconds for a model of 1 B parameters.

    Args:
        model: the encoder, on any device; an `nn.Module`, whose weights can be read.
        rounded: take the weights as bfloat16 holds them and leave their type out, so that a model and the same in
            bfloat16 have one digest. In float16 it has another: rounded twice, some weights end elsewhere.
        any_frames: leave out the number of frames and the encoder's `frame_tensors`, so that a model and the same at
            another number of frames have one digest.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: the encoder is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"encoder_digest: model is a {type(model).__name__}, expected an nn.Module, whose weights can be read. "
            "Make your encoder one; encoder_facts takes it as it is."
        )
    without = ("n_frames", *getattr(model, "frame_tensors", ())) if any_frames else ()
    weights = module_digest(model, rounded=rounded, without=without)
    # A model of transformers inside: its heads and activations are in its own configuration.
    inner = getattr(getattr(model, "model", None), "config", None)
    settings = "" if inner is None else json.dumps(_settings(plain(inner), dtype=not rounded), sort_keys=True)
    tokenizer = getattr(model, "tokenizer", None)
    words = tokenizer_digest(tokenizer) if hasattr(tokenizer, "get_vocab") else ""
    words = words or getattr(getattr(model, "words", None), "rules", "")
    looks = (model.size, model.interpolation) if any_frames else (model.n_frames, model.size, model.interpolation)
    parts = (weights, settings, words, repr(getattr(model, "pixels", None)), *looks)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def encoder_facts(model: VideoTextEncoder) -> dict[str, str | int]:
    """What the info of an alignment says of the encoder whose embeddings it was fitted on.

    Args:
        model: the encoder.

    Returns:
        Its class, its number of frames and its digests. One that is no `nn.Module` has no weights that could be read,
        and so no digest: `check_alignment` says then that it could not compare.

    Example:
        >>> from pisces.encoders import load_encoder
        >>> from pisces.world import checkpoint_path
        >>> sorted(encoder_facts(load_encoder(checkpoint_path("encoder"))))
        ['encoder', 'encoder_any_frames_sha256', 'encoder_bf16_sha256', 'encoder_frames', 'encoder_sha256']
    """
    facts: dict[str, str | int] = {"encoder": type(model).__name__, FRAMES: model.n_frames}
    if isinstance(model, nn.Module):
        facts[EXACT] = encoder_digest(model)
        facts[ROUNDED] = encoder_digest(model, rounded=True)
        facts[ANY_FRAMES] = _any_frames(model)
    return facts


def check_alignment(alignment: Alignment, encoder: VideoTextEncoder, who: str) -> None:
    """Refuse an alignment that was fitted with another encoder.

    The encoder is read only where the alignment's info has a digest. One that was fitted in this process with
    `fit_alignment`, which sees embeddings and no encoder, has none and is taken as it is; add `encoder_facts` to its
    info before you save it. The same weights in bfloat16 are the same encoder.

    Args:
        alignment: what is to be used.
        encoder: what it is to be used with.
        who: name for the messages.

    Warns:
        UserWarning: the alignment is of a file without a digest, such as the map of the paper's authors, or one of an
            encoder that is no `nn.Module`; or it was fitted with this encoder at another number of frames, as the
            paper's is (8 in fitting, 26 in use).

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
    info, kind = alignment.info, type(encoder).__name__
    wanted = {name: info[name] for name in (EXACT, ROUNDED) if name in info}
    if not wanted:
        if alignment.file is not None:
            warnings.warn(
                f"{who}: {alignment.file} does not say with which encoder it was fitted, and only its width "
                f"{alignment.dim} could be compared. Make sure that it was this {kind}.",
                stacklevel=3,
            )
        return
    fitted, source = info.get("encoder", "encoder"), alignment.file or "alignment"
    frames = info.get(FRAMES, encoder.n_frames)
    got = "of weights that cannot be read, as it is no nn.Module"
    if isinstance(encoder, nn.Module):
        found = {}
        for name, digest in wanted.items():  # the exact one first: it is nearly always equal
            found[name] = encoder_digest(encoder, rounded=name == ROUNDED)
            if found[name] == digest:
                return
        if frames != encoder.n_frames and ANY_FRAMES in info and info[ANY_FRAMES] == _any_frames(encoder):
            warnings.warn(
                f"{who}: {source} was fitted with this {fitted} at {frames} frames, and here it looks at "
                f"{encoder.n_frames}: its embeddings differ. Fit an alignment at {encoder.n_frames} to be exact.",
                stacklevel=3,
            )
            return
        got = next(iter(found.values()))[:12]
    hint = ""
    if ANY_FRAMES not in info:
        hint = " An earlier version took digests otherwise: if it wrote this one, fit again."
    elif frames != encoder.n_frames and fitted == kind:
        hint = (
            f" It may look at {encoder.n_frames} frames instead of {frames} if it names the tensors that depend on "
            "their number in `frame_tensors`."
        )
    raise ValueError(
        f"{who}: {source} was fitted with another encoder: got {kind} {got}, expected {fitted} "
        f"{next(iter(wanted.values()))[:12]} (SHA-256 of weights, words, frames and size). Use that encoder, or fit an "
        f"alignment with this one.{hint}"
    )


def _any_frames(model: VideoTextEncoder) -> str:
    """Rounded, too: the paper's encoder has 8 frames in fitting and 26 in bfloat16 in use."""
    return encoder_digest(model, rounded=True, any_frames=True)


def _settings(settings: Any, *, dtype: bool) -> Any:
    """The settings of a model of transformers, with or without those that say how precise its weights are."""
    if isinstance(settings, dict):
        kept = {key: _settings(value, dtype=dtype) for key, value in settings.items()}
        return {key: value for key, value in kept.items() if dtype or key not in ("dtype", "torch_dtype")}
    return settings

"""Video-text encoders: what a video shows and whether a text describes it."""

from __future__ import annotations

import json
from pathlib import Path

from pisces.encoders.base import AttentionRefiner, TextFeatures, VideoFeatures, VideoTextEncoder, resample
from pisces.encoders.tiny import TinyEncoder, TinyEncoderConfig

__all__ = [
    "AttentionRefiner",
    "TextFeatures",
    "TinyEncoder",
    "TinyEncoderConfig",
    "VideoFeatures",
    "VideoTextEncoder",
    "load_encoder",
    "resample",
]

_KINDS = {"tiny_encoder": TinyEncoder}


def load_encoder(path: str | Path) -> TinyEncoder:
    """Load an encoder directory; the `model_type` of its config.json says which class.

    Args:
        path: directory with config.json and model.safetensors.

    Returns:
        The encoder in float32 and eval mode.

    Raises:
        FileNotFoundError: no such directory, or no config.json in it.
        ValueError: a model_type that this version does not know.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"load_encoder: {path} has no config.json, expected an encoder directory. "
            "The packaged one is at pisces.world.checkpoint_path('encoder')."
        )
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in _KINDS:
        raise ValueError(f"load_encoder: {path}/config.json has model_type {kind!r}, expected one of {sorted(_KINDS)}.")
    return _KINDS[kind].from_pretrained(path)

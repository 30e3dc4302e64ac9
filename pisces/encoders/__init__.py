"""Video-text encoders: what a video shows and whether a text describes it."""

from __future__ import annotations

from pathlib import Path

from pisces.encoders import blip, dual
from pisces.encoders.base import AttentionRefiner, TextFeatures, VideoFeatures, VideoTextEncoder, read_options, resample
from pisces.encoders.blip import BlipEncoder
from pisces.encoders.contract import check_encoder
from pisces.encoders.dual import DualEncoder
from pisces.encoders.internvideo2 import InternVideo2, InternVideo2Config
from pisces.encoders.pretrained import model_type
from pisces.encoders.tiny import TinyEncoder, TinyEncoderConfig

__all__ = [
    "AttentionRefiner",
    "BlipEncoder",
    "DualEncoder",
    "InternVideo2",
    "InternVideo2Config",
    "TextFeatures",
    "TinyEncoder",
    "TinyEncoderConfig",
    "VideoFeatures",
    "VideoTextEncoder",
    "check_encoder",
    "load_encoder",
    "read_options",
    "resample",
]

Encoder = TinyEncoder | InternVideo2 | BlipEncoder | DualEncoder

_KINDS: dict[str, type[Encoder]] = {
    "tiny_encoder": TinyEncoder,
    "internvideo2": InternVideo2,
    **dict.fromkeys(blip.KINDS, BlipEncoder),
    **dict.fromkeys(dual.KINDS, DualEncoder),
}


def load_encoder(path: str | Path) -> Encoder:
    """Load an encoder directory; the `model_type` of its config.json says which class.

    Args:
        path: one of

            - config.json and model.safetensors of a `TinyEncoder`;
            - vocab.txt and the checkpoint of an `InternVideo2`, config.json only where it differs from the official
              one: see `InternVideo2.from_pretrained`;
            - a directory of transformers with a CLIP, SigLIP, SigLIP 2 or X-CLIP (`DualEncoder`, for the quality
              reward) or a BLIP for image-text retrieval (`BlipEncoder`).

    Returns:
        The encoder in eval mode; in float32, but for an InternVideo2 whose config.json says otherwise.

    Raises:
        FileNotFoundError: no such directory, or a file is missing in it.
        ValueError: a model_type that this version does not know, a damaged file, or contents that do not fit; the
            message names the file.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        if (path / "vocab.txt").is_file():
            return InternVideo2.from_pretrained(path)
        raise FileNotFoundError(
            f"load_encoder: {path} has no config.json, expected an encoder directory. "
            "The packaged one is at pisces.world.checkpoint_path('encoder')."
        )
    return _KINDS[model_type(path, "load_encoder", sorted(_KINDS))].from_pretrained(path)

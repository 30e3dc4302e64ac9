"""The form of a reward, and what several rewards of one batch share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from pisces.encoders.base import TextFeatures, VideoFeatures, VideoTextEncoder, check_frames, check_prompts

E = TypeVar("E", bound=VideoTextEncoder)


class Features:
    """A batch of videos with their prompts; each encoder reads it once, however many rewards use that encoder.

    Args:
        frames: [B, T, 3, H, W] in [0, 1].
        prompts: B prompts.

    Raises:
        TypeError, ValueError: frames or prompts are none, or are not as many.
    """

    def __init__(self, frames: Tensor, prompts: Sequence[str]) -> None:
        check_frames(frames, "Reward")
        self.frames, self.prompts = frames, check_prompts(prompts, "Reward")
        if len(self.prompts) != len(frames):
            raise ValueError(
                f"Reward: got {len(self.prompts)} prompts for {len(frames)} videos, expected one prompt a video."
            )
        self._encoded: dict[int, tuple[VideoTextEncoder, TextFeatures, VideoFeatures]] = {}

    def encode(self, encoder: VideoTextEncoder) -> tuple[TextFeatures, VideoFeatures]:
        """Both sides by one encoder; text without gradient, video with."""
        if id(encoder) not in self._encoded:
            with torch.no_grad():
                text = encoder.encode_text(self.prompts)
            # the encoder is kept too: its id may be given to another object once it is gone
            self._encoded[id(encoder)] = (encoder, text, encoder.encode_video(self.frames))
        return self._encoded[id(encoder)][1:]


class Reward(nn.Module):
    """A reward: higher is better, one number a sample that depends on that sample only.

    A subclass defines `score`. A sample with NaN frames has the reward NaN, for the training loop to see.

    Example:
        >>> class Brightness(Reward):
        ...     def score(self, features):
        ...         return features.frames.mean((1, 2, 3, 4))
        >>> Brightness()(torch.ones(2, 1, 3, 8, 8), ["a lamp", "the sun"])
        tensor([1., 1.])
    """

    def score(self, features: Features) -> Tensor:
        """Reward [B] of a batch."""
        raise NotImplementedError(f"{type(self).__name__} defines no score(features). Define it.")

    def forward(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Reward of videos for their prompts.

        Args:
            frames: [B, T, 3, H, W] in [0, 1], any T, H and W.
            prompts: B prompts.

        Returns:
            [B] float.

        Gradient:
            In `frames`.

        Raises:
            TypeError: frames or prompts of another type.
            ValueError: wrong shape, range or number; a prompt without a word.
        """
        return self.score(Features(frames, prompts))


def check_match_head(encoder: VideoTextEncoder, who: str) -> None:
    """Refuse an encoder that cannot say whether a text describes a video.

    Raises:
        ValueError: an encoder without a match head.
    """
    if not getattr(encoder, "has_match_head", True):
        raise ValueError(
            f"{who}: encoder is a {type(encoder).__name__} without a match head, expected one with fusion "
            "layers. Use InternVideo2 or BlipEncoder; this one serves a QualityReward."
        )


def freeze(encoder: E) -> E:
    """The same encoder, in eval mode and without gradients of its parameters."""
    if isinstance(encoder, nn.Module):
        encoder.requires_grad_(False).eval()
    return encoder

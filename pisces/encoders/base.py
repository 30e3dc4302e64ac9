"""What a reward needs of a video-text encoder: tokens, embeddings, a match score with a hook into its attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from pisces_kernels._precision import no_autocast

_PART = 64  # prompts that are read at once when it is asked which are refused
AttentionRefiner = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query [B, Q, D], key [B, M, D], attention [B, H, Q, M], frame_index [M], positions [M, 2], lexical [B, Q] bool)
-> attention [B, H, Q, M]. Called once in every fusion layer for the whole batch; query and key are the projections of
the layer's cross-attention with all heads side by side, attention its probabilities. Rows where `lexical` is False
(special tokens and padding) are to come back as they are."""


@dataclass(frozen=True)
class TextFeatures:
    """Encoded prompts.

    Attributes:
        tokens: [B, N, D] features of the text tower, padding included.
        embedding: [B, E] pooled, projected, L2-normalised.
        mask: [B, N] bool, True for real tokens (special ones included), False for padding.
        lexical: [B, N] bool, True for the words of the prompt only.
    """

    tokens: Tensor
    embedding: Tensor
    mask: Tensor
    lexical: Tensor


@dataclass(frozen=True)
class VideoFeatures:
    """Encoded videos.

    Attributes:
        tokens: [B, M, D] features of the video tower.
        embedding: [B, E] pooled, projected, L2-normalised.
        frame_index: [M] token frame of each token, -1 for a CLS token.
        positions: [M, 2] (y, x) in [0, 1], (-1, -1) for a CLS token.
    """

    tokens: Tensor
    embedding: Tensor
    frame_index: Tensor
    positions: Tensor


class VideoTextEncoder(Protocol):
    """A dual encoder with fusion layers, as InternVideo2 stage 2 has them.

    One without fusion layers and match head has `has_match_head = False`, and its `match` raises: it serves the quality
    reward only. `token_texts(prompts)` is optional: the texts of each prompt's lexical tokens in their order, a list of
    lists. Only `pisces.rewards.explain` asks for it.

    `frame_tensors` is optional, too: names in the `state_dict` of the tensors whose shape depends on `n_frames`, such
    as positions in time. They are left out where `pisces.ot_map.check_alignment` compares encoders of different
    `n_frames`.

    `check_encoder` tries out whether an encoder keeps all of this; docs/encoders.md has a whole one.

    Attributes:
        n_frames: frames that the video tower looks at.
        size: height and width in pixels that it looks at.
        interpolation: "bilinear" or "bicubic", how videos are brought to that size.
        embed_dim: width E of the two embeddings.
    """

    n_frames: int
    size: int
    interpolation: str
    embed_dim: int

    def encode_video(self, frames: Tensor) -> VideoFeatures:
        """Encode frames [B, T, C, H, W] in [0, 1]; any T >= 1, H, W; differentiable and deterministic."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode B prompts; a prompt without a word is a ValueError that names its index."""
        ...

    def match(self, text: TextFeatures, video: VideoFeatures, *, refine: AttentionRefiner | None = None) -> Tensor:
        """Log-odds [B] that text i describes video i; `refine` may change the cross-attention of every layer."""
        ...


def read_options(encoder: VideoTextEncoder) -> dict[str, Any]:
    """Arguments with which `read_video` and its kin give the frames that an encoder would look at.

    Example:
        >>> from pisces.encoders import TinyEncoder, TinyEncoderConfig
        >>> read_options(TinyEncoder(TinyEncoderConfig(vocabulary=("[pad]", "[unk]", "[sep]", "dot"), width=16)))
        {'n_frames': 9, 'size': 32, 'interpolation': 'bilinear'}
    """
    return {"n_frames": encoder.n_frames, "size": encoder.size, "interpolation": encoder.interpolation}


def resample(frames: Tensor, n_frames: int, size: int, *, mode: str = "bilinear") -> Tensor:
    """Bring videos to the frame count and size that an encoder wants, without randomness.

    Time: the frames in the middle of n_frames equal parts, floor((i + 1/2) T / n_frames). Space: the short side becomes
    `size` by antialiased interpolation, then the centre is cut out, so shapes keep their proportions. `read_video` does
    the same with a file, so that a video has the same reward before it is written and after it is read.

    Args:
        frames: [B, T, C, H, W], floating point.
        n_frames: frames wanted, at least 1.
        size: height and width wanted, at least 1.
        mode: interpolation, "bilinear" or "bicubic"; what the latter overshoots [0, 1] at edges is cut off.

    Returns:
        [B, n_frames, C, size, size]; `frames` itself where it already has that shape.

    Gradient:
        Reaches every frame that is looked at and every pixel inside the centre square, but where values are cut off.

    Raises:
        ValueError: not five dimensions, or an empty one.

    Example:
        >>> resample(torch.rand(1, 5, 3, 48, 64), 9, 32).shape
        torch.Size([1, 9, 3, 32, 32])
    """
    if frames.dim() != 5 or frames.numel() == 0:
        raise ValueError(
            f"resample: frames has shape {tuple(frames.shape)}, expected five dimensions (B, T, C, H, W), none "
            "empty. Add the batch dimension with frames[None]."
        )
    frames = pick_frames(frames, n_frames)
    b, _, _, h, w = frames.shape
    if (h, w) != (size, size):
        scale = size / min(h, w)
        h, w = max(size, round(h * scale)), max(size, round(w * scale))
        flat = rearrange(frames, "b t c h w -> (b t) c h w")
        flat = F.interpolate(flat, size=(h, w), mode=mode, antialias=True, align_corners=False)
        top, left = (h - size) // 2, (w - size) // 2
        frames = rearrange(flat[..., top : top + size, left : left + size], "(b t) c h w -> b t c h w", b=b)
        if mode == "bicubic":
            frames = frames.clamp(0.0, 1.0)
    return frames


def pick_frames(frames: Tensor, n_frames: int) -> Tensor:
    """The frames of [B, T, C, H, W] in the middle of n_frames equal parts; `frames` itself where T is n_frames."""
    t = frames.shape[1]
    if t == n_frames:
        return frames
    index = [(2 * i + 1) * t // (2 * n_frames) for i in range(n_frames)]
    # not frames[:, index]: its backward adds in an order that depends on the threads
    return frames.index_select(1, torch.tensor(index, device=frames.device))


def check_frames(frames: Tensor, who: str) -> None:
    """Refuse what is no batch of videos with three colour channels in [0, 1].

    The range is checked with a tolerance of 0.05: a video decoder overshoots a little, a video in [-1, 1] or [0, 255]
    does not pass. NaN passes, so that one broken sample breaks its own reward only and the training loop can skip the
    step. This reads two numbers back from the device.

    Args:
        frames: what the caller passed.
        who: name for the message.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong shape or out of range.
    """
    if not isinstance(frames, Tensor) or not frames.is_floating_point():
        got = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"{who}: frames is {got}, expected a floating-point tensor in [0, 1]. Divide uint8 by 255.")
    if frames.dim() != 5 or frames.shape[2] != 3 or frames.numel() == 0:
        raise ValueError(
            f"{who}: frames has shape {tuple(frames.shape)}, expected (B, T, 3, H, W), none empty. "
            "Add the batch dimension with frames[None]; channels come third."
        )
    low, high = (float(x) for x in torch.aminmax(frames.detach()))
    if low < -0.05 or high > 1.05:  # False for NaN
        raise ValueError(
            f"{who}: frames reach from {low:.3g} to {high:.3g}, expected [0, 1]. "
            "Map [-1, 1] by (frames + 1) / 2 and uint8 by frames / 255."
        )


def unit(x: Tensor) -> Tensor:
    """x [..., E] scaled to length 1, in float32 where it came in 16 bits: rewards differ in digits that those lack."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def log_odds(head: nn.Linear, x: Tensor) -> Tensor:
    """What a match head says of x [B, D], in float32 where it came in 16 bits, also inside torch.autocast.

    Args:
        head: one logit, or those of no match and of a match.
        x: [B, D] features.

    Returns:
        [B], the one logit, or the second minus the first.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x.device.type):
        logits = F.linear(x.to(wide), head.weight.to(wide), head.bias.to(wide))
    return logits[:, 0] if head.out_features == 1 else logits[:, 1] - logits[:, 0]


def check_pairs(text: TextFeatures, video: VideoFeatures, who: str) -> None:
    """Refuse texts and videos that are not as many: row i is scored against row i.

    Raises:
        ValueError: different batch sizes.
    """
    if len(text.tokens) != len(video.tokens):
        raise ValueError(
            f"{who}: got {len(text.tokens)} texts and {len(video.tokens)} videos, expected as many of each: row i is "
            "scored against row i."
        )


def check_prompts(prompts: Sequence[str], who: str) -> list[str]:
    """The prompts as a list; a bare string and an empty prompt are refused.

    Raises:
        TypeError: a bare string, or an entry that is no string.
        ValueError: no prompts, or one without a visible character.
    """
    if isinstance(prompts, str):
        raise TypeError(f"{who}: prompts is one string, expected a list of strings. Pass [prompt].")
    prompts = list(prompts)
    if not prompts:
        raise ValueError(f"{who}: prompts is empty, expected at least one.")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"{who}: prompts[{i}] is {type(prompt).__name__}, expected a string.")
        if not prompt.strip():
            raise ValueError(f"{who}: prompts[{i}] is empty, expected at least one word. Remove or fill it.")
    return prompts


def refused_prompts(encoder: VideoTextEncoder, prompts: Sequence[str]) -> dict[int, str]:
    """Which prompts an encoder refuses, and why: one caption without a word is no reason to lose a whole batch.

    They are read as tokens where the encoder names them, else encoded; each is tried alone only where a part raises.

    Args:
        encoder: which raises a ValueError for a prompt without a word.
        prompts: any number.

    Returns:
        Index -> reason, of the refused ones; empty if there are none.

    Raises:
        ValueError: what the encoder raises, if that is not about single prompts: it refuses any, or none of them alone.

    Example:
        >>> from pisces.encoders import load_encoder
        >>> from pisces.world import checkpoint_path
        >>> list(refused_prompts(load_encoder(checkpoint_path("encoder")), ["a red square", "!!!"]))
        [1]
    """
    reasons: dict[int, str] = {}
    for start in range(0, len(prompts), _PART):
        part = list(prompts[start : start + _PART])
        error = _refusal(encoder, part)
        if error is None:
            continue
        found = {start + i: why for i, prompt in enumerate(part) if (why := _refusal(encoder, [prompt])) is not None}
        if not found or _refusal(encoder, ["a video"]) is not None:
            raise error
        # alone a prompt has the number 0, which would mislead
        reasons |= {i: str(why).replace("prompts[0]", "the prompt") for i, why in found.items()}
    return reasons


@torch.no_grad()
def _refusal(encoder: VideoTextEncoder, prompts: list[str]) -> ValueError | None:
    """What the encoder raises for these prompts, if it does."""
    read = getattr(encoder, "token_texts", None) or encoder.encode_text
    try:
        with warnings.catch_warnings(action="ignore"):  # that a prompt is cut is said when it is used
            read(prompts)
    except ValueError as error:
        return error
    return None

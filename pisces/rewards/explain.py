"""Why a video got its semantic reward: which video tokens each word was matched to, in every fusion layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from pisces.encoders.base import VideoTextEncoder
from pisces.rewards.base import Features, check_match_head
from pisces.rewards.semantic import Transport, TransportRefiner


@dataclass(frozen=True)
class Explanation:
    """What the fusion layers did with the words of B prompts.

    L fusion layers, H heads (1 where they were averaged), W words of the longest prompt, M video tokens. Rows beyond
    the words of a shorter prompt are zero.

    Attributes:
        words: of each prompt, the texts of its words (the encoder's lexical tokens).
        plan: [B, L, H, W, M] transport plans before their rows are normalised: the words of one (sample, layer, head)
            together have the transported mass. None without transport.
        attention: [B, L, H, W, M] attention before the fusion with the plan. From the second layer on it has been
            changed by the fusion in the layers before.
        refined: [B, L, H, W, M] attention after it; the same without transport.
        frame_index: [M] token frame of each video token, -1 for a CLS token.
        positions: [M, 2] (y, x) in [0, 1], (-1, -1) for a CLS token.
        match: [B] probability of a match without transport.
        refined_match: [B] the same with transport, if there is any.
    """

    words: list[list[str]]
    plan: Tensor | None
    attention: Tensor
    refined: Tensor
    frame_index: Tensor
    positions: Tensor
    match: Tensor
    refined_match: Tensor

    def on_grid(self, values: Tensor) -> Tensor:
        """Lay what belongs to video tokens out as pictures: one a token frame, a patch a pixel.

        Args:
            values: [..., M] such as `plan`.

        Returns:
            [..., T, rows, cols]. CLS tokens have no place and are left out.

        Example:
            >>> from pisces.encoders import TinyEncoder, TinyEncoderConfig
            >>> encoder = TinyEncoder(TinyEncoderConfig(vocabulary=("[pad]", "[unk]", "[sep]", "dot"), width=16))
            >>> found = explain(encoder, torch.rand(1, 9, 3, 32, 32), ["a dot"])
            >>> found.on_grid(found.attention).shape
            torch.Size([1, 2, 1, 2, 4, 4, 4])
        """
        placed = self.frame_index >= 0
        indices = [
            torch.unique(axis[placed], return_inverse=True)
            for axis in (self.frame_index, self.positions[:, 0], self.positions[:, 1])
        ]
        grid = values.new_zeros(*values.shape[:-1], *(len(names) for names, _ in indices))
        t, y, x = (index for _, index in indices)
        grid[..., t, y, x] = values[..., placed]
        return grid


class _Recorder:
    """An `AttentionRefiner` that keeps the words' rows of everything it sees."""

    def __init__(self, transport: Transport | None, lexical: Tensor, per_head: bool) -> None:
        self.refiner = None if transport is None else TransportRefiner(transport)
        self.per_head = per_head
        # the words of each prompt first, in their order, whatever special tokens and padding stand between
        self.order = lexical.int().argsort(dim=1, descending=True, stable=True)[:, : int(lexical.sum(1).max())]
        self.real = lexical.gather(1, self.order)  # [B, W]
        self.plans: list[Tensor] = []
        self.attentions: list[Tensor] = []
        self.refined: list[Tensor] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        attention: Tensor,
        frame_index: Tensor,
        positions: Tensor,
        lexical: Tensor,
    ) -> Tensor:
        """Refined attention [B, H, Q, M]."""
        refined = attention
        if self.refiner is not None:
            refined, plan = self.refiner.with_plan(query, key, attention, frame_index, positions, lexical)
            self.plans.append(self._words(plan))
        self.attentions.append(self._words(attention))
        self.refined.append(self._words(refined))
        return refined

    def _words(self, values: Tensor) -> Tensor:
        """[B parts, H, Q, m] -> [B, H, W, M], M = parts m: frames that were matched one by one stand side by side."""
        if not self.per_head:
            values = values.mean(1, keepdim=True)
        b = len(self.order)
        parts = len(values) // b
        # rows sum to 1 over all parts together
        values = rearrange(values, "(b parts) h q m -> b h q (parts m)", b=b) / parts
        rows = self.order[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
        return torch.where(self.real[:, None, :, None], values.gather(2, rows), 0.0)


@torch.no_grad()
def explain(
    encoder: VideoTextEncoder,
    frames: Tensor,
    prompts: Sequence[str],
    transport: Transport | None = None,
    *,
    per_head: bool = False,
) -> Explanation:
    """Record plan and attention of every word in every fusion layer while the match head reads videos.

    An encoder that matches frame by frame (BLIP) has one plan a frame; they stand side by side, each with the weight
    1 / frames, so that a row of attention sums to 1 as elsewhere.

    Args:
        encoder: with a match head and `token_texts`.
        frames: [B, T, 3, H, W] in [0, 1].
        prompts: B prompts of any lengths.
        transport: settings, `Transport()` for those of the reward; None leaves the attention as it is, without a plan.
        per_head: keep the heads apart. They are averaged otherwise: with InternVideo2's 16 heads, 5 layers, 60 words
            and 2,049 tokens all heads are 39 MB a sample and tensor, their mean is 2.5 MB.

    Returns:
        `Explanation`, without gradient, on the device of the encoder.

    Raises:
        TypeError: an encoder that does not name its tokens; frames or prompts of another type.
        ValueError: an encoder without a match head, or what a reward refuses.

    Example:
        >>> from pisces.encoders import TinyEncoder, TinyEncoderConfig
        >>> encoder = TinyEncoder(TinyEncoderConfig(vocabulary=("[pad]", "[unk]", "[sep]", "red", "dot"), width=16))
        >>> found = explain(encoder, torch.rand(2, 9, 3, 32, 32), ["a red dot", "dot"], Transport())
        >>> found.words
        [['a', 'red', 'dot'], ['dot']]
        >>> found.plan.shape
        torch.Size([2, 2, 1, 3, 64])

    Source:
        PISCES (arXiv 2602.01624), the token-level reward: what its plans are drawn of.
    """
    check_match_head(encoder, "explain")
    name_tokens = getattr(encoder, "token_texts", None)
    if name_tokens is None:
        raise TypeError(
            f"explain: encoder is a {type(encoder).__name__} without token_texts, expected one that names its words. "
            "Define token_texts(prompts), the texts of each prompt's lexical tokens."
        )
    features = Features(frames, prompts)
    text, video = features.encode(encoder)
    recorder = _Recorder(transport, text.lexical, per_head)
    refined_logit = encoder.match(text, video, refine=recorder)
    return Explanation(
        words=name_tokens(features.prompts),
        plan=torch.stack(recorder.plans, dim=1) if recorder.plans else None,
        attention=torch.stack(recorder.attentions, dim=1),
        refined=torch.stack(recorder.refined, dim=1),
        frame_index=video.frame_index,
        positions=video.positions,
        match=encoder.match(text, video).sigmoid(),
        refined_match=refined_logit.sigmoid(),
    )

"""The semantic reward: the match head, the cross-attention of its words refined by partial optimal transport."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pisces.encoders.base import VideoTextEncoder
from pisces.rewards.base import Features, Reward, check_match_head, freeze
from pisces_kernels import transport_attention

FLOOR = 1e-6  # what is added to attention and plan before their logarithms are taken
ROWS = ("normalized", "mass")


@dataclass(frozen=True)
class Transport:
    """Settings of the partial transport between words and video tokens.

    Attributes:
        epsilon: entropic regularisation, of a cost in [0, 1].
        tau: rho / (rho + epsilon) in (0, 1], strength with which both marginals are kept; 1 is balanced. The paper's
            released code calls it m.
        mass: transported mass in (0, 1] instead of `tau`, as the paper's formula has it; None uses `tau`.
        max_iters: most iterations of the solver.
        tol: largest change of a log-scaling at which it stops.
        gamma: weight of the distance in time.
        eta: weight of the distance in space.
        rows: "normalized" scales each word's row of the plan to sum 1 before it is fused with the attention, as the
            released code does; "mass" fuses the plan as it is, so that a word which moves little mass is refined less.
        differentiable_plan: gradients also run through the plan, to words, video tokens and attention; else the plan
            is a constant.

    Raises:
        ValueError: a setting out of its range, or `mass` beside another `tau` than the default, which it replaces.

    Source:
        PISCES (arXiv 2602.01624), the token-level reward: epsilon 0.05, m 0.9, gamma = eta = 0.2.
    """

    epsilon: float = 0.05
    tau: float = 0.9
    mass: float | None = None
    max_iters: int = 200
    tol: float = 1e-3
    gamma: float = 0.2
    eta: float = 0.2
    rows: str = "normalized"
    differentiable_plan: bool = False

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("epsilon", 0 < self.epsilon < math.inf, "a finite number above 0"),
            ("tau", 0 < self.tau <= 1, "a number in (0, 1]; 1 is balanced"),
            ("mass", self.mass is None or 0 < self.mass <= 1, "a number in (0, 1], or None to use tau"),
            ("max_iters", self.max_iters >= 1, "at least 1"),
            ("tol", self.tol >= 0, "at least 0"),
            ("gamma", 0 <= self.gamma < math.inf, "a finite number of at least 0"),
            ("eta", 0 <= self.eta < math.inf, "a finite number of at least 0"),
            ("rows", self.rows in ROWS, " or ".join(map(repr, ROWS))),
        ):
            if not fits:
                raise ValueError(f"Transport: {name} is {getattr(self, name)!r}, expected {wanted}.")
        if self.mass is not None and self.tau != type(self).tau:
            raise ValueError(
                f"Transport: mass is {self.mass} and tau {self.tau}, expected one of them: with an exact mass there is "
                "no damping. Leave out tau."
            )


class TransportRefiner:
    """An `AttentionRefiner`: attention of the words fused with a transport plan, the whole batch in one call.

        softmax_j(log(A + 1e-6) + log(P + 1e-6)),  P the plan, its rows normalised to 1 or as they are

    Gradients run through the attention, and through the plan where the settings ask for it. Rows of special tokens and
    padding come back unchanged.

    Args:
        transport: settings.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        settings = asdict(transport)
        self.weighted = settings.pop("rows") == "mass"
        self.settings = settings

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
        if self.weighted:
            return self.with_plan(query, key, attention, frame_index, positions, lexical)[0]
        return transport_attention(query, key, attention, frame_index, positions, row_mask=lexical, **self.settings)

    def with_plan(
        self,
        query: Tensor,
        key: Tensor,
        attention: Tensor,
        frame_index: Tensor,
        positions: Tensor,
        lexical: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The same, and the plan [B, H, Q, M] before its rows are normalised; zero where `lexical` is False."""
        refined, plan = transport_attention(
            query, key, attention, frame_index, positions, row_mask=lexical, return_plan=True, **self.settings
        )
        if self.weighted:
            prior = plan if self.transport.differentiable_plan else plan.detach()
            wide = attention.to(plan.dtype)
            fused = ((wide + FLOOR).log() + (prior + FLOOR).log()).softmax(-1)
            refined = torch.where(lexical[:, None, :, None], fused.to(attention.dtype), attention)
        return refined, plan


class SemanticReward(Reward):
    """reward = log P(match) of the encoder's match head.

    Args:
        encoder: its parameters are frozen here.
        transport: settings of the partial transport in every fusion layer; None leaves the attention as it is.
        log: log-probability; False gives the probability itself, as the paper has it. Its gradient vanishes for videos
            that do not match at all, the logarithm's does not.

    Raises:
        ValueError: an encoder without a match head.

    Source:
        PISCES (arXiv 2602.01624), the discrete token-level partial-OT reward.
    """

    def __init__(self, encoder: VideoTextEncoder, *, transport: Transport | None = None, log: bool = True) -> None:
        super().__init__()
        check_match_head(encoder, "SemanticReward")
        self.encoder = freeze(encoder)
        self.transport = transport
        self.log = log

    def score(self, features: Features) -> Tensor:
        """Log-probability [B] <= 0, or probability in [0, 1]."""
        text, video = features.encode(self.encoder)
        refine = TransportRefiner(self.transport) if self.transport is not None else None
        logit = self.encoder.match(text, video, refine=refine)
        return F.logsigmoid(logit) if self.log else logit.sigmoid()


def _uniform(
    query: Tensor, key: Tensor, attention: Tensor, frame_index: Tensor, positions: Tensor, lexical: Tensor
) -> Tensor:
    """Every word looks everywhere alike."""
    return torch.where(lexical[:, None, :, None], 1 / attention.shape[-1], attention)


@torch.no_grad()
def leverage(
    encoder: VideoTextEncoder,
    frames: Tensor,
    prompts: Sequence[str],
    transport: Transport | None = None,
    *,
    batch_size: int = 32,
) -> dict[str, float]:
    """How far the attention of the words can move the match score at all.

    If even uniform attention hardly moves it, no refinement of the attention can help or harm this encoder's reward.

    Args:
        encoder: the encoder of a `SemanticReward`.
        frames: [B, T, 3, H, W] in [0, 1], B >= 2.
        prompts: B prompts.
        transport: settings; None is `Transport()`.
        batch_size: videos encoded at once.

    Returns:
        logit_std: standard deviation of the log-odds over the batch, to compare with.
        partial_ot: mean |change of the log-odds| when partial transport refines the attention.
        uniform: the same when the words' attention is replaced by uniform attention.

    Raises:
        ValueError: fewer than two videos, an encoder without a match head, or what a reward refuses.

    Example:
        >>> from pisces.encoders import TinyEncoder, TinyEncoderConfig
        >>> encoder = TinyEncoder(TinyEncoderConfig(vocabulary=("[pad]", "[unk]", "[sep]", "dot"), width=16))
        >>> sorted(leverage(encoder, torch.rand(3, 9, 3, 32, 32), ["dot"] * 3))
        ['logit_std', 'partial_ot', 'uniform']
    """
    check_match_head(encoder, "leverage")
    features = Features(frames, prompts)
    if len(frames) < 2:
        raise ValueError("leverage: got one video, expected at least two for a standard deviation.")
    if batch_size < 1:
        raise ValueError(f"leverage: batch_size is {batch_size}, expected at least 1.")
    refine = TransportRefiner(transport or Transport())
    logits = []
    for i in range(0, len(frames), batch_size):
        text, video = Features(frames[i : i + batch_size], features.prompts[i : i + batch_size]).encode(encoder)
        logits.append(torch.stack([encoder.match(text, video, refine=how) for how in (None, refine, _uniform)]))
    plain, refined, uniform = torch.cat(logits, dim=1)
    return {
        "logit_std": float(plain.std()),
        "partial_ot": float((refined - plain).abs().mean()),
        "uniform": float((uniform - plain).abs().mean()),
    }

"""The quality reward: how near a video lies to where real videos of its prompt lie."""

from __future__ import annotations

from torch import Tensor

from pisces.encoders.base import VideoTextEncoder
from pisces.ot_map.alignment import Alignment
from pisces.ot_map.encoder_digest import check_alignment
from pisces.rewards.base import Features, Reward, freeze


class QualityReward(Reward):
    """reward = cos(text embedding, video embedding), both aligned.

    With a Neural OT alignment it is the paper's cos(T(y), x); without one, the plain similarity of the encoder.

    Args:
        encoder: its parameters are frozen here.
        alignment: fitted with the embeddings of this encoder; None leaves them as they are. Its info is compared
            with the encoder, which reads all weights once: `pisces.ot_map.check_alignment`.

    Warns:
        UserWarning: the alignment's file does not say which encoder it was fitted with.

    Raises:
        ValueError: the alignment was fitted with another encoder, or is of another width.

    Source:
        PISCES (arXiv 2602.01624), the distributional OT-aligned reward.
    """

    def __init__(self, encoder: VideoTextEncoder, alignment: Alignment | None = None) -> None:
        super().__init__()
        self.encoder = freeze(encoder)
        self.alignment = (alignment or Alignment("none")).requires_grad_(False).eval()
        check_alignment(self.alignment, encoder, "QualityReward")

    def score(self, features: Features) -> Tensor:
        """Cosine [B] in [-1, 1]."""
        text, video = features.encode(self.encoder)
        return (self.alignment.text(text.embedding) * self.alignment.video(video.embedding)).sum(-1)

"""Embeddings of the demo's folders. How they are batched is part of its figures: a trained map amplifies rounding."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from pisces.data import CaptionedVideos
from pisces.encoders import VideoTextEncoder


@torch.no_grad()
def embed_videos(
    encoder: VideoTextEncoder, videos: CaptionedVideos, *, batch_size: int = 32, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Embed every caption and every video of a folder.

    Args:
        encoder: the encoder of the quality reward.
        videos: n captioned videos, of one size or not.
        batch_size: captions encoded at once; videos are encoded one by one, as they may differ in size.
        progress: show a progress bar.

    Returns:
        (text [n, E], video [n, E]), L2-normalised, row i of both from item i.
    """
    captions = videos.captions
    text = [
        encoder.encode_text(captions[start : start + batch_size]).embedding
        for start in range(0, len(captions), batch_size)
    ]
    bar = tqdm(
        range(len(videos)), desc="embedding videos", unit="video", disable=None if progress else True, leave=False
    )
    video = [encoder.encode_video(videos[i][0][None]).embedding for i in bar]
    return torch.cat(text), torch.cat(video)

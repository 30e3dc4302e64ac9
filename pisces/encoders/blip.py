"""BLIP's image-text matching of transformers, frame by frame, with the hook into its cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from pisces.encoders.attention import cross_attention
from pisces.encoders.base import AttentionRefiner, TextFeatures, VideoFeatures, check_pairs, log_odds, unit
from pisces.encoders.pretrained import Pixels, Words, load_model, load_pixels, load_tokenizer, model_type, read_prompts
from pisces.tokens import TokenGrid

KINDS = ("blip",)
"""model_types that a `BlipEncoder` reads."""


class BlipEncoder(nn.Module):
    """BLIP for image-text retrieval; it implements `VideoTextEncoder`. It sees frames, and no motion.

        embedding = N(mean over frames of N(image embedding)),  log-odds = mean over frames of those of the frame

    Args:
        model: BlipForImageTextRetrieval.
        tokenizer: of the model; None leaves the text side without words.
        pixels: what the model wants frames to be; None is CLIP's mean and deviation, which BLIP has, at its size.
        n_frames: frames that are looked at.

    Example:
        >>> from transformers import BlipConfig, BlipForImageTextRetrieval
        >>> tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> config = BlipConfig(
        ...     text_config={**tower, "encoder_hidden_size": 8, "vocab_size": 9}, image_text_hidden_size=4,
        ...     vision_config={**tower, "image_size": 16, "patch_size": 8},
        ... )
        >>> encoder = BlipEncoder(BlipForImageTextRetrieval(config), n_frames=3)
        >>> encoder.encode_video(torch.rand(2, 5, 3, 20, 30)).tokens.shape
        torch.Size([2, 15, 8])

    Source:
        BLIP (arXiv 2201.12086).
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, pixels: Pixels | None = None, n_frames: int = 8
    ) -> None:
        super().__init__()
        vision = model.config.vision_config
        self.model, self.tokenizer, self.pixels = model, tokenizer, pixels or Pixels(vision.image_size)
        self.n_frames, self.size = n_frames, self.pixels.size
        self.embed_dim = model.config.image_text_hidden_size
        side = vision.image_size // vision.patch_size
        self.frame = TokenGrid(1, side, side, cls=True)

    @property
    def interpolation(self) -> str:
        """How videos are brought to `size`: as the image processor does it."""
        return self.pixels.mode

    def encode_video(self, frames: Tensor) -> VideoFeatures:
        """Encode videos of any length and size.

        Args:
            frames: [B, T, 3, H, W] in [0, 1]; brought to `n_frames` and `size` by `resample`.

        Returns:
            `VideoFeatures` with M = n_frames (1 + patches of a frame), each frame's CLS token before its patches.

        Raises:
            ValueError: not five dimensions or not three channels.
        """
        x = self.pixels.prepare(frames, self.n_frames, self.model.dtype, "BlipEncoder.encode_video")
        features = self.model.vision_model(rearrange(x, "b t c h w -> (b t) c h w")).last_hidden_state
        features = rearrange(features, "(b t) m d -> b t m d", t=self.n_frames)
        images = unit(self.model.vision_proj(features[:, :, 0]))  # [B, T, E]
        one = self.frame.frame_index().to(x.device)  # -1 for CLS, 0 for the patches
        later = torch.arange(self.n_frames, device=x.device)[:, None]
        index = torch.where(one < 0, one, one + later).flatten()
        positions = self.frame.positions().to(x.device).repeat(self.n_frames, 1)
        return VideoFeatures(rearrange(features, "b t m d -> b (t m) d"), unit(images.mean(1)), index, positions)

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts.

        The tokens are the embedded words, with which the match begins; the embedding is that of the text alone.

        Raises:
            ValueError: a prompt without a word, or an encoder without a tokenizer.
        """
        text, words = self.model.text_encoder, self._read(prompts, "BlipEncoder.encode_text")
        x = tokens = text.embeddings(words.ids)
        for layer in text.encoder.layer:
            x = layer(x, attention_mask=_additive(words.mask, x))
        return TextFeatures(tokens, unit(self.model.text_proj(x[:, 0])), words.mask, words.lexical)

    def token_texts(self, prompts: Sequence[str]) -> list[list[str]]:
        """The tokens of each prompt as the tokenizer writes them, without the special ones."""
        words = self._read(prompts, "BlipEncoder.token_texts")
        return [
            self.tokenizer.convert_ids_to_tokens(ids[lexical].tolist())
            for ids, lexical in zip(words.ids, words.lexical, strict=True)
        ]

    def _read(self, prompts: Sequence[str], who: str) -> Words:
        return read_prompts(
            self.tokenizer,
            prompts,
            max_tokens=self.model.text_encoder.config.max_position_embeddings,
            full=False,
            device=self.model.device,
            who=who,
        )

    def match(self, text: TextFeatures, video: VideoFeatures, *, refine: AttentionRefiner | None = None) -> Tensor:
        """Log-odds that each text describes its video: the mean of `match_frames` over the frames.

        Args:
            text: B encoded prompts.
            video: B encoded videos.
            refine: see `match_frames`.

        Returns:
            [B] log-odds of a match; float32 at least.

        Raises:
            ValueError: different batch sizes.
        """
        return self.match_frames(text, video, refine=refine).mean(1)

    def match_frames(
        self, text: TextFeatures, video: VideoFeatures, *, refine: AttentionRefiner | None = None
    ) -> Tensor:
        """Log-odds that each text describes each frame of its video; their least, `.amin(1)`, is the worst frame's.

        Args:
            text: B encoded prompts.
            video: B encoded videos.
            refine: called once in every layer, with the frames of all videos as its batch of B n_frames: a plan
                connects words with one frame, as the cross-attention does. None leaves the attention as it is.

        Returns:
            [B, n_frames] log-odds of a match, in the order of the frames; float32 at least.

        Raises:
            ValueError: different batch sizes.
        """
        check_pairs(text, video, "BlipEncoder.match")
        n_frames = video.tokens.shape[1] // self.frame.n_tokens
        images = rearrange(video.tokens, "b (t m) d -> (b t) m d", t=n_frames)
        x, mask, lexical = (
            repeat(part, "b ... -> (b t) ...", t=n_frames) for part in (text.tokens, text.mask, text.lexical)
        )
        index, positions = video.frame_index[: self.frame.n_tokens], video.positions[: self.frame.n_tokens]
        additive = _additive(mask, x)
        for layer in self.model.text_encoder.encoder.layer:
            x = layer.attention(x, attention_mask=additive)[0]
            cross = layer.crossattention
            context = cross_attention(
                cross.self, cross.self.num_attention_heads, x, images, index, positions, lexical, refine
            )
            x = layer.feed_forward_chunk(cross.output(context, x))
        return rearrange(log_odds(self.model.itm_head, x[:, 0]), "(b t) -> b t", t=n_frames)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, n_frames: int = 8, dtype: torch.dtype = torch.float32) -> BlipEncoder:
        """Load a local directory of transformers, such as blip-itm-base-coco, in eval mode; nothing is downloaded.

        Args:
            path: directory with the model, its tokenizer and its image processor.
            n_frames: see the class.
            dtype: of the parameters.

        Raises:
            FileNotFoundError: a file is missing there.
            ValueError: another kind of model, one without a match head, a damaged file, or tensors that are missing or
                have another shape; they are named.
        """
        who = "BlipEncoder.from_pretrained"
        model_type(path, who, KINDS)
        from transformers import BlipForImageTextRetrieval

        wanted = "a model for image-text retrieval such as blip-itm-base-coco"
        model = load_model(BlipForImageTextRetrieval, path, who, dtype=dtype, wanted=wanted)
        tokenizer = load_tokenizer(path, who)
        pixels = load_pixels(path, model.config.vision_config.image_size, who)
        return cls(model, tokenizer, pixels=pixels, n_frames=n_frames).eval()


def _additive(mask: Tensor, x: Tensor) -> Tensor:
    """What BLIP adds to its scores, [B, 1, 1, N]: nothing for a word, the least number for padding."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(mask[:, None, None], zero, torch.finfo(x.dtype).min)

"""CLIP, SigLIP, SigLIP 2 and X-CLIP of transformers as encoders of the quality reward: embeddings, no match head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from pisces.encoders.base import AttentionRefiner, TextFeatures, VideoFeatures, check_prompts, unit
from pisces.encoders.pretrained import Pixels, load_model, load_pixels, load_tokenizer, model_type, read_prompts
from pisces.tokens import TokenGrid

KINDS = ("clip", "siglip", "siglip2", "xclip")
"""model_types that a `DualEncoder` reads. The SigLIP 2 checkpoints of one resolution are of the type siglip."""


class DualEncoder(nn.Module):
    """A contrastive text-image or text-video model of transformers; `VideoTextEncoder` without its match head.

        video embedding = N(mean over frames of N(image embedding)),  N(x) = x / |x|

    X-CLIP has a video embedding of its own and is read as it is; its text embedding is the plain one, without the part
    that depends on the video.

    Args:
        model: CLIPModel, SiglipModel, Siglip2Model or XCLIPModel.
        tokenizer: of the model; None leaves the text side without words.
        pixels: what the model wants frames to be; None is CLIP's mean and deviation at the model's size.
        n_frames: frames that are looked at. X-CLIP has its own number.

    Raises:
        ValueError: another kind of model, or another number of frames than X-CLIP's.

    Example:
        >>> from transformers import CLIPConfig, CLIPModel
        >>> tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> vision = {**tower, "image_size": 16, "patch_size": 8}
        >>> encoder = DualEncoder(CLIPModel(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=4)))
        >>> encoder.encode_video(torch.rand(2, 5, 3, 20, 30)).embedding.shape
        torch.Size([2, 4])

    Source:
        CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343), SigLIP 2 (arXiv 2502.14786), X-CLIP (arXiv 2208.02816).
    """

    has_match_head = False

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, pixels: Pixels | None = None, n_frames: int | None = None
    ) -> None:
        super().__init__()
        self.kind = model.config.model_type
        if self.kind not in KINDS:
            raise ValueError(f"DualEncoder: model is of the type {self.kind!r}, expected one of {list(KINDS)}.")
        vision, text = model.config.vision_config, model.config.text_config
        own = vision.num_frames if self.kind == "xclip" else None
        if own is not None and n_frames not in (None, own):
            raise ValueError(f"DualEncoder: n_frames is {n_frames}, expected {own}, the number of this X-CLIP.")
        if self.kind == "siglip2":
            self.side = round(vision.num_patches**0.5)
            size = self.side * vision.patch_size
        else:
            size = vision.image_size
        self.model, self.tokenizer, self.pixels = model, tokenizer, pixels or Pixels(size)
        self.n_frames, self.size = own or n_frames or 8, self.pixels.size
        self.embed_dim = text.projection_size if self.kind.startswith("siglip") else model.config.projection_dim

    @property
    def interpolation(self) -> str:
        """How videos are brought to `size`: as the image processor does it."""
        return self.pixels.mode

    def encode_video(self, frames: Tensor) -> VideoFeatures:
        """Encode videos of any length and size.

        Args:
            frames: [B, T, 3, H, W] in [0, 1]; brought to `n_frames` and `size` by `resample`.

        Returns:
            `VideoFeatures` whose tokens [B, n_frames, D] are one a frame: image embeddings, or X-CLIP's features of a
            frame.

        Raises:
            ValueError: not five dimensions or not three channels.
        """
        x = self.pixels.prepare(frames, self.n_frames, self.model.dtype, "DualEncoder.encode_video")
        grid = TokenGrid(self.n_frames, 1, 1)
        place = (grid.frame_index().to(x.device), grid.positions().to(x.device))
        if self.kind == "xclip":
            output = self.model.get_video_features(x)
            tokens = rearrange(output.last_hidden_state[:, 0], "(b t) d -> b t d", t=self.n_frames)
            return VideoFeatures(tokens, unit(output.pooler_output), *place)
        images = rearrange(x, "b t c h w -> (b t) c h w")
        if self.kind == "siglip2":
            output = self.model.get_image_features(**self._patches(images))
        else:
            output = self.model.get_image_features(images)
        tokens = rearrange(unit(output.pooler_output), "(b t) d -> b t d", t=self.n_frames)
        return VideoFeatures(tokens, unit(tokens.mean(1)), *place)

    def _patches(self, images: Tensor) -> dict[str, Tensor]:
        """[n, 3, S, S] as SigLIP 2 takes images of any proportions: rows of patches, channels last in each."""
        n, side = len(images), self.side
        return {
            "pixel_values": rearrange(images, "n c (i p) (j q) -> n (i j) (p q c)", i=side, j=side),
            "pixel_attention_mask": torch.ones(n, side * side, dtype=torch.long, device=images.device),
            "spatial_shapes": torch.full((n, 2), side, dtype=torch.long, device=images.device),
        }

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts as the model was trained to read them; longer ones are cut with a warning.

        Raises:
            ValueError: a prompt without a word, or an encoder without a tokenizer.
        """
        siglip = self.kind.startswith("siglip")
        if siglip:  # trained on small letters, which not every tokenizer makes of the others
            prompts = [prompt.lower() for prompt in check_prompts(prompts, "DualEncoder.encode_text")]
        words = read_prompts(
            self.tokenizer,
            prompts,
            max_tokens=self.model.config.text_config.max_position_embeddings,
            full=siglip,
            device=self.model.device,
            who="DualEncoder.encode_text",
        )
        # SigLIP was trained to look at its padding
        attended = {} if siglip else {"attention_mask": words.mask.long()}
        output = self.model.get_text_features(words.ids, **attended)
        return TextFeatures(output.last_hidden_state, unit(output.pooler_output), words.mask, words.lexical)

    def match(self, text: TextFeatures, video: VideoFeatures, *, refine: AttentionRefiner | None = None) -> Tensor:
        """There is no match head.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"DualEncoder.match: {self.kind} has no match head, expected an encoder with fusion layers. Use "
            "InternVideo2 or BlipEncoder for the semantic reward."
        )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, n_frames: int | None = None, dtype: torch.dtype = torch.float32
    ) -> DualEncoder:
        """Load a local directory of transformers, in eval mode; nothing is downloaded.

        Args:
            path: directory with the model, its tokenizer and its image processor.
            n_frames: see the class; 8 by default.
            dtype: of the parameters.

        Raises:
            FileNotFoundError: a file is missing there.
            ValueError: another kind of model, a damaged file, or tensors that are missing or have another shape; they
                are named.
        """
        who = "DualEncoder.from_pretrained"
        model_type(path, who, KINDS)
        from transformers import AutoModel

        model = load_model(AutoModel, path, who, dtype=dtype, wanted="a whole CLIP, SigLIP or X-CLIP")
        encoder = cls(model, load_tokenizer(path, who), n_frames=n_frames)
        encoder.pixels = load_pixels(path, encoder.size, who)
        return encoder.eval()

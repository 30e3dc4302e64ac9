"""A small video-text encoder with the parts of InternVideo2 stage 2 that the rewards use.

Video tower (conv stem, then self-attention), text tower, fusion layers that cross-attend from words to video tokens,
contrastive and match heads. It is sized for the small world and two CPU cores; it knows nothing of the real world.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pisces.encoders.attention import cross_attention, merge_heads, split_heads
from pisces.encoders.base import (
    AttentionRefiner,
    TextFeatures,
    VideoFeatures,
    check_pairs,
    check_prompts,
    log_odds,
    unit,
)
from pisces.encoders.pretrained import Pixels
from pisces.tensor_files import check_fit, read_settings, read_tensors
from pisces.tokens import TokenGrid

PAD, UNK, SEP = "[pad]", "[unk]", "[sep]"
SPECIALS = (PAD, UNK, SEP)
_STEM_STRIDE = 8  # three convolutions of stride 2
_TUBELET, _TUBELET_STRIDE = 3, 2  # a token sees three frames and shares one with its neighbour in time


@dataclass(frozen=True)
class TinyEncoderConfig:
    """Shape of a `TinyEncoder`.

    Attributes:
        vocabulary: words; the first three are "[pad]", "[unk]", "[sep]".
        n_frames: video frames that are looked at, odd and at least 3: (n_frames - 1) / 2 token frames.
        size: height and width in pixels, a multiple of 8.
        width: features of a token, a multiple of `heads`.
        heads: attention heads.
        video_layers, text_layers, fusion_layers: blocks in the three towers.
        embed_dim: width E of the embeddings.
        max_tokens: longest sequence, its two special tokens included.
        temperature: fixed softmax temperature with which the embeddings were trained.
    """

    vocabulary: tuple[str, ...]
    n_frames: int = 9
    size: int = 32
    width: int = 64
    heads: int = 4
    video_layers: int = 3
    text_layers: int = 2
    fusion_layers: int = 2
    embed_dim: int = 32
    max_tokens: int = 32
    temperature: float = 0.03

    def __post_init__(self) -> None:
        if tuple(self.vocabulary[:3]) != SPECIALS:
            raise ValueError(f"TinyEncoderConfig: vocabulary starts with {self.vocabulary[:3]}, expected {SPECIALS}.")
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("TinyEncoderConfig: vocabulary has a word twice, expected distinct words.")
        for name, value in vars(self).items():
            if name not in ("vocabulary", "temperature") and (type(value) is not int or value < 1):
                raise ValueError(f"TinyEncoderConfig: {name} is {value!r}, expected an integer of at least 1.")
        if type(self.temperature) not in (int, float) or not self.temperature > 0:
            raise ValueError(f"TinyEncoderConfig: temperature is {self.temperature!r}, expected a positive number.")
        if self.n_frames < 3 or self.n_frames % 2 == 0:
            raise ValueError(f"TinyEncoderConfig: n_frames is {self.n_frames}, expected 3, 5, 7, ...")
        if self.size < _STEM_STRIDE or self.size % _STEM_STRIDE:
            raise ValueError(f"TinyEncoderConfig: size is {self.size}, expected a multiple of {_STEM_STRIDE}.")
        if self.width % self.heads:
            raise ValueError(
                f"TinyEncoderConfig: width {self.width} is not a multiple of heads {self.heads}; make it one."
            )
        if self.max_tokens < 3:
            raise ValueError(f"TinyEncoderConfig: max_tokens is {self.max_tokens}, expected at least 3.")

    @property
    def grid(self) -> TokenGrid:
        """Geometry of the video tokens."""
        side = self.size // _STEM_STRIDE
        return TokenGrid((self.n_frames - 1) // _TUBELET_STRIDE, side, side)


class Attention(nn.Module):
    """Multi-head attention from `x` to `context`, with explicit probabilities where they are to be refined."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Self-attention of x [B, N, D]; mask [B, 1, 1, N] is True where a token may be seen."""
        q, k, v = (split_heads(part(x), self.heads) for part in (self.query, self.key, self.value))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))

    def cross(self, x: Tensor, video: VideoFeatures, lexical: Tensor, refine: AttentionRefiner | None) -> Tensor:
        """Attention of text x [B, Q, D] over the video tokens, through `refine` if given."""
        context = cross_attention(
            self, self.heads, x, video.tokens, video.frame_index, video.positions, lexical, refine or _unchanged
        )
        return self.out(context)


def _unchanged(query: Tensor, key: Tensor, attention: Tensor, *rest: Tensor) -> Tensor:
    """For no hook: a fused attention rounds otherwise, and the recorded figures of the small world would change."""
    return attention


class Block(nn.Module):
    """Pre-norm transformer block; a fusion block also looks at the video between self-attention and MLP."""

    def __init__(self, width: int, heads: int, *, fusion: bool = False) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_cross = nn.LayerNorm(width) if fusion else None
        self.cross_attention = Attention(width, heads) if fusion else None
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        video: VideoFeatures | None = None,
        lexical: Tensor | None = None,
        refine: AttentionRefiner | None = None,
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]."""
        x = x + self.attention(self.norm_attention(x), mask)
        if self.cross_attention is not None and self.norm_cross is not None:
            if video is None or lexical is None:
                raise ValueError("Block: a fusion block got no video, expected video and lexical. Pass both.")
            x = x + self.cross_attention.cross(self.norm_cross(x), video, lexical, refine)
        return x + self.mlp(self.norm_mlp(x))


class TinyEncoder(nn.Module):
    """Small InternVideo2-like encoder; it implements `VideoTextEncoder`.

    A token covers 8 x 8 pixels of three frames, and neighbours in time share one frame, so that no frame of the video
    escapes the reward. The match head reads the mean of the words' tokens: behind a CLS token a change of the words'
    attention would hardly reach the score.

    Args:
        config: shape and vocabulary.

    Example:
        >>> encoder = TinyEncoder(TinyEncoderConfig(vocabulary=("[pad]", "[unk]", "[sep]", "red", "dot"), width=16))
        >>> text, video = encoder.encode_text(["red dot"]), encoder.encode_video(torch.rand(1, 5, 3, 40, 56))
        >>> encoder.match(text, video).shape
        torch.Size([1])
    """

    frame_tensors = ("time",)
    frame_index: Tensor
    positions: Tensor

    def __init__(self, config: TinyEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.n_frames, self.size, self.embed_dim = config.n_frames, config.size, config.embed_dim
        self.interpolation = "bilinear"
        self.word_index = {word: i for i, word in enumerate(config.vocabulary)}
        grid, width = config.grid, config.width
        self.stem = nn.Sequential(
            nn.Conv2d(3 * _TUBELET, 24, 4, 2, 1),
            nn.GroupNorm(4, 24),
            nn.GELU(),
            nn.Conv2d(24, 48, 4, 2, 1),
            nn.GroupNorm(4, 48),
            nn.GELU(),
            nn.Conv2d(48, width, 4, 2, 1),
        )
        self.place = nn.Parameter(0.02 * torch.randn(1, 1, grid.rows * grid.cols, width))
        self.time = nn.Parameter(0.02 * torch.randn(1, grid.frames, 1, width))
        self.video_blocks = nn.ModuleList([Block(width, config.heads) for _ in range(config.video_layers)])
        self.video_norm = nn.LayerNorm(width)
        self.words = nn.Embedding(len(config.vocabulary), width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.order = nn.Parameter(0.02 * torch.randn(1, config.max_tokens, width))
        self.text_blocks = nn.ModuleList([Block(width, config.heads) for _ in range(config.text_layers)])
        self.text_norm = nn.LayerNorm(width)
        self.fusion_blocks = nn.ModuleList(
            [Block(width, config.heads, fusion=True) for _ in range(config.fusion_layers)]
        )
        self.fusion_norm = nn.LayerNorm(width)
        self.video_projection = nn.Linear(width, config.embed_dim)
        self.text_projection = nn.Linear(width, config.embed_dim)
        self.match_head = nn.Linear(width, 1)
        self.register_buffer("frame_index", grid.frame_index(), persistent=False)
        self.register_buffer("positions", grid.positions(), persistent=False)

    def encode_video(self, frames: Tensor) -> VideoFeatures:
        """Encode videos of any length and size.

        Args:
            frames: [B, T, 3, H, W] in [0, 1], T >= 1; brought to `n_frames` and `size` by `resample`.

        Returns:
            `VideoFeatures` with M = token frames x (size / 8)^2.

        Raises:
            ValueError: not five dimensions or not three channels.
        """
        # no attribute: `pixels` of an encoder are part of its digest, which alignments on disk have
        pixels = Pixels(self.size, (0.5,) * 3, (0.5,) * 3, self.interpolation)
        x = pixels.prepare(frames, self.n_frames, self.place.dtype, "TinyEncoder.encode_video")
        tubes = rearrange(x.unfold(1, _TUBELET, _TUBELET_STRIDE), "b f c h w t -> (b f) (t c) h w")
        patches = rearrange(self.stem(tubes), "(b f) d h w -> b f (h w) d", b=len(x))
        x = rearrange(patches + self.place + self.time, "b f m d -> b (f m) d")
        for block in self.video_blocks:
            x = block(x)
        x = self.video_norm(x)
        return VideoFeatures(x, unit(self.video_projection(x.mean(1))), self.frame_index, self.positions)

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Word indices [B, N] long, [sep] first and last, padded to the longest prompt.

        Words are runs of letters and digits in lower case; unknown ones become [unk]. Prompts of more than
        `max_tokens` - 2 words are cut there, with a warning.

        Raises:
            ValueError: a prompt without a word; the message names its index.
        """
        sep, unk = self.word_index[SEP], self.word_index[UNK]
        rows = [[sep, *(self.word_index.get(word, unk) for word in words), sep] for words in self.token_texts(prompts)]
        ids = torch.full((len(rows), max(map(len, rows))), self.word_index[PAD])
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids.to(self.place.device)

    def token_texts(self, prompts: Sequence[str]) -> list[list[str]]:
        """The words of each prompt as they are read, unknown ones too; see `token_ids`."""
        texts, room = [], self.config.max_tokens - 2
        for i, prompt in enumerate(check_prompts(prompts, "TinyEncoder.encode_text")):
            words = re.findall(r"[^\W_]+", prompt.lower())
            if not words:
                raise ValueError(f"TinyEncoder.encode_text: prompts[{i}] is {prompt!r}, expected at least one word.")
            if len(words) > room:
                warnings.warn(
                    f"TinyEncoder.encode_text: prompts[{i}] has {len(words)} words, only {room} are read.",
                    stacklevel=3,
                )
            texts.append(words[:room])
        return texts

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts with the word vocabulary of the configuration; see `token_ids` for how words are read."""
        return self.encode_ids(self.token_ids(prompts))

    def encode_ids(self, ids: Tensor) -> TextFeatures:
        """Encode word indices [B, N] as `token_ids` makes them."""
        mask = ids != self.word_index[PAD]
        lexical = mask & (ids != self.word_index[SEP])
        x = self.words(ids) + self.order[:, : ids.shape[1]]
        for block in self.text_blocks:
            x = block(x, mask[:, None, None])
        x = self.text_norm(x)
        return TextFeatures(x, unit(self.text_projection(x[:, 0])), mask, lexical)

    def match(self, text: TextFeatures, video: VideoFeatures, *, refine: AttentionRefiner | None = None) -> Tensor:
        """Log-odds that each text describes its video.

        Args:
            text: B encoded prompts.
            video: B encoded videos.
            refine: called in every fusion layer, once for the batch; None leaves the attention as it is.

        Returns:
            [B] log-odds of a match; float32 at least.

        Raises:
            ValueError: different batch sizes.
        """
        check_pairs(text, video, "TinyEncoder.match")
        x, mask = text.tokens, text.mask[:, None, None]
        for block in self.fusion_blocks:
            x = block(x, mask, video, text.lexical, refine)
        weight = text.lexical.to(x.dtype)[..., None]
        pooled = (x * weight).sum(1) / weight.sum(1)
        return log_odds(self.match_head, self.fusion_norm(pooled))

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write config.json and model.safetensors; `dtype` float16 halves the file, weights load as float32."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"model_type": "tiny_encoder", **asdict(self.config)}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        state = {name: value.detach().to(dtype).contiguous() for name, value in self.state_dict().items()}
        save_file(state, directory / "model.safetensors")
        return directory

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> TinyEncoder:
        """Load what `save_pretrained` wrote, as float32 and in eval mode.

        Raises:
            FileNotFoundError: config.json or model.safetensors is missing.
            ValueError: config.json describes another kind of encoder or none, a file is damaged, or the weights are not
                those of the configuration.
        """
        directory = Path(directory)
        for name in ("config.json", "model.safetensors"):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"TinyEncoder.from_pretrained: {directory} has no {name}, expected a directory written by "
                    "save_pretrained."
                )
        encoder = cls(_read_config(directory / "config.json"))
        state = read_tensors(directory / "model.safetensors", "TinyEncoder.from_pretrained")
        check_fit(state, encoder.state_dict(), f"TinyEncoder.from_pretrained: {directory}/model.safetensors")
        encoder.load_state_dict({name: value.float() for name, value in state.items()})
        return encoder.eval()


def _read_config(file: Path) -> TinyEncoderConfig:
    """The config.json of a directory, every entry checked."""
    who = "TinyEncoder.from_pretrained"
    settings = read_settings(file, who)
    kind = settings.pop("model_type", None)
    if kind != "tiny_encoder":
        raise ValueError(f"{who}: {file} has model_type {kind!r}, expected 'tiny_encoder'. Use load_encoder.")
    known = [field.name for field in fields(TinyEncoderConfig)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"{who}: {file} has the unknown {unknown}, expected some of {known}. Remove them.")
    words = settings.pop("vocabulary", None)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{who}: {file} has no vocabulary, expected a list of words. Copy that of the training.")
    try:
        return TinyEncoderConfig(vocabulary=tuple(words), **settings)
    except ValueError as error:
        raise ValueError(f"{who}: {file} does not fit. {error}") from error


def unknown_words(encoder: Any, prompts: Sequence[str]) -> str:
    """A remark on words that a word-level encoder has never seen.

    Args:
        encoder: any; one that does not read whole words knows them all.
        prompts: at least one.

    Returns:
        A sentence, empty where there are none.
    """
    known = getattr(encoder, "word_index", None)
    if known is None:
        return ""
    with warnings.catch_warnings(action="ignore"):  # that a prompt is cut is said when it is used
        words = [word for text in encoder.token_texts(sorted(set(prompts))) for word in text]
    unknown = sum(word not in known for word in words)
    return f"{unknown} of {len(words)} words are unknown to this encoder and look alike to it." if unknown else ""

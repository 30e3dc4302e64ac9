"""InternVideo2 stage 2: vision tower, text tower, fusion tower, projections and match head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pisces.encoders.base import AttentionRefiner, TextFeatures, VideoFeatures, check_pairs, log_odds, unit
from pisces.encoders.internvideo2.checkpoint import WEIGHTS, fit, read_weights
from pisces.encoders.internvideo2.config import InternVideo2Config
from pisces.encoders.internvideo2.text import Bert
from pisces.encoders.internvideo2.vision import VisionEncoder
from pisces.encoders.internvideo2.wordpiece import WordPieces
from pisces.encoders.pretrained import Pixels
from pisces.tensor_files import read_settings

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class InternVideo2(nn.Module):
    """InternVideo2 stage 2; it implements `VideoTextEncoder`. Parameters have the names of the official checkpoint.

    A new one has random weights and, with the default sizes, 1.4 billion of them: build it on the meta device to look
    at its shape, or load it with `from_checkpoint`.

    Args:
        config: sizes; None is the official 1B model with 4 frames.
        vocabulary: the vocab.txt of bert-large-uncased, or its lines. None leaves the text side without words.

    Raises:
        FileNotFoundError: no such vocabulary.
        ValueError: a vocabulary of another size than the configuration says.

    Example:
        >>> with torch.device("meta"):
        ...     encoder = InternVideo2()
        >>> sum(p.numel() for p in encoder.vision_encoder.parameters())
        1019266816

    Source:
        InternVideo2 (arXiv 2403.15377), stage 2.
    """

    frame_tensors = ("vision_encoder.pos_embed",)

    def __init__(
        self, config: InternVideo2Config | None = None, vocabulary: str | Path | Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.config = config = config or InternVideo2Config()
        self.n_frames, self.size, self.embed_dim = config.n_frames, config.size, config.embed_dim
        self.interpolation = "bicubic"
        self.vision_encoder = VisionEncoder(config)
        self.text_encoder = nn.ModuleDict({"bert": Bert(config)})
        self.vision_proj = nn.Linear(config.pool_width, config.embed_dim)
        self.text_proj = nn.Linear(config.text_width, config.embed_dim)
        self.itm_head = nn.Linear(config.text_width, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))  # of the contrastive loss; no reward reads it
        self.words = None if vocabulary is None else WordPieces(vocabulary)
        if self.words is not None and self.words.size != config.vocabulary_size:
            raise ValueError(
                f"InternVideo2: vocabulary has {self.words.size} word pieces, expected {config.vocabulary_size}. "
                "Use the vocab.txt with which the checkpoint was trained: that of bert-large-uncased."
            )
        # no buffers: `.to(torch.bfloat16)` would round the positions, and a model on the meta device would lose them
        self._geometry: tuple[Tensor, Tensor] | None = None

    def encode_video(self, frames: Tensor) -> VideoFeatures:
        """Encode videos of any length and size.

        They are brought to `n_frames` and `size` by `resample` with bicubic interpolation (the official short side of
        224 and a crop, here the centre's) and normalised by ImageNet's mean and deviation, in float32 at least.

        Args:
            frames: [B, T, 3, H, W] in [0, 1], T >= 1.

        Returns:
            `VideoFeatures` with M = 1 + n_frames (size / patch_size)^2, CLS first; the tokens in the dtype of the
            parameters, the embedding in float32 at least.

        Raises:
            ValueError: not five dimensions or not three channels.
        """
        # no attribute: `pixels` of an encoder are part of its digest, which alignments on disk have
        pixels = Pixels(self.size, _MEAN, _STD, self.interpolation)
        x = pixels.prepare(frames, self.n_frames, self.vision_proj.weight.dtype, "InternVideo2.encode_video")
        tokens, pooled = self.vision_encoder(x)
        if self._geometry is None or self._geometry[0].device != tokens.device:
            grid = self.config.grid
            self._geometry = (grid.frame_index().to(tokens.device), grid.positions().to(tokens.device))
        return VideoFeatures(tokens, unit(self.vision_proj(pooled)), *self._geometry)

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Word pieces [B, N] long, [CLS] first and [SEP] last, padded to the longest prompt.

        Prompts of more than `max_tokens` are cut there, with a warning.

        Raises:
            ValueError: a prompt without a word, or an encoder without a vocabulary.
        """
        words = self._words("encode_text")
        rows = words.encode(prompts, max_tokens=self.config.max_tokens, who="InternVideo2.encode_text")
        ids = torch.full((len(rows), max(map(len, rows))), words.pad)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids.to(self.text_proj.weight.device)

    def token_texts(self, prompts: Sequence[str]) -> list[list[str]]:
        """The word pieces of each prompt as the match head reads them, without [CLS] and [SEP]."""
        words = self._words("token_texts")
        return words.texts(prompts, max_tokens=self.config.max_tokens, who="InternVideo2.token_texts")

    def encode_text(self, prompts: Sequence[str]) -> TextFeatures:
        """Encode prompts; see `encode_ids` for the two lengths and `token_ids` for how words are read."""
        return self.encode_ids(self.token_ids(prompts))

    def encode_ids(self, ids: Tensor) -> TextFeatures:
        """Encode word pieces as `token_ids` makes them.

        The tokens, which the match head reads, are those of the whole prompt. The embedding is that of the prompt cut
        to `embedding_tokens` with [SEP] last, as the contrastive loss saw it; the text tower runs a second time where
        a prompt is longer.

        Args:
            ids: [B, N] long, N <= text_positions.

        Returns:
            `TextFeatures`; lexical are all word pieces but [CLS] and [SEP].
        """
        words, bert = self._words("encode_ids"), self.text_encoder["bert"]
        mask = ids != words.pad
        lexical = mask & (ids != words.cls) & (ids != words.sep)
        tokens = bert.text(ids, mask)
        cls, n = tokens[:, 0], self.config.embedding_tokens
        if ids.shape[1] > n:
            short = ids[:, :n].clone()
            short[:, -1] = torch.where(mask[:, n], words.sep, short[:, -1])
            cls = bert.text(short, mask[:, :n])[:, 0]
        return TextFeatures(tokens, unit(self.text_proj(cls)), mask, lexical)

    def match(self, text: TextFeatures, video: VideoFeatures, *, refine: AttentionRefiner | None = None) -> Tensor:
        """Log-odds that each text describes its video.

        Args:
            text: B encoded prompts.
            video: B encoded videos.
            refine: called in every fusion layer, once for the batch; None leaves the attention as it is and never
                stores its probabilities.

        Returns:
            [B] log-odds of a match, logit 1 minus logit 0 of the match head; float32 at least.

        Raises:
            ValueError: different batch sizes.
        """
        check_pairs(text, video, "InternVideo2.match")
        x = self.text_encoder["bert"].fuse(text.tokens, text.mask, video, text.lexical, refine)[:, 0]
        return log_odds(self.itm_head, x)

    def _words(self, method: str) -> WordPieces:
        if self.words is None:
            raise ValueError(
                f"InternVideo2.{method}: this encoder has no vocabulary. Build it with vocabulary='vocab.txt', the "
                "word pieces of bert-large-uncased."
            )
        return self.words

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        vocabulary: str | Path | Sequence[str] | None = None,
        *,
        config: InternVideo2Config | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> InternVideo2:
        """Load the official checkpoint, or one of its layout, into eval mode on the CPU.

        Args:
            path: the .pt file (its tensors under "module") or a .safetensors file.
            vocabulary: see the class.
            config: sizes; `InternVideo2Config(n_frames=8)` interpolates the positions of the 4 frames in time.
            dtype: of the parameters.

        Raises:
            FileNotFoundError: no such file.
            ValueError: names or shapes that differ from the model's; all are named. What the rewards do not use of
                the official checkpoint (`checkpoint.UNUSED`) may be there or not.
        """
        with torch.device("meta"):
            model = cls(config, vocabulary)
        grid = model.config.grid
        state = fit(read_weights(path), model.state_dict(), grid.frames, grid.rows * grid.cols)
        for name, value in state.items():  # one by one, so that two copies of the model never exist
            state[name] = value.to(dtype if value.is_floating_point() else value.dtype, copy=True)
        model.load_state_dict(state, assign=True)
        return model.eval()

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> InternVideo2:
        """Load a directory: vocab.txt, one file of weights, and config.json where something differs from the official.

        Args:
            directory: with vocab.txt, one .pt, .pth, .bin or .safetensors file, and optionally config.json: an object
                of "model_type": "internvideo2", fields of `InternVideo2Config` and "dtype" (float32, bfloat16 or
                float16; float32 if absent).

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: several files of weights, a damaged file, an unknown setting, or what `from_checkpoint`
                refuses.
        """
        directory = Path(directory)
        who = "InternVideo2.from_pretrained"
        if not (directory / "vocab.txt").is_file():
            raise FileNotFoundError(
                f"{who}: {directory} has no vocab.txt, expected that of bert-large-uncased. Copy it there."
            )
        weights = sorted(p for p in directory.iterdir() if p.suffix in WEIGHTS)
        if not weights:
            raise FileNotFoundError(f"{who}: {directory} has no weights, expected one file ending in {WEIGHTS}.")
        if len(weights) > 1:
            raise ValueError(f"{who}: {directory} has {[p.name for p in weights]}, expected one file of weights.")
        settings = read_settings(directory / "config.json", who) if (directory / "config.json").is_file() else {}
        if settings.pop("model_type", "internvideo2") != "internvideo2":
            raise ValueError(f"{who}: {directory}/config.json is of another model. Use load_encoder.")
        dtype = settings.pop("dtype", "float32")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{who}: dtype is {dtype!r} in {directory}/config.json, expected one of {list(_DTYPES)}.")
        known = vars(InternVideo2Config())
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"{who}: {directory}/config.json has {unknown}, expected some of {sorted(known)}.")
        try:
            config = InternVideo2Config(**settings)
        except ValueError as error:
            raise ValueError(f"{who}: {directory}/config.json does not fit. {error}") from error
        return cls.from_checkpoint(weights[0], directory / "vocab.txt", config=config, dtype=_DTYPES[dtype])

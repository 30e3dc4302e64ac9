"""Sizes of InternVideo2 stage 2."""

from __future__ import annotations

from dataclasses import dataclass, field

from pisces.tokens import TokenGrid


@dataclass(frozen=True)
class InternVideo2Config:
    """Sizes of an `InternVideo2`; the defaults are those of the official 1B checkpoint at 224 px and 4 frames.

    Attributes:
        n_frames: frames that are looked at; positions of a checkpoint are interpolated to as many.
        size: height and width in pixels, a multiple of `patch_size`.
        patch_size: pixels of a patch's side.
        vision_width, vision_layers, vision_heads, vision_mlp: blocks of the vision tower.
        pool_heads, pool_width: heads of the attention pooling and the features that it gives.
        text_width, text_heads, text_mlp: layers of the text tower and of the fusion tower.
        text_layers, fusion_layers: how many layers see the text only, and how many more also see the video.
        vocabulary_size: word pieces.
        text_positions: longest sequence that has position embeddings.
        embed_dim: width E of the embeddings.
        max_tokens: longest sequence that is read, special tokens included; more is cut with a warning.
        embedding_tokens: the text embedding is that of the prompt cut to so many tokens, as it was trained.
        gelu: approximation in the vision tower, "none" or "tanh". The official code has "none", and "tanh" where its
            fused layers are installed.
        checkpoint: compute vision blocks and fusion layers again in the backward pass, so that one activation of each
            is kept.

    Raises:
        ValueError: sizes that do not fit together, or a setting of another type.

    Source:
        InternVideo2 (arXiv 2403.15377), stage 2; PISCES (arXiv 2602.01624) reads 40 tokens for the quality reward and
        300 for the semantic one.
    """

    n_frames: int = 4
    size: int = 224
    patch_size: int = 14
    vision_width: int = 1408
    vision_layers: int = 40
    vision_heads: int = 16
    vision_mlp: int = 6144
    pool_heads: int = 16
    pool_width: int = 768
    text_width: int = 1024
    text_layers: int = 19
    fusion_layers: int = 5
    text_heads: int = 16
    text_mlp: int = 4096
    vocabulary_size: int = 30522
    text_positions: int = 512
    embed_dim: int = 512
    max_tokens: int = 300
    embedding_tokens: int = 40
    gelu: str = "none"
    checkpoint: bool = field(default=False, compare=False)  # no result depends on it

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("gelu", "checkpoint") and (type(value) is not int or value < 1):
                raise ValueError(f"InternVideo2Config: {name} is {value!r}, expected an integer of at least 1.")
        if type(self.checkpoint) is not bool:
            raise ValueError(f"InternVideo2Config: checkpoint is {self.checkpoint!r}, expected true or false.")
        for whole, part in (
            ("size", "patch_size"),
            ("vision_width", "vision_heads"),
            ("vision_width", "pool_heads"),
            ("text_width", "text_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"InternVideo2Config: {whole} {getattr(self, whole)} is not a multiple of {part} "
                    f"{getattr(self, part)}; make it one."
                )
        if not 3 <= self.embedding_tokens <= self.max_tokens <= self.text_positions:
            raise ValueError(
                f"InternVideo2Config: embedding_tokens, max_tokens, text_positions are {self.embedding_tokens}, "
                f"{self.max_tokens}, {self.text_positions}, expected 3 <= embedding_tokens <= max_tokens <= "
                "text_positions."
            )
        if self.gelu not in ("none", "tanh"):
            raise ValueError(f"InternVideo2Config: gelu is {self.gelu!r}, expected 'none' or 'tanh'.")

    @property
    def grid(self) -> TokenGrid:
        """Geometry of the video tokens, CLS first."""
        side = self.size // self.patch_size
        return TokenGrid(self.n_frames, side, side, cls=True)

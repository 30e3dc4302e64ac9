"""BERT's uncased word pieces, from a local vocab.txt."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Encoding, Tokenizer
from tokenizers.models import WordPiece as WordPieceModel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from pisces.encoders.base import check_prompts
from pisces.tensor_files import read_text

PAD, UNK, CLS, SEP = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class WordPieces:
    """Prompts to indices of word pieces, as bert-large-uncased has them.

    The names of the special tokens cannot be written: "[SEP]" in a prompt is three pieces.

    Args:
        vocabulary: a vocab.txt, one piece a line, or the pieces themselves; a piece's index is its line.

    Attributes:
        pad, cls, sep: indices of the special tokens.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a special token is missing.

    Example:
        >>> pieces = WordPieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "run", "##s"])
        >>> pieces.encode(["A dog RUNS"], max_tokens=40)
        [[2, 4, 5, 6, 7, 3]]
    """

    def __init__(self, vocabulary: str | Path | Sequence[str]) -> None:
        source = vocabulary if isinstance(vocabulary, str | Path) else "the vocabulary"
        if isinstance(vocabulary, str | Path):
            path = Path(vocabulary)
            if not path.is_file():
                raise FileNotFoundError(
                    f"WordPieces: no file {path}, expected the vocab.txt of bert-large-uncased. Copy it there."
                )
            # not splitlines: pieces may be characters that Unicode calls line ends
            vocabulary = read_text(path, "WordPieces").removesuffix("\n").split("\n")
        index = {piece: i for i, piece in enumerate(vocabulary)}
        missing = [name for name in SPECIALS if name not in index]
        if missing:
            raise ValueError(
                f"WordPieces: {source} of {len(index)} pieces has no {missing}, expected those of "
                "bert-large-uncased. Use its vocab.txt."
            )
        self.size = len(vocabulary)
        self.pad, self.cls, self.sep = index[PAD], index[CLS], index[SEP]
        # registered nowhere as special: their names in a prompt are ordinary text
        self._tokenizer = Tokenizer(WordPieceModel(index, unk_token=UNK, max_input_chars_per_word=100))
        self._tokenizer.normalizer = BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()

    @property
    def rules(self) -> str:
        """All that the pieces of a text depend on, as JSON."""
        return self._tokenizer.to_str()

    def encode(self, prompts: Sequence[str], *, max_tokens: int, who: str = "WordPieces.encode") -> list[list[int]]:
        """Indices of each prompt, [CLS] first and [SEP] last, not padded.

        Args:
            prompts: at least one.
            max_tokens: most indices, the special ones included; what is beyond is cut with a warning.
            who: name for the messages.

        Raises:
            ValueError: a prompt without a letter or digit; the message names its index.
        """
        rows = [encoding.ids for encoding in self._read(prompts, who)]
        for i, row in enumerate(rows):
            if len(row) > max_tokens - 2:
                warnings.warn(
                    f"{who}: prompts[{i}] has {len(row)} word pieces, only {max_tokens - 2} are read.", stacklevel=3
                )
        return [[self.cls, *row[: max_tokens - 2], self.sep] for row in rows]

    def texts(self, prompts: Sequence[str], *, max_tokens: int, who: str = "WordPieces.texts") -> list[list[str]]:
        """The pieces that `encode` reads of each prompt, without the special ones.

        Example:
            >>> pieces = WordPieces(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "run", "##s"])
            >>> pieces.texts(["A dog RUNS"], max_tokens=40)
            [['a', 'dog', 'run', '##s']]
        """
        return [encoding.tokens[: max_tokens - 2] for encoding in self._read(prompts, who)]

    def _read(self, prompts: Sequence[str], who: str) -> list[Encoding]:
        prompts = check_prompts(prompts, who)
        for i, prompt in enumerate(prompts):
            if not re.search(r"[^\W_]", prompt):
                raise ValueError(f"{who}: prompts[{i}] is {prompt!r}, expected at least one word. Describe the video.")
        return self._tokenizer.encode_batch(prompts, add_special_tokens=False)

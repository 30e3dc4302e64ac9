"""What the encoders of transformers share: their directories, their tokenizers, what they want pixels to be."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pisces.encoders.base import check_prompts, pick_frames, resample
from pisces.tensor_files import listed, read_settings, read_tensors

T = TypeVar("T")

_MODES = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_BYTE = 255  # what 1.0 is in the pictures that image processors are given


@dataclass(frozen=True)
class Pixels:
    """How an image model wants its pixels.

    Attributes:
        size: height and width.
        mean, std: of each channel, for frames in [0, 1].
        mode: interpolation, "bilinear" or "bicubic".
    """

    size: int
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's images
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    mode: str = "bicubic"

    def prepare(self, frames: Tensor, n_frames: int, dtype: torch.dtype, who: str) -> Tensor:
        """Frames [B, T, 3, H, W] in [0, 1] -> [B, n_frames, 3, size, size], normalised in float32 at least.

        Raises:
            ValueError: not five dimensions or not three channels.
        """
        if frames.dim() != 5 or frames.shape[2] != 3:
            raise ValueError(f"{who}: frames has shape {tuple(frames.shape)}, expected (B, T, 3, H, W).")
        wide = torch.promote_types(torch.promote_types(frames.dtype, dtype), torch.float32)
        # of a long video in 16 bits, only the frames that are looked at are made wider
        frames = resample(pick_frames(frames, n_frames).to(wide), n_frames, self.size, mode=self.mode)
        mean, std = (frames.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return ((frames - mean) / std).to(dtype)

    @classmethod
    def of(cls, processor: Any, size: int, who: str) -> Pixels:
        """From an image processor of transformers; its own way to a square is not followed, see `resample`.

        Raises:
            ValueError: another interpolation than these two, or pixels that are not brought to [0, 1].
        """
        if processor.resample not in _MODES:
            raise ValueError(
                f"{who}: the image processor has resample {processor.resample!r}, expected 2 (bilinear) or 3 "
                "(bicubic). Set the nearer of them in its file, and know that the model was trained with another."
            )
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        if abs(scale * _BYTE - 1) > 1e-3:
            raise ValueError(
                f"{who}: the image processor multiplies bytes by {scale:.4g} (do_rescale, rescale_factor), expected "
                "1/255, which brings them to [0, 1]. Write an adapter for this model: docs/encoders.md."
            )
        mode = _MODES[processor.resample]
        if not processor.do_normalize:
            return cls(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), mode)
        return cls(size, tuple(processor.image_mean), tuple(processor.image_std), mode)


def model_type(path: str | Path, who: str, kinds: Sequence[str]) -> str:
    """The model_type of a directory's config.json.

    Raises:
        FileNotFoundError: there is none. Nothing is looked up anywhere else.
        ValueError: it is none of `kinds`, or the file is damaged.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{who}: {path} has no config.json, expected a directory of transformers. Download one and pass its path."
        )
    kind = read_settings(file, who).get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{who}: {file} has model_type {kind!r}, expected one of {list(kinds)}.")
    return kind


def load_model(auto: Any, path: str | Path, who: str, *, dtype: torch.dtype, wanted: str) -> nn.Module:
    """A model of transformers out of a local directory, every one of its tensors read from there.

    transformers itself fills what a directory lacks with random numbers.

    Args:
        auto: the class whose `from_pretrained` reads it.
        path: directory.
        who: name for the messages.
        dtype: of the parameters.
        wanted: what kind of model is expected, for the message.

    Raises:
        FileNotFoundError: no file of weights.
        ValueError: a damaged file, or tensors are missing or have another shape than the configuration says; the
            message names them.
    """

    def load() -> tuple[nn.Module, dict[str, Any]]:
        return auto.from_pretrained(
            path, local_files_only=True, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )

    model, report = _read(load, path, who, "weights", ("*.safetensors", "*.bin", "*.index.json"), ("config.json",))
    found = listed(
        {
            "missing": sorted(report["missing_keys"]),
            "of another shape": [
                f"{name} has shape {tuple(got)}, expected {tuple(want)}"
                for name, got, want in sorted(report["mismatched_keys"])
            ],
        }
    )
    if found:
        raise ValueError(
            f"{who}: the weights in {path} do not fit its config.json. {found}. Expected {wanted}: download the whole "
            "directory again."
        )
    if report["unexpected_keys"]:
        extra = listed({"unexpected": sorted(report["unexpected_keys"])})
        warnings.warn(f"{who}: {path} holds tensors that the model does not use. {extra}.", stacklevel=3)
    return model


def load_tokenizer(path: str | Path, who: str) -> Any:
    """The tokenizer of a local directory of transformers.

    Raises:
        FileNotFoundError: none of its files is there. transformers would make one that knows no word.
        ValueError: a damaged file.
    """
    from transformers import AutoTokenizer

    def load() -> Any:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)

    files = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
    tokenizer = _read(load, path, who, "tokenizer", files, ("tokenizer_config.json",))
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((Path(path) / name).is_file() for name in names):
        raise FileNotFoundError(
            f"{who}: {path} has no tokenizer, expected one of {sorted(names)}. Download the whole directory."
        )
    return tokenizer


def load_pixels(path: str | Path, size: int, who: str) -> Pixels:
    """What the image processor of a local directory of transformers makes of pixels.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a damaged file, or what `Pixels.of` refuses.
    """
    from transformers import AutoImageProcessor

    def load() -> Any:
        return AutoImageProcessor.from_pretrained(path, local_files_only=True)

    processor = _read(load, path, who, "image processor", ("preprocessor_config.json", "processor_config.json"))
    return Pixels.of(processor, size, f"{who}: {path}")


def _read(
    load: Callable[[], T], path: str | Path, who: str, what: str, own: Sequence[str], beside: Sequence[str] = ()
) -> T:
    """What `load` reads of a directory; where it cannot, the file that is to blame is named.

    Args:
        load: a call into transformers.
        path: directory.
        who: name for the messages.
        what: what is read, for the messages.
        own: patterns of the files that hold it.
        beside: files that are read along with them.
    """
    try:
        with _silent():  # its report of tensors that do not fit is a table of hundreds of lines
            return load()
    except (ImportError, MemoryError):  # a package or memory is missing, and no file is to blame
        raise
    except Exception as error:  # what transformers raises depends on the class, the file and the version
        files = [file for pattern in (*own, *beside) for file in sorted(Path(path).glob(pattern))]
        for file in files:
            if file.suffix == ".json":
                read_settings(file, who)
            elif file.suffix in (".safetensors", ".bin"):
                read_tensors(file, who)
        if not [file for file in files if file.name not in beside]:
            raise FileNotFoundError(
                f"{who}: {path} has no {what}, expected {' or '.join(own)}. Download the whole directory."
            ) from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"{who}: transformers cannot read the {what} in {path} ({reason}), expected "
            f"{', '.join(file.name for file in files)} that were saved together. Download the whole directory again."
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the log of transformers to its errors."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@dataclass(frozen=True)
class Words:
    """Prompts as a model reads them.

    Attributes:
        ids: [B, N] long.
        mask: [B, N] bool, False for padding.
        lexical: [B, N] bool, True for the words of the prompt only.
    """

    ids: Tensor
    mask: Tensor
    lexical: Tensor


def read_prompts(
    tokenizer: Any, prompts: Sequence[str], *, max_tokens: int, full: bool, device: torch.device, who: str
) -> Words:
    """Tokenize prompts; those that are too long are cut with a warning.

    Args:
        tokenizer: of transformers; None is refused.
        prompts: at least one.
        max_tokens: most tokens, special ones included.
        full: pad every prompt to max_tokens, not to the longest.
        device: of the result.
        who: name for the messages.

    Raises:
        ValueError: no tokenizer, or a prompt without a word; the message names its index.
    """
    if tokenizer is None:
        raise ValueError(f"{who}: this encoder has no tokenizer. Build it with one, or with from_pretrained.")
    prompts = check_prompts(prompts, who)
    for i, prompt in enumerate(prompts):
        if not re.search(r"[^\W_]", prompt):
            raise ValueError(f"{who}: prompts[{i}] is {prompt!r}, expected at least one word. Describe the video.")
    for i, row in enumerate(tokenizer(prompts)["input_ids"]):
        if len(row) > max_tokens:
            warnings.warn(f"{who}: prompts[{i}] has {len(row)} tokens, only {max_tokens} are read.", stacklevel=4)
    batch = tokenizer(
        prompts,
        padding="max_length" if full else True,
        truncation=True,
        max_length=max_tokens,
        return_attention_mask=True,
        return_special_tokens_mask=True,
        return_tensors="pt",
    )
    mask = batch["attention_mask"].bool()
    lexical = mask & ~batch["special_tokens_mask"].bool()
    return Words(*(x.to(device) for x in (batch["input_ids"], mask, lexical)))

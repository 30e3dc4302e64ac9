"""Latents of videos and embeddings of prompts on disk, so that each is computed once.

A file's name is a digest of all that its content depends on: the video's bytes or the prompt, the weights and
configurations that encode it, and the software. So nothing is ever out of date, a folder may serve several data sets,
models and processes at once, and what is loaded has the bits that encoding would give.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pisces.data import CaptionedVideos, atomic_path
from pisces.pipelines.base import PipelineAdapter, PromptEmbeds

logger = logging.getLogger(__name__)

# Part of every name: raise it when this package encodes a video or a prompt otherwise than before.
FORMAT = 1
# What decodes, encodes and rounds; another version may give other bits.
VIDEO_SOFTWARE = ("av", "torch", "diffusers")
TEXT_SOFTWARE = ("torch", "diffusers", "transformers", "tokenizers", "ftfy")
# Keys of a configuration that say where it came from.
ORIGIN_KEYS = ("transformers_version", "name_or_path")


@runtime_checkable
class DigestedVideos(CaptionedVideos, Protocol):
    """Captioned videos that can be told apart without decoding them."""

    def digest(self, index: int) -> str:
        """Of what the frames of a video depend on."""
        ...


class LatentCache:
    """Latents and prompt embeddings of one pipeline in a folder, one safetensors file each.

    Files are written atomically, so processes may share the folder. A damaged one is logged and written again. Nothing
    is ever deleted: remove the folder, or its oldest files, when it is too large.

    Args:
        folder: where they are; made if missing.
        adapter: the pipeline that encodes. When they are first needed, all weights of its VAE and of its text encoders
            are read once for their digests.

    Attributes:
        n_written: entries that were not there and were encoded.

    Example:
        >>> import tempfile
        >>> from pisces.pipelines import load_pipeline
        >>> from pisces.world import checkpoint_path
        >>> adapter = load_pipeline(checkpoint_path("wan-base"))
        >>> cache = LatentCache(tempfile.mkdtemp(), adapter)
        >>> adapter.prompt_memory.store = cache
        >>> _ = adapter.encode_prompts(["a red square moves left", "a red square moves left"])
        >>> cache.n_written
        1
    """

    def __init__(self, folder: str | Path, adapter: PipelineAdapter) -> None:
        self.folder = Path(folder)
        self.adapter = adapter
        self.n_written = 0
        self._digests: dict[str, str] = {}
        for kind in ("latents", "prompts"):
            (self.folder / kind).mkdir(parents=True, exist_ok=True)

    def latents(self, video: str, encode: Callable[[], Tensor]) -> Tensor:
        """Latents of a video.

        Args:
            video: digest of what its frames depend on, as `VideoFolder.digest` gives it.
            encode: called if they are not there.

        Returns:
            What ``encode`` returns, or once returned.
        """
        return self._get("latents", video, self._video_encoder, lambda: {"latents": encode()})["latents"]

    def embeds(self, prompt: str, encode: Callable[[], PromptEmbeds]) -> PromptEmbeds:
        """Embeddings of a prompt, likewise: the store of :class:`pisces.pipelines.prompt_memory.PromptMemory`."""
        return self._get("prompts", prompt, self._text_encoder, encode)

    def forget(self) -> None:
        """Take the digests anew: needed after the weights or configurations of an encoder have changed."""
        self._digests.clear()

    def _get(
        self, kind: str, item: str, encoder: Callable[[], Any], encode: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if kind not in self._digests:
            family, device = type(self.adapter).__name__, self.adapter.device.type
            self._digests[kind] = _digest([FORMAT, kind, family, device, encoder()])
        file = self.folder / kind / f"{_digest([self._digests[kind], item])}.safetensors"
        if file.is_file():
            try:
                # Read, not mapped into memory: another process may replace the file.
                return {name: value.to(self.adapter.device) for name, value in load(file.read_bytes()).items()}
            except SafetensorError as error:
                logger.warning("%s is damaged (%s): it is encoded again", file, error)
        tensors = encode()
        with atomic_path(file) as temporary:
            temporary.write_bytes(save({name: value.cpu().contiguous() for name, value in tensors.items()}))
        self.n_written += 1
        return tensors

    def _video_encoder(self) -> Any:
        # Tiles overlap and blend, so that they change the latents; they are no part of the configuration.
        tiled = bool(getattr(self.adapter.vae, "use_tiling", False))
        encoder = [_versions(VIDEO_SOFTWARE), module_digest(self.adapter.vae), tiled]
        # Pipelines with one VAE may want one more latent frame or not.
        return [*encoder, self.adapter.n_padding] if self.adapter.n_padding else encoder

    def _text_encoder(self) -> Any:
        parts: dict[str, str] = {}
        for name, part in self.adapter.pipe.components.items():
            if name.startswith("tokenizer") and part is not None:
                parts[name] = tokenizer_digest(part)
            elif isinstance(part, nn.Module) and name != "vae" and not name.startswith("transformer"):
                parts[name] = module_digest(part)
        # The denoiser says how many tokens are wanted, and in which precision.
        transformer: Any = self.adapter.transformer
        return [_versions(TEXT_SOFTWARE), parts, _plain(transformer.config), str(transformer.dtype)]


def module_digest(module: nn.Module, *, rounded: bool = False) -> str:
    """A digest of a model: its class, its configuration, and name, type, shape and bytes of every tensor.

    Args:
        module: on any device; its tensors are copied to the CPU one by one.
        rounded: take floating-point tensors as bfloat16 holds them, so that a model and the same in bfloat16 have one
            digest.

    Example:
        >>> one, other = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> module_digest(one) == module_digest(other)
        False
        >>> _ = other.load_state_dict(one.state_dict())
        >>> module_digest(one) == module_digest(other)
        True
    """
    hasher = hashlib.sha256(_digest([type(module).__name__, _plain(getattr(module, "config", None))]).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if rounded and tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        hasher.update(_digest([name, str(tensor.dtype), list(tensor.shape)]).encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer: class, vocabulary, special tokens, limits, templates, and its rules where it has them.

    Args:
        tokenizer: of transformers.
    """
    rules: dict[str, Any] = {}
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left there by the call before: no part of the tokenizer.
        rules.update(truncation=None, padding=None)
    names = ("special_tokens_map", "model_max_length", "padding_side", "truncation_side", "chat_template")
    settings = {name: getattr(tokenizer, name, None) for name in names}
    return _digest([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), rules, _plain(settings)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _versions(packages: tuple[str, ...]) -> list[str]:
    return [f"{package} {version(package)}" for package in packages]


def _plain(value: Any) -> Any:
    """A configuration as JSON can hold it, without keys that say where it came from or fields that do not compare."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value) if field.compare}
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        kept = {str(key): item for key, item in value.items() if not str(key).startswith("_")}
        return {key: _plain(item) for key, item in kept.items() if key not in ORIGIN_KEYS}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)

"""Latents of videos and embeddings of prompts on disk, so that each is computed once.

A file's name is a digest of all that its content depends on: the video's bytes or the prompt, the weights and
configurations that encode it, and the software. So nothing is ever out of date, a folder may serve several data sets,
models and processes at once, and what is loaded has the bits that encoding would give.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from pisces.data import CaptionedVideos, atomic_path
from pisces.digests import json_digest, module_digest, plain, tokenizer_digest
from pisces.pipelines.base import PipelineAdapter, PromptEmbeds

logger = logging.getLogger(__name__)

# Part of every name: raise it when this package encodes a video or a prompt otherwise than before.
FORMAT = 1
# What decodes, encodes and rounds; another version may give other bits.
VIDEO_SOFTWARE = ("av", "torch", "diffusers")
TEXT_SOFTWARE = ("torch", "diffusers", "transformers", "tokenizers", "ftfy")


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
            self._digests[kind] = json_digest([FORMAT, kind, family, device, encoder()])
        file = self.folder / kind / f"{json_digest([self._digests[kind], item])}.safetensors"
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
        return [_versions(TEXT_SOFTWARE), parts, plain(transformer.config), str(transformer.dtype)]


def _versions(packages: tuple[str, ...]) -> list[str]:
    return [f"{package} {version(package)}" for package in packages]

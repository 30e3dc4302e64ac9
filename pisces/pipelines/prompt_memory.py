"""Prompt embeddings that were computed before: the last ones in memory, all of them in a store if there is one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

# Embeddings of the prompts seen last; at Wan's 512 x 4096 float32 (8 MiB each) this keeps memory at 8 GiB at most.
PROMPT_CACHE_SIZE = 1024


class PromptStore(Protocol):
    """Where embeddings outlive the process, such as :class:`pisces.latent_cache.LatentCache`."""

    def embeds(self, prompt: str, encode: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is stored for a prompt, or what ``encode`` returns, which is then stored."""
        ...

    def forget(self) -> None:
        """The encoders have changed: what was stored is of others."""
        ...


class PromptMemory:
    """Embeddings by prompt, encoded when they are first asked for.

    Args:
        encode: embeddings of one prompt, tensors without a batch axis.

    Attributes:
        store: asked before ``encode``; None is none.
    """

    def __init__(self, encode: Callable[[str], dict[str, Tensor]]) -> None:
        self.encode = encode
        self.store: PromptStore | None = None
        self._last: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def __getitem__(self, prompt: str) -> dict[str, Tensor]:
        if prompt not in self._last:
            if self.store is None:
                self._last[prompt] = self.encode(prompt)
            else:
                self._last[prompt] = self.store.embeds(prompt, lambda: self.encode(prompt))
        self._last.move_to_end(prompt)
        if len(self._last) > PROMPT_CACHE_SIZE:
            self._last.popitem(last=False)
        return self._last[prompt]

    def move(self, device: str) -> None:
        """Hold what is remembered on a device."""
        for prompt, embeds in self._last.items():
            self._last[prompt] = {name: value.to(device) for name, value in embeds.items()}

    def clear(self) -> None:
        """Forget all: needed after a text encoder has changed."""
        self._last.clear()
        if self.store is not None:
            self.store.forget()

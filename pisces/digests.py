"""Digests of models and tokenizers: what they compute with, wherever it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

# Keys of a configuration that say where it came from.
ORIGIN_KEYS = ("transformers_version", "name_or_path")


def module_digest(module: nn.Module, *, rounded: bool = False, without: Collection[str] = ()) -> str:
    """A digest of a model: its class, its configuration, and name, type, shape and bytes of every tensor.

    Args:
        module: on any device; its tensors are copied to the CPU one by one.
        rounded: take floating-point tensors as bfloat16 holds them, so that a model and the same in bfloat16 have one
            digest.
        without: names of tensors, and of entries of the configuration, that do not count.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> one, other = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> module_digest(one) == module_digest(other)
        False
        >>> _ = other.load_state_dict(one.state_dict())
        >>> module_digest(one) == module_digest(other)
        True
    """
    config = plain(getattr(module, "config", None))
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if key not in without}
    hasher = hashlib.sha256(json_digest([type(module).__name__, config]).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if name in without:
            continue
        if rounded and tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        hasher.update(json_digest([name, str(tensor.dtype), list(tensor.shape)]).encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer: class, vocabulary, special tokens, limits, templates, and its rules where it has them.

    Args:
        tokenizer: of transformers.

    Returns:
        64 hexadecimal digits.
    """
    rules: dict[str, Any] = {}
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left there by the call before: no part of the tokenizer.
        rules.update(truncation=None, padding=None)
    names = ("special_tokens_map", "model_max_length", "padding_side", "truncation_side", "chat_template")
    settings = {name: getattr(tokenizer, name, None) for name in names}
    return json_digest([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), rules, plain(settings)])


def json_digest(value: Any) -> str:
    """SHA-256 of what JSON can hold, whatever the order of its keys; 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """A configuration as JSON can hold it, without keys that say where it came from or fields that do not compare."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value) if field.compare}
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        kept = {str(key): item for key, item in value.items() if not str(key).startswith("_")}
        return {key: plain(item) for key, item in kept.items() if key not in ORIGIN_KEYS}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)

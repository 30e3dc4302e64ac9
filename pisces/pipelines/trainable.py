"""What of a pipeline is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pisces.pipelines.base import PipelineAdapter

if TYPE_CHECKING:
    from pisces.config import LoraConfig


def best_device() -> str:
    """Where the commands put a pipeline if nothing else is said: the first GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(
    adapter: PipelineAdapter, lora: LoraConfig | None, *, seed: int = 0, gradient_checkpointing: bool = False
) -> None:
    """Choose what is trained: every weight of the denoisers, or a new LoRA adapter on each.

    Call it once, before ``FrozenBase`` and ``Trainer``.

    Args:
        adapter: the pipeline.
        lora: the adapter's settings; None for full fine-tuning.
        seed: of the adapter's first weights (Gaussian A, zero B: at first the model is the base).
        gradient_checkpointing: recompute the denoisers' blocks in the backward pass, for the memory of one block.

    An adapter is float32 whatever the transformer is: bfloat16 has 8 bits, and swallows small updates.

    Raises:
        ValueError: if the transformer already has an adapter, no layer has the wanted name, or all of a transformer
            that is not float32 is to be trained.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in adapter.denoisers.values():
            _prepare(module, lora, adapter.lora_targets, gradient_checkpointing)


def _prepare(transformer: Any, lora: LoraConfig | None, targets: Sequence[str], gradient_checkpointing: bool) -> None:
    """The same for one denoiser."""
    if getattr(transformer, "peft_config", None):
        raise ValueError("prepare: the transformer already has a LoRA adapter. Load the pipeline afresh.")
    if gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if lora is None:
        if transformer.dtype != torch.float32:
            raise ValueError(
                f"prepare: full fine-tuning of a {transformer.dtype} transformer would lose small updates. "
                "Load it in float32, or train a LoRA adapter."
            )
        transformer.requires_grad_(True)
        return
    from peft import LoraConfig as PeftConfig

    targets = list(lora.targets or targets)
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if missing:
        raise ValueError(f"prepare: the transformer has no linear layer named {missing}. It has e.g. {names[:6]}.")
    transformer.requires_grad_(False)
    config = PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, init_lora_weights="gaussian")
    transformer.add_adapter(config)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def trained_parameters(adapter: PipelineAdapter) -> dict[str, nn.Parameter]:
    """The parameters that :func:`prepare` chose, by name; of several denoisers with theirs in front."""
    several = len(adapter.denoisers) > 1
    return {
        f"{denoiser}.{name}" if several else name: parameter
        for denoiser, module in adapter.denoisers.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }

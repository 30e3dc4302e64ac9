"""The memory of a training step, predicted by running it on tensors without contents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pisces.algorithms import Algorithm
from pisces.algorithms.base import Batch, FrozenBase
from pisces.decode.meter import TensorMeter
from pisces.pipelines.base import PipelineAdapter
from pisces.pipelines.trainable import trained_parameters


@dataclass(frozen=True)
class StepMemory:
    """What a training step takes, predicted.

    Attributes:
        weights_bytes: of the pipeline and of a frozen copy of the denoiser, if there is one.
        optimizer_bytes: gradients, both moments of AdamW and averaged weights.
        peak_bytes: most bytes alive at a time of what a step makes besides: states, activations, frames. The
            reward's own memory and kernels' workspaces come on top; AdamW on a GPU takes the size of the trained
            weights once more, when these are gone.
    """

    weights_bytes: int
    optimizer_bytes: int
    peak_bytes: int


class MeanReward:
    """Stands for the rewards: the gradient of all frames, and no network."""

    def __init__(self) -> None:
        self.weights = {"mean": 1.0}

    def terms(self, frames: Tensor, prompts: list[str]) -> Mapping[str, Tensor]:
        """The mean of each video."""
        return {"mean": frames.mean((1, 2, 3, 4))}


def predict_step(adapter: PipelineAdapter, algorithm: Algorithm, batch: Batch, *, ema: bool = False) -> StepMemory:
    """Predict the memory of one micro-batch, forward and backward.

    The denoiser and the VAE are moved to PyTorch's "meta" device, where tensors have shapes and no contents, and the
    algorithm's own loss is run on them: exactly the operations of a real step, attention counted as a fused kernel does
    it. The adapter cannot be used for anything else afterwards.

    Args:
        adapter: the pipeline, given to ``prepare``; its text encoders embed the prompts for real.
        algorithm: built on it, with :class:`MeanReward` for the rewards.
        batch: what it trains on.
        ema: whether averaged weights are kept.

    Returns:
        The prediction.

    Raises:
        ValueError: for a denoiser that looks at the contents of its inputs (HunyuanVideo 1.5, Mochi).
    """
    encoders = [part for part in adapter.pipe.components.values() if isinstance(part, nn.Module)]
    weights = sum(p.nbytes for part in encoders for p in part.parameters())
    base = getattr(algorithm, "base", None)
    copies = list((base.copies or {}).values()) if isinstance(base, FrozenBase) else []
    weights += sum(p.nbytes for copy in copies for p in copy.parameters())
    trained = sum(p.nbytes for p in trained_parameters(adapter).values())
    adapter.encode_prompts([*batch.prompts, ""])
    adapter.prompt_memory.move("meta")
    there: list[Tensor] = []
    for module in (*adapter.denoisers.values(), *copies, adapter.vae):
        module.to("meta")
        there += [*module.parameters(), *module.buffers()]
    # Gradients are there from the first micro-batch on: the meter is to see what is added to them only.
    for parameter in trained_parameters(adapter).values():
        parameter.grad = torch.zeros_like(parameter)
        there.append(parameter.grad)
    try:
        with TensorMeter(there) as meter, _fused_attention():
            loss, _ = algorithm.loss(batch, torch.Generator().manual_seed(0))
            loss.backward()
    except RuntimeError as error:
        raise ValueError(
            f"predict_step: the {type(adapter.transformer).__name__} looks at the contents of its inputs ({error}), "
            "expected a denoiser that looks at shapes. Use `pisces plan` on the pipeline's folder for the decode alone."
        ) from error
    return StepMemory(weights, trained * (4 if ema else 3), meter.peak)


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device attention is taken apart into products; every kernel that is used keeps its output only."""
    attention = F.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output: Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return output

    # Not a TorchFunctionMode: autograd switches those off in the backward pass, where checkpoints compute again.
    F.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention

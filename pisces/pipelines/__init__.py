"""One adapter for each family of diffusers text-to-video pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pisces.pipelines.base import PipelineAdapter, PromptEmbeds
from pisces.pipelines.cogvideox import CogVideoXAdapter
from pisces.pipelines.files import check_pipeline_dir
from pisces.pipelines.hunyuan import HunyuanVideo15Adapter, HunyuanVideoAdapter
from pisces.pipelines.ltx import LTXAdapter
from pisces.pipelines.mochi import MochiAdapter
from pisces.pipelines.trainable import prepare
from pisces.pipelines.wan import WanAdapter

ADAPTERS: dict[str, type[PipelineAdapter]] = {
    family.pipeline_class: family
    for family in (
        WanAdapter,
        HunyuanVideoAdapter,
        HunyuanVideo15Adapter,
        CogVideoXAdapter,
        LTXAdapter,
        MochiAdapter,
    )
}


def load_pipeline(path: str | Path, **options: Any) -> PipelineAdapter:
    """Load a local diffusers directory with the adapter that fits its ``model_index.json``.

    Args:
        path: the directory.
        **options: dtype, vae_dtype, device and decoding, as :meth:`PipelineAdapter.from_pretrained` takes them.

    Returns:
        The adapter.

    Raises:
        FileNotFoundError: if the directory is missing or is no pipeline.
        ValueError: if its class has no adapter.
    """
    root = check_pipeline_dir(path, who="load_pipeline")
    try:
        name = json.loads((root / "model_index.json").read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load_pipeline: {root / 'model_index.json'} names no pipeline class ({error}).") from error
    if name not in ADAPTERS:
        known = ", ".join(sorted(ADAPTERS))
        raise ValueError(f"load_pipeline: {root} is a {name}, expected one of: {known}.")
    return ADAPTERS[name].from_pretrained(root, **options)


__all__ = [
    "ADAPTERS",
    "CogVideoXAdapter",
    "HunyuanVideo15Adapter",
    "HunyuanVideoAdapter",
    "LTXAdapter",
    "MochiAdapter",
    "PipelineAdapter",
    "PromptEmbeds",
    "WanAdapter",
    "load_pipeline",
    "prepare",
]

"""`pisces plan`: which way of decoding a video for a reward fits into memory."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pisces.algorithms import Batch
from pisces.build import build_adapter, build_algorithm, build_batches, first_prompts, video_size
from pisces.config import TrainConfig
from pisces.decode import choose, describe, latents_shape, plan_decode
from pisces.decode.plan import METHODS, made_on_meta, size_text
from pisces.pipelines import prepare
from pisces.step_memory import MeanReward, predict_step

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# What a run's settings say in the place of the command's options; they have no spatial tiles.
SETTINGS = {
    "frames": "pipeline.n_frames",
    "height": "pipeline.height",
    "width": "pipeline.width",
    "batch": "data.batch_size",
    "dtype": "pipeline.vae_dtype",
    "tiling": None,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def plan(
    vae: str, *, frames: int, height: int, width: int, batch: int, dtype: str, tiling: bool, budget: str | None
) -> str:
    """The table of all ways to decode, and the choice.

    Args:
        vae: a diffusers directory (of a pipeline or of its autoencoder; only its config is read), or the name of an
            autoencoder class of diffusers, whose default sizes are then meant.
        frames: of a video.
        height: in pixels.
        width: in pixels.
        batch: videos that are decoded together.
        dtype: "float32", "bfloat16" or "float16".
        tiling: the class's own spatial tiles.
        budget: memory for the decode, such as "24GB"; None chooses nothing.

    Returns:
        Text.

    Raises:
        ValueError: if something is not possible, or nothing fits.
        FileNotFoundError: if there is no such directory.
    """
    limit = None if budget is None else bytes_of(budget)
    if dtype not in DTYPES:
        raise ValueError(f"plan: got dtype {dtype!r}, expected one of {', '.join(DTYPES)}.")
    model = autoencoder(vae, DTYPES[dtype])
    if tiling:
        model.enable_tiling()
    shape = latents_shape(model, frames=frames, height=height, width=width, batch=batch)
    plans = plan_decode(model, shape, methods=tqdm(METHODS, desc="ways of decoding", unit="way", leave=False))
    plain = next(one for one in plans if one.options.get("memory") == "plain")
    latents = torch.empty(*shape, dtype=DTYPES[dtype], device="meta")
    weights = sum(parameter.nbytes for parameter in model.decoder.parameters())
    lines = [
        f"{type(model).__name__}, {batch} x {frames} frames of {height} x {width}, {dtype}: latents {tuple(shape)}",
        describe(model, latents, temb=torch.empty(batch, device="meta")),
        "",
        f"{'decode(vae, latents, ...)':<36}{'peak memory':>12}{'of plain':>10}{'work':>8}",
    ]
    for one in plans:
        share = one.peak_bytes / plain.peak_bytes
        lines.append(f"{one.name:<36}{size_text(one.peak_bytes):>12}{share:>10.1%}{one.relative_time:>7.2f}x")
    lines += [
        "",
        "Predicted from shapes: tensors of the decode, the frames and their gradient.",
        f"On top come the decoder's weights ({size_text(weights)}), reward, denoiser and the kernels' workspaces.",
    ]
    if limit is not None:
        lines.append(f"The least work within {size_text(limit)}: {choose(plans, limit).name}")
    return "\n".join(lines)


def refuse_decode_options(given: Mapping[str, Any]) -> None:
    """Refuse options that are meant for an autoencoder where there are settings of a run.

    Args:
        given: the command's options as they were written, by name; those that a run has, too, are passed over.

    Raises:
        ValueError: naming the options, and the settings that say the same.
    """
    wrong = [name for name in SETTINGS if name in given]
    if not wrong:
        return
    settings = [f"--set {key}={given[name]}" for name in wrong if (key := SETTINGS[name]) is not None]
    advice = " ".join(
        [f"Write {' '.join(settings)}."] * bool(settings)
        + ["A run decodes without tiles: leave --tiling out."] * ("tiling" in wrong)
    )
    options = ", ".join(f"--{name}" for name in wrong)
    raise ValueError(f"plan: got {options} with settings of a run, which have their own. {advice}")


def plan_training(config: TrainConfig, *, budget: str | None = None) -> str:
    """The memory of a training step, of the process that makes it.

    Args:
        config: of the run; its pipeline is read, its rewards are not.
        budget: memory for the whole, such as "24GB"; None compares with nothing.

    Returns:
        Text.

    Raises:
        ValueError: if the settings do not fit together, the denoiser cannot be run on shapes, or it does not fit.
        FileNotFoundError: if a file that the settings name is not there.
    """
    limit = None if budget is None else bytes_of(budget)
    config = dataclasses.replace(config, pipeline=dataclasses.replace(config.pipeline, device="cpu"))
    adapter = build_adapter(config)
    # No video is opened, and no cache filled for another device than the run's.
    prompts = first_prompts(build_batches(config, adapter), config.data.batch_size)
    batch = Batch(prompts, latents=torch.zeros(len(prompts), *adapter.latent_shape(**video_size(config))))
    checkpointing = config.pipeline.gradient_checkpointing
    prepare(adapter, config.lora, seed=config.seed, gradient_checkpointing=checkpointing)
    algorithm = build_algorithm(config, adapter, MeanReward())
    found = predict_step(adapter, algorithm, batch, ema=config.optimizer.ema_decay > 0)
    n_frames, height, width = adapter.video_size(**video_size(config))
    total = found.weights_bytes + found.optimizer_bytes + found.peak_bytes
    if limit is not None and total > limit:
        raise ValueError(
            f"plan: the step takes {size_text(total)}, expected at most {size_text(limit)}: weights "
            f"{size_text(found.weights_bytes)}, gradients and moments {size_text(found.optimizer_bytes)}, the rest "
            f"{size_text(found.peak_bytes)}. Choose fewer frames (--set pipeline.n_frames=...), a smaller picture, "
            "pipeline.gradient_checkpointing=true, a smaller lora.rank, or bfloat16."
        )
    what = f"{config.algorithm.name}, {len(batch.prompts)} x {n_frames} frames of {height} x {width}"
    lines = [
        f"{type(adapter).__name__}, {what}",
        "",
        f"{'weights':<46}{size_text(found.weights_bytes):>12}",
        f"{'gradients, moments, averages':<46}{size_text(found.optimizer_bytes):>12}",
        f"{'states, activations, frames at the peak':<46}{size_text(found.peak_bytes):>12}",
        f"{'together':<46}{size_text(total):>12}",
        "",
        "Predicted from shapes. On top come the rewards' own networks and activations and the kernels' workspaces.",
    ]
    if limit is not None:
        lines.append(f"Of {size_text(limit)} that leaves them {size_text(limit - total)}.")
    return "\n".join(lines)


def bytes_of(text: str) -> int:
    """Bytes of "24GB", "512 MiB" or "1000000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"plan: got budget {text!r}, expected a size such as 24GB or 512MiB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def autoencoder(source: str, dtype: torch.dtype) -> Any:
    """An autoencoder without contents, from a directory's configuration or a class's defaults."""
    import diffusers

    path = Path(source)
    config: dict[str, Any] = {}
    name = source
    if path.exists():
        found = [place for place in (path / "vae" / "config.json", path / "config.json") if place.is_file()]
        if not found:
            raise FileNotFoundError(
                f"plan: {source} has no config.json and no vae/config.json. Name a diffusers folder."
            )
        config = json.loads(found[0].read_text())
        name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None) if name.startswith(("Autoencoder", "AsymmetricAutoencoder")) else None
    if cls is None:
        what = "an autoencoder of diffusers" if path.exists() else "a directory or an autoencoder class of diffusers"
        raise ValueError(f"plan: {name} is not {what}. Try AutoencoderKLWan.")
    return made_on_meta(cls, config, dtype)

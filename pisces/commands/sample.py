"""`pisces sample`: videos of a generator for prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pisces.config import pipeline_path
from pisces.data import atomic_path, write_metadata, write_video
from pisces.pipelines import load_pipeline
from pisces.pipelines.trainable import best_device
from pisces.report import contact_sheet

MAX_SHEET = 24  # clips on the contact sheet
FPS = 8


def sample(
    prompts: Sequence[str],
    output: Path,
    *,
    pipeline: str,
    lora: Path | None,
    seed: int,
    steps: int | None,
    guidance: float,
    n_frames: int | None,
    height: int | None,
    width: int | None,
    fps: float | None,
    batch_size: int,
    device: str | None = None,
) -> list[Path]:
    """Sample one video a prompt and write mp4 files, a contact sheet, captions and settings.

    Video i starts from noise of the seed `seed + i`, so it does not depend on the number of prompts or the batch size
    (beyond rounding).

    Args:
        prompts: texts, none empty.
        output: folder; made if missing, files of the same names are replaced.
        pipeline: diffusers directory, or "packaged:NAME".
        lora: directory or file for `load_lora_weights`.
        seed: of the first video.
        steps: sampler steps; None as the pipeline directory says, as for the sizes and the rate.
        guidance: classifier-free guidance, 1 is off.
        n_frames: frames a video.
        height: in pixels.
        width: in pixels.
        fps: pictures a second.
        batch_size: videos at a time.
        device: such as "cuda:1"; None is the first GPU if there is one, else the CPU.

    Returns:
        The mp4 files.

    Raises:
        FileNotFoundError: no such pipeline or LoRA.
        ValueError: settings that do not fit.
    """
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"sample: --fps is {fps}, expected a positive number.")
    adapter = load_pipeline(pipeline_path(pipeline), device=device or best_device())
    if lora is not None:
        adapter.load_lora(_lora_file(lora))
    defaults = getattr(adapter, "defaults", {})
    rate = fps or defaults.get("fps", FPS)
    files: list[Path] = []
    shown: list[torch.Tensor] = []
    bar = tqdm(total=len(prompts), desc="sampling", unit="video", disable=None)
    with bar, torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            texts = list(prompts[start : start + batch_size])
            noise = torch.cat([_noise(adapter, seed + start + i, n_frames, height, width) for i in range(len(texts))])
            frames = adapter.decode(adapter.sample(texts, steps=steps, guidance_scale=guidance, noise=noise)).cpu()
            for video in frames:
                files.append(write_video(output / f"{len(files):04d}.mp4", video, fps=rate, lossless=False))
                if len(shown) < MAX_SHEET:
                    shown.append(video)
            bar.update(len(texts))
    contact_sheet(output / "contact-sheet.png", [("", torch.stack(shown))], prompts[:MAX_SHEET])
    settings = {
        "pipeline": pipeline,
        "lora": str(lora) if lora else None,
        "steps": steps or defaults.get("steps"),
        "guidance": guidance,
    }
    rows = [
        {"prompt": prompt, "file_name": file.name, "seed": seed + i, **settings}
        for i, (prompt, file) in enumerate(zip(prompts, files, strict=True))
    ]
    with atomic_path(output / "prompts.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    # With captions the folder is a data set: `score`, `fit-ot-map` and `train` read it.
    write_metadata(output, [{"file_name": row["file_name"], "text": row["prompt"]} for row in rows])
    return files


def _noise(adapter: Any, seed: int, n_frames: int | None, height: int | None, width: int | None) -> torch.Tensor:
    shape = adapter.latent_shape(n_frames=n_frames, height=height, width=width)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, *shape), generator=generator).to(adapter.device)


def _lora_file(lora: Path) -> Path:
    """The one LoRA file at a path."""
    files = [lora] if lora.is_file() else sorted(lora.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"sample: no LoRA at {str(lora)!r}, expected a directory with a .safetensors file.")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"sample: {str(lora)!r} holds several LoRA files ({names}). Give the path of one.")
    return files[0]

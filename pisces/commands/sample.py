"""`pisces sample`: videos of a generator for prompts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pisces.config import pipeline_path
from pisces.data import atomic_path, read_video, write_metadata, write_video
from pisces.pipelines import load_pipeline
from pisces.pipelines.files import files_fingerprint
from pisces.pipelines.trainable import best_device
from pisces.report import contact_sheet

MAX_SHEET = 24  # clips on the contact sheet
SHEET_FRAMES = 5  # of each
FPS = 8
MAX_NAME_BYTES = 255  # of usual file systems


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
    names: str = "number",
    per_prompt: int = 1,
    lossless: bool = False,
    resume: bool = False,
    guidance_2: float | None = None,
) -> list[Path]:
    """Sample videos of prompts and write mp4 files, a contact sheet, captions and settings.

    Video i (all videos of a prompt behind each other) starts from noise of the seed `seed + i`, so it does not depend
    on the number of prompts or the batch size (beyond rounding).

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
        names: "number" writes `0000.mp4`; "vbench" writes `videos/PROMPT-K.mp4`, K the number among those of a prompt,
            where VBench's evaluator looks for them. It takes every file of that folder for a video.
        per_prompt: videos of each prompt; VBench wants 5.
        lossless: at their own size without loss, to be measured; otherwise as every player shows them, small ones
            enlarged.
        resume: leave the files that an earlier call with the same settings wrote.
        guidance_2: guidance of the expert for less noise, where a pipeline has two; None is `guidance`.

    Returns:
        The mp4 files.

    Raises:
        FileNotFoundError: no such pipeline or LoRA.
        ValueError: settings that do not fit, prompts that make no file name, or a folder to resume with others.
    """
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"sample: --fps is {fps}, expected a positive number.")
    texts = [prompt for prompt in prompts for _ in range(per_prompt)]
    files = [output / name for name in file_names(prompts, names, per_prompt)]
    adapter = load_pipeline(pipeline_path(pipeline), device=device or best_device())
    if lora is not None:
        adapter.load_lora(_lora_file(lora))
    defaults = getattr(adapter, "defaults", {})
    rate = fps or defaults.get("fps", FPS)
    settings = {
        "pipeline": pipeline,
        "lora": str(lora) if lora else None,
        "steps": steps or defaults.get("steps"),
        "guidance": guidance,
        "guidance_2": guidance_2,
        "size": list(adapter.video_size(n_frames=n_frames, height=height, width=width)),
        "fps": rate,
        "lossless": lossless,
        # A folder that was trained on again has the same name and other weights.
        "weights": files_fingerprint(pipeline_path(pipeline)) + (files_fingerprint(lora) if lora else ""),
    }
    rows = [
        {"prompt": text, "file_name": str(file.relative_to(output)), "seed": seed + i, **settings}
        for i, (text, file) in enumerate(zip(texts, files, strict=True))
    ]
    listing, content = output / "prompts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    there = listing.read_text(encoding="utf-8") if listing.is_file() else None
    if resume and there != content and (there is not None or any(file.exists() for file in files)):
        raise ValueError(f"sample: {output} holds videos of other prompts or settings. Choose another --output.")
    if names == "vbench" and files[0].parent.is_dir():
        foreign = sorted({file.name for file in files[0].parent.iterdir()} - {file.name for file in files})
        if foreign:
            raise ValueError(
                f"sample: {files[0].parent} holds {foreign[0]!r}, which is no video of these prompts and which VBench "
                "would take for one. Choose another --output."
            )
    missing = [i for i, file in enumerate(files) if not (resume and file.is_file())]
    bar = tqdm(total=len(files), initial=len(files) - len(missing), desc="sampling", unit="video", disable=None)
    with bar, torch.no_grad():
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            noise = torch.cat([_noise(adapter, seed + i, n_frames, height, width) for i in part])
            few = [texts[i] for i in part]
            latents = adapter.sample(
                few, steps=steps, guidance_scale=guidance, guidance_scale_2=guidance_2, noise=noise
            )
            frames = adapter.decode(latents).cpu()
            if start == 0:  # what is to be made, before the first of it: a stopped call is resumed by it
                for i in missing:  # of other settings, perhaps
                    files[i].unlink(missing_ok=True)
                with atomic_path(listing) as temporary:
                    temporary.write_text(content, encoding="utf-8")
            for i, video in zip(part, frames, strict=True):
                write_video(files[i], video, fps=rate, lossless=lossless)
            bar.update(len(part))
    shown = torch.stack([read_video(file, n_frames=SHEET_FRAMES) for file in files[:MAX_SHEET]])
    contact_sheet(output / "contact-sheet.png", [("", shown)], texts[:MAX_SHEET])
    # With captions the folder is a data set: `score`, `fit-ot-map` and `train` read it.
    write_metadata(output, [{"file_name": row["file_name"], "text": row["prompt"]} for row in rows])
    return files


def file_names(prompts: Sequence[str], names: str, per_prompt: int) -> list[str]:
    """Paths of all videos below the output folder, those of a prompt behind each other.

    Raises:
        ValueError: unknown `names`; with "vbench", a prompt that is there twice or cannot be a file name.
    """
    if names == "number":
        return [f"{i:04d}.mp4" for i in range(len(prompts) * per_prompt)]
    if names != "vbench":
        raise ValueError(f"sample: --names is {names!r}, expected number or vbench.")
    twice = sorted(prompt for prompt, count in Counter(prompts).items() if count > 1)
    if twice:
        raise ValueError(f"sample: the prompt {twice[0]!r} is there twice, expected once: it names the file.")
    for prompt in prompts:
        if "/" in prompt or "\0" in prompt or len(f"{prompt}-{per_prompt}.mp4".encode()) > MAX_NAME_BYTES:
            raise ValueError(
                f"sample: {prompt[:60]!r} cannot be a file name, expected at most {MAX_NAME_BYTES} bytes without '/'. "
                "Use --names number."
            )
    return [f"videos/{prompt}-{k}.mp4" for prompt in prompts for k in range(per_prompt)]


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

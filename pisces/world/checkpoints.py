"""Making the packaged checkpoints of the small world from nothing: `pisces world train-checkpoints`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline

from pisces.pipelines.files import quiet_files, whole_dir, write_defaults
from pisces.pipelines.wan import WanAdapter
from pisces.world.dataset import FPS
from pisces.world.encoder_recipe import train_encoder
from pisces.world.generator_recipe import BASE, GOOD, GeneratorData, train_generator
from pisces.world.judge import judge, mean_scores
from pisces.world.recipe import Log, write_json
from pisces.world.scene import FRAMES, SIZE, Split, captions, render, sample_scenes
from pisces.world.vae_recipe import IMAGE_STEPS, VIDEO_STEPS, build_vae, train_vae

STAGES = ("vae", "encoder", "wan-good", "wan-base")
SAMPLER_STEPS = 12
SCORED = 128  # videos or captions per score
SCORE_SEED = 999


def train_checkpoints(output: str | Path, *, only: list[str] | None = None, seed: int = 0, log: Log = print) -> None:
    """Train VAE, encoder and both generators; each stage resumes where it was killed and is skipped when done.

    Args:
        output: receives encoder/, wan-good/ and wan-base/; progress is kept in output/.state until a stage is done.
        only: stages to run out of "vae", "encoder", "wan-good", "wan-base"; those named are made again. None runs
            what is missing. The generators need the VAE, which is found in output/.state or in a finished generator.
        seed: of every stage.
        log: takes one line of progress.

    Raises:
        ValueError: an unknown stage.
        FileNotFoundError: a generator is asked for and there is no VAE.
    """
    output = Path(output)
    unknown = sorted(set(only or ()) - set(STAGES))
    if unknown:
        raise ValueError(f"train_checkpoints: unknown stages {unknown}, expected some of {list(STAGES)}.")
    state = output / ".state"
    runs: dict[str, Callable[[], None]] = {
        "vae": lambda: _make_vae(state, seed, log),
        "encoder": lambda: _make_encoder(output / "encoder", state, seed, log),
        "wan-good": lambda: _make_generator(output, state, "wan-good", GOOD, seed, log),
        "wan-base": lambda: _make_generator(output, state, "wan-base", BASE, seed, log),
    }
    for stage in STAGES:
        made = any(folder.is_dir() for folder in _vae_folders(output)) if stage == "vae" else (output / stage).is_dir()
        if stage in only if only is not None else not made:
            log(f"{stage}: training")
            runs[stage]()


def _make_vae(state: Path, seed: int, log: Log) -> None:
    vae = train_vae(state / "vae.pt", seed=seed, log=log)
    vae.save_pretrained(state / "vae")
    (state / "vae.pt").unlink()


def _make_encoder(folder: Path, state: Path, seed: int, log: Log) -> None:
    train_encoder(folder, seed=seed, log=log, state_file=state / "encoder.pt")
    (state / "encoder.pt").unlink()


def _make_generator(output: Path, state: Path, name: str, data: GeneratorData, seed: int, log: Log) -> None:
    pipe = train_generator(_load_vae(output), data, state / f"{name}.pt", name=name, seed=seed, log=log)
    with whole_dir(output / name) as folder:
        _save_small(pipe, folder)
        scores = _generator_scores(WanAdapter.from_pretrained(folder))
        training = {"generator": dataclasses.asdict(data), "vae": {"images": IMAGE_STEPS, "videos": VIDEO_STEPS}}
        write_json(folder / "scores.json", {"recipe": {"seed": seed, **training}, **scores})
    (state / f"{name}.pt").unlink()
    log(f"{name}: {scores}")


def _load_vae(output: Path) -> AutoencoderKLWan:
    for folder in _vae_folders(output):
        if folder.is_dir():
            stored = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
            # a new one: that which was loaded would write its folder's path into every config.json
            vae = build_vae(list(stored.config.latents_mean), list(stored.config.latents_std))
            vae.load_state_dict(stored.state_dict())
            return vae.eval()
    raise FileNotFoundError(f"train_checkpoints: no VAE in {output}. Run the stage 'vae' first.")


def _vae_folders(output: Path) -> tuple[Path, ...]:
    """Where the VAE may be: as it was trained, or half as precise in a finished generator."""
    return output / ".state" / "vae", output / "wan-good" / "vae", output / "wan-base" / "vae"


def _save_small(pipe: WanPipeline, folder: Path) -> None:
    """Save VAE and transformer as float16: half the size, and the difference is far below a step of 8-bit pixels."""
    pipe.vae.half()
    pipe.transformer.half()
    with quiet_files():
        pipe.save_pretrained(folder)
    write_defaults(folder, {"n_frames": FRAMES, "height": SIZE, "width": SIZE, "steps": SAMPLER_STEPS, "fps": FPS})


@torch.no_grad()
def _generator_scores(adapter: WanAdapter) -> dict[str, Any]:
    """The judge on reconstructions and on samples for training and held-out captions, as the files are stored."""
    scores: dict[str, Any] = {"reconstruction": _reconstruction_scores(adapter)}
    splits: tuple[Split, ...] = ("train", "held_out")
    for split in splits:
        scenes = sample_scenes(SCORED, torch.Generator().manual_seed(SCORE_SEED), split=split)
        for guidance in (1.0, 2.5):
            generator = torch.Generator().manual_seed(1)
            latents = adapter.sample(captions(scenes), generator=generator, guidance_scale=guidance)
            scores[f"{split}, guidance {guidance:g}"] = _rounded(mean_scores(judge(adapter.decode(latents), scenes)))
    return scores


@torch.no_grad()
def _reconstruction_scores(adapter: WanAdapter) -> dict[str, float]:
    generator = torch.Generator().manual_seed(SCORE_SEED)
    scenes = sample_scenes(SCORED, generator)
    frames = render(scenes, generator)
    rebuilt = adapter.decode(adapter.encode_frames(frames))
    psnr = -10 * torch.log10((rebuilt - frames).square().mean((1, 2, 3, 4)))
    return _rounded({"psnr": float(psnr.mean()), **mean_scores(judge(rebuilt, scenes))})


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in scores.items()}

"""Time and peak memory of a reward's gradient through the decoding of videos, against their length: docs/decode/.

    python -m benchmarks.decode                          # all classes and methods, about two hours on a core
    python -m benchmarks.decode --only wan --frames 5 17 # some
    python -m benchmarks.decode --plots                  # draw again what was measured

Narrow decoders of the real diffusers classes with random weights, a video of 32 x 32 pixels, float32. Peak memory is
that of tensors alive (pisces.decode.meter), weights not counted; time is of a run without the meter, methods taking
turns, the median where there are three. A method stops where the next length would take more than --gigabytes or
--seconds. Results are written after every length, and what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pisces.decode import decode
from pisces.decode.meter import TensorMeter
from pisces.video import atomic_path

Record = dict[str, Any]
FRAMES = (5, 17, 33, 65, 129, 257, 513, 1025)
PIXELS = 32
REPEATED_BELOW = 2.0  # seconds: shorter runs are measured three times


@dataclass(frozen=True)
class Decoder:
    """A narrow autoencoder: its class, its settings, frames and pixels a latent, what to know of its own decode."""

    cls: str
    config: dict[str, Any]
    time: int
    space: int
    note: str = ""


DECODERS: dict[str, Decoder] = {
    "wan": Decoder("AutoencoderKLWan", {"base_dim": 16, "z_dim": 4}, 4, 8),
    "wan22": Decoder(
        "AutoencoderKLWan",
        {
            "base_dim": 16,
            "z_dim": 4,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        },
        4,
        16,
    ),
    "cogvideox": Decoder(
        "AutoencoderKLCogVideoX",
        {
            "latent_channels": 4,
            "block_out_channels": (16, 32, 32, 64),
            "norm_num_groups": 4,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        },
        4,
        8,
    ),
    "mochi": Decoder(
        "AutoencoderKLMochi",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "layers_per_block": (1, 1, 2, 2, 1),
        },
        6,
        8,
    ),
    "hunyuan": Decoder(
        "AutoencoderKLHunyuanVideo",
        {"latent_channels": 4, "block_out_channels": (16, 32, 64, 64), "norm_num_groups": 4},
        4,
        8,
        "Its own decode, plain here, is in overlapping tiles of time from 17 frames on; ours is the same decode.",
    ),
    "hunyuan15": Decoder(
        "AutoencoderKLHunyuanVideo15",
        {"latent_channels": 4, "block_out_channels": (16, 32, 32, 64, 64), "layers_per_block": 2},
        4,
        16,
    ),
    "ltx": Decoder(
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 4,
            "block_out_channels": (16, 32, 64, 64),
            "decoder_block_out_channels": (16, 32, 64, 64),
            "layers_per_block": (2,) * 5,
            "decoder_layers_per_block": (2,) * 5,
            "decoder_inject_noise": (False,) * 5,
            "upsample_residual": (False,) * 4,
            "upsample_factor": (1,) * 4,
            "patch_size": 1,
        },
        8,
        8,
    ),
}


def own(vae: Any, latents: Tensor) -> Tensor:
    """Autograd through the class's own decode."""
    frames: Tensor = vae.decode(latents, return_dict=False)[0]
    return frames


def own_checkpointing(vae: Any, latents: Tensor) -> Tensor:
    """The same with diffusers' gradient checkpointing, where the class has it."""
    vae.enable_gradient_checkpointing()
    return own(vae, latents)


def own_tiling(vae: Any, latents: Tensor) -> Tensor:
    """The same in diffusers' spatial tiles, of half the picture's size and a quarter of it faded."""
    vae.enable_tiling()
    ratio = PIXELS // latents.shape[3]
    half = {"tile_sample_min_height": PIXELS // 2, "tile_sample_min_width": PIXELS // 2}
    if hasattr(vae, "tile_latent_min_height"):
        half |= {"tile_latent_min_height": PIXELS // 2 // ratio, "tile_latent_min_width": PIXELS // 2 // ratio}
    else:
        stride = max(ratio, PIXELS // 2 - ratio)
        half |= {"tile_sample_stride_height": stride, "tile_sample_stride_width": stride}
    for name, value in half.items():
        setattr(vae, name, value)
    return own(vae, latents)


def own_frames(vae: Any, latents: Tensor) -> Tensor:
    """The same with diffusers' frame-wise decode, where the class has it; other frames than in one piece."""
    vae.use_framewise_decoding = True
    return own(vae, latents)


def ours(**options: Any) -> Callable[[Any, Tensor], Tensor]:
    """pisces.decode with options."""
    return lambda vae, latents: decode(vae, latents, **options)


METHODS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": own,
    "diffusers checkpointing": own_checkpointing,
    "diffusers tiling": own_tiling,
    "diffusers frame-wise": own_frames,
    "keep": ours(states="keep"),
    "keep, chunks of 4": ours(states="keep", chunk=4),
    "sqrt": ours(states="sqrt"),
    "cbrt": ours(states="cbrt"),
    "sqrt, checkpoint": ours(states="sqrt", checkpoint=True),
}


def has(method: str, decoder: Decoder, vae: Any) -> bool:
    """Whether a class has the switch that a method wants, switched off, and the picture is large enough for it."""
    if method == "diffusers checkpointing":
        return bool(vae._supports_gradient_checkpointing)
    if method == "diffusers frame-wise":
        return getattr(vae, "use_framewise_decoding", True) is False
    if method == "diffusers tiling":
        return PIXELS // decoder.space >= 4
    return True


def build(decoder: Decoder) -> Any:
    """The autoencoder, frozen, as it is when it is made."""
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, decoder.cls)(**decoder.config).eval().requires_grad_(False)


def run(decoder: Decoder, method: str, n_latents: int) -> float:
    """Seconds of one gradient."""
    vae = build(decoder)
    size = PIXELS // decoder.space
    latents = torch.randn(1, 4, n_latents, size, size, requires_grad=True)
    started = time.perf_counter()
    frames = METHODS[method](vae, latents)
    torch.autograd.grad(frames, latents, torch.ones_like(frames))
    return time.perf_counter() - started


def measure(decoder: Decoder, methods: Sequence[str], frames: int) -> dict[str, Record]:
    """One length: the methods take turns."""
    n_latents = max(1, -(-(frames - 1) // decoder.time)) + 1
    peaks = {}
    for method in methods:
        with TensorMeter() as meter:
            run(decoder, method, n_latents)
        peaks[method] = meter.peak
    seconds: dict[str, list[float]] = {method: [run(decoder, method, n_latents)] for method in methods}
    for _ in range(2):
        for method in methods:
            if seconds[method][0] < REPEATED_BELOW:
                seconds[method].append(run(decoder, method, n_latents))
    return {
        method: {"latents": n_latents, "seconds": statistics.median(seconds[method]), "peak": peaks[method]}
        for method in methods
    }


def benchmark(arguments: argparse.Namespace) -> Record:
    """Measure what is not there yet."""
    file = arguments.output / "results.json"
    results: Record = json.loads(file.read_text()) if file.exists() else {}
    for frames, name in itertools.product(sorted(arguments.frames), arguments.only or DECODERS):
        decoder = DECODERS[name]
        vae = build(decoder)
        table = results.setdefault(name, {method: {} for method in METHODS if has(method, decoder, vae)})
        chosen = [m for m in table if m in (arguments.methods or METHODS)]
        wanted = [m for m in chosen if str(frames) not in table[m] and fits(table[m], frames, arguments)]
        if not wanted:
            continue
        print(f"{name}, {frames} frames: {'; '.join(wanted)}", flush=True)
        for method, record in measure(decoder, wanted, frames).items():
            table[method][str(frames)] = record
        write(file, results)
    return results


def fits(measured: dict[str, Record], frames: int, arguments: argparse.Namespace) -> bool:
    """Whether a length is worth trying, if memory and time grow as the frames do."""
    shorter = [int(n) for n in measured if int(n) < frames]
    if not shorter:
        return frames == min(arguments.frames) or not measured
    last = max(shorter)
    growth = frames / last
    record = measured[str(last)]
    small = record["peak"] * growth < arguments.gigabytes * 1e9
    return bool(small and record["seconds"] * growth < arguments.seconds)


def write(file: Path, results: Record) -> None:
    """All results, whole or not at all."""
    with atomic_path(file) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")


PREFACE = """# Measured: gradients through the decoding of videos

`python -m benchmarks.decode`: narrow decoders of the real classes with random weights, one video of
{pixels} x {pixels} pixels, float32, a CPU. A cell is the peak of tensors alive in MB, weights not counted, and in
brackets the time over that of plain autograd. In decoders this small much of the time is that of many small calls, and
the machine is shared: a ratio is good to a third or so. Pieces as short as a latent frame of Mochi or LTX also fall
back to PyTorch's slow CPU convolution (`slow_conv3d_forward`, half of their time by torch.profiler) where whole videos
take oneDNN's. What one latent frame takes is the floor of every chunked method: compare rows by how they grow.
Of 257 frames and more only the memory counts: those runs shared their core with other work.
"""


def table_of(results: Record) -> str:
    """A table a class: megabytes, and seconds over those of plain autograd where that fits."""
    lines = [PREFACE.format(pixels=PIXELS)]
    for name, table in results.items():
        lengths = sorted({int(n) for measured in table.values() for n in measured})
        lines += [f"## {name}: `{DECODERS[name].cls}`", "", f"![{name}]({name}.svg)", ""]
        lines += [DECODERS[name].note, ""] if DECODERS[name].note else []
        lines += [f"| MB (time beside plain) | {' | '.join(map(str, lengths))} |", "|---" * (len(lengths) + 1) + "|"]
        for method, measured in table.items():
            cells = []
            for frames in lengths:
                record, plain = measured.get(str(frames)), table["plain"].get(str(frames))
                ratio = f" ({record['seconds'] / plain['seconds']:.1f}x)" if record and plain else ""
                cells.append(f"{record['peak'] / 1e6:.3g}{ratio}" if record else "")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def draw(results: Record, folder: Path) -> None:
    """Memory and time against frames, a file a class."""
    from .plots import log_panels

    for name, table in results.items():
        curves = {method: {int(n): record for n, record in measured.items()} for method, measured in table.items()}
        log_panels(
            curves, folder / f"{name}.svg", axis="frames",
            title=f"{name}: gradient of all frames, a video of {PIXELS} x {PIXELS}, narrow decoder",
            quantities=(("peak", 1e6, "peak memory / MB"), ("seconds", 1.0, "time / s")),
            dashed=[method for method in table if method == "plain" or method.startswith("diffusers")],
        )  # fmt: skip


def main() -> None:
    """Measure, write the page and the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=DECODERS, help="some of the classes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="some of the methods")
    parser.add_argument("--frames", nargs="+", type=int, default=list(FRAMES), help="lengths; rounded to latents")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="most memory that is tried")
    parser.add_argument("--seconds", type=float, default=60.0, help="longest run that is tried")
    parser.add_argument("--output", type=Path, default=Path("docs/decode"))
    parser.add_argument("--plots", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    results = json.loads((arguments.output / "results.json").read_text()) if arguments.plots else benchmark(arguments)
    (arguments.output / "README.md").write_text(table_of(results))
    draw(results, arguments.output)


if __name__ == "__main__":
    main()

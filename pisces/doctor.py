"""What this installation can do and what it lacks: `pisces doctor`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "bad"]
PACKAGES = (
    *("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "av"),
    *("braceexpand", "einops", "matplotlib", "pillow", "pyyaml", "psutil", "tensorboard", "tqdm", "typer", "rich"),
    "ftfy",
)
CHECKPOINTS = ("encoder", "wan-base", "wan-good")
NEEDED_BYTES = 2**30  # a demo with its checkpoints and videos stays below


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        topic: heading under which it stands.
        name: what was looked at.
        state: "ok"; "note" for what may be missing; "bad" for what keeps commands from working.
        detail: what was found, and what to do about it.
    """

    topic: str
    name: str
    state: State
    detail: str


def diagnose(folder: Path = Path()) -> list[Check]:
    """Look at versions, kernels, checkpoints, video codecs, processors and disk; change nothing, fetch nothing.

    Args:
        folder: where results would be written; its disk is measured.

    Returns:
        The checks in order of the report.

    Example:
        >>> any(check.name == "torch" for check in diagnose())
        True
    """
    return [*_versions(), *_kernels(), *_checkpoints(), *_video(), *_machine(folder)]


def _versions() -> list[Check]:
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    checks = [Check("versions", "python", "ok" if sys.version_info >= (3, 11) else "bad", python)]
    for name in ("pisces-kernels", *PACKAGES):
        try:
            checks.append(Check("versions", name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            own = name == "pisces-kernels"
            detail = "not installed (running from a source tree)" if own else f"missing: pip install {name}"
            checks.append(Check("versions", name, "note" if own else "bad", detail))
    return checks


def _kernels() -> list[Check]:
    import pisces_kernels

    info = pisces_kernels.build_info()
    if info is None:
        build = Check(
            "kernels", "build", "note", f"not compiled: {pisces_kernels.why_not('cpu')}. Run: pip install -e ."
        )
    else:
        build = Check("kernels", "build", "ok", ", ".join(f"{key} {value}" for key, value in info.items()))
    checks = [build]
    for backend in pisces_kernels.BACKENDS:
        reason = pisces_kernels.why_not(backend)
        checks.append(Check("kernels", backend, "note" if reason else "ok", reason or "available"))
    return checks


def _checkpoints() -> list[Check]:
    from pisces.world import CHECKPOINTS as PACKAGED
    from pisces.world import checkpoint_path

    checks = []
    for name in CHECKPOINTS:
        try:
            path = checkpoint_path(name)
        except FileNotFoundError:
            checks.append(
                Check("checkpoints", name, "bad", f"missing. Run: pisces world train-checkpoints --output {PACKAGED}")
            )
            continue
        megabytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
        checks.append(Check("checkpoints", name, "ok", f"{megabytes:.1f} MB in {path}"))
    return checks


def _video() -> list[Check]:
    import av

    checks = []
    for codec, mode, use in (
        ("h264", "r", "reading mp4"),
        ("vp9", "r", "reading webm"),
        ("libx264", "w", "writing mp4"),
    ):
        try:
            av.Codec(codec, mode)
            checks.append(Check("video", use, "ok", codec))
        except (av.FFmpegError, ValueError):
            state: State = "note" if codec == "vp9" else "bad"
            checks.append(Check("video", use, state, f"this PyAV lacks {codec}. Run: pip install --force-reinstall av"))
    return checks


def _machine(folder: Path) -> list[Check]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wish = os.environ.get("OMP_NUM_THREADS")
    threads = f"{torch.get_num_threads()} of torch, {usable} processors" + (f", OMP_NUM_THREADS={wish}" if wish else "")
    checks = [Check("machine", "threads", "ok", threads)]
    if torch.cuda.is_available():
        checks.append(Check("machine", "gpu", "ok", torch.cuda.get_device_name(0)))
    else:
        checks.append(
            Check("machine", "gpu", "note", "none that this torch sees; everything here runs on the processor")
        )
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free at {place}"
    if not os.access(place, os.W_OK):
        checks.append(Check("machine", "disk", "bad", f"cannot write to {place}"))
    else:
        checks.append(Check("machine", "disk", "ok" if free >= NEEDED_BYTES else "bad", detail))
    offline = os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True", "ON", "YES")
    detail = "off for the Hugging Face libraries" if offline else "left on by HF_HUB_OFFLINE; no command needs it"
    checks.append(Check("machine", "network", "ok" if offline else "note", detail))
    return checks


def doctor(*, as_json: bool = False, folder: Path = Path()) -> bool:
    """Print the report.

    Args:
        as_json: one JSON list instead of tables.
        folder: as in `diagnose`.

    Returns:
        Whether nothing is bad.
    """
    checks = diagnose(folder)
    fine = all(check.state != "bad" for check in checks)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
        return fine

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    marks = {"ok": Text("ok", "green"), "note": Text("note", "yellow"), "bad": Text("BAD", "bold red")}
    table = Table(show_header=False, box=None, pad_edge=False)
    for column in ("topic", "state", "name"):
        table.add_column(column, no_wrap=True)
    table.add_column("detail", overflow="fold")
    topic = ""
    for check in checks:
        heading = Text(check.topic if check.topic != topic else "", "bold")
        table.add_row(heading, marks[check.state], check.name, Text(check.detail))
        topic = check.topic
    console.print(table)
    n_bad = sum(check.state == "bad" for check in checks)
    console.print("Everything that the commands need is here." if fine else f"{n_bad} things are missing, marked BAD.")
    return fine

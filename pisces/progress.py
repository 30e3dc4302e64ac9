"""What a terminal shows of a run: a bar, the rewards behind it, and the memory."""

from __future__ import annotations

import sys
from typing import NoReturn

import psutil
import torch
from tqdm import tqdm

from pisces.run_log import Record


def progress_bar(done: int, total: int, *, shown: bool) -> tqdm[NoReturn]:
    """A bar of steps; nothing where stderr is no terminal."""
    return tqdm(total=total, initial=done, disable=not (shown and sys.stderr.isatty()), unit="step")


def show(bar: tqdm[NoReturn], record: Record) -> None:
    """One step further, with the rewards and the memory behind the bar."""
    shown = {k: v for k, v in record.items() if k == "loss" or k.startswith("reward")}
    numbers = {k: f"{v:.3f}" for k, v in shown.items() if v is not None}
    bar.set_postfix({**numbers, "memory": f"{record['memory_gb']:.1f} GB"}, refresh=False)
    bar.update()


def start_memory(device: torch.device) -> None:
    """Forget the peak of a GPU's memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_gb(device: torch.device) -> float:
    """The peak since :func:`start_memory` on a GPU, else what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9

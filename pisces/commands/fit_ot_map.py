"""`pisces fit-ot-map`: align the text embeddings of an encoder with those of real videos."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from pisces.config import resolve_path
from pisces.data import VideoFolder, VideoReadError, VideoShards, open_videos
from pisces.encoders import VideoTextEncoder, load_encoder
from pisces.ot_map import Alignment, Kind, alignment_metrics, fit_alignment

BATCH_SIZE = 32
MIN_HELD_OUT = 3  # what the metrics need
DECIMALS = {"sinkhorn_divergence": 4}


def fit_ot_map(
    videos: Path,
    output: Path,
    *,
    encoder: str,
    kind: Kind,
    steps: int,
    hidden: int | None,
    lr: float,
    batch_size: int,
    seed: int,
    held_out: float,
) -> dict[str, dict[str, float]]:
    """Embed captioned videos, fit an alignment on one part, measure it on the other, write it.

    Args:
        videos: a captioned folder, or shards.
        output: .safetensors file to write.
        encoder: directory of an encoder, or "packaged".
        kind: kind of alignment.
        steps: outer steps of the Neural OT fit.
        hidden: width of its networks; None is twice the width of the embeddings and at least 128.
        lr: its learning rate.
        batch_size: its batch.
        seed: of the split and of the fit.
        held_out: share of the videos that is measured on and not fitted on.

    Returns:
        Metrics by kind: "none", "center" and the one fitted.

    Raises:
        FileNotFoundError: no such folder or encoder.
        ValueError: too few videos, a bad setting or output name.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"fit-ot-map: --output is {str(output)!r}, expected a name that ends in .safetensors.")
    if not 0 < held_out < 1:
        raise ValueError(f"fit-ot-map: --held-out is {held_out}, expected a share between 0 and 1.")
    model = load_encoder(resolve_path(encoder))
    text, video, captions = embed(open_videos(videos, n_frames=model.n_frames, size=model.size), model)
    n_test = round(held_out * len(captions))
    if n_test < MIN_HELD_OUT or len(captions) - n_test < 2:
        raise ValueError(
            f"fit-ot-map: {len(captions)} readable videos, {n_test} of them held out, expected at least "
            f"{MIN_HELD_OUT} held out and 2 others. Give more videos."
        )
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed))
    test, train = order[:n_test], order[n_test:]
    width = hidden or max(128, 2 * text.shape[1])
    alignment = fit_alignment(
        text[train],
        video[train],
        kind=kind,
        hidden=width,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    # Beside the map stands what costs nothing: no alignment, and centring alone.
    compared = {"none": Alignment("none"), "center": fit_alignment(text[train], video[train], kind="center")}
    compared[kind] = alignment
    test_captions = [captions[i] for i in test.tolist()]
    results = {}
    remarks: list[str] = []
    for name, candidate in compared.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results[name] = alignment_metrics(candidate, text[test], video[test], test_captions)
        if name == kind:
            remarks = [str(warning.message) for warning in caught]
    alignment.save(output)
    _print(results, remarks, n_train=len(train), n_test=n_test, output=output)
    return results


@torch.no_grad()
def embed(videos: VideoFolder | VideoShards, model: VideoTextEncoder) -> tuple[Tensor, Tensor, list[str]]:
    """Embed every readable video with its caption; unreadable ones are named on stderr and left out.

    Returns:
        text [n, E], video [n, E] and the n captions.
    """
    errors = Console(stderr=True, soft_wrap=True)
    texts: list[Tensor] = []
    embeddings: list[Tensor] = []
    captions: list[str] = []
    skipped = 0
    bar = tqdm(total=len(videos), desc="embedding", unit="video", disable=None)
    with bar:
        for start in range(0, len(videos), BATCH_SIZE):
            frames: list[Tensor] = []
            words: list[str] = []
            for i in range(start, min(start + BATCH_SIZE, len(videos))):
                try:
                    clip, caption = videos[i]
                except VideoReadError as error:
                    skipped += 1
                    errors.print(f"pisces: skipped {error.path}: {error.why}", markup=False, highlight=False)
                    continue
                frames.append(clip)
                words.append(caption)
            if words:
                texts.append(model.encode_text(words).embedding)
                embeddings.append(model.encode_video(torch.stack(frames)).embedding)
                captions += words
            bar.update(min(BATCH_SIZE, len(videos) - start))
    if skipped:
        errors.print(f"pisces: {skipped} of {len(videos)} videos could not be read")
    if not captions:
        raise ValueError(f"fit-ot-map: none of the {len(videos)} videos in {str(videos.path)!r} could be read.")
    return torch.cat(texts), torch.cat(embeddings), captions


def _print(
    results: dict[str, dict[str, float]], remarks: Sequence[str], *, n_train: int, n_test: int, output: Path
) -> None:
    console = Console()
    names = list(next(iter(results.values())))
    table = Table(title=f"fitted on {n_train} videos, measured on {n_test} others", title_justify="left")
    table.add_column("")
    for kind in results:
        table.add_column(kind, justify="right")
    for name in names:
        digits = DECIMALS.get(name, 3)
        table.add_row(name, *(f"{metrics[name]:.{digits}f}" for metrics in results.values()))
    console.print(table)
    console.print(
        "r_at_1 (higher) and rho (lower) tell whether the reward gets better; gap, cosine and divergence improve even "
        "where it gets worse.",
        style="dim",
    )
    for remark in remarks:
        console.print(f"warning: {remark}", style="yellow", markup=False)
    console.print(f"wrote {output}", markup=False, highlight=False)

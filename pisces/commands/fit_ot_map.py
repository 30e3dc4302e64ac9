"""`pisces fit-ot-map`: align the text embeddings of an encoder with those of real videos."""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as ConsoleTable
from torch import Tensor
from tqdm import tqdm

from pisces.commands.inputs import choose_device
from pisces.config import resolve_path
from pisces.data import open_videos
from pisces.encoders import load_encoder, read_options
from pisces.ot_map import (
    KINDS,
    LINEAR,
    NEURAL,
    OBJECTIVES,
    Alignment,
    HeldOut,
    Kind,
    Objective,
    alignment_metrics,
    encoder_facts,
    fit_alignment,
    paper_settings,
)
from pisces.ot_map.embeddings import PATIENCE, Embeddings, embed, extract, read_embeddings, wait_for_shards
from pisces.processes import Processes, join_processes, own_device

Choice = Literal["r_at_1", "rho", "last"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
MIN_HELD_OUT = 3  # pairs, as the metrics need, and captions, without which retrieval says little
CHECKS = 50  # how often in a training maps are compared
DECIMALS = {"sinkhorn_divergence": 4}
ADVICE = (
    "r_at_1 (higher) and rho (lower) tell whether the reward gets better; gap, cosine and divergence improve even "
    "where it gets worse."
)


PAPERS = ("steps", "hidden", "lr", "batch_size", "cost_weight", "objective")
"""Options of a training that `--paper` sets."""


@dataclass(frozen=True)
class FitOptions:
    """How the alignment is fitted.

    Attributes:
        kind: kind of alignment.
        steps: outer steps of the Neural OT fit.
        hidden: width of its networks; None is twice the width of the embeddings and at least 128.
        lr: its learning rate.
        batch_size: its batch.
        cost_weight: weight of its transport cost.
        objective: "max_min" or "sinkhorn".
        choose: the best of its maps by "r_at_1" or "rho" on pairs set aside for that, or the "last" one.
        checkpoints: folder in which it is resumed; None keeps none.
        seed: of the split and of the fit.
        held_out: share of the captions and of their videos that is measured on and not fitted on, and as a share of the
            rest what is chosen by.
    """

    kind: Kind = "center_ot"
    steps: int = 1000
    hidden: int | None = None
    lr: float = 3e-4
    batch_size: int = 128
    cost_weight: float = 1.0
    objective: Objective = "max_min"
    choose: Choice = "r_at_1"
    checkpoints: Path | None = None
    seed: int = 0
    held_out: float = 0.2


def fit_ot_map(
    output: Path,
    *,
    videos: Path | None,
    embeddings: Path | None,
    encoder: str,
    options: FitOptions,
    paper: bool = False,
    compare: bool = False,
    report: Path | None = None,
    device: str | None = None,
    embed_batch: int = 32,
    patience: float = PATIENCE,
) -> dict[str, dict[str, float]]:
    """Embed captioned videos, fit an alignment on one part, measure it on the other, write it.

    Args:
        output: .safetensors file to write.
        videos: a captioned folder, or shards; None where `embeddings` holds all that is needed.
        embeddings: folder in which embeddings are kept; None keeps them in memory.
        encoder: directory of an encoder, or "packaged".
        options: of the fit.
        paper: take the paper's settings instead of those of `options`.
        compare: fit all kinds without training, too.
        report: .html to write, with a .png beside it.
        device: of encoder and fit; None is the first GPU if there is one, else the CPU.
        embed_batch: videos that the encoder sees at a time.
        patience: seconds without a new shard after which other processes are taken for dead.

    Returns:
        Metrics by kind; nothing in processes that embed only.

    Raises:
        FileNotFoundError: no such folder or encoder.
        ValueError: too few videos, a bad setting or output name, or another process that failed.
    """
    _check(output, videos, embeddings, options, report)
    joined = join_processes()
    processes = Processes()
    if processes.count > 1 and embeddings is None:
        raise ValueError("fit-ot-map: several processes need a folder in which to meet. Add --embeddings DIR.")
    place = own_device(device, joined, "--device") if joined else choose_device(device, "fit-ot-map")
    found, source = _embeddings(videos, embeddings, encoder, place, processes, embed_batch, patience)
    if not processes.is_main:
        return {}
    if paper:
        options = replace(options, **paper_settings(found.text.shape[1]))
    parts = split_pairs(found.captions, options)
    train, chosen_by, test = (torch.tensor(part, dtype=torch.long) for part in parts)
    text, video = found.text.to(place), found.video.to(place)
    alignment = _fit(text, video, found.captions, train, chosen_by, options)
    alignment.info |= source
    alignment.save(output)  # before anything else that could fail
    # Beside the map stands what costs nothing: no alignment, and centring alone.
    kinds: list[Kind] = [kind for kind in KINDS if kind not in NEURAL] if compare else ["none", "center"]
    if len(set(found.captions)) == 1:  # nothing to fit a matrix to; the metrics say so
        kinds = [kind for kind in kinds if kind not in LINEAR]
    compared: dict[Kind, Alignment] = {
        kind: fit_alignment(text[train], video[train], kind=kind, seed=options.seed)
        for kind in kinds
        if kind != options.kind
    }
    compared[options.kind] = alignment
    results, remarks = _measure(compared, text[test], video[test], [found.captions[i] for i in test.tolist()])
    counts = f"fitted on {len(train)} videos, " + (f"chosen on {len(chosen_by)}, " if len(chosen_by) else "")
    counts += f"measured on {len(test)} others" + _overlap(found.captions, parts)
    _print(results, remarks[options.kind], counts, output)
    if report is not None:
        write_report(report, alignment, text[test], video[test], results, remarks[options.kind], counts)
    return results


def refuse_unused(written: Mapping[str, object], kind: str) -> None:
    """Refuse options that would change nothing, however they were meant.

    Args:
        written: the command's options as they were written, by name.
        kind: of the alignment, written or not.

    Raises:
        ValueError: naming the options and what they are for.
    """

    def refuse(names: Sequence[str], advice: str) -> None:
        wrong = [f"--{name.replace('_', '-')}" for name in names if name in written]
        if wrong:
            raise ValueError(f"fit-ot-map: got {', '.join(wrong)}, {advice}")

    if written.get("paper"):
        refuse(("kind", *PAPERS), "and --paper, which has its own. Leave one of them out.")
    elif kind not in NEURAL:
        refuse(
            (*PAPERS, "choose", "checkpoints"), f"which kind {kind!r} does not use: it needs no training. Leave it out."
        )
    if "videos" not in written:
        refuse(("encoder",), "but the embeddings are there, made by the encoder that their folder names. Leave it out.")


def _check(
    output: Path, videos: Path | None, embeddings: Path | None, options: FitOptions, report: Path | None
) -> None:
    if output.suffix != ".safetensors":
        raise ValueError(f"fit-ot-map: --output is {str(output)!r}, expected a name that ends in .safetensors.")
    if report is not None and report.suffix != ".html":
        raise ValueError(f"fit-ot-map: --report is {str(report)!r}, expected a name that ends in .html.")
    for file in (output, report):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(file.parent, os.W_OK):
                raise PermissionError(f"fit-ot-map: cannot write to {str(file.parent)!r}. Choose another --output.")
    if videos is None and embeddings is None:
        raise ValueError("fit-ot-map: give --videos, or --embeddings of a folder that an earlier call filled.")
    if not 0 < options.held_out < 1:
        raise ValueError(f"fit-ot-map: --held-out is {options.held_out}, expected a share between 0 and 1.")
    for name, value, known in (
        ("objective", options.objective, OBJECTIVES),
        ("choose", options.choose, CHOICES),
    ):
        if value not in known:
            raise ValueError(f"fit-ot-map: --{name} is {value!r}, expected one of {', '.join(known)}.")


def _embeddings(
    videos: Path | None,
    folder: Path | None,
    encoder: str,
    device: torch.device,
    processes: Processes,
    batch_size: int,
    patience: float,
) -> tuple[Embeddings, dict[str, Any]]:
    """The embeddings, made where they are not there yet, and what the alignment's file says of their source."""
    n_videos = 0
    if videos is not None:
        model = load_encoder(resolve_path(encoder)).to(device)
        opened = open_videos(videos, **read_options(model))
        n_videos = len(opened)
        how: dict[str, Any] = {"batch_size": batch_size, "device": device}
        with tqdm(total=-(-n_videos // processes.count), desc="embedding", unit="video", disable=None) as bar:
            if folder is None:
                found = embed(opened, model, range(len(opened)), progress=bar.update, **how)
                source: dict[str, Any] = encoder_facts(model)
            else:
                extract(folder, opened, model, processes=processes, progress=bar.update, **how)
    if folder is not None:
        if not processes.is_main:
            return Embeddings(torch.empty(0), torch.empty(0), []), {}
        if processes.count > 1:
            wait_for_shards(folder, patience=patience)
        found, listing = read_embeddings(folder)
        n_videos = listing["n_videos"]
        source = {name: value for name, value in listing.items() if name.startswith("encoder")}
    errors = Console(stderr=True, soft_wrap=True)
    for name, why in found.unreadable:
        errors.print(f"pisces: skipped {name}: {why}", markup=False, highlight=False)
    if found.unreadable:
        errors.print(
            f"pisces: {len(found.unreadable)} of {n_videos} videos could not be read or have a caption without a word "
            "or an embedding that is not finite"
        )
    if not len(found):
        raise ValueError(f"fit-ot-map: none of the {n_videos} videos in {str(videos or folder)!r} could be used.")
    return found, source


def split_pairs(captions: Sequence[str], options: FitOptions) -> tuple[list[int], list[int], list[int]]:
    """Divide pairs into those to fit on, to choose by (none, if there is nothing to choose) and to measure on.

    Of a caption all pairs are in one part: on videos of captions that were fitted on, every map looks better. Parts
    have their shares of the captions, and about those of the pairs. Pairs are divided instead where one would have less
    than three captions.

    Args:
        captions: of all pairs.
        options: `kind` and `choose` say whether there is anything to choose, `held_out` and `seed` how it is divided.

    Returns:
        Numbers of the pairs of the three parts; the same for the same captions and options.

    Raises:
        ValueError: too few pairs.
    """
    n = len(captions)
    n_test = round(options.held_out * n)
    if n_test < MIN_HELD_OUT or n - n_test < 2:
        raise ValueError(
            f"fit-ot-map: {n} readable videos, {n_test} of them held out, expected at least {MIN_HELD_OUT} held out "
            "and 2 others. Give more videos."
        )
    of_caption: dict[str, list[int]] = {}
    for i, caption in enumerate(captions):
        of_caption.setdefault(caption, []).append(i)
    groups = _shuffled(list(of_caption.values()), options.seed)
    test, rest = _hold_out(groups, options.held_out)
    if not _enough(test, rest):
        test, rest = _hold_out(_shuffled([[i] for i in range(n)], options.seed), options.held_out)
    train = rest
    chosen_by: list[list[int]] = []
    if options.kind in NEURAL and options.choose != "last":
        for groups in (rest, _shuffled([[i] for group in rest for i in group], options.seed)):
            held, others = _hold_out(groups, options.held_out)
            if _enough(held, others):
                train, chosen_by = others, held
                break
    return _flat(train), _flat(chosen_by), _flat(test)


def _shuffled(groups: list[list[int]], seed: int) -> list[list[int]]:
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    return [groups[i] for i in order.tolist()]


def _hold_out(groups: list[list[int]], share: float) -> tuple[list[list[int]], list[list[int]]]:
    """Groups in their order that come to a share of them, and nearest to that of what is in them; and the others."""
    most_groups, most = round(share * len(groups)), round(share * sum(map(len, groups)))
    held: list[list[int]] = []
    others: list[list[int]] = []
    n = 0
    for group in groups:
        if len(held) < most_groups and n + len(group) / 2 <= most:
            held.append(group)
            n += len(group)
        else:
            others.append(group)
    return held, others


def _enough(held: list[list[int]], others: list[list[int]]) -> bool:
    return len(held) >= MIN_HELD_OUT and len(others) >= 2


def _flat(groups: list[list[int]]) -> list[int]:
    return [i for group in groups for i in group]


def _overlap(captions: Sequence[str], parts: Sequence[Sequence[int]]) -> str:
    """What is to be said of captions that are in several parts; nothing, if none is."""
    places = Counter(caption for part in parts for caption in {captions[i] for i in part})
    shared = sum(n > 1 for n in places.values())
    if not shared:
        return ""
    return (
        f"; captions in several of these parts: {shared} of {len(places)}, too few to keep them apart, so that the "
        "figures are partly those of captions fitted on"
    )


def _fit(
    text: Tensor, video: Tensor, captions: Sequence[str], train: Tensor, chosen_by: Tensor, options: FitOptions
) -> Alignment:
    held_out = None
    if len(chosen_by):
        metric: Literal["r_at_1", "rho"] = "rho" if options.choose == "rho" else "r_at_1"
        held_out = HeldOut(text[chosen_by], video[chosen_by], [captions[i] for i in chosen_by.tolist()], metric)
    return fit_alignment(
        text[train],
        video[train],
        kind=options.kind,
        hidden=options.hidden or max(128, 2 * text.shape[1]),
        steps=options.steps,
        lr=options.lr,
        batch_size=options.batch_size,
        cost_weight=options.cost_weight,
        objective=options.objective,
        held_out=held_out,
        check_every=max(1, options.steps // CHECKS),
        checkpoints=options.checkpoints,
        seed=options.seed,
        progress=sys.stderr.isatty(),
    )


def _measure(
    compared: dict[Kind, Alignment], text: Tensor, video: Tensor, captions: list[str]
) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """Metrics and warnings of every alignment."""
    results: dict[str, dict[str, float]] = {}
    remarks: dict[str, list[str]] = {}
    for kind, alignment in compared.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results[kind] = alignment_metrics(alignment, text, video, captions)
        remarks[kind] = [str(warning.message) for warning in caught]
    return results, remarks


def write_report(
    path: Path,
    alignment: Alignment,
    text: Tensor,
    video: Tensor,
    results: dict[str, dict[str, float]],
    remarks: Sequence[str],
    counts: str,
) -> None:
    """Write a page with the metrics and a picture of the held-out embeddings, and the picture beside it.

    Args:
        path: the .html; the picture is the .png of the same name.
        alignment: the fitted one.
        text: [n, E] held-out text embeddings.
        video: [n, E] those of their videos.
        results: metrics by kind.
        remarks: warnings about the fitted one.
        counts: how many videos served what.
    """
    from pisces.report import Image, Table, Text, embedding_plot, html_page

    plain = Alignment("none")
    with torch.no_grad():
        before, after = ((a.text(text), a.video(video)) for a in (plain, alignment))
    picture = embedding_plot(path.with_suffix(".png"), before, after)
    rows = _rows(results)
    chosen = [kind for kind, *_ in rows].index(alignment.kind)
    table = Table(["", *_names(results)], rows, note=ADVICE, highlight=[chosen])
    settings: list[list[str | float | None]] = [[name, str(value)] for name, value in alignment.info.items()]
    html_page(
        path,
        f"Alignment of kind {alignment.kind}",
        [
            ("Held-out pairs", [table, *(Text(remark) for remark in remarks)]),
            ("Embeddings", [Image(picture, "Held-out texts and videos before and after the alignment.")]),
            ("The fit", [Table(["", "value"], settings)]),
        ],
        lead=f"The alignment was {counts}.",
    )


def _names(results: dict[str, dict[str, float]]) -> list[str]:
    return list(next(iter(results.values())))


def _rows(results: dict[str, dict[str, float]]) -> list[list[str]]:
    """One line a kind."""
    return [
        [kind, *(f"{value:.{DECIMALS.get(name, 3)}f}" for name, value in metrics.items())]
        for kind, metrics in results.items()
    ]


def _print(results: dict[str, dict[str, float]], remarks: Sequence[str], counts: str, output: Path) -> None:
    console = Console()
    console.print(counts, highlight=False)
    table = ConsoleTable(box=SIMPLE)
    table.add_column("", no_wrap=True)
    for name in _names(results):
        table.add_column(name, justify="right", overflow="fold")
    for row in _rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(ADVICE, style="dim")
    for remark in remarks:
        console.print(f"warning: {remark}", style="yellow", markup=False)
    console.print(f"wrote {output}", markup=False, highlight=False)

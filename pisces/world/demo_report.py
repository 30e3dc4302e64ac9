"""What the demo shows: a Markdown table, reward curves, a before/after sheet and one HTML page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pisces.data import atomic_path
from pisces.page import Clips, Image, Table, Text, html_page
from pisces.report import animated_sheet, contact_sheet, reward_curves
from pisces.world.arms import BASE_LABEL, BASE_NAME, PISCES, Arm, DemoPaths, shown_captions

SCORES = ("semantic", "quality", "total")
METRICS = ("gap", "cosine", "r_at_1", "rho", "sinkhorn_divergence", "mutual_knn", "spearman")
METRIC_LABELS = ("gap", "cosine", "R@1", "rho", "Sinkhorn div.", "mutual k-NN", "Spearman")


def write_report(paths: DemoPaths, arms: Sequence[Arm], results: dict[str, Any], shown: Mapping[str, Tensor]) -> Path:
    """Write table.md, curves.png, sheet.png, sheet.gif and index.html.

    Args:
        paths: the demo's folders.
        arms: what was compared, in the order of the table.
        results: what results.json holds.
        shown: name of the arm (or "base") -> videos [n, T, 3, H, W] for the same n captions.

    Returns:
        The HTML page.
    """
    labels = {BASE_NAME: BASE_LABEL, **{arm.name: arm.label for arm in arms}}
    scores = score_table(results, labels)
    diagnostics = alignment_table(results)
    with atomic_path(paths.root / "table.md") as temporary:
        temporary.write_text(
            f"{_markdown(scores)}\n\n{_markdown(diagnostics)}\n\n{_markdown(calibration_table(results))}\n\n{leverage_line(results)}\n"
        )
    rewarded = {arm.label: paths.run(arm, 0) / "log.jsonl" for arm in arms if arm.alignment is not None}
    final = paths.run(PISCES, 0).relative_to(paths.root) / "final"
    keys = ["reward/quality", "reward/semantic"]
    curves = reward_curves(paths.root / "curves.png", rewarded, keys=keys, title="rewards while training, seed 0")
    prompts = list(shown_captions(results["judged_captions"], len(shown[BASE_NAME])))
    rows = [(labels[name], shown[name]) for name in (BASE_NAME, "further", PISCES.name) if name in shown]
    sheet = contact_sheet(paths.root / "sheet.png", rows, prompts)
    animated_sheet(paths.root / "sheet.gif", rows, prompts)
    clips = [
        Clips([(prompt, video) for prompt, video in zip(prompts, frames, strict=True)], caption=label)
        for label, frames in rows
    ]
    print(_plain(scores))
    return html_page(
        paths.root / "index.html",
        "PISCES in the small world",
        [
            ("Judged by pixels", [Text(_READING), scores]),
            ("Before and after", [Image(sheet, "held-out captions, the same noise for every generator"), *clips]),
            ("Rewards while training", [Image(curves)]),
            ("The alignments", [diagnostics, *_warnings(results)]),
            ("The judge on videos of which the verdict is known", [calibration_table(results)]),
            ("Partial transport", [Text(leverage_line(results))]),
        ],
        lead=(
            f"{results['steps']} post-training steps, {results['seeds']} seed(s), {results['judged_captions']} "
            "held-out captions. Nothing that the judge measures is learned, and no reward can read it. The "
            f"post-trained generator is a diffusers pipeline in {final}."
        ),
    )


_READING = (
    "The judge reads colours, shapes, directions and counts off the pixels (semantic) and measures flicker, sharpness, "
    "smooth motion, background and outline without reading the caption (quality); total = 0.8 quality + 0.2 semantic. "
    "The number behind ± is the standard deviation over seeds. Every arm starts from the same base; further "
    "pre-training has as many steps as cost the same FLOPs."
)


def score_table(results: dict[str, Any], labels: Mapping[str, str]) -> Table:
    """Arms against the judge's scores, mean and spread over seeds."""
    rows: list[list[str | float | None]] = []
    for name, label in labels.items():
        of_seeds = results["arms"][name]["scores"]
        cells = [_mean_and_spread([scores[score] for scores in of_seeds]) for score in SCORES]
        rows.append([label, str(results["arms"][name]["steps"]), *cells])
    highlight = [i for i, name in enumerate(labels) if name == PISCES.name]
    note = "Both OT rewards: the centred OT map for quality, partial transport in the attention for meaning."
    return Table(["generator", "steps", *SCORES], rows, note=note, highlight=highlight)


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def alignment_table(results: dict[str, Any]) -> Table:
    """Kinds of alignment against the metrics on videos that they were not fitted on."""
    rows: list[list[str | float | None]] = [
        [kind, *(f"{metrics[name]:.3f}" for name in METRICS)] for kind, metrics in results["alignments"].items()
    ]
    return Table(["alignment", *METRIC_LABELS], rows, note="R@1 should be high and rho low: they predict a map's use.")


def calibration_table(results: dict[str, Any]) -> Table:
    """What the judge says of real, damaged and meaningless videos."""
    rows: list[list[str | float | None]] = [
        [case, *(f"{scores[name]:.3f}" for name in SCORES)] for case, scores in results["judge"].items()
    ]
    return Table(["videos", *SCORES], rows)


def leverage_line(results: dict[str, Any]) -> str:
    """How far the words' attention can move this encoder's match score."""
    moved = results["leverage"]
    return (
        f"Partial transport moves the log-odds of a match by {moved['partial_ot']:.3f} on average, uniform attention "
        f"by {moved['uniform']:.3f}; over videos they have a standard deviation of {moved['logit_std']:.3f}."
    )


def _warnings(results: dict[str, Any]) -> list[Text]:
    lines = [line for metrics in results["alignments"].values() for line in metrics["warnings"]]
    return [Text("\n\n".join(lines))] if lines else []


def _markdown(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _plain(table: Table) -> str:
    lines = [[str(cell) for cell in line] for line in (table.header, *table.rows)]
    widths = [max(len(line[j]) for line in lines) for j in range(len(table.header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)

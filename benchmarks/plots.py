"""Plots of the results, in colours that colour-blind readers can tell apart (Okabe and Ito)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Record = dict[str, Any]
STYLES = {
    "ours": ("#D55E00", "o"),
    "torch.compile exp-free": ("#0072B2", "s"),
    "torch exp-free, mv": ("#56B4E9", "^"),
    "POT stabilized": ("#009E73", "D"),
    "official loop": ("#000000", "v"),
    "official function": ("#000000", "v"),
}
AXES = {"M": "columns M", "B": "problems B", "frames": "frames"}
WIDTH = 5.2  # inches of one panel


def draw(results: Record, folder: Path) -> dict[str, str]:
    """Write the plots for which there are figures: {file name: title}."""
    pictures = {}
    for axis, swept in results.get("sweeps", {}).items():
        pictures[f"{axis.lower()}.svg"] = f"Time and memory against {AXES[axis]}: {swept['what']}"
        sweep(swept, AXES[axis], folder / f"{axis.lower()}.svg")
    if any("work" in record and record["contenders"][0]["status"] == "ok" for record in results["workloads"]):
        pictures["roofline.svg"] = "Roofline of one core, and ours on it"
        roofline(results, folder / "roofline.svg")
    return pictures


def log_panels(
    curves: Mapping[str, Mapping[int, Record]], file: Path, *, title: str, axis: str,
    quantities: Sequence[tuple[str, float, str]], dashed: Collection[str],
) -> None:  # fmt: skip
    """A panel a quantity (key of a record, unit, label), a curve a method, both axes logarithmic."""
    figure, axes = plt.subplots(1, len(quantities), figsize=(WIDTH * len(quantities), 3.9))
    for ax, (quantity, unit, label) in zip(axes, quantities, strict=True):
        for name, records in curves.items():
            xs = sorted(records)
            style = "--" if name in dashed else "-"
            ax.plot(xs, [records[x][quantity] / unit for x in xs], style, marker="o", markersize=3, label=name)
        ax.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def curve(points: list[Record], name: str, quantity: str) -> tuple[list[float], list[float]]:
    """Where a contender has a figure."""
    found = [
        (point["x"], contender[quantity])
        for point in points
        for contender in point["contenders"]
        if contender["name"] == name and contender["status"] == "ok" and contender.get(quantity)
    ]
    return [x for x, _ in found], [y for _, y in found]


def sweep(swept: Record, label: str, file: Path) -> None:
    """Time, and memory where it was measured."""
    points = swept["points"]
    names = [contender["name"] for contender in points[0]["contenders"]]
    panels = [("median", 1e-3, "time of a call / ms")]
    if any(contender.get("memory") for point in points for contender in point["contenders"]):
        panels.append(("memory", 1e6, "peak memory beyond the inputs / MB"))
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH * len(panels), 3.9), squeeze=False)
    for ax, (quantity, unit, title) in zip(axes[0], panels, strict=True):
        for name in names:
            x, y = curve(points, name, quantity)
            if x:
                colour, marker = STYLES[name]
                ax.plot(x, [value / unit for value in y], marker=marker, color=colour, label=name)
        ax.set(xscale="log", yscale="log", xlabel=label, ylabel=title)
        ax.set_xticks([point["x"] for point in points], [str(point["x"]) for point in points])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(swept["what"] + ", one thread", fontsize=10)
    save(figure, file)


def roofline(results: Record, file: Path) -> None:
    """FLOP rate against FLOP per byte; a workload's bytes come from the level that its marker's colour names."""
    limits = results["limits"]
    levels = {"L1": "#E69F00", "L2": "#0072B2", "L3": "#009E73", "RAM": "#CC79A7"}
    figure, ax = plt.subplots(figsize=(8.6, 5.2))
    span = (0.25, 256.0)
    for level, colour in levels.items():
        rate = limits["loads"][level]
        knee = limits["flops"] / rate
        xs, ys = (span[0], knee, span[1]), (span[0] * rate, limits["flops"], limits["flops"])
        ax.plot(xs, [y / 1e9 for y in ys], color=colour, lw=1.3, label=f"{level}, {rate / 1e9:.0f} GB/s")
    ax.text(
        span[1],
        limits["flops"] / 1e9 * 1.06,
        f"multiply-add {limits['flops'] / 1e9:.0f} GFLOP/s",
        ha="right",
        fontsize=8,
    )
    placed: list[tuple[float, float, str, str]] = []
    for record in results["workloads"]:
        work, ours = record.get("work"), record["contenders"][0]
        if work is None or ours["status"] != "ok":
            continue
        x, y = work["flops"] / work["loads"], work["flops"] / ours["median"] / 1e9
        placed.append((x, y, work["level"], record["name"]))
    annotate(ax, placed, levels)
    ax.set(
        xscale="log", yscale="log", xlim=span, xlabel="least FLOP per byte read / (FLOP/byte)",
        ylabel="least FLOP over measured time / (GFLOP/s)",
    )  # fmt: skip
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8, title="loads from", loc="lower right")
    ax.set_title("Ours on the roofline of one core (float32; exponentials are not FLOP)", fontsize=10)
    save(figure, file)


def annotate(ax: Axes, placed: list[tuple[float, float, str, str]], levels: dict[str, str]) -> None:
    """Markers with names beside them, pushed apart where they would overlap."""
    last: dict[int, float] = {}
    for x, y, level, name in sorted(placed, key=lambda point: point[1]):
        ax.plot([x], [y], marker="o", color=levels[level], markeredgecolor="black", ls="none")
        column = round(x * 2)
        height = max(y, last.get(column, 0.0) * 1.13)
        last[column] = height
        ax.annotate(
            name, (x, y), (x * 1.12, height), fontsize=7, va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "alpha": 0.5},
        )  # fmt: skip


def save(figure: Any, file: Path) -> None:
    """Write the same bytes for the same figures."""
    figure.tight_layout()
    with mpl.rc_context({"svg.hashsalt": "benchmarks"}):
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)

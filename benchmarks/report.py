"""Turn results into docs: `python -m benchmarks.report results.json FOLDER` writes the page and the plots again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from . import plots
from .contender import LIBRARY, OFFICIAL, TORCH
from .workloads import BY_NAME, Target

Record = dict[str, Any]
PEERS = (TORCH, LIBRARY, OFFICIAL)
TWO_THREADS = 1.8  # speed-up that two threads should give

HOW_TO_READ = """\
- One thread on one core for every contender, float32, the same inputs. Conversion of inputs, compilation and first
  calls are not timed.
- In every round each contender has one turn, in an order that rotates. Times are medians, in brackets the quartiles.
  Slow contenders run fewer rounds, at least three. Ratios are medians over medians of the same run.
- Each result is compared with float64. *Error* is the total-variation distance of the worst row of the plan (as a share
  of its mass), or that of the attention; for gradients the largest error over the largest entry, for costs the largest
  error, for point clouds that of a potential over epsilon.
- A contender outside the tolerance has no time: it shows "wrong (error ...)". It need not be broken: geomloss, for one,
  spends most of its iterations on annealing epsilon.
- "to the error ...": a peer gets the fewest iterations with which it is accurate enough, found beforehand, and no stop
  test to pay for; ours gets the largest `tol` of a fixed list and pays for its stop test.
- Memory is the rise of the process's resident set during one call, in a fresh process: scratch and result, not the
  inputs.
- POT returns plans, so forming the plan is part of its time (one pass over the cost beside the iterations').
"""


def ok(contender: Record) -> bool:
    """Whether its check has passed; only then it has figures."""
    return contender["status"] == "ok"


def ours_of(record: Record) -> Record:
    """The contender of ours that targets speak of."""
    return record["contenders"][0]


def best(record: Record, target: Target | None = None) -> Record | None:
    """The fastest right contender that a target names, or the fastest peer."""
    families = PEERS if target is None else target.families
    found = [
        contender
        for contender in record["contenders"]
        if ok(contender)
        and contender["family"] in families
        and (target is None or not target.log_domain or contender["log_domain"])
        and (target is None or not target.names or contender["name"] in target.names)
    ]
    return min(found, key=lambda contender: contender["median"], default=None)


def duration(seconds: float) -> str:
    """Three digits with a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def size(count: float | None) -> str:
    """Bytes in MB."""
    return "" if count is None else f"{count / 1e6:.3g} MB"


def figure(contender: Record) -> str:
    """The time, or why there is none."""
    if ok(contender):
        low, high = contender["quartiles"]
        return f"{duration(contender['median'])} [{duration(low)}, {duration(high)}]"
    if contender["status"] == "wrong":
        return f"wrong (error {contender['error']:.1e})"
    return f"{contender['status']}: {contender['reason']}".replace("|", "/")


def verdicts(record: Record) -> list[str]:
    """One line a target."""
    workload, ours = BY_NAME[record["name"]], ours_of(record)
    lines = []
    for target in workload.targets:
        peer = best(record, target)
        if not ok(ours):
            lines.append(f"{target.times:.3g}x {target.against}: ours is {figure(ours)}")
        elif peer is None:
            lines.append(f"{target.times:.3g}x {target.against}: no figure, none of them ran here")
        else:
            ratio = peer["median"] / ours["median"]
            stretch = f" (stretch {target.stretch:.3g}x)" if target.stretch else ""
            verdict = "met" if ratio >= target.times else f"missed by {100 * (1 - ratio / target.times):.0f} %"
            name = "" if peer["name"] == target.against else f" ({peer['name']})"
            lines.append(f"{ratio:.3g}x {target.against}{name}; target {target.times:.3g}x{stretch}: {verdict}")
    if workload.limit_ms is not None and ok(ours):
        verdict = "met" if 1e3 * ours["median"] <= workload.limit_ms else "missed"
        lines.append(f"{duration(ours['median'])}; target {duration(workload.limit_ms / 1e3)}: {verdict}")
    if ok(ours):
        lines += other_verdicts(record)
    return lines


def other_verdicts(record: Record) -> list[str]:
    """Memory, and two threads on what takes more than a millisecond; a line for each that was measured."""
    workload, ours = BY_NAME[record["name"]], ours_of(record)
    lines, used = [], ours.get("memory")
    if workload.memory_less is not None and used:
        times, name = workload.memory_less
        for peer in record["contenders"]:
            if peer["name"] == name and peer.get("memory"):
                verdict = "met" if peer["memory"] >= times * used else "missed"
                lines.append(f"memory {peer['memory'] / used:.3g}x less than {name}; target {times:.3g}x: {verdict}")
    if workload.memory_of_result is not None and used:
        share = used / record["result_bytes"]
        verdict = "met" if share <= workload.memory_of_result else "missed"
        lines.append(f"memory {share:.2f}x of the result; target {workload.memory_of_result:.3g}x: {verdict}")
    if "threads" in record and record["threads"]["one"] > 1e-3:
        speedup = record["threads"]["speedup"]
        verdict = "met" if speedup >= TWO_THREADS else f"missed by {100 * (1 - speedup / TWO_THREADS):.0f} %"
        lines.append(f"two threads {speedup:.2f}x; target {TWO_THREADS:.3g}x: {verdict}")
    return lines


def summary(results: Record) -> list[str]:
    """The table of ratios."""
    lines = [
        "| workload | ours | best peer | ratio | to the official loop | two threads | targets |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in results["workloads"]:
        ours, peer = ours_of(record), best(record)
        official = best(record, Target(1, "", (OFFICIAL,)))
        cells = [record["title"], duration(ours["median"]) if ok(ours) else figure(ours)]
        cells.append(f"{peer['name']}, {duration(peer['median'])}" if peer else "none ran")
        for other in (peer, official):
            cells.append(f"{other['median'] / ours['median']:.3g}x" if other and ok(ours) else "")
        cells.append(f"{record['threads']['speedup']:.2f}x" if "threads" in record else "")
        cells.append("" if results["smoke"] else "<br>".join(verdicts(record)))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def details(record: Record) -> list[str]:
    """One workload: every contender."""
    ours = ours_of(record)
    lines = [
        f"### {record['title']}", "",
        f"`{record['name']}`; tolerance {record['tolerance']:.1e}.", "",
        "| | time of a call | ratio | error | memory | |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for contender in record["contenders"]:
        ratio = ""
        if ok(ours) and ok(contender) and contender is not ours:
            ratio = f"{contender['median'] / ours['median']:.3g}"
        error = "" if contender["error"] is None else f"{contender['error']:.1e}"
        cells = [contender["name"], figure(contender), ratio, error, size(contender.get("memory")), contender["effort"]]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def shares(results: Record) -> list[str]:
    """Which share of the machine's limits ours reaches."""
    limits = results["limits"]
    lines = [
        "| workload | least work | bound | bound's time | ours | share |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for record in results["workloads"]:
        work, ours = record.get("work"), ours_of(record)
        if work is None or not ok(ours):
            continue
        bounds = bound_times(work, limits)
        bound = max(bounds, key=lambda name: bounds[name])
        lines.append(
            f"| {record['title']} | {work['formula']} | {bound} | {duration(bounds[bound])} | "
            f"{duration(ours['median'])} | {100 * bounds[bound] / ours['median']:.0f} % |"
        )
    return lines


def bound_times(work: Record, limits: Record) -> dict[str, float]:
    """Seconds that the least work takes at each limit of the machine; the longest is what nothing can undercut."""
    return {
        "multiply-add": work["flops"] / limits["flops"],
        "exp": work["exps"] / limits["exps"],
        f"loads from {work['level']}": work["loads"] / limits["loads"][work["level"]],
    }


def page(results: Record, pictures: dict[str, str]) -> str:
    """The whole page."""
    machine, limits = results["machine"], results["limits"]
    loads = ", ".join(f"{level} {rate / 1e9:.0f}" for level, rate in limits["loads"].items())
    smoke = ["**A smoke run: tiny sizes that say nothing about speed.**", ""] if results["smoke"] else []
    names = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    head = f"""\
Written by the suite in `benchmarks/`; do not edit. Every figure is in [results.json](benchmarks/results.json).

- Machine: {machine["cpu"]} ({machine["vectors"]}), {machine["cores"]} cores, {machine["system"]}.
- Command: `{results["command"].strip()}` (`make bench`), {results["date"]}, commit {results["commit"]},
  {results.get("minutes", 0)} minutes.
- Versions: Python {machine["python"]}, {names}.

## Ratios
"""
    reached = f"""\
## Limits of the core, and what ours reaches of them

{limits["flops"] / 1e9:.0f} GFLOP/s of multiply-adds, {limits["exps"] / 1e9:.2f} G exponentials/s, loads in GB/s:
{loads}; float32, measured in this run by {limits["how"]}.

Share: the time that the least work of the algorithm takes at the limit it meets first, over the measured time. The
least work is that of the plain algorithm, with data where the formula says they lie.
"""
    lines = [
        "# Benchmarks", "", *smoke,
        head,
        *summary(results), "",
        "Two threads: time with one over time with two, ours, measured in a run of its own.", "",
        "## How to read them", "", HOW_TO_READ, reached, *shares(results), "",
    ]  # fmt: skip
    for name, title in pictures.items():
        lines += [f"![{title}](benchmarks/{name})", ""]
    lines += ["## Every contender", ""]
    for record in results["workloads"]:
        lines += details(record)
    return "\n".join(lines).rstrip() + "\n"


def write_report(results: Record, folder: Path) -> None:
    """Write FOLDER/benchmarks.md and FOLDER/benchmarks/{results.json, plots}."""
    inside = folder / "benchmarks"
    inside.mkdir(parents=True, exist_ok=True)
    (inside / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    pictures = plots.draw(results, inside)
    (folder / "benchmarks.md").write_text(page(results, pictures))


if __name__ == "__main__":
    write_report(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))

"""`pisces report`: what a run has done, on one page."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pisces.config import GuardsConfig, TrainConfig
from pisces.data import VideoFolder
from pisces.guards import alarms
from pisces.page import Block, Clips, Image, Table, Text, html_page
from pisces.report import read_log, reward_curves
from pisces.run_log import STEPS_FILE, VALIDATION_FILE
from pisces.sections import flat
from pisces.validation import validation_dir

SHOWN = 6  # prompts whose videos are on the page
HIDDEN = ("step", "seconds", "watched_std")


def report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write one self-contained HTML page about a run, or several side by side.

    Args:
        runs: folders that `pisces train` wrote; a run that is still going on will do.
        output: the .html; None is ``report.html`` in the run's folder, which several runs do not have in common.

    Returns:
        The page.

    Raises:
        FileNotFoundError: a folder without a log.
        ValueError: several runs without an output, or two of the same name.
    """
    if output is None:
        if len(runs) != 1:
            raise ValueError(f"report: got {len(runs)} runs, expected --output FILE with more than one.")
        output = runs[0] / "report.html"
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"report: the runs are called {names}, expected different names.")
    named = dict(zip(names, runs, strict=True))
    logs = {name: _records(run / STEPS_FILE) for name, run in named.items()}
    validated = {name: run for name, run in named.items() if _records(run / VALIDATION_FILE, missing_ok=True)}
    validations = {name: _records(run / VALIDATION_FILE) for name, run in validated.items()}
    with tempfile.TemporaryDirectory() as folder:
        sections: list[tuple[str, list[Block]]] = [("Progress", [_progress(logs)])]
        if validations:
            sections.append(("Validation", [_change(validations), *_alarms(named, validations)]))
            sections += [
                (f"Before and after: {name}", _clips(run, validations[name])) for name, run in validated.items()
            ]
            files = {name: run / VALIDATION_FILE for name, run in validated.items()}
            sections.append(("Validation over steps", [_curves(Path(folder) / "v.png", files, validations)]))
        files = {name: run / STEPS_FILE for name, run in named.items() if logs[name]}
        if files:
            curves = _curves(Path(folder) / "t.png", files, logs, ("reward", "loss"))
            sections.append(("Training over steps", [curves]))
        sections += [(f"Settings: {name}", [_settings(run)]) for name, run in named.items()]
        return html_page(output, ", ".join(names), sections, lead=_LEAD)


def _records(file: Path, *, missing_ok: bool = False) -> list[dict[str, Any]]:
    """Lines of a log; none of a run that has only begun."""
    if not file.is_file() and missing_ok:
        return []
    return [] if file.is_file() and not file.stat().st_size else read_log(file)


_LEAD = (
    "The curves are pale as they were logged and full as a moving mean. Validation samples the same prompts from the "
    "same noise each time, the base model first."
)


def _progress(logs: Mapping[str, list[dict[str, Any]]]) -> Table:
    """How far each run is, and what a step takes."""
    rows: list[list[str | float | None]] = []
    for name, records in logs.items():
        seconds = sorted(record["seconds"] for record in records if record.get("seconds"))
        memory = [record["memory_gb"] for record in records if record.get("memory_gb")]
        rows.append(
            [
                name,
                str(records[-1]["step"] if records else 0),
                str(sum("skipped" in record for record in records)),
                f"{seconds[len(seconds) // 2]:.3g}" if seconds else None,
                f"{max(memory):.3g}" if memory else None,
            ]
        )
    return Table(["run", "steps", "skipped", "seconds a step (median)", "most memory, GB"], rows)


def _change(validations: Mapping[str, list[dict[str, Any]]]) -> Table:
    """Every measure of the first and the last validation."""
    rows: list[list[str | float | None]] = []
    for name, records in validations.items():
        first, last = records[0], records[-1]
        for key in last:
            if key in HIDDEN:
                continue
            before, after = first.get(key), last[key]
            share = f"{after / before:.0%}" if before and after is not None and before > 0 and after >= 0 else None
            rows.append([name, key, *(None if v is None else f"{v:.4g}" for v in (before, after)), share])
    steps = ", ".join(f"{name}: {r[0]['step']} and {r[-1]['step']}" for name, r in validations.items())
    return Table(["run", "measure", "first", "last", "share"], rows, note=f"Validated steps: {steps}; 0 is the base.")


def _alarms(runs: Mapping[str, Path], validations: Mapping[str, list[dict[str, Any]]]) -> list[Block]:
    """What the guards say of each last validation."""
    lines = []
    for name, records in validations.items():
        lines += [f"{name}: {sentence}." for sentence in alarms(records, _guards(runs[name]))]
    return [Text("\n\n".join(lines or ["No guard raises an alarm at the last validation."]))]


def _guards(run: Path) -> GuardsConfig:
    values = _config(run)
    return TrainConfig.from_dict(values).validation.guards if values else GuardsConfig()


def _config(run: Path) -> dict[str, Any]:
    file = run / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else {}


def _clips(run: Path, records: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Videos of the base and of the last validation, one prompt below the other."""
    blocks: list[Block] = []
    first, last = (validation_dir(run, record["step"]) for record in (records[0], records[-1]))
    rows = VideoFolder(last).rows if last.is_dir() else []
    for row in rows[:SHOWN]:
        pair = [
            (label, folder / row["file_name"])
            for label, folder in ((_label(records[0]), first), (_label(records[-1]), last))
            if (folder / row["file_name"]).is_file()
        ]
        if pair:
            blocks.append(Clips(pair, caption=row["text"]))
    return blocks or [Text("The videos of the validations are not in the run's folder any more.")]


def _label(record: Mapping[str, Any]) -> str:
    return f"step {record['step']}" if record["step"] else "base"


def _curves(
    path: Path,
    files: Mapping[str, Path],
    records: Mapping[str, list[dict[str, Any]]],
    prefixes: tuple[str, ...] = ("",),
) -> Image:
    """Curves of every measure whose name begins with one of the prefixes."""
    found = [key for run in records.values() for record in run for key in record if key not in HIDDEN]
    keys = [key for key in dict.fromkeys(found) if key.startswith(prefixes)]
    return Image(reward_curves(path, files, keys=keys))


def _settings(run: Path) -> Table:
    """Every setting of a run."""
    return Table(["setting", "value"], [[key, str(value)] for key, value in flat(_config(run)).items()])

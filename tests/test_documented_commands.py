"""Every `pisces ...` line in the documents is one that the command line takes."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pisces.cli import app
from pisces.config import PRESET, PRESETS, TrainConfig
from pisces.sections import override

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))])


def documented(page: str) -> list[str]:
    """Command lines in the fenced blocks of a page, continued ones joined."""
    lines = []
    fenced = (ROOT / page).read_text().split("```")[1::2]  # every other part is inside a block
    for block in fenced:
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:\$ )?(?:.* -m )?pisces (.*)", line)
            lines += [found[1]] if found else []
    return lines


def settings_of(line: str) -> TrainConfig | None:
    """The settings that a line of `train`, `plan` or `encode` with --set asks for, of files that need not be there."""
    command, *words = shlex.split(re.sub(r"[\[\]]", " ", line), comments=True)
    if command not in ("train", "plan", "encode") or "--set" not in words:
        return None
    file = PRESETS / f"{words[0].removeprefix(PRESET)}.yaml" if words[0].startswith(PRESET) else ROOT / words[0]
    values = yaml.safe_load(file.read_text()) if file.is_file() else {}
    for word, setting in itertools.pairwise(words):
        if word == "--set":
            override(values, setting)
    return TrainConfig.from_dict(values)


def taken(line: str) -> bool:
    """Whether the command line parses; nothing is run, and a complaint is on stderr."""
    words: list[str] = []
    line = re.sub(r"[\[\]]|\|[^\]]*\]", " ", line)  # brackets are left out, and of [--this | --that] all but the first
    for word in shlex.split(line, comments=True):
        words += [word.replace("*", name) for name in "ab"] if "*" in word else [word]  # as the shell would
    command: Any = typer.main.get_command(app)
    commands = [command]
    for one in commands:
        one.callback = lambda **_: None
        commands += getattr(one, "commands", {}).values()
    with pytest.raises(SystemExit) as end:
        command.main(words, prog_name="pisces")
    return end.value.code == 0


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_are_taken(page: str, capfd: pytest.CaptureFixture[str]) -> None:
    for line in documented(page):
        assert taken(line), f"pisces {line}\n{capfd.readouterr().err}"


def test_documented_settings_are_taken() -> None:
    lines = [line for page in PAGES for line in documented(page)]
    assert sum(settings_of(line) is not None for line in lines) >= 5
    settings = settings_of("plan preset:wan-1.3b --budget 80GB --set pipeline.n_frames=41  # a remark")
    assert settings is not None
    assert (settings.pipeline.n_frames, settings.pipeline.height) == (41, 480)
    for wrong in ("plan a.yaml --set pipeline.frames=41", "train preset:tiny-wan --set algorithm.phases=2"):
        with pytest.raises(ValueError, match="unknown key"):
            settings_of(wrong)


def test_the_lines_are_found_and_wrong_ones_are_not_taken() -> None:
    commands = {line.split()[0] for page in ("README.md", "docs/rewards.md") for line in documented(page)}
    assert commands >= {"train", "fit-ot-map", "score", "explain", "leverage", "world"}
    for line in (
        "explain a.mp4 x y --output why.html",
        "score --vidoe a.mp4",
        "explain a.mp4",
        "plan a --frames x",
        "scroe a.mp4",
    ):
        assert not taken(line), line
    assert taken('score runs/*.mp4 --prompt "a square"  # a remark')

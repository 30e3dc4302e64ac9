"""Every `pisces ...` line in the documents is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from pisces.cli import app

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

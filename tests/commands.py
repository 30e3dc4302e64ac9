"""Commands of `pisces`, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from pisces.cli import app


def run(*arguments: object) -> Result:
    """Run a command; what it did not expect is raised here."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def refused(result: Result, *parts: str) -> None:
    """The result is exit code 2 and one line on stderr that holds all parts."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("pisces: ")
    for part in parts:
        assert part in lines[0], (part, lines[0])

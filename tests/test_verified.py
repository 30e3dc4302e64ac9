"""What lets the gate run a part of a slow check: that it was asked to, and that nothing which it covers has changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import verified


@pytest.fixture
def covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of two sources, which have passed; a part is asked for."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("one")
    (tmp_path / "csrc" / "b.h").write_text("two")
    monkeypatch.setattr(verified, "ROOT", tmp_path)
    monkeypatch.setattr(verified, "FILE", tmp_path / "verified.json")
    monkeypatch.setenv("VERIFIED", "draw")
    assert not verified.only_a_part("emulator")
    verified.passed("emulator")
    assert verified.only_a_part("emulator")
    return tmp_path / "csrc"


def test_nobody_gets_a_part_unasked(covered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERIFIED")
    assert not verified.only_a_part("emulator")


@pytest.mark.parametrize("change", ["other text", "new file", "lost file", "other name", "text moved"])
def test_whatever_changes_is_verified_whole(covered: Path, change: str) -> None:
    first, second = covered / "a.cu", covered / "b.h"
    if change == "other text":
        first.write_text("One")
    elif change == "new file":
        (covered / "deep").mkdir()
        (covered / "deep" / "c.cuh").write_text("")
    elif change == "lost file":
        second.unlink()
    elif change == "other name":
        first.rename(covered / "z.cu")
    else:
        first.write_text("two")
        second.write_text("one")
    assert not verified.only_a_part("emulator")


def test_checks_are_noted_apart(covered: Path) -> None:
    assert not verified.only_a_part("native")
    verified.passed("native")
    assert verified.only_a_part("native")
    assert verified.only_a_part("emulator")


def test_every_pattern_names_files() -> None:
    for patterns in verified.COVERS.values():
        for pattern in patterns:
            assert any(path.is_file() for path in verified.ROOT.glob(pattern)), pattern

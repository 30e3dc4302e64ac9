"""The list of files in docs/architecture.md: no module is missing from it, and it names none that is gone."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"


def listed(page: str) -> list[str]:
    """What the first column of the table names: files, patterns and, with a slash at their end, folders.

    A name without a folder lies beside the one before it.
    """
    names, folder = [], ""
    for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            if "/" in name:
                folder = name[: name.rindex("/") + 1]
                names.append(name)
            else:
                names.append(folder + name)
    return names


def covered(module: str, names: list[str]) -> bool:
    return any(module.startswith(name) if name.endswith("/") else fnmatch(module, name) for name in names)


def modules() -> list[str]:
    """All modules but those whose job their name says: the API of a package, and `python -m`."""
    files = [file for package in ("pisces", "pisces_kernels") for file in (ROOT / package).rglob("*.py")]
    return sorted(str(file.relative_to(ROOT)) for file in files if file.name not in ("__init__.py", "__main__.py"))


def test_every_module_has_its_job() -> None:
    names = listed(PAGE.read_text(encoding="utf-8"))
    assert [module for module in modules() if not covered(module, names)] == []
    # a row less is noticed
    without = [name for name in names if name != "pisces/encoders/contract.py"]
    assert [module for module in modules() if not covered(module, without)] == ["pisces/encoders/contract.py"]


def test_every_name_is_there() -> None:
    names = listed(PAGE.read_text(encoding="utf-8"))
    assert len(names) > 100
    assert [name for name in names if not any(ROOT.glob(name.rstrip("/")))] == []

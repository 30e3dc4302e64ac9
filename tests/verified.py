"""The slow checks of the kernels: whole where the sources that they cover have changed, else a part drawn by chance.

A whole run that passes writes the SHA-256 of these sources into verified.json, which is committed with them. The gate
asks for the part (VERIFIED=draw); a change of the sources makes it run everything again, whoever forgot to.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = Path(__file__).with_suffix(".json")
COVERS = {
    "emulator": ("csrc/**/*", "tests/emulator/*", "CMakeLists.txt"),
    "native": ("csrc/*.h", "csrc/cpu/*", "tests/native/*", "CMakeLists.txt"),
    "triton": ("pisces_kernels/**/*.py", "tests/triton/*.py", "tests/problems.py", "constraints.txt"),
}


def sources(check: str) -> str:
    """SHA-256 of the files that a check covers, with their names."""
    files = {path for pattern in COVERS[check] for path in ROOT.glob(pattern) if path.is_file()}
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


def only_a_part(check: str) -> bool:
    """Whether a part is asked for and enough: everything has passed with these sources."""
    return os.environ.get("VERIFIED") == "draw" and _read().get(check) == sources(check)


def passed(check: str) -> None:
    """Note that everything has passed."""
    FILE.write_text(json.dumps(_read() | {check: sources(check)}, indent=1, sort_keys=True) + "\n")


def _read() -> dict[str, str]:
    return json.loads(FILE.read_text()) if FILE.is_file() else {}

"""What a contender of a workload is: how it gets ready, what is timed, and what is compared afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OURS, OFFICIAL, TORCH, LIBRARY, SCALE = "ours", "official", "torch", "library", "scale"


def unchanged(value: Any) -> Any:
    """Return the value."""
    return value


@dataclass(frozen=True)
class Prepared:
    """A contender that holds its inputs.

    Attributes:
        call: what is timed. Ends when the result is in memory.
        result: untimed, from what `call` returns to what the error of the workload takes.
    """

    call: Callable[[], Any]
    result: Callable[[Any], Any] = unchanged


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: as it is printed.
        family: OURS, OFFICIAL (the released code's formulas), TORCH, LIBRARY, or SCALE (a yardstick, no peer).
        prepare: problem -> Prepared. Imports its library itself; an ImportError becomes the reason of a skip.
        log_domain: works in the log domain, for targets that name such peers.
        own_stop: keeps its own stop test where others get the number of iterations that just reaches the accuracy.
    """

    name: str
    family: str
    prepare: Callable[[Any], Prepared]
    log_domain: bool = False
    own_stop: bool = False

"""SIGTERM and SIGINT as a request to stop at the next good moment."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignals:
    """Within the context SIGTERM and the first SIGINT are noted; a second one of a kind acts as it did before.

    Outside the main thread, where Python has no signals, nothing is changed.

    Attributes:
        noted: the number of the first signal that came; None if none did.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = self.noted or number
        signal.signal(number, self._former[number])

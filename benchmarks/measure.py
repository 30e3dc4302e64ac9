"""Run the contenders of a workload in turns, check what they return, keep only the figures of those that are right."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from .contender import OURS, SCALE, Contender, Prepared
from .workloads import Workload

BUDGET_SECONDS = 6.0  # of timed calls of one contender in one workload; at least LEAST_ROUNDS run
LEAST_ROUNDS = 3
STOPS = tuple(10.0 ** (-k / 4) for k in range(6, 27))  # tol of ours where it is fitted to an accuracy
MOST_ITERATIONS = 1000


@dataclass
class Entry:
    """A contender in one workload.

    Attributes:
        status: "ok", "wrong", "skipped" or "failed"; only "ok" has times.
        reason: why it is not ok.
        error: against float64.
        effort: iterations or tol it ran with, if they were fitted.
        seconds: of one call, one per round.
    """

    contender: Contender
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    effort: str = ""
    seconds: list[float] = field(default_factory=list)
    prepared: Prepared | None = None
    last: Any = None

    def record(self) -> dict[str, Any]:
        """What goes into the results: no time unless the check has passed."""
        out: dict[str, Any] = {
            "name": self.contender.name, "family": self.contender.family, "log_domain": self.contender.log_domain,
            "status": self.status, "reason": self.reason, "error": self.error, "effort": self.effort,
        }  # fmt: skip
        if self.status == "ok":
            quartiles = statistics.quantiles(self.seconds, method="inclusive") if len(self.seconds) > 1 else []
            low, high = (quartiles[0], quartiles[2]) if quartiles else (self.seconds[0], self.seconds[0])
            out |= {
                "seconds": self.seconds, "median": statistics.median(self.seconds), "quartiles": [low, high],
                "rounds": len(self.seconds),
            }  # fmt: skip
        return out


class Comparison:
    """One workload with all its contenders, ready to be timed.

    Args:
        workload: what is done.
        smoke: tiny sizes, few rounds.
        only: names of contenders to keep; None keeps all.
    """

    def __init__(self, workload: Workload, *, smoke: bool = False, only: tuple[str, ...] | None = None) -> None:
        torch.compiler.reset()  # each workload compiles for its own shapes
        self.workload = workload
        self.problem = workload.make(smoke)
        tolerance = workload.tolerance
        self.tolerance: float = tolerance(self.problem) if callable(tolerance) else tolerance
        self.turns = 0
        self.hint = 0
        self.entries = [Entry(c) for c in workload.contenders if only is None or c.name in only]
        for entry in self.entries:
            self._get_ready(entry)

    def _get_ready(self, entry: Entry) -> None:
        """Compile, run once and check; a contender that cannot run says why."""
        try:
            if not self.workload.calibrate:
                entry.prepared = entry.contender.prepare(self.problem)
                self._check(entry, entry.prepared.call())
            elif entry.contender.own_stop:
                entry.prepared = entry.contender.prepare(dataclasses.replace(self.problem, tol=1e-3, n_iters=200))
                entry.effort = "its own stop, 1e-3"
                self._check(entry, entry.prepared.call())
            elif entry.contender.family == OURS:
                self._fit_stop(entry)
            else:
                self._fit_iterations(entry)
        except ImportError as error:
            entry.status, entry.reason = "skipped", f"{type(error).__name__}: {error}"
        except Exception as error:
            if entry.contender.family == OURS:
                raise
            entry.status, entry.reason = "failed", f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"

    def _error(self, prepared: Prepared, value: Any) -> float:
        return self.workload.error(self.problem, prepared.result(value))

    def _right(self, error: float) -> bool:
        return error <= self.tolerance * (1 + 1e-6)  # False for NaN

    def _check(self, entry: Entry, value: Any) -> None:
        assert entry.prepared is not None
        if entry.contender.family == SCALE:
            return  # computes something else
        entry.error = self._error(entry.prepared, value)
        if not self._right(entry.error):
            entry.status = "wrong"
            entry.reason = f"error {entry.error:.1e}, allowed {self.tolerance:.1e}"

    def _fit_stop(self, entry: Entry) -> None:
        """The largest tol of a fixed list with which ours is accurate enough."""
        for tol in STOPS:
            problem = dataclasses.replace(self.problem, tol=tol, n_iters=MOST_ITERATIONS)
            entry.prepared, entry.effort = entry.contender.prepare(problem), f"tol {tol:.1e}"
            entry.error = self._error(entry.prepared, entry.prepared.call())
            if self._right(entry.error):
                return
        self._check(entry, entry.prepared.call())  # type: ignore[union-attr]

    def _fit_iterations(self, entry: Entry) -> None:
        """The fewest iterations with which a peer is accurate enough, without the price of a stop test."""

        def reaches(n_iters: int) -> bool:
            entry.prepared = entry.contender.prepare(dataclasses.replace(self.problem, n_iters=n_iters, tol=0.0))
            entry.error, entry.effort = self._error(entry.prepared, entry.prepared.call()), f"{n_iters} iterations"
            return self._right(entry.error)

        too_few, enough = 0, self.hint or 1
        while not reaches(enough):
            if enough >= MOST_ITERATIONS or (self.hint and enough > 4 * self.hint):
                entry.status, entry.reason = "wrong", f"error {entry.error:.1e} after {enough} iterations"
                return
            too_few = enough
            enough = enough + 1 if enough < self.hint + 3 and self.hint else 2 * enough
        if enough == self.hint:  # what another contender needed: only its neighbours are tried
            while enough > 1 and reaches(enough - 1):
                enough -= 1
            too_few = enough - 1
        while enough - too_few > 1:
            middle = (enough + too_few) // 2
            if reaches(middle):
                enough = middle
            else:
                too_few = middle
        reaches(enough)
        self.hint = enough

    def turn(self, entry: Entry) -> float:
        """Time one turn of one contender: seconds of one call."""
        assert entry.prepared is not None
        call = entry.prepared.call
        entry.last = None  # its memory is free again before the clock starts
        started = time.perf_counter()
        for _ in range(self.workload.calls):
            value = call()
        seconds = (time.perf_counter() - started) / self.workload.calls
        entry.last = value
        entry.seconds.append(seconds)
        return seconds

    def others(self) -> list[Entry]:
        """Contenders of this round besides the first one, in an order that rotates."""
        ready = [entry for entry in self.entries[1:] if entry.status == "ok"]
        start = self.turns % max(len(ready), 1)
        self.turns += 1
        return [entry for entry in ready[start:] + ready[:start] if self._has_time(entry)]

    def _has_time(self, entry: Entry) -> bool:
        spent = sum(entry.seconds) * self.workload.calls
        return len(entry.seconds) < LEAST_ROUNDS or spent < BUDGET_SECONDS

    def run(self, rounds: int) -> None:
        """Rounds of one turn each."""
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                for entry in self.others():
                    self.turn(entry)
                if self.entries[0].status == "ok":
                    self.turn(self.entries[0])
        finally:
            gc.enable()

    def finish(self) -> dict[str, Any]:
        """Check the results of the last timed calls and return the record of the workload."""
        for entry in self.entries:
            if entry.status == "ok":
                if not entry.seconds:
                    entry.status, entry.reason = "failed", "did not run"
                    continue
                self._check(entry, entry.last)
        first = self.entries[0]
        results = first.last if isinstance(first.last, tuple) else (first.last,)
        size = sum(part.numel() * part.element_size() for part in results if isinstance(part, torch.Tensor))
        return {
            "result_bytes": size, "name": self.workload.name, "title": self.workload.title, "tolerance": self.tolerance,
            "calls": self.workload.calls, "contenders": [entry.record() for entry in self.entries],
        }  # fmt: skip

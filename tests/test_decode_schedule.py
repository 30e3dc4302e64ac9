"""Which caches are kept while chunks are run backwards: within the bounds of binomial checkpointing."""

from __future__ import annotations

import itertools

import pytest

from pisces.decode.schedule import kept, longest, slots_for, split


@pytest.mark.parametrize(("n", "sweeps"), itertools.product([1, 2, 3, 5, 17, 40], [1, 2, 3, 4]))
def test_schedule_runs_every_chunk_backwards_within_its_bounds(n: int, sweeps: int) -> None:
    runs = [0] * n
    order: list[int] = []

    def reverse(start: int, stop: int, slots: int, sweeps: int, alive: int) -> int:
        """The most caches alive at a time."""
        if stop - start == 1:
            order.append(start)
            return alive
        middle = start + split(stop - start, slots, sweeps)
        for chunk in range(start, middle):
            runs[chunk] += 1
        later = reverse(middle, stop, slots - 1, sweeps, alive + 1)
        return max(later, reverse(start, middle, slots, sweeps - 1, alive))

    slots = slots_for(n, sweeps)
    assert reverse(0, n, slots, sweeps, 0) <= slots
    assert order == list(reversed(range(n)))
    assert max(runs) <= sweeps
    assert longest(slots, sweeps) >= n
    assert slots == 0 or longest(slots - 1, sweeps) < n


def test_schedule_keeps_what_the_first_pass_meets() -> None:
    assert kept(5, 1) == [1, 2, 3, 4]
    assert kept(1, 2) == []
    assert kept(6, 2) == [3, 5]  # 6 = beta(2, 2): one of 3, 2 and 1 is left at a time

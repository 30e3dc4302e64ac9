"""Peak memory of a piece of code, as PyTorch's CPU allocator sees it, custom operators and backward passes included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


@dataclass
class Memory:
    """Bytes, known when the block has ended.

    Attributes:
        peak: most bytes alive at a time, beyond those that were alive at the start.
        largest: largest single allocation.
    """

    peak: int = 0
    largest: int = 0


@contextmanager
def memory_meter() -> Iterator[Memory]:
    """Measure what the block allocates.

    Example:
        with memory_meter() as memory:
            run()
        assert memory.peak < LIMIT
    """
    memory = Memory()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield memory
    alive = 0
    for size in _allocations(profiler):
        alive += size
        memory.peak = max(memory.peak, alive)
        memory.largest = max(memory.largest, size)


def _allocations(profiler: Any) -> list[int]:
    """Sizes in the order of time, negative when freed."""
    events = []
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.typed[0] == _EventType.Allocation:
            events.append((event.start_time_ns, event.typed[1].alloc_size))
    return [size for _, size in sorted(events, key=lambda event: event[0])]

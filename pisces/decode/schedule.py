"""Which caches are kept while a chain of chunks is run backwards: binomial checkpointing.

With at most s caches kept, and at most t forward runs of any chunk before the one with gradient, a chain of

    beta(s, t) = (s + t)! / (s! t!)

chunks can be run backwards: t = 1 keeps all, t = 2 about sqrt(2 n), t = 3 about the cube root of 6 n.
Source: A. Griewank and A. Walther, "Algorithm 799: revolve", ACM TOMS 26 (2000), equation (2).
"""

from __future__ import annotations

import math


def longest(slots: int, sweeps: int) -> int:
    """beta(s, t): chunks that ``slots`` kept caches and ``sweeps`` forward runs suffice for."""
    return math.comb(slots + sweeps, sweeps)


def slots_for(n: int, sweeps: int) -> int:
    """The fewest caches with which ``n`` chunks can be run backwards."""
    slots = 0
    while longest(slots, sweeps) < n:
        slots += 1
    return slots


def split(n: int, slots: int, sweeps: int) -> int:
    """How many of ``n`` >= 2 chunks come before the next cache that is kept: as few as the others allow."""
    return max(1, n - longest(slots - 1, sweeps))


def kept(n: int, sweeps: int) -> list[int]:
    """The chunks whose caches the first pass keeps."""
    places: list[int] = []
    done, slots = 0, slots_for(n, sweeps)
    while n - done > 1:
        done += split(n - done, slots, sweeps)
        slots -= 1
        places.append(done)
    return places

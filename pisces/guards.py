"""Alarms against reward hacking: the reward rises while the videos get worse in ways that it does not see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pisces.config import GuardsConfig


def alarms(records: Sequence[Mapping[str, Any]], guards: GuardsConfig) -> list[str]:
    """What is wrong with the last validation, in sentences; empty if nothing is.

        sharpness, motion  < share * those of the first validation
        saturation         > times * that of the first
        watched            < its best so far - distance * its standard deviation over the first validation's videos

    What was a number and is null now, because it is not finite, is an alarm as well; what was never measured is none.

    Args:
        records: of all validations in order, the first of them the base's.
        guards: the limits.

    Example:
        >>> from pisces.config import GuardsConfig
        >>> base, now = ({"step": n, "sharpness": s, "motion": 0.1} for n, s in ((0, 0.02), (64, 0.004)))
        >>> alarms([base, now], GuardsConfig())
        ['sharpness 0.004 is 20 % of the base model, limit 50 %']
    """
    first, last = records[0], records[-1]
    found = []
    # A run whose first validation came later has nothing of the base to compare with.
    for name in ("sharpness", "motion", "saturation") if first["step"] == 0 else ():
        limit, before = getattr(guards, name), first.get(name)
        if limit is None or before is None or name not in last:
            continue
        now = last[name]
        if now is None:
            found.append(f"{name} is not finite, {before:.3g} for the base model")
            continue
        if before == 0:
            continue
        share = now / before
        if share > limit if name == "saturation" else share < limit:
            found.append(f"{name} {now:.3g} is {share:.0%} of the base model, limit {limit:.0%}".replace("%", " %"))
    scores = [record["watched"] for record in records if record.get("watched") is not None]
    spread = first.get("watched_std")
    if guards.watched is not None and scores and last.get("watched", scores[0]) is None:
        found.append(f"the watched rewards are not finite, {max(scores):.3g} at their best")
    if guards.watched is not None and spread and last.get("watched") is not None:
        lost = (max(scores) - last["watched"]) / spread
        if lost > guards.watched:
            found.append(
                f"the watched rewards are {lost:.2g} standard deviations below their best, limit {guards.watched:g}"
            )
    return found


def alarms_in_a_row(records: Sequence[Mapping[str, Any]], guards: GuardsConfig) -> int:
    """How many of the last validations, without a break, raise an alarm."""
    count = 0
    for end in range(len(records), 0, -1):
        if not alarms(records[:end], guards):
            break
        count += 1
    return count


def is_best(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the watched rewards of the last validation are higher than those of all before."""
    *former, last = [record.get("watched") for record in records]
    return last is not None and last > max((value for value in former if value is not None), default=-math.inf)

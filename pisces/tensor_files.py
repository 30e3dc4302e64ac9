"""Files of tensors, and what is said when they do not hold what they should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_SHOWN = 8  # names in a message


def listed(problems: Mapping[str, Sequence[str]]) -> str:
    """Names by what is wrong with them, for a message; "" where nothing is.

    Example:
        >>> listed({"missing": ["a", "b"], "unexpected": []})
        '2 missing: a, b'
    """
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for what, names in problems.items()
        if names
    )

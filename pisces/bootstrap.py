"""How sure a mean is: percentile bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean and the interval in which it is believed to lie.

    Attributes:
        mean: of the values.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean with its percentile bootstrap interval: quantiles of the means of samples drawn with replacement.

    Args:
        values: at least one; one alone has the interval of no width.
        level: how much of the resampled means lies inside.
        seed: of the resampling.

    Raises:
        ValueError: no values, or a level that is none.

    Example:
        >>> mean_interval([1.0, 1.0, 1.0])
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    means = _resampled_means(values, np.random.default_rng(seed))
    return _interval(float(np.mean(values)), means, level)


def difference_interval(
    after: Sequence[float], before: Sequence[float], *, paired: bool, level: float = 0.95, seed: int = 0
) -> Interval:
    """mean(after) - mean(before) with its interval.

    Args:
        after: values.
        before: values to compare with.
        paired: whether the two belong to each other one by one, which takes the spread over prompts out; otherwise
            each side is resampled for itself.
        level: as for `mean_interval`.
        seed: of the resampling.

    Raises:
        ValueError: as `mean_interval`, or pairs that are not as many.

    Example:
        >>> difference_interval([1.0, 5.0], [0.0, 4.0], paired=True)
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    if paired:
        if len(after) != len(before):
            raise ValueError(f"difference_interval: got {len(after)} and {len(before)} values, expected pairs.")
        return mean_interval([a - b for a, b in zip(after, before, strict=True)], level=level, seed=seed)
    generator = np.random.default_rng(seed)
    means = _resampled_means(after, generator) - _resampled_means(before, generator)
    return _interval(float(np.mean(after) - np.mean(before)), means, level)


def _resampled_means(values: Sequence[float], generator: np.random.Generator) -> np.ndarray:
    if not len(values):
        raise ValueError("bootstrap: got no values, expected at least one.")
    numbers = np.asarray(values, dtype=np.float64)
    means = np.empty(RESAMPLES)
    # a hundred at a time: the indices of all at once are 80 KB a value
    for start in range(0, RESAMPLES, 100):
        means[start : start + 100] = numbers[generator.integers(len(numbers), size=(100, len(numbers)))].mean(1)
    return means


def _interval(mean: float, means: np.ndarray, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"bootstrap: got level {level}, expected a number between 0 and 1.")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))

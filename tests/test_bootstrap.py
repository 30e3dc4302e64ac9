"""Bootstrap intervals: they cover the truth as often as they say, and pairing takes out what it should."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pisces.bootstrap import difference_interval, mean_interval


def test_equal_to_scipy(seed: int) -> None:
    values = np.random.default_rng(seed).exponential(size=40)
    mine = mean_interval(values, seed=seed)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000).confidence_interval
    width = theirs.high - theirs.low
    assert mine.mean == pytest.approx(values.mean())
    # Quantiles of 10,000 resamples are known to about a hundredth of the width.
    assert abs(mine.low - theirs.low) < 0.06 * width
    assert abs(mine.high - theirs.high) < 0.06 * width


def test_unpaired_differences_have_the_spread_of_both_sides(seed: int) -> None:
    generator = np.random.default_rng(seed)
    after, before = generator.normal(1.0, 1.0, 60), generator.normal(0.0, 2.0, 80)
    found = difference_interval(after, before, paired=False, seed=seed)
    half = 1.96 * np.sqrt(after.var() / 60 + before.var() / 80)
    assert found.mean == pytest.approx(after.mean() - before.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_pairing_takes_the_spread_over_prompts_out(seed: int) -> None:
    generator = np.random.default_rng(seed)
    prompts = generator.normal(0.0, 5.0, 50)
    before = prompts + generator.normal(0.0, 0.1, 50)
    after = prompts + 0.3 + generator.normal(0.0, 0.1, 50)
    paired, unpaired = (difference_interval(after, before, paired=p, seed=seed) for p in (True, False))
    assert paired.low > 0 > unpaired.low
    assert unpaired.high - unpaired.low > 10 * (paired.high - paired.low)


def test_the_same_seed_is_the_same_interval(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=9)
    assert mean_interval(values, seed=seed) == mean_interval(values, seed=seed)


def test_what_has_no_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="got no values"):
        mean_interval([])
    with pytest.raises(ValueError, match="got 2 and 1 values, expected pairs"):
        difference_interval([1.0, 2.0], [1.0], paired=True)
    with pytest.raises(ValueError, match="got level 95"):
        mean_interval([1.0, 2.0], level=95)

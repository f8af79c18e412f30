"""Intervals against published and simulated values."""

from __future__ import annotations

import numpy as np
import pytest

from eval.intervals import bootstrap_interval, wilson_interval


@pytest.mark.parametrize(("good", "low", "high"), [(8, 0.4902, 0.9433), (0, 0, 0.2775), (10, 0.7225, 1)])
def test_wilson_of_ten_trials(good: int, low: float, high: float) -> None:
    assert wilson_interval(good, 10) == pytest.approx((low, high), abs=1e-4)


def test_bootstrap_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(3, 2, 40).tolist(), seed=seed, draws=400)
        hits += low <= 3 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([1.0, 2.0, 4.0])


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="11 of 10"):
        wilson_interval(11, 10)
    with pytest.raises(ValueError, match="at least two"):
        bootstrap_interval([1.0])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([1.0, float("nan")])

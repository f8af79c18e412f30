"""Intervals against published and simulated values."""

from __future__ import annotations

import numpy as np
import pytest

from eval.intervals import bootstrap_interval, paired_interval, share_interval, wilson_interval


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


def test_clips_of_one_picture_count_as_one() -> None:
    """Ten equal clips of each of 12 pictures are 12 values: the interval must not shrink with the copies."""
    pictures = np.random.default_rng(0).normal(0, 1, 12).tolist()
    copies, names = np.repeat(pictures, 10).tolist(), np.repeat([f"picture {i}" for i in range(12)], 10).tolist()
    assert bootstrap_interval(copies, groups=names) == pytest.approx(bootstrap_interval(sorted(pictures)), abs=0.2)
    alone, together = (np.ptp(bootstrap_interval(copies, groups=g)) for g in (None, names))
    assert together > 2 * alone
    with pytest.raises(ValueError, match="in 1 groups"):
        bootstrap_interval([1.0, 2.0], groups=["a", "a"])


def test_pairs_are_narrower_than_two_intervals() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(20, 5, 60)
    second = first + rng.normal(1, 0.5, 60)
    low, high = paired_interval(second.tolist(), first.tolist())
    assert 0.8 < low < 1 < high < 1.2
    assert paired_interval(first.tolist(), first.tolist()) == (0, 0)
    with pytest.raises(ValueError, match="2 values and 1"):
        paired_interval([1.0, 2.0], [1.0])


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="11 of 10"):
        wilson_interval(11, 10)
    with pytest.raises(ValueError, match="at least two"):
        bootstrap_interval([1.0])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([1.0, float("nan")])


def test_shares_of_groups() -> None:
    """Independent outcomes have Wilson's interval; groups that are alike throughout count as one outcome each."""
    independent = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    names = [str(k) for k in range(10)]
    low, high = share_interval(independent, names)
    assert (low, high) == pytest.approx(wilson_interval(6.3, 9)), "the variance over 10 groups has 9 degrees of freedom"
    fives = share_interval(np.repeat(independent, 5).tolist(), np.repeat(names, 5).tolist())
    assert fives == pytest.approx((low, high))
    assert share_interval([1.0] * 50, np.repeat(names, 5).tolist()) == pytest.approx(wilson_interval(10, 10))
    assert share_interval(independent, names, 99)[0] < low
    with pytest.raises(ValueError, match="two groups"):
        share_interval([1.0, 0.0], ["a", "a"])


@pytest.mark.parametrize(("share", "groups"), [(0.8, 6), (0.95, 20), (0.98, 50)])
def test_shares_of_groups_that_are_alike_throughout_are_covered(share: float, groups: int) -> None:
    rng, names = np.random.default_rng(1), np.repeat(np.arange(groups), 5).astype(str).tolist()
    bounds = [
        share_interval(np.repeat(rng.random(groups) < share, 5).astype(float).tolist(), names) for _ in range(300)
    ]
    assert sum(low <= share <= high for low, high in bounds) / 300 > 0.88


def test_shares_of_groups_cover_more_often_than_wilsons() -> None:
    """Ten pictures under five captions, each picture failing by a chance of its own."""
    rng, held, plain = np.random.default_rng(0), 0, 0
    groups = np.repeat(np.arange(10), 5).astype(str).tolist()
    for _ in range(400):
        chance = np.where(rng.random(10) < 0.2, 0.3, 1.0)
        right = (rng.random((10, 5)) < chance[:, None]).astype(float).ravel().tolist()
        truth = 0.8 + 0.2 * 0.3
        low, high = share_interval(right, groups)
        held += low <= truth <= high
        low, high = wilson_interval(sum(right), 50)
        plain += low <= truth <= high
    assert held / 400 > 0.87 > 0.8 > plain / 400

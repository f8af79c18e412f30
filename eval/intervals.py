"""Intervals: Wilson's for a share, the bootstrap's for a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

Z_95 = 1.959963984540054
# measured on normal values; in words for a table
NARROW = ("of 6 pictures, a 95 % interval holds the mean in about 86 % of all sets, of 10 in 90 %, of 20 in 93 %, "
          "of 50 in 94 %")  # fmt: skip


def wilson_interval(successes: float, trials: float, z: float = Z_95) -> tuple[float, float]:
    """The interval of a share, in [0, 1], by Wilson's score; it keeps its width at 0 and at `trials` successes.

    Raises ValueError unless 0 <= successes <= trials and trials >= 1.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials}; expected 0 <= successes <= trials and at least one trial")
    share, weight = successes / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def share_interval(outcomes: Sequence[float], groups: Sequence[str], percent: float = 95) -> tuple[float, float]:
    """Wilson's interval of the share of outcomes (0 or 1), which are not independent within a group (videos of one
    picture): taken for as many as independent ones would tell as much, by the design effect

        (variance of the share over groups) / (share (1 - share) / n), at least 1.

    Where all outcomes are alike it cannot be told, and each group counts as one outcome. Raises ValueError for fewer
    than two groups.
    """
    array = np.asarray(outcomes, np.float64)
    _, member = np.unique(list(groups), return_inverse=True)
    sizes, count = np.bincount(member), len(array)
    if len(member) != count or len(sizes) < 2:
        raise ValueError(f"{count} outcomes in {len(sizes)} groups; expected a group for each, two groups or more")
    share = float(array.mean())
    apart = np.bincount(member, array) - share * sizes
    between = len(sizes) / (len(sizes) - 1) * float((apart**2).sum()) / count
    effect = max(between / (share * (1 - share)), 1.0) if 0 < share < 1 else count / len(sizes)
    trials = max(count / effect, 1.0)
    return wilson_interval(share * trials, trials, NormalDist().inv_cdf(0.5 + percent / 200))


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 2000,
                       groups: Sequence[str] | None = None, percent: float = 95
                       ) -> tuple[float, float]:  # fmt: skip
    """The percentile interval of the mean of independent values (one per clip, not per frame), in their own unit.

    groups: one name per value; values of one name (clips of one picture) are not independent of each other, so they
    are drawn together. Raises ValueError for fewer than two values or groups, or values that are not finite.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise ValueError(f"{len(array)} values; expected a list of at least two finite numbers")
    _, member = np.unique(np.arange(len(array)) if groups is None else list(groups), return_inverse=True)
    sizes = np.bincount(member)
    if len(member) != len(array) or len(sizes) < 2:
        raise ValueError(f"{len(array)} values in {len(sizes)} groups; expected a group for each, two groups or more")
    sums = np.bincount(member, array)
    picks = np.random.default_rng(seed).integers(0, len(sizes), (draws, len(sizes)))
    low, high = np.percentile(sums[picks].sum(axis=1) / sizes[picks].sum(axis=1), [50 - percent / 2, 50 + percent / 2])
    return float(low), float(high)


def paired_interval(values: Sequence[float], reference: Sequence[float], seed: int = 0, draws: int = 2000,
                    groups: Sequence[str] | None = None, percent: float = 95) -> tuple[float, float]:  # fmt: skip
    """The bootstrap interval of the mean of value - reference, taken pair by pair: the same clip made in two ways.

    Raises ValueError for different lengths and as `bootstrap_interval`.
    """
    if len(values) != len(reference):
        raise ValueError(f"{len(values)} values and {len(reference)} to compare them with; expected pairs")
    return bootstrap_interval([a - b for a, b in zip(values, reference, strict=True)], seed, draws, groups, percent)

"""95 % intervals: Wilson's for a share, the bootstrap's for a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of a share, in [0, 1], by Wilson's score; it keeps its width at 0 and at `trials` successes.

    Raises ValueError unless 0 <= successes <= trials and trials > 0.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials}; expected 0 <= successes <= trials and at least one trial")
    share, weight = successes / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """The percentile interval of the mean of independent values (one per clip, not per frame), in their own unit.

    Raises ValueError for fewer than two values or values that are not finite.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise ValueError(f"{len(array)} values; expected a list of at least two finite numbers")
    picks = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    low, high = np.percentile(array[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)

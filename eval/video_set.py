"""A metric over a set of videos: the mean over videos without weights, as the paper's tables, and its interval."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from eval.intervals import bootstrap_interval


def least(percent: float = 95) -> int:
    """How many pictures an interval needs: 6 for 95 %. With 5, even the range from the lowest to the highest value
    holds the median in only 94 % of all sets."""
    return math.ceil(1 + math.log2(1 / (1 - percent / 100)))


def mean_and_interval(values: Sequence[float], metric: str, seed: int = 0, percent: float = 95,
                      groups: Sequence[str] | None = None) -> tuple[float, tuple[float, float]]:  # fmt: skip
    """The mean over videos and its bootstrap interval, in the metric's unit; one value for each video.

    groups: each video's picture; videos of one picture are drawn together. Raises ValueError for fewer than `least`
    pictures and for values that are not finite.
    """
    count = len(values) if groups is None else len(set(groups))
    if count < least(percent):
        of = "videos" if groups is None else "pictures"
        raise ValueError(f"{metric}: {count} {of}, a {percent:g} % interval needs at least {least(percent)}; "
                         f"give more {of}, or the values of each without an interval")  # fmt: skip
    return sum(values) / len(values), bootstrap_interval(values, seed, groups=groups, percent=percent)


def check_same_length(lengths: Mapping[str, int]) -> None:
    """Raises ValueError, naming the videos, unless all have the same number of frames.

    Every metric here depends on it: later frames are less alike the first, and DOVER's frames are picked by number.
    """
    if len(set(lengths.values())) < 2:
        return
    usual, _ = Counter(lengths.values()).most_common(1)[0]
    other = [f"{name} has {count}" for name, count in lengths.items() if count != usual]
    more = f" and {len(other) - 3} more" if len(other) > 3 else ""
    raise ValueError(
        f"videos of differing length: most have {usual} frames, {', '.join(other[:3])}{more}; cut all to "
        f"{min(lengths.values())} frames (--frames {min(lengths.values())}), or measure each length on its own"
    )

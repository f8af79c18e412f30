"""A metric over a set of videos: the mean over videos without weights, as the paper's tables, and its interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from eval.intervals import bootstrap_interval

LEAST = 6  # videos: with 5, even the range from the lowest to the highest holds the median in only 94 % of all sets


def mean_and_interval(values: Sequence[float], metric: str, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """The mean over videos and its 95 % bootstrap interval, in the metric's unit; one value for each video.

    Raises ValueError for fewer than LEAST videos and for values that are not finite.
    """
    if len(values) < LEAST:
        raise ValueError(f"{metric}: {len(values)} videos, a 95 % interval needs at least {LEAST}; "
                         "give more videos, or the values of each without an interval")  # fmt: skip
    return sum(values) / len(values), bootstrap_interval(values, seed)


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
        f"{min(lengths.values())} frames, or measure each length on its own"
    )

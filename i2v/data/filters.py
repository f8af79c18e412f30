"""Which parts of a file make training clips: without a cut inside, moving, without bars, long enough.

Pure functions of a `Scan`. Every threshold is a constant here; docs/data.md says what was measured with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from i2v.data.clips import LARGE, Scan, Timing, interval
from i2v.data.folders import BadClip

FILTERS = ("cut", "static", "letterbox")  # those that can be switched off
CUT_LEVEL = 12.0  # mean change from one frame to the next, in levels of 0 ... 255, that may be a cut
CUT_RATIO = 3.0  # and how many times more than around it
CUT_AROUND = 8  # frames on either side that it is compared with
STILL_LEVEL = 12.0  # levels by which the liveliest 1 % of the picture differs between quarters of a moving clip
GAP = 3.0  # frames that are missing in a row split the file as a cut does
BAR_ROWS = 3  # of 96: bars of 3 % of the height (or width) on both sides
BAR_LEVELS = 40  # how far a bar's colour may vary: compression smears the picture over its edge
BAR_STEP = 32  # levels by which the picture next to a bar differs from it at some time
BAR_EDGE = 0.5  # in this part of the row, so that only straight edges count
SLOWER = 0.9  # a file with less than this part of the wanted frames a second would repeat frames
AS_FIRST = "fbd5591820222082"  # digest of the values with which caches and checkpoints were made that do not name any


def thresholds() -> dict[str, float]:
    """The constants above by name, or none while they are those of `AS_FIRST`: with others clips are chosen anew."""
    known = globals().items()
    values = {name: float(value) for name, value in known if name.isupper() and isinstance(value, int | float)}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    return {} if digest == AS_FIRST else values


def cuts(scan: Scan) -> NDArray[np.int64]:
    """Numbers of the frames that begin a new shot: they differ from the frame before far more than is usual there."""
    pairs = zip(scan.small[:-1], scan.small[1:])  # one by one: 18,000 frames would be copied to 600 MB
    change = np.asarray([np.abs(after.astype(np.float32) - before).mean() for before, after in pairs], np.float32)
    found = []
    for k in np.flatnonzero(change >= CUT_LEVEL):
        around = np.concatenate([change[max(k - CUT_AROUND, 0) : k], change[k + 1 : k + CUT_AROUND + 1]])
        usual = float(np.quantile(around, 0.8)) if len(around) else 0.0  # not the largest: other cuts may be near
        if change[k] >= CUT_RATIO * usual:
            found.append(k + 1)
    return np.asarray(found, np.int64)


def movement(small: NDArray[np.uint8]) -> float:
    """How far the liveliest 1 % of the picture goes from quarter to quarter of a clip, in levels; 0 for one frame.

    Averages over a quarter let noise and the flicker of compression cancel out.
    """
    quarters = np.stack([part.mean(axis=(0, 3)) for part in np.array_split(small, min(4, len(small)))])
    return float(np.quantile(quarters.max(axis=0) - quarters.min(axis=0), 0.99))


def bars(scan: Scan) -> tuple[int, int]:
    """Rows and columns, of 96, that are bars of one colour over the whole time; 0 where there are not two of them."""
    turned = scan.low.swapaxes(0, 1), scan.high.swapaxes(0, 1)
    return _bars(scan.low, scan.high), _bars(*turned)


def _bars(low: NDArray[np.uint8], high: NDArray[np.uint8]) -> int:
    """Bars above and below. They end on a straight edge: a dark sky or an object on a plain ground does not."""
    least, most = low.astype(int), high.astype(int)

    def count(rows: range) -> int:
        for n in range(1, len(rows)):
            inside = slice(rows[n], rows[0] + 1) if rows[0] > rows[n] else slice(rows[0], rows[n] + 1)
            if (most[inside].max(axis=(0, 1)) - least[inside].min(axis=(0, 1))).max() > BAR_LEVELS:
                return n
        return 0  # one colour all over: no bars

    top, bottom = count(range(LARGE)), count(range(LARGE - 1, -1, -1))
    if min(top, bottom) < BAR_ROWS or top + bottom > LARGE // 2 + LARGE // 4:
        return 0
    colour, below = (
        np.median(most[part] + least[part], axis=(0, 1)) / 2 for part in (slice(top), slice(-bottom, None))
    )
    if np.abs(colour - below).max() > BAR_LEVELS:
        return 0
    for rows in (slice(top, top + 3), slice(LARGE - bottom - 3, LARGE - bottom)):  # one or two may hold a mixture
        away = np.maximum(np.abs(most[rows] - colour), np.abs(least[rows] - colour)).max(axis=-1)
        if (away > BAR_STEP).mean(axis=1).max() < BAR_EDGE:
            return 0
    return top + bottom


def shots(scan: Scan, timing: Timing, keep: Collection[str] = ()) -> list[tuple[int, int]]:
    """[first, end) numbers of frames without a cut, and without a gap in time, between them; all if cuts are kept."""
    if "cut" in keep:
        return [(0, len(scan.times))]
    borders = set(cuts(scan).tolist())
    if len(scan.times) > 1:
        longest = max(GAP * interval(scan.times), 1.5 * timing.step(scan.times))
        borders |= set((np.flatnonzero(np.diff(scan.times) > longest) + 1).tolist())
    edges = [0, *sorted(borders), len(scan.times)]
    return list(zip(edges[:-1], edges[1:]))


def starts(scan: Scan, timing: Timing, keep: Collection[str] = ()) -> NDArray[np.int64]:
    """(S, 2) the frames at which a clip can start, each with the end of its shot.

    Raises `BadClip` saying which filter the file fails. keep: names of `FILTERS` that are switched off.
    """
    times = scan.times
    if "letterbox" not in keep and max(bars(scan)) > 0:
        rows, columns = bars(scan)
        side = "above and below" if rows else "left and right"
        raise BadClip("letterbox", f"bars {side} take {max(rows, columns) / LARGE:.0%} of the picture")
    if timing.num_frames == 1:
        parts = shots(scan, timing, keep)
        return np.asarray([(first, end) for begin, end in parts for first in range(begin, end)], np.int64)
    if len(times) < 2:
        raise BadClip("one_frame", "holds a single frame")
    step, own = timing.step(times), interval(times)
    if step < SLOWER * own:
        raise BadClip("slow", f"shows {1 / own:.3g} frames a second, {1 / step:.3g} are wanted")
    span = (timing.num_frames - 1) * step
    if times[-1] + own / 2 < span:
        raise BadClip("too_short", f"lasts {times[-1] + own:.2f} s, a clip of {timing.num_frames} frames {span:.2f} s")
    fitting: list[list[tuple[int, int]]] = []
    for begin, end in shots(scan, timing, keep):
        last = times[end - 1] + own / 2 - span  # the latest start, by half a frame
        fitting.append([(k, end) for k in range(begin, end) if times[k] <= last])
    if not any(fitting):
        raise BadClip("cut", f"{len(fitting)} shots or pauses, none of them {span:.2f} s long")
    moving = [part for part in fitting if part and movement(scan.small[part[0][0] : part[0][1]]) >= STILL_LEVEL]
    if "static" not in keep and not moving:
        raise BadClip("static", "nothing moves")
    chosen = fitting if "static" in keep else moving
    return np.asarray([pair for part in chosen for pair in part], np.int64)


def frames_from(times: NDArray[np.float64], start: int, end: int, timing: Timing) -> NDArray[np.int64]:
    """(num_frames,) numbers of the frames shown nearest to start, start + step, ... seconds; all before `end`."""
    wanted = times[start] + timing.step(times) * np.arange(timing.num_frames)
    shown = times[start:end]
    after = np.searchsorted(shown, wanted).clip(1, max(len(shown) - 1, 1))
    if len(shown) == 1:
        return np.full(timing.num_frames, start, np.int64)
    before = after - 1
    nearer = np.where(wanted - shown[before] <= shown[after] - wanted, before, after)
    return (start + nearer).astype(np.int64)

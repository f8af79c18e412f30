"""How the object of a clip moved, measured from pixels: a verdict that never reads the caption."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.metrics.align import SIDE
from eval.metrics.object_mask import object_mask
from eval.metrics.view import View, look

CLASSES = ("moves left", "moves right", "moves up", "moves down", "stays still")
MOTIONS = (*CLASSES, "grows", "shrinks", "spins clockwise", "spins counterclockwise", "bounces")
STILL = 0.12  # of the frame
GROWTH = 0.22  # natural logarithm of the size
SPIN = 45.0  # degrees
FOUND = 0.35  # least share of the object that has to be there


@dataclass(frozen=True)
class Motion:
    """A clip's measured motion, relative to the background.

    motion: the class. dx, dy: displacement of the object over the clip, of the frame, right and down positive.
    log_scale: natural logarithm of its growth. turn: degrees clockwise, counted through full turns. hop: how high it
    was in the middle of the clip above the line from start to end, of the frame. background: its (dx, dy).
    found: how much of the object is in the last quarter of the frames (`object_track.track_object`).
    """

    motion: str
    dx: float
    dy: float
    log_scale: float
    turn: float
    hop: float
    background: tuple[float, float]
    found: float


def measure_motion(frames: NDArray[np.uint8], mask: NDArray[np.uint8] | None = None,
                   classes: Sequence[str] = CLASSES) -> Motion:  # fmt: skip
    """The motion of one object over a clip, from pixels alone.

    frames: uint8 (F, S, S, 3) RGB, F >= 2. mask: (S, S), non-zero on the object in frame 0; estimated by `object_mask`
    when absent. classes: the allowed verdicts, among MOTIONS.

    Raises ValueError for other shapes, an empty mask or unknown classes.
    """
    return motion_of(look(frames, object_mask(frames[0]) if mask is None else mask), classes)


def motion_of(view: View, classes: Sequence[str] = MOTIONS) -> Motion:
    """The object's motion in a clip that has been looked at.

    Definition. The object's pose (shift, scale, turn) in every frame, as far as FOUND of it is there, is taken relative
    to the background's, so that a moving camera moves nothing. Displacement and growth are the median of the last
    quarter of the frames; of an object that is lost by then, its last place. Turns are added up from frame to frame, so
    an object with several equal sides may turn past them. The hop is the median over the middle half of the clip. The
    largest of displacement against STILL (longer axis), growth against GROWTH, turn against SPIN and hop against STILL
    names the class; when none reaches 1, it "stays still".

    The thresholds were fixed on true clips of the miniature world, split "train", plain and degraded. The ceiling on
    other clips is in docs/measuring.md. Raises ValueError for unknown classes or a view without an object.
    """
    unknown = set(classes) - set(MOTIONS)
    if unknown:
        raise ValueError(f"cannot tell {sorted(unknown)}; known classes are {MOTIONS}")
    if view.track is None:
        raise ValueError("a picture without an object has no object's motion; give its mask")
    path = _path(view)
    late = path[-max((len(path) + 1) // 4, 1) :]
    seen = path[~np.isnan(path[:, 0])]
    ended = late[~np.isnan(late[:, 0])]
    ended = ended if len(ended) else seen[-1:]
    dx, dy, log_scale, turn = np.median(ended, axis=0) if len(ended) else np.zeros(4)
    hop = _hop(path[:, 1])
    found = float(np.median(view.track.found[-len(late) :]))
    motion = _verdict(dx, dy, log_scale, turn, hop, classes)
    return Motion(motion, float(dx), float(dy), float(log_scale), float(turn), hop,
                  (view.camera.dx, view.camera.dy), found)  # fmt: skip


def _path(view: View) -> NDArray[np.float64]:
    """dx, dy, log_scale, turn for each frame after the first; not a number where the object is lost: (F - 1, 4)."""
    if view.track is None:
        raise ValueError("the view was taken without a mask: there is no object to follow")
    centre, track = view.track.target.centre, view.track
    middle = complex(SIDE / 2 - 0.5, SIDE / 2 - 0.5)
    rows, turned, before = [], 0.0, 1 + 0j
    for thing, behind, found in zip(track.poses, view.camera.poses, track.found):
        if found < FOUND:
            rows.append([math.nan] * 4)
            continue
        shift = ((centre + thing.b - middle - behind.b) / behind.a + middle - centre) / SIDE
        a = thing.a / behind.a
        turned += math.degrees(cmath.phase(a / before))
        before = a
        rows.append([shift.real, shift.imag, math.log(abs(a)), turned])
    return np.array(rows)


def _hop(heights: NDArray[np.float64]) -> float:
    """Median height over the chord from start to end, in the middle half of a clip; downwards is negative."""
    known = ~np.isnan(heights)
    if int(known.sum()) < 2:
        return 0.0
    time = np.arange(1, len(heights) + 1) / len(heights)
    y = np.interp(time, time[known], heights[known])
    middle = (time > 0.2) & (time < 0.8)
    return float(np.median((y[-1] * time - y)[middle])) if middle.any() else 0.0


def _verdict(dx: float, dy: float, log_scale: float, turn: float, hop: float, classes: Sequence[str]) -> str:
    """The class by the largest evidence against its threshold; "stays still" when none passes."""
    sideways = abs(dx) >= abs(dy)
    evidence = {
        "moves left": -dx / STILL * sideways,
        "moves right": dx / STILL * sideways,
        "moves up": -dy / STILL * (not sideways),
        "moves down": dy / STILL * (not sideways),
        "grows": log_scale / GROWTH,
        "shrinks": -log_scale / GROWTH,
        "spins clockwise": turn / SPIN,
        "spins counterclockwise": -turn / SPIN,
        "bounces": hop / STILL,
    }
    allowed = {name: value for name, value in evidence.items() if name in classes}
    best = max(allowed, key=lambda name: allowed[name], default="stays still")
    return best if allowed.get(best, 0.0) >= 1 else "stays still"

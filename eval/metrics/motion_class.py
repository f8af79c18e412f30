"""Which way the object of a clip moved, measured from pixels: a verdict that never reads the caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from eval.metrics.object_mask import object_mask

CLASSES = ("moves left", "moves right", "moves up", "moves down", "stays still")
SIDE = 256  # pixels; clips are enlarged to this before flow, which misses small motions at 64
MATCH_SIDE = 64  # pixels; the object is looked for as a whole at this side
STILL = 0.12  # of the frame
GROWTH = 0.20  # natural logarithm of the size
FOUND = 0.35  # least share of the object that has to be there for a match


class Tracked(NamedTuple):
    """Points followed through a clip by optical flow, in fractions of the frame."""

    dx: float
    dy: float
    log_scale: float
    kept: float  # share of the points that survived to the last frame


@dataclass(frozen=True)
class Motion:
    """A clip's measured motion.

    motion: the class. dx, dy: displacement of the object relative to the background over the clip, in fractions of
    the frame, right and down positive. log_scale: natural logarithm of its growth. background: (dx, dy) of the
    background. found: how much of the object is in the last frames at its best place: 1 minus the squared difference to
    it, over that of the bare background; at most 1, about 0 when it is gone. method: "match" or "flow".
    """

    motion: str
    dx: float
    dy: float
    log_scale: float
    background: tuple[float, float]
    found: float
    method: str


def measure_motion(frames: NDArray[np.uint8], mask: NDArray[np.uint8] | None = None,
                   classes: Sequence[str] = CLASSES) -> Motion:  # fmt: skip
    """The motion of one object over a clip, from pixels alone.

    frames: uint8 (F, H, W, 3) RGB with H = W, F >= 2. mask: (H, W), non-zero on the object in frame 0; estimated by
    `object_mask` when absent. classes: the allowed verdicts; "grows" and "shrinks" may be added.

    Definition. The object's displacement is found in two ways. "match": frame 0's object is looked for, as a whole
    and by colour, in the last quarter of the frames (64 x 64 pixels, shifts up to half a frame): its place is where
    the squared difference to it is most below that of frame 0's background (the object painted out) at that place,
    so a background of the object's colour is no find; light and contrast of the frames are first brought back to
    frame 0's by its background. The median of the places is taken when at least FOUND of the difference is
    explained there, which bears blur, noise and fading. "flow", otherwise: points on the object follow DIS optical
    flow from frame to frame at 256 pixels, checked forwards and backwards; median displacement. Background points
    give the camera's part, which is subtracted where it explains the background. Then: less than STILL of the frame
    is "stays still", else the sign on the longer axis names the class. Growth (only when asked for) is the scale of
    a RANSAC similarity fitted to the object's points; it decides when it is larger against GROWTH than the
    displacement against STILL.

    The thresholds were fixed on true clips of the miniature world (split "train", plain and degraded), before any
    model was measured: there, displacements are 0.19 or more for moving and 0.02 or less for still objects, and an
    object that dissolves is found to 0.21 at most, one blurred beyond recognition (sigma 3 of 64 pixels) to 0.5 or
    more. The ceiling on other clips is in docs/measuring.md.

    Raises ValueError for other shapes, an empty mask or unknown classes.
    """
    _check(frames, classes)
    area = object_mask(frames[0]) if mask is None else (np.asarray(mask) > 0).astype(np.uint8)
    if area.shape != frames.shape[1:3] or not 0 < int(area.sum()) < area.size:
        raise ValueError(f"the object's mask has shape {area.shape} and {int(area.sum())} pixels; expected "
                         f"{frames.shape[1:3]} with some pixels on the object and some beside it")  # fmt: skip
    thing, behind = _follow(frames, area)
    dx, dy, found = _match(frames, area)
    place = (dx, dy)
    method = "match"
    if found < FOUND:
        dx, dy, method = thing.dx, thing.dy, "flow"
    shift = (behind.dx, behind.dy) if _travelled(frames, area, place, behind) else (0.0, 0.0)
    dx, dy = dx - shift[0], dy - shift[1]
    motion = _verdict(dx, dy, thing.log_scale, classes)
    return Motion(motion, dx, dy, thing.log_scale, shift, found, method)


def _check(frames: NDArray[np.uint8], classes: Sequence[str]) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or frames.shape[1] != frames.shape[2]:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (F, S, S, 3)")
    if len(frames) < 2:
        raise ValueError("one frame has no motion; expected at least two")
    unknown = set(classes) - {*CLASSES, "grows", "shrinks"}
    if unknown:
        raise ValueError(f"cannot tell {sorted(unknown)}; known classes are {(*CLASSES, 'grows', 'shrinks')}")


def _verdict(dx: float, dy: float, log_scale: float, classes: Sequence[str]) -> str:
    """The class by the largest evidence against its threshold; "stays still" when none passes."""
    evidence = {
        "moves left": -dx / STILL if abs(dx) >= abs(dy) else 0.0,
        "moves right": dx / STILL if abs(dx) >= abs(dy) else 0.0,
        "moves up": -dy / STILL if abs(dy) > abs(dx) else 0.0,
        "moves down": dy / STILL if abs(dy) > abs(dx) else 0.0,
        "grows": log_scale / GROWTH,
        "shrinks": -log_scale / GROWTH,
    }
    allowed = {name: value for name, value in evidence.items() if name in classes}
    best = max(allowed, key=lambda name: allowed[name], default="stays still")
    return best if allowed.get(best, 0.0) >= 1 else "stays still"


def _match(frames: NDArray[np.uint8], area: NDArray[np.uint8]) -> tuple[float, float, float]:
    """Where frame 0's object is in the last quarter of the frames: dx, dy (of the frame), and how much of it."""
    pad = MATCH_SIDE // 2
    late = frames[-max(len(frames) // 4, 1) :]
    small = [_resized(frame, MATCH_SIDE).astype(np.float32) for frame in (frames[0], *late)]
    cover = cv2.resize(area.astype(np.float32), (MATCH_SIDE, MATCH_SIDE), interpolation=cv2.INTER_AREA)
    weight = (cover > 0.5).astype(np.float32)
    if not weight.any():
        return 0.0, 0.0, 0.0
    x, y, w, h = cv2.boundingRect(weight.astype(np.uint8))
    first, stencil = small[0][y : y + h, x : x + w], np.repeat(weight[y : y + h, x : x + w, None], 3, axis=2)

    def misfit(frame: NDArray[np.float32]) -> NDArray[np.float32]:
        """Squared difference to the object at every shift of at most half a frame: (2 pad + 1, 2 pad + 1)."""
        wide = cv2.copyMakeBorder(frame, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
        error = np.asarray(cv2.matchTemplate(wide, first, cv2.TM_SQDIFF, mask=stencil), np.float32)
        return error[y : y + 2 * pad + 1, x : x + 2 * pad + 1]

    gone = cv2.dilate(weight.astype(np.uint8), np.ones((5, 5), np.uint8))
    bare = cv2.inpaint(small[0].astype(np.uint8), gone, 3, cv2.INPAINT_TELEA).astype(np.float32)
    empty = misfit(bare)
    places = []
    for frame in small[1:]:
        gain = empty - misfit(_relit(frame, bare))
        row, column = np.unravel_index(int(gain.argmax()), gain.shape)
        explained = float(gain[row, column] / max(empty[row, column], 1e-6))
        places.append(((column - pad) / MATCH_SIDE, (row - pad) / MATCH_SIDE, explained))
    dx, dy, found = np.median(np.array(places), axis=0)
    return float(dx), float(dy), float(found)


def _relit(frame: NDArray[np.float32], bare: NDArray[np.float32]) -> NDArray[np.float32]:
    """A frame whose background has the light and contrast of `bare` again, per colour channel.

    A line is fitted to the 60 % of the pixels that lie nearest to it, which leaves the object out; where the
    background is flat, its slope stays near 1.
    """
    out = np.empty_like(frame)
    for channel in range(3):
        x, y = bare[..., channel], frame[..., channel]
        slope, offset = 1.0, float(np.median(y - x))
        for _ in range(4):
            far = np.abs(y - slope * x - offset)
            kept = far <= np.quantile(far, 0.6)
            dx, dy = x[kept] - x[kept].mean(), y[kept] - y[kept].mean()
            slope = float(np.clip(((dx * dy).mean() + 100) / ((dx * dx).mean() + 100), 0.3, 3))
            offset = float(y[kept].mean() - slope * x[kept].mean())
        out[..., channel] = (y - offset) / slope
    return out


def _travelled(frames: NDArray[np.uint8], area: NDArray[np.uint8], place: tuple[float, float],
               behind: Tracked) -> bool:  # fmt: skip
    """Whether the flow's shift of the background leaves at most half of what no shift leaves unexplained.

    Flow over a smooth gradient reads a change of light as motion; correlation, beside the object where it was and
    where it is, does not.
    """
    if max(abs(behind.dx), abs(behind.dy)) < 0.02:
        return False
    first, last = (cv2.cvtColor(_resized(frames[i], SIDE), cv2.COLOR_RGB2GRAY).astype(np.float32) for i in (0, -1))
    thing = cv2.dilate(cv2.resize(area, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST), np.ones((9, 9), np.uint8))
    beside = 1 - thing.astype(np.float32)
    gone = cv2.warpAffine(thing, np.array([[1, 0, place[0] * SIDE], [0, 1, place[1] * SIDE]]), (SIDE, SIDE)) == 0
    scores = []
    for dx, dy in ((0.0, 0.0), (behind.dx, behind.dy)):
        matrix = np.array([[1, 0, dx * SIDE], [0, 1, dy * SIDE]])
        moved, seen = (cv2.warpAffine(picture, matrix, (SIDE, SIDE)) for picture in (first, beside))
        both = (seen > 0.99) & gone
        if int(both.sum()) < 64:
            return False
        pair = np.stack([moved[both], last[both]])
        pair -= pair.mean(axis=1, keepdims=True)
        scores.append(float((pair[0] * pair[1]).sum() / (np.linalg.norm(pair[0]) * np.linalg.norm(pair[1]) + 1e-6)))
    return 1 - scores[1] < 0.5 * (1 - scores[0])


def _resized(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    method = cv2.INTER_AREA if picture.shape[0] > side else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (side, side), interpolation=method), np.uint8)


def grey_pictures(frames: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The frames' luma at SIDE pixels."""
    return [np.asarray(cv2.cvtColor(_resized(frame, SIDE), cv2.COLOR_RGB2GRAY), np.uint8) for frame in frames]


def flow(first: NDArray[np.uint8], second: NDArray[np.uint8], start: NDArray[np.float32] | None = None
         ) -> NDArray[np.float32]:  # fmt: skip
    """DIS optical flow from one grey picture to another, in pixels, (H, W, 2); `start` is a first guess."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    guess = np.zeros((*first.shape, 2), np.float32) if start is None else start.copy()
    return np.asarray(dis.calc(first, second, guess), np.float32)


def _follow(frames: NDArray[np.uint8], area: NDArray[np.uint8]) -> tuple[Tracked, Tracked]:
    """Object and background points carried through the clip by flow."""
    mask = cv2.resize(area, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    step = SIDE // 64
    grid = np.stack(np.meshgrid(np.arange(step, SIDE - step, step), np.arange(step, SIDE - step, step)), -1)
    inside = grid.reshape(-1, 2)
    beside = cv2.dilate(mask, np.ones((17, 17), np.uint8))[inside[:, 1], inside[:, 0]] == 0
    on = mask[inside[:, 1], inside[:, 0]] > 0
    start = [inside[on].astype(np.float32), inside[beside].astype(np.float32)]
    now, alive = [points.copy() for points in start], [np.ones(len(points), bool) for points in start]
    grey = grey_pictures(frames)
    for before, after in zip(grey[:-1], grey[1:], strict=True):
        there, back = flow(before, after), flow(after, before)
        for k in range(2):
            moved = now[k] + _at(there, now[k])
            missed = np.linalg.norm(moved + _at(back, moved) - now[k], axis=1)
            alive[k] &= (missed < 2) & (moved >= 0).all(1) & (moved < SIDE).all(1)
            now[k] = moved
    thing, behind = (_summary(start[k], now[k], alive[k]) for k in range(2))
    return thing, behind


def _at(flow: NDArray[np.float32], points: NDArray[np.float32]) -> NDArray[np.float32]:
    """A flow field at points between pixels: (N, 2)."""
    if not len(points):
        return np.zeros((0, 2), np.float32)
    maps = points.reshape(-1, 1, 2)
    found = cv2.remap(flow, maps[..., 0], maps[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(found, np.float32).reshape(-1, 2)


def _summary(start: NDArray[np.float32], end: NDArray[np.float32], alive: NDArray[np.bool_]) -> Tracked:
    """Median displacement and scale of the points that were kept; at rest when fewer than 8 were."""
    if int(alive.sum()) < 8:
        return Tracked(0.0, 0.0, 0.0, 0.0)
    dx, dy = np.median(end[alive] - start[alive], axis=0) / SIDE
    found, _ = cv2.estimateAffinePartial2D(start[alive], end[alive], method=cv2.RANSAC, ransacReprojThreshold=3)
    scale = 1.0 if found is None else float(np.hypot(found[0, 0], found[1, 0]))
    return Tracked(float(dx), float(dy), float(np.log(max(scale, 1e-3))), float(alive.mean()))

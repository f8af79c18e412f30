"""The object of frame 0 followed through a clip: where it is in every frame, how large, how turned, and how much."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from eval.metrics.align import SIDE, Picture, Pose, Target, sampled, softened, visible

SOFT = 1.2  # pixels; pictures are blurred by it before a pose is fitted
SURE = 0.8  # an object found to this share by its last place is not looked for elsewhere


@dataclass(frozen=True)
class Track:
    """poses, found: one for each frame after the first. target: the object in frame 0. bare: frame 0 without it."""

    target: Target
    bare: Picture
    poses: list[Pose]
    found: NDArray[np.float64]


def track_object(shots: list[Picture], area: NDArray[np.uint8]) -> Track:
    """Follows the pixels `area` of the first picture through the others (`align.pictures`).

    In every frame the pose is fitted from the one before; where that explains less than SURE of the object, it is also
    looked for as a whole at all shifts up to half a frame, and the better one counts. found: 1 minus the squared
    difference to the object over that of frame 0's bare background (the object painted out) at the same place; at most
    1, about 0 or less when it is gone. A background of the object's colour is so no find. Light and contrast of the
    frames are first brought back to frame 0's by the background.
    """
    gone = cv2.dilate(area, np.ones((5, 5), np.uint8))
    bare = cv2.inpaint(shots[0].astype(np.uint8), gone, 3, cv2.INPAINT_TELEA).astype(np.float32)
    y, x = np.nonzero(area)
    target = Target(softened(shots[0], SOFT), area, complex(x.mean(), y.mean()))
    empty = _misfits(bare, shots[0], area)
    pose, poses, found = Pose(), [], []
    for shot in shots[1:]:
        lit = relit(shot, bare)
        soft = softened(lit, SOFT)
        pose = target.fit(soft, pose)
        share = explained(target, lit, bare, pose)
        if share < SURE:
            place = _search(lit, shots[0], area, empty)
            other = target.fit(soft, place)
            for candidate in (place, other):
                value = explained(target, lit, bare, candidate)
                if value > share:
                    pose, share = candidate, value
        poses.append(pose)
        found.append(share)
    return Track(target, bare, poses, np.array(found))


def explained(target: Target, shot: Picture, bare: Picture, pose: Pose) -> float:
    """How much of the object is at a pose: see `track_object`."""
    seen = target.area & visible(pose, target.centre)
    if seen.sum() < 0.3 * target.area.sum():
        return -1.0
    own = ((sampled(shot, pose, target.centre)[seen] - target.picture[seen]) ** 2).sum()
    other = ((sampled(bare, pose, target.centre)[seen] - target.picture[seen]) ** 2).sum()
    return float(1 - own / max(float(other), 1e-6))


def _misfits(picture: Picture, first: Picture, area: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Squared difference to the object at every shift of at most half a frame: (SIDE + 1, SIDE + 1)."""
    pad = SIDE // 2
    x, y, w, h = cv2.boundingRect(area)
    stencil = np.repeat(area[y : y + h, x : x + w, None].astype(np.float32), 3, axis=2)
    wide = cv2.copyMakeBorder(picture, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    error = cv2.matchTemplate(wide, first[y : y + h, x : x + w], cv2.TM_SQDIFF, mask=stencil)
    return np.asarray(error[y : y + SIDE + 1, x : x + SIDE + 1], np.float32)


def _search(shot: Picture, first: Picture, area: NDArray[np.uint8], empty: NDArray[np.float32]) -> Pose:
    """The shift at which the object explains most of what the bare background does not."""
    gain = empty - _misfits(shot, first, area)
    row, column = np.unravel_index(int(gain.argmax()), gain.shape)
    return Pose(b=complex(column - SIDE // 2, row - SIDE // 2))


def relit(shot: Picture, bare: Picture) -> Picture:
    """A frame whose background has the light and contrast of `bare` again, per colour channel.

    A line is fitted to the 60 % of the pixels that lie nearest to it, which leaves the object out. Where the background
    is flat its slope stays near 1; where a texture has moved under the pixels no line fits, and only the means count.
    """
    out = np.empty_like(shot)
    for channel in range(3):
        x, y = bare[::2, ::2, channel].ravel(), shot[::2, ::2, channel].ravel()
        slope, offset = 1.0, float(np.median(y - x))
        for _ in range(4):
            far = np.abs(y - slope * x - offset)
            kept = far <= np.quantile(far, 0.6)
            dx, dy = x[kept] - x[kept].mean(), y[kept] - y[kept].mean()
            slope = float(np.clip(((dx * dy).mean() + 100) / ((dx * dx).mean() + 100), 0.3, 3))
            offset = float(y[kept].mean() - slope * x[kept].mean())
        if float((dx * dx).mean()) > 100 and (dx * dy).mean() ** 2 < 0.6 * (dx * dx).mean() * (dy * dy).mean():
            slope, offset = 1.0, float(y.mean() - x.mean())
        out[..., channel] = (shot[..., channel] - offset) / slope
    return out

"""What is where in a clip: the object and the background of frame 0 in every frame. The other metrics start here."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from eval.metrics.align import SIDE, Picture, area_at_side, pictures
from eval.metrics.camera import Camera, measure_camera
from eval.metrics.object_track import Track, track_object

EDGE = np.ones((7, 7), np.uint8)  # an object's edge is mixed with the background: this much is left out


@dataclass(frozen=True)
class View:
    """shots: the frames at SIDE pixels. track: of the object, None without one. covered: for every frame, 1 where the
    object is, with its edge, (SIDE, SIDE). camera: of the background."""

    shots: list[Picture]
    track: Track | None
    covered: list[NDArray[np.uint8]]
    camera: Camera


def look(frames: NDArray[np.uint8], mask: NDArray[np.uint8] | None) -> View:
    """Follows object and background through a clip.

    frames: uint8 (F, S, S, 3) RGB, F >= 2. mask: (S, S), non-zero on the object in frame 0; None for a picture that is
    all background, as a photograph. Raises ValueError for other shapes and a mask that is empty or full.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or frames.shape[1] != frames.shape[2]:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (F, S, S, 3)")
    if len(frames) < 2:
        raise ValueError("one frame has no motion; expected at least two")
    shots = pictures(frames)
    if mask is None:
        covered = [np.zeros((SIDE, SIDE), np.uint8)] * len(shots)
        return View(shots, None, covered, measure_camera(shots, covered))
    count = int((np.asarray(mask) > 0).sum())
    if np.shape(mask) != frames.shape[1:3] or not 0 < count < np.size(mask):
        raise ValueError(f"the object's mask has shape {np.shape(mask)} and {count} pixels; expected "
                         f"{frames.shape[1:3]} with some pixels on the object and some beside it")  # fmt: skip
    area = area_at_side(mask)
    if not area.any():
        raise ValueError(f"the object's mask has no pixel left at {SIDE} x {SIDE}: the object is too small")
    track = track_object(shots, area)
    places = [cv2.warpAffine(area, pose.matrix(track.target.centre), (SIDE, SIDE), flags=cv2.INTER_NEAREST)
              for pose in track.poses]  # fmt: skip
    covered = [np.asarray(cv2.dilate(place, EDGE), np.uint8) for place in (area, *places)]
    return View(shots, track, covered, measure_camera(shots, covered, track))

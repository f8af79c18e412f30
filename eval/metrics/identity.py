"""Whether the object stays itself while it moves: sharpness and likeness at its best place in every frame."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from eval.metrics.align import Picture, sampled, visible
from eval.metrics.background import lab, psnr
from eval.metrics.view import View

COLOUR = 50.0  # delta E at which nothing is left of the likeness


def object_psnr(view: View) -> float | None:
    """How exactly the object is kept: dB, 0 to 50, higher is better.

    Each frame is sampled (cubic) at the pose that `object_track` found for the object (shift, scale and turn), so that
    frame 0's object should come out; PSNR over RGB on the object's pixels, without its outermost one, which is mixed
    with the background; mean over the frames after the first. An object that has left the frame by more than 70 % is
    not judged in that frame; where it always has, or there is none, None.
    """
    values = [psnr(first, back) for first, back in _pairs(view)]
    return float(np.mean(values)) if values else None


def identity(view: View) -> float | None:
    """How like the first frame's object it is: -1 to 1, higher is better, 1 for equal.

    At the same pose and on the same pixels as `object_psnr`: the correlation of the colours (each channel's mean taken
    off; 1 where both objects are of one colour) times 1 - delta E / 50 of the mean colours (CIE 1976, not below 0);
    mean over the frames after the first. It bears blur better than PSNR and changes of kind or colour worse.
    """
    values = []
    for first, back in _pairs(view):
        a, b = first - first.mean(axis=0), back - back.mean(axis=0)
        size = np.linalg.norm(a) * np.linalg.norm(b)
        plain = max(np.abs(a).max(), np.abs(b).max()) < 1  # levels: of one colour, which cannot correlate
        likeness = 1.0 if plain else float((a * b).sum() / (size + 1e-6))
        far = float(np.linalg.norm(_mean_lab(first) - _mean_lab(back)))
        values.append(likeness * max(0.0, 1 - far / COLOUR))
    return float(np.mean(values)) if values else None


def _mean_lab(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(lab(colours[None])[0].mean(axis=0), np.float32)


def _pairs(view: View) -> list[tuple[Picture, Picture]]:
    """Colours (N, 3) of the object in frame 0, and in each frame where enough of it can be seen."""
    if view.track is None:
        return []
    target = view.track.target
    inner = cv2.erode(target.area.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    inner = inner if inner.sum() > 0.3 * target.area.sum() else target.area
    out = []
    for shot, pose in zip(view.shots[1:], view.track.poses, strict=True):
        seen = inner & visible(pose, target.centre)
        if seen.sum() >= 0.3 * inner.sum():
            out.append((view.shots[0][seen], sampled(shot, pose, target.centre, cv2.INTER_CUBIC)[seen]))
    return out

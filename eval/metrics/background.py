"""What should not change: the background's sharpness, colour and calm over a clip, the camera's motion undone."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from eval.metrics.align import Picture, Pose, sampled, softened, visible
from eval.metrics.camera import CENTRE
from eval.metrics.view import View

CAP = 50.0  # dB; a repeated frame would be infinite
LEAST = 64  # pixels that have to be left for a comparison


def psnr(first: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """In dB, peak 255, at most CAP."""
    error = float(np.square(first - other).mean())
    return float(min(10 * np.log10(255**2 / max(error, 1e-9)), CAP))


def static_psnr(view: View) -> float | None:
    """How exactly the part that nothing moves over stays as in frame 0: dB, 0 to 50, higher is better.

    PSNR over RGB (peak 255, at most 50) of each frame against frame 0, pixel by pixel and without any motion
    compensation, outside the object at its first and at its present place (with an edge of 2 pixels); mean over the
    frames after the first. Only for clips whose camera is to rest: an unwanted motion of the camera counts as an error.
    None where the object covers all.
    """
    return _kept(view, 0)


def settled_psnr(view: View) -> float | None:
    """How exactly that part stays as in frame 1: dB, 0 to 50, higher is better.

    As `static_psnr` with frame 1 in place of frame 0, over the frames after it. Far above `static_psnr` where a picture
    is drawn anew once and then rests; as low where it changes all the time.
    """
    return _kept(view, 1)


def _kept(view: View, start: int) -> float | None:
    """Mean PSNR of the frames after `start` against that one, beside the object."""
    return _mean([
        psnr(view.shots[start][free], shot[free])
        for shot, covered in zip(view.shots[start + 1 :], view.covered[start + 1 :], strict=True)
        if (free := (view.covered[start] == 0) & (covered == 0)).sum() >= LEAST
    ])  # fmt: skip


def background_psnr(view: View) -> float | None:
    """As `static_psnr`, with the camera's motion undone: dB, 0 to 50, higher is better.

    Frame t is sampled (cubic) where `camera.measure_camera` says that frame 0's background is, and compared where that
    lies in the frame. Zoomed and turned clips lose some dB to the sampling alone: read it beside the true clips'.
    """
    back, seen = _steady(view)
    values = [psnr(view.shots[0][s], b[s]) for b, s in zip(back[1:], seen[1:], strict=True) if s.sum() >= LEAST]
    return _mean(values)


def colour_drift(view: View) -> float | None:
    """How far the background's mean colour goes from frame 0's: CIE 1976 delta E, 0 or more, lower is better.

    The mean CIE Lab colour (sRGB, D65) of the background's pixels that are seen in both frames, camera undone; the
    distance to the same pixels of frame 0; mean over the frames after the first. About 2 can just be seen.
    """
    back, seen = _steady(view)
    first = lab(back[0])
    return _mean([
        float(np.linalg.norm(lab(b)[s].mean(axis=0) - first[s].mean(axis=0)))
        for b, s in zip(back[1:], seen[1:], strict=True) if s.sum() >= LEAST
    ])  # fmt: skip


def flicker(view: View) -> float | None:
    """How restless the background is from frame to frame: CIE 1976 delta E, 0 or more, lower is better.

    How far each frame lies from the mean of its two neighbours, camera undone, object left out, blurred by 1.5 of 64
    pixels (grain is no flicker): the mean over pixels and frames. A steady drift or a fade does not count.
    """
    back, seen = _steady(view)
    colours = [softened(lab(b), 1.5) for b in back]
    values = []
    for k in range(1, len(colours) - 1):
        both = seen[k - 1] & seen[k] & seen[k + 1]
        if both.sum() >= LEAST:
            off = colours[k] - (colours[k - 1] + colours[k + 1]) / 2
            values.append(float(np.linalg.norm(off[both], axis=-1).mean()))
    return _mean(values)


def lab(picture: Picture) -> Picture:
    """CIE Lab of an RGB picture of 0..255."""
    return np.asarray(cv2.cvtColor(picture.clip(0, 255) / 255, cv2.COLOR_RGB2LAB), np.float32)


def _steady(view: View) -> tuple[list[Picture], list[NDArray[np.bool_]]]:
    """All frames with the camera's motion undone, and where they show the background of frame 0."""
    back, seen = [view.shots[0]], [view.covered[0] == 0]
    for shot, covered, pose in zip(view.shots[1:], view.covered[1:], view.camera.poses, strict=True):
        still = pose == Pose()
        back.append(shot if still else sampled(shot, pose, CENTRE, cv2.INTER_CUBIC))
        there = covered if still else sampled(covered.astype(np.float32), pose, CENTRE) > 0.01
        seen.append(seen[0] & (there == 0) & visible(pose, CENTRE))
    return back, seen


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None

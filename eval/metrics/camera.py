"""How the camera of a clip moved, from the motion of the background; the verdict never reads the caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from eval.metrics.align import SIDE, Picture, Pose, Target, softened
from eval.metrics.object_track import Track

CAMERAS = ("", "the camera pans left", "the camera pans right", "the camera tilts up", "the camera tilts down",
           "the camera zooms in", "the camera zooms out", "the picture turns clockwise",
           "the picture turns counterclockwise")  # fmt: skip
PAN = 0.12  # of the frame
ZOOM = 0.18  # natural logarithm of the scale
TURN = 12.0  # degrees
FINE, COARSE = 1.0, 6.0  # pixels of 64; what is told apart by its size: grain, a background's features, drifting light
UNEXPLAINED = 0.85  # a camera's motion leaves at most this share of what no motion leaves, in half of the blocks
BLOCK, LEAST = 8, 8  # a block's side in pixels, and how many of the 64 are needed
STRAIGHT = 0.6  # it goes on its way: its end is this far from its start, as a share of the way's length
ONE_WAY = 0.03  # where the background changes this much less along one direction, nothing is known of that direction
PLAIN = 0.5  # least share of the object that has to be there for this
CENTRE = complex(SIDE / 2 - 0.5, SIDE / 2 - 0.5)


@dataclass(frozen=True)
class Camera:
    """A clip's measured camera.

    dx, dy: shift of the background, of the frame, right and down positive. log_scale:
    natural logarithm of its growth. turn: degrees clockwise. left: share of the difference that the motion leaves, 1
    when it explains nothing. poses: the background's pose in every frame after the first; all at rest when it explains
    too little.
    """

    dx: float
    dy: float
    log_scale: float
    turn: float
    left: float
    poses: list[Pose]


def measure_camera(shots: list[Picture], covered: list[NDArray[np.uint8]], track: Track | None = None) -> Camera:
    """The camera's motion over a clip, from pixels alone.

    shots: `align.pictures` of all frames. covered: (SIDE, SIDE) for each frame, 1 where the object is; nowhere for
    photographs. track: the object's.

    Definition. Frame by frame, the similarity transform is fitted that takes frame 0's background to this frame's:
    Gauss-Newton on the colours, with light and contrast free, without the object at both its places, and with weights
    that leave out what fits badly. What is coarser than COARSE pixels is taken off first: over a smooth background no
    motion can be seen, and colours that drift there are none. Of the last quarter of the frames the median counts. It
    must leave at most UNEXPLAINED of the squared difference (cut at 30 levels) that no motion leaves, in half of the
    background's blocks: what the object leaves beside it explains few of them. Otherwise the camera rests. So it does
    when the way of the picture's corners is not STRAIGHT, as when blotches come and go.

    Stripes do not show how far they have moved along themselves. If the background has one such direction and moves
    across it, the object's motion stands for the other: in this world the object rests where the camera moves.
    """
    soft = [detail(shot, 1 - cover) for shot, cover in zip(shots, covered, strict=True)]
    target = Target(soft[0], 1 - covered[0], CENTRE)
    pose, poses, left = Pose(), [], []
    late = len(shots) - max(len(shots) // 4, 1)
    for k, shot in enumerate(soft[1:], 1):
        free = 1 - covered[k]
        pose = target.fit(shot, pose, free)
        poses.append(pose)
        if k >= late:
            left.append(_left(target, shot, pose, free))
    share = float(np.median(left))
    if share > UNEXPLAINED or _straightness(poses) < STRAIGHT:
        return Camera(0.0, 0.0, 0.0, 0.0, share, [Pose()] * len(poses))
    along = _hidden_direction(target)
    if along is not None and track is not None:
        poses = [
            _filled(pose, along, thing, track.target.centre) if found >= PLAIN else pose
            for pose, thing, found in zip(poses, track.poses, track.found, strict=True)
        ]
    dx, dy, log_scale, turn = np.median([(p.dx, p.dy, p.log_scale, p.turn) for p in poses[late - 1 :]], axis=0)
    return Camera(float(dx), float(dy), float(log_scale), float(turn), share, poses)


def detail(shot: Picture, free: NDArray[np.uint8]) -> Picture:
    """A picture without what is coarser than COARSE pixels, averaged over its `free` (0 and 1) pixels alone."""
    weight = free.astype(np.float32)
    mass = cv2.GaussianBlur(weight, (0, 0), COARSE)[..., None]
    coarse = softened(shot * weight[..., None], COARSE) / np.maximum(mass, 1e-3)
    return np.asarray(softened(shot, FINE) - coarse, np.float32)


def verdict(camera: Camera, classes: Sequence[str] = CAMERAS) -> str:
    """The camera's class, "" at rest: the largest of shift against PAN, zoom against ZOOM and turn against TURN.

    A camera that pans left moves the background right. classes: the allowed verdicts besides rest; ValueError for
    unknown ones.
    """
    unknown = set(classes) - set(CAMERAS)
    if unknown:
        raise ValueError(f"cannot tell {sorted(unknown)}; known cameras are {CAMERAS}")
    dx, dy = camera.dx, camera.dy
    sideways = abs(dx) >= abs(dy)
    evidence = {
        "": 1.0,
        "the camera pans left": dx / PAN * sideways,
        "the camera pans right": -dx / PAN * sideways,
        "the camera tilts up": dy / PAN * (not sideways),
        "the camera tilts down": -dy / PAN * (not sideways),
        "the camera zooms in": camera.log_scale / ZOOM,
        "the camera zooms out": -camera.log_scale / ZOOM,
        "the picture turns clockwise": camera.turn / TURN,
        "the picture turns counterclockwise": -camera.turn / TURN,
    }
    return max(("", *classes), key=lambda name: evidence[name])


def _left(target: Target, shot: Picture, pose: Pose, free: NDArray[np.uint8]) -> float:
    """The difference under a pose over that at rest: the median over the blocks that can be judged; 1 below LEAST."""
    both = target.seen(free, pose) & (free > 0)
    count = _sums(both.astype(np.float32))
    judged = count >= BLOCK**2 / 2
    if int(judged.sum()) < LEAST:
        return 1.0
    shares = []
    for p in (pose, Pose()):
        misfit = np.zeros((SIDE, SIDE), np.float32)
        misfit[both] = np.minimum(target.misfit(shot, p, both), 900)
        shares.append(_sums(misfit)[judged] / count[judged] + 10)  # 3 levels are no motion
    return float(np.median(shares[0] / shares[1]))


def _sums(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over every block: (SIDE / BLOCK, SIDE / BLOCK)."""
    return np.asarray(values.reshape(SIDE // BLOCK, BLOCK, -1, BLOCK).sum(axis=(1, 3)), np.float32)


def _straightness(poses: list[Pose]) -> float:
    """Distance of the picture's corners from their start over the length of their way, 0 to 1."""
    corners = np.array([-1 - 1j, 1 - 1j, -1 + 1j, 1 + 1j]) * SIDE / 2
    way = np.stack([corners, *(pose.a * corners + pose.b for pose in poses)])
    length = float(np.abs(np.diff(way, axis=0)).mean(axis=1).sum())
    return float(np.abs(way - corners).mean(axis=1).max()) / max(length, 1e-6)


def _hidden_direction(target: Target) -> complex | None:
    """The unit direction along which the background does not change; None where it changes everywhere."""
    gx, gy = (slope[target.area].ravel() for slope in target.slopes)
    values, vectors = np.linalg.eigh(np.array([[gx @ gx, gx @ gy], [gx @ gy, gy @ gy]], np.float64))
    if values[0] > ONE_WAY * values[1]:
        return None
    return complex(vectors[0, 0], vectors[1, 0])


def _filled(pose: Pose, along: complex, thing: Pose, point: complex) -> Pose:
    """A background's pose that moves along the hidden direction as the object does, if it moves across it at all."""
    across = abs((pose.b * (along * 1j).conjugate()).real)
    if across < 0.02 * SIDE:
        return pose
    missing = thing.b - (pose.a - 1) * (point - CENTRE) - pose.b
    return Pose(pose.a, pose.b + along * (missing * along.conjugate()).real)

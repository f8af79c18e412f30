"""Where a rigid part of a picture is in another one: shift, scale and turn, fitted to the colours themselves."""

from __future__ import annotations

import cmath
import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 64  # pixels; pictures are aligned at this side
STEPS = 8  # of Gauss-Newton
Picture = NDArray[np.float32]  # (SIDE, SIDE, 3), 0..255

_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


class Pose(NamedTuple):
    """A similarity transform as complex numbers: a point z goes to centre + a (z - centre) + b, in pixels of SIDE.

    Right and down are positive; so is a clockwise turn on the screen.
    """

    a: complex = 1 + 0j
    b: complex = 0j

    @property
    def dx(self) -> float:
        """Shift of the centre to the right, of the frame."""
        return self.b.real / SIDE

    @property
    def dy(self) -> float:
        """Shift of the centre downwards, of the frame."""
        return self.b.imag / SIDE

    @property
    def log_scale(self) -> float:
        """Natural logarithm of the scale."""
        return math.log(max(abs(self.a), 1e-3))

    @property
    def turn(self) -> float:
        """Degrees clockwise, in (-180, 180]."""
        return math.degrees(cmath.phase(self.a))

    def matrix(self, centre: complex) -> NDArray[np.float64]:
        """(2, 3): from a pixel of the first picture to its place in the other."""
        rest = centre + self.b - self.a * centre
        return np.array([[self.a.real, -self.a.imag, rest.real], [self.a.imag, self.a.real, rest.imag]])


def pictures(frames: NDArray[np.uint8]) -> list[Picture]:
    """The frames at SIDE pixels."""
    size = frames.shape[1]
    if size == SIDE:
        return [frame.astype(np.float32) for frame in frames]
    method = cv2.INTER_AREA if size > SIDE else cv2.INTER_CUBIC
    return [cv2.resize(frame, (SIDE, SIDE), interpolation=method).astype(np.float32) for frame in frames]


def area_at_side(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A mask at SIDE pixels, 0 and 1."""
    cover = cv2.resize((np.asarray(mask) > 0).astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return (cover > 0.5).astype(np.uint8)


def sampled(picture: NDArray[np.float32], pose: Pose, centre: complex, method: int = cv2.INTER_LINEAR
            ) -> NDArray[np.float32]:  # fmt: skip
    """A picture brought back: its value at the pixel where the pose takes each pixel of the first picture."""
    return np.asarray(cv2.warpAffine(picture, pose.matrix(centre), (SIDE, SIDE), borderMode=cv2.BORDER_REPLICATE,
                                     flags=method | cv2.WARP_INVERSE_MAP), np.float32)  # fmt: skip


def visible(pose: Pose, centre: complex) -> NDArray[np.bool_]:
    """Pixels of the first picture whose place under the pose lies in the frame: (SIDE, SIDE)."""
    m = pose.matrix(centre)
    x, y = m[0, 0] * _X + m[0, 1] * _Y + m[0, 2], m[1, 0] * _X + m[1, 1] * _Y + m[1, 2]
    return (x >= 0) & (x <= SIDE - 1) & (y >= 0) & (y <= SIDE - 1)


def softened(picture: Picture, sigma: float) -> Picture:
    """A picture blurred by `sigma` pixels."""
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma), np.float32)


def slopes(picture: Picture) -> tuple[Picture, Picture]:
    """Its derivatives along x and y per pixel."""
    return (np.asarray(cv2.Sobel(picture, cv2.CV_32F, 1, 0, ksize=1, scale=0.5), np.float32),
            np.asarray(cv2.Sobel(picture, cv2.CV_32F, 0, 1, ksize=1, scale=0.5), np.float32))  # fmt: skip


class Target:
    """What is looked for: the pixels `area` (0 and 1) of a picture, and the centre that a pose refers to."""

    def __init__(self, picture: Picture, area: NDArray[np.uint8], centre: complex, damping: float = 3e-3) -> None:
        self.picture, self.area, self.centre, self.damping = picture, area > 0, centre, damping
        self.slopes = slopes(picture)
        x, y = _X - centre.real, _Y - centre.imag
        self.x, self.y = x, y
        self.radius = math.sqrt(float((x[self.area] ** 2 + y[self.area] ** 2).mean())) if self.area.any() else 1.0

    def seen(self, free: NDArray[np.uint8], pose: Pose) -> NDArray[np.bool_]:
        """Pixels of the area whose place under a pose lies in the frame and on `free` (0 and 1) pixels of it."""
        there = cv2.warpAffine(free, pose.matrix(self.centre), (SIDE, SIDE),
                               flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP)  # fmt: skip
        return self.area & visible(pose, self.centre) & (there > 0)

    def misfit(self, picture: Picture, pose: Pose, seen: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Squared difference per pixel `seen`, light adjusted: (N,), the mean of the channels."""
        goal = self.picture[seen]
        back = _relit(sampled(picture, pose, self.centre)[seen], goal, np.ones(len(goal), np.float32))
        return np.asarray(((back - goal) ** 2).mean(axis=1), np.float32)

    def fit(self, picture: Picture, start: Pose, free: NDArray[np.uint8] | None = None) -> Pose:
        """The pose of least difference near `start`: Gauss-Newton with Cauchy's weights, light and contrast free.

        A direction that the picture says nothing about (along stripes) stays as in `start`.
        """
        pose = start
        for _ in range(STEPS):
            seen = self.area & visible(pose, self.centre) if free is None else self.seen(free, pose)
            if int(seen.sum()) < 16:
                return start
            moved = sampled(picture, pose, self.centre)
            there, goal = moved[seen], self.picture[seen]
            weight = np.ones(len(goal), np.float32)
            for _ in range(2):
                lit = _relit(there, goal, weight)
                far = ((lit - goal) ** 2).mean(axis=1)
                weight = 1 / (1 + far / (4 * np.median(far) + 4)) ** 2
            gx, gy = (0.5 * (own[seen] + other[seen]) for own, other in zip(self.slopes, slopes(moved)))
            x, y = self.x[seen, None], self.y[seen, None]
            columns = np.stack([gx, gy, gx * x + gy * y, gy * x - gx * y])  # (4, N, 3)
            columns -= (columns * weight[:, None]).sum(axis=1, keepdims=True) / weight.sum()
            weighted = columns * weight[:, None]
            normal = np.tensordot(weighted, columns, ([1, 2], [1, 2])).astype(np.float64)
            right = np.tensordot(weighted, goal - lit, ([1, 2], [0, 1])).astype(np.float64)
            floor = self.damping * (normal[0, 0] + normal[1, 1]) / 2 + 1e-3 * len(goal)
            normal += np.diag([floor, floor, floor * self.radius**2, floor * self.radius**2])
            q = np.linalg.solve(normal, right)
            size = math.hypot(q[0], q[1]) + self.radius * math.hypot(q[2], q[3])
            q *= min(1.0, 4.0 / max(size, 1e-9))  # at most 4 pixels at once
            a = pose.a * complex(1 + q[2], q[3])
            a *= min(max(abs(a), 0.2), 5.0) / max(abs(a), 1e-9)
            pose = Pose(a, pose.b + pose.a * complex(q[0], q[1]))
            if abs(pose.b) > 2 * SIDE:
                return start
            if size < 0.03:
                break
        return pose


def _relit(there: NDArray[np.float32], goal: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colours (N, 3) with the weighted mean and, within a factor of 3, the contrast of `goal`."""
    share = (weight / weight.sum())[:, None]
    mean, wanted = (there * share).sum(axis=0), (goal * share).sum(axis=0)
    own, other = (there - mean), (goal - wanted)
    gain = np.sqrt(((other**2 * share).sum() + 1) / ((own**2 * share).sum() + 1))
    return np.asarray(own * np.clip(gain, 1 / 3, 3) + wanted, np.float32)

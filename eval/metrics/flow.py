"""Dense optical flow without weights (OpenCV's DIS), and how much of it a clip has."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 128  # pixels; smaller frames are enlarged to this, since DIS misses small motions at 64

Flow = NDArray[np.float32]  # (S, S, 2) in pixels of S


def grey_pictures(frames: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The frames' luma at SIDE pixels, or their own side if it is larger."""
    size = max(frames.shape[1], SIDE)
    enlarged = (cv2.resize(frame, (size, size), interpolation=cv2.INTER_CUBIC) for frame in frames)
    return [np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8) for frame in enlarged]


def flow(first: NDArray[np.uint8], second: NDArray[np.uint8], start: Flow | None = None) -> Flow:
    """Where each pixel of one grey picture is in another, as a shift in pixels; `start` is a first guess.

    DIS, preset "medium", with 20 iterations of variational refinement and alpha 60, which halves what noise adds and
    takes a third off the error.
    """
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setVariationalRefinementIterations(20)
    dis.setVariationalRefinementAlpha(60)
    guess = np.zeros((*first.shape, 2), np.float32) if start is None else start.copy()
    return np.asarray(dis.calc(first, second, guess), np.float32)


def step_flows(grey: Sequence[NDArray[np.uint8]]) -> list[Flow]:
    """Flow from each picture to the next."""
    return [flow(before, after) for before, after in zip(grey[:-1], grey[1:], strict=True)]


def mean_flow(steps: Sequence[Flow], size: int) -> float:
    """How much moves: pixels per frame of a clip of side `size`, 0 or more.

    Mean over consecutive frames and pixels of the flow's length. A still clip has 0, one with noise of deviation 2 to 5
    levels 0.05 to 0.15. For comparing clips of one model; not comparable with scores of other flow networks.
    """
    side = steps[0].shape[0]
    return float(np.mean([np.linalg.norm(step, axis=-1).mean() for step in steps]) * size / side)


def flows_from_first(grey: Sequence[NDArray[np.uint8]], steps: Sequence[Flow]) -> list[Flow]:
    """Flow from the first picture to each later one: the chain of steps, refined between the two pictures."""
    side = grey[0].shape[0]
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    total = np.zeros((side, side, 2), np.float32)
    found = []
    for step, picture in zip(steps, grey[1:], strict=True):
        ahead = cv2.remap(step, x + total[..., 0], y + total[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        total = flow(grey[0], picture, total + ahead)
        found.append(total)
    return found

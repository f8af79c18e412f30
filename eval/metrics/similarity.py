"""How much of the first frame is still in the clip once motion is undone: PSNR and SSIM of frames warped back."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from eval.metrics.flow import Flow, flows_from_first, grey_pictures, step_flows

CAP = 50.0  # dB; a repeated frame would be infinite


@dataclass(frozen=True)
class Similarity:
    """Means over frames 1..F-1. psnr: dB, at most CAP. ssim: in [-1, 1]. covered: share of pixels compared."""

    psnr: float
    ssim: float
    covered: float


def first_frame_similarity(frames: NDArray[np.uint8], mask: NDArray[np.uint8] | None = None,
                           flows: list[Flow] | None = None) -> Similarity:  # fmt: skip
    """Similarity of every frame to the first after motion compensation; higher is better.

    frames: uint8 (F, S, S, 3) RGB, F >= 2. mask: (S, S), compares only its pixels (the object of frame 0).
    flows: `flow.flows_from_first`, if they are known already.

    Definition. The flow from frame 0 to frame t is the chain of DIS flows between consecutive frames at 128 pixels,
    refined by DIS between frame 0 and t. Frame t is sampled where the flow points, so that frame 0 should come out,
    and compared on the pixels whose flow stays in the frame: PSNR over RGB (peak 255, at most 50 dB), SSIM of the
    luma (Gaussian window, sigma 1.5). Pixels that something has covered meanwhile count as errors on purpose: a
    check of consistency would also excuse an object that dissolved. So read it beside its values for the true clips
    (the ceiling) and for frame 0 repeated (50 dB, 1).

    Raises ValueError for other shapes or an empty mask.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or frames.shape[1] != frames.shape[2]:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; expected uint8 (F, S, S, 3)")
    if len(frames) < 2:
        raise ValueError("one frame has nothing to be compared with; expected at least two")
    size = frames.shape[1]
    inside = np.ones((size, size), bool) if mask is None else np.asarray(mask) > 0
    if inside.shape != (size, size) or not inside.any():
        raise ValueError(f"the mask has shape {inside.shape} and {int(inside.sum())} pixels; expected {(size, size)}")
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    values = []
    if flows is None:
        grey = grey_pictures(frames)
        flows = flows_from_first(grey, step_flows(grey))
    for frame, shift in zip(frames[1:], flows, strict=True):
        small = np.asarray(cv2.resize(shift, (size, size), interpolation=cv2.INTER_AREA), np.float32)
        small = small * (size / shift.shape[0])
        map_x, map_y = x + small[..., 0], y + small[..., 1]
        back = cv2.remap(frame, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        seen = inside & (map_x >= 0) & (map_x <= size - 1) & (map_y >= 0) & (map_y <= size - 1)
        if seen.any():
            values.append((*_compare(frames[0], np.asarray(back, np.uint8), seen), seen.sum() / inside.sum()))
        else:
            values.append((0.0, 0.0, 0.0))
    psnr, ssim, covered = np.mean(values, axis=0)
    return Similarity(float(psnr), float(ssim), float(covered))


def _compare(first: NDArray[np.uint8], back: NDArray[np.uint8], seen: NDArray[np.bool_]) -> tuple[float, float]:
    """PSNR and SSIM of two pictures on the pixels `seen`."""
    error = np.square(first[seen].astype(np.float64) - back[seen]).mean()
    psnr = min(10 * np.log10(255**2 / max(error, 1e-9)), CAP)
    a, b = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64) for picture in (first, back))

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(values, (11, 11), 1.5), np.float64)

    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * ma * mb + c1) * (2 * both + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return float(psnr), float(ssim[seen].mean())

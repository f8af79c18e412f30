"""Colours over a clip: the release's colour matching, the exact known frames, and how far colours drift.

A clip is (F, H, W, 3) RGB here, uint8 or float32 in [0, 1] as each function says.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

FADE_FRAMES = 4  # half a second at the released 8 frames per second


def color_match(video: NDArray[np.float32], known: Collection[int] = (0,)) -> NDArray[np.float32]:
    """Every frame gets the colours of the first known one; video (F, H, W, 3) float32 in [0, 1], as is the result.

    `known` frames, which are the user's pictures, stay as they are.
    What the release does to each video: in OpenCV's 8-bit Lab, lightness is kept and the histograms of a and b
    are made those of frame 0. Values are cut, not rounded, to 8 bits. The paper does not mention this step.
    The release hands RGB to a converter that expects BGR; so does this, since a and b then differ.
    """
    reference = cv2.cvtColor(_cut_to_uint8(video[min(known)]), cv2.COLOR_BGR2LAB)
    matched = []
    for index, frame in enumerate(video):
        if index in known:
            matched.append(frame)
            continue
        lab = cv2.cvtColor(_cut_to_uint8(frame), cv2.COLOR_BGR2LAB)
        for channel in (1, 2):
            lab[..., channel] = match_histogram(lab[..., channel], reference[..., channel])
        matched.append(cv2.cvtColor(lab, cv2.COLOR_LAB2BGR).astype(np.float32) / np.float32(255))
    return np.stack(matched)


def match_histogram(values: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """`values` changed monotonically so that their distribution becomes that of `reference`; float64, same shape."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    levels, reference_counts = np.unique(reference, return_counts=True)
    quantiles = np.cumsum(counts) / values.size
    reference_quantiles = np.cumsum(reference_counts) / reference.size
    return np.interp(quantiles, reference_quantiles, levels)[where].reshape(values.shape)


def exact_frames(
    frames: NDArray[np.uint8], pictures: Mapping[int, NDArray[np.uint8]], fade: int = FADE_FRAMES
) -> NDArray[np.uint8]:
    """The clip with the given (H, W, 3) pictures themselves as its known frames; frames (F, H, W, 3) uint8.

    A known frame of a generated clip is the autoencoder's round trip of its picture. What that lost, picture minus
    frame, is added back whole to the frame itself and in equal steps less to the `fade` frames around it that are
    nearest to it, so that nothing jumps. It is added where it was, not moved along: for a fraction of a second, fine
    detail may stand still. Raises ValueError when a picture has another size than the frames.
    """
    for picture in pictures.values():
        if picture.shape != frames.shape[1:]:
            raise ValueError(f"the picture is {picture.shape}, frames are {frames.shape[1:]}: fit the picture first")
    lost = {known: picture.astype(np.float32) - frames[known] for known, picture in pictures.items()}
    result = frames.copy()
    for index, frame in enumerate(frames):
        nearest = min(pictures, key=lambda known: abs(known - index))
        share = max(0.0, 1 - abs(nearest - index) / (fade + 1))
        result[index] = (frame + share * lost[nearest]).round().clip(0, 255).astype(np.uint8)
    return result


def drift(frames: NDArray[np.uint8]) -> dict[str, float]:
    """How far a clip (F, H, W, 3) wanders from frame 0, in units of CIE 1976 colour difference (about 2 is just seen).

    "delta_e": mean difference of pixels over the later frames, motion included. "color_shift" and
    "last_color_shift": difference of the mean colour, which motion leaves alone, over the later frames and
    in the last one. All 0 for a single frame.
    """
    if len(frames) < 2:
        return {"delta_e": 0.0, "color_shift": 0.0, "last_color_shift": 0.0}
    first, pixels, shifts = _lab(frames[0]), [], []
    for frame in frames[1:]:
        difference = _lab(frame) - first
        pixels.append(float(np.linalg.norm(difference, axis=-1).mean()))
        shifts.append(float(np.linalg.norm(difference.mean(axis=(0, 1)))))
    return {
        "delta_e": sum(pixels) / len(pixels),
        "color_shift": sum(shifts) / len(shifts),
        "last_color_shift": shifts[-1],
    }


def psnr(picture: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float | None:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB; None when they are equal (JSON has no infinity)."""
    error = float(np.mean((picture.astype(np.float64) - reference) ** 2))
    return None if error == 0 else 10 * math.log10(255**2 / error)


def _cut_to_uint8(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (pixels * 255).astype(np.uint8)


def _lab(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """True CIE Lab (L 0..100) of an sRGB picture."""
    return np.asarray(cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2Lab), np.float32)

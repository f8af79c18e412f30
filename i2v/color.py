"""Colours over a clip: the release's colour matching, the exact known frames, and how far colours drift.

A clip is (F, H, W, 3) RGB here, uint8 or float32 in [0, 1] as each function says.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
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
    return np.stack(list(matched(video, known)))


def matched(frames: Iterable[NDArray[np.float32]], known: Collection[int] = (0,)) -> Iterator[NDArray[np.float32]]:
    """`color_match` of frames as they come; those before the first known one are held back until it is there."""
    anchor, waiting = min(known), list[NDArray[np.float32]]()
    reference: NDArray[Any] | None = None
    for index, frame in enumerate(frames):
        if index == anchor:
            reference = cv2.cvtColor(_cut_to_uint8(frame), cv2.COLOR_BGR2LAB)
        waiting.append(frame)
        if reference is None:
            continue
        for number, one in enumerate(waiting, index + 1 - len(waiting)):
            yield one if number in known else _matched(one, reference)
        waiting.clear()


def _matched(frame: NDArray[np.float32], reference: NDArray[Any]) -> NDArray[np.float32]:
    """One frame with the a and b of the reference, both as `color_match` makes them."""
    lab = cv2.cvtColor(_cut_to_uint8(frame), cv2.COLOR_BGR2LAB)
    for channel in (1, 2):
        lab[..., channel] = match_histogram(lab[..., channel], reference[..., channel])
    return cv2.cvtColor(lab, cv2.COLOR_LAB2BGR).astype(np.float32) / np.float32(255)


def match_histogram(values: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """`values` changed monotonically so that their distribution becomes that of `reference`; float64, same shape."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    levels, reference_counts = np.unique(reference, return_counts=True)
    quantiles = np.cumsum(counts) / values.size
    reference_quantiles = np.cumsum(reference_counts) / reference.size
    return np.interp(quantiles, reference_quantiles, levels)[where].reshape(values.shape)


def exact(
    frames: Iterable[NDArray[np.uint8]], pictures: Mapping[int, NDArray[np.uint8]], fade: int = FADE_FRAMES
) -> Iterator[NDArray[np.uint8]]:
    """A clip with the given (H, W, 3) pictures themselves as its known frames; frames (H, W, 3) uint8, one by one.

    A known frame of a generated clip is the autoencoder's round trip of its picture. What that lost, picture minus
    frame, is added back whole to the frame itself and in equal steps less to the `fade` frames around it that are
    nearest to it, so that nothing jumps; so many are held back at most. It is added where it was, not moved along: for
    a fraction of a second, fine detail may stand still. Raises ValueError when a picture has another size than its
    frame.
    """
    lost: dict[int, NDArray[np.float32]] = {}
    waiting: deque[tuple[int, NDArray[np.uint8]]] = deque()

    def done() -> NDArray[np.uint8]:
        index, frame = waiting.popleft()
        nearest = min(pictures, key=lambda known: abs(known - index))
        share = max(0.0, 1 - abs(nearest - index) / (fade + 1))
        return frame if share == 0 else (frame + share * lost[nearest]).round().clip(0, 255).astype(np.uint8)

    for index, frame in enumerate(frames):
        if index in pictures:
            if pictures[index].shape != frame.shape:
                raise ValueError(f"the picture is {pictures[index].shape}, frames are {frame.shape}: fit it first")
            lost[index] = pictures[index].astype(np.float32) - frame
        waiting.append((index, frame))
        if len(waiting) > fade:
            yield done()
    while waiting:
        yield done()


def drift(frames: NDArray[np.uint8]) -> dict[str, float]:
    """How far a clip (F, H, W, 3) wanders from frame 0, in units of CIE 1976 colour difference (about 2 is just seen).

    "delta_e": mean difference of pixels over the later frames, motion included. "color_shift" and
    "last_color_shift": difference of the mean colour, which motion leaves alone, over the later frames and
    in the last one. All 0 for a single frame.
    """
    report: dict[str, float] = {}
    for _ in drifting(frames, report):
        pass
    return report


def drifting(frames: Iterable[NDArray[np.uint8]], report: dict[str, Any]) -> Iterator[NDArray[np.uint8]]:
    """The frames as they come; after the last one their `drift` is in `report`."""
    first: NDArray[np.float32] | None = None
    pixels, shifts = list[float](), list[float]()
    for frame in frames:
        yield frame
        if first is None:
            first = _lab(frame)
            continue
        difference = _lab(frame) - first
        pixels.append(float(np.linalg.norm(difference, axis=-1).mean()))
        shifts.append(float(np.linalg.norm(difference.mean(axis=(0, 1)))))
    count = max(len(pixels), 1)
    report |= {"delta_e": sum(pixels) / count, "color_shift": sum(shifts) / count,
               "last_color_shift": shifts[-1] if shifts else 0.0}  # fmt: skip


def psnr(picture: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float | None:
    """Peak signal-to-noise ratio of two 8-bit pictures in dB; None when they are equal (JSON has no infinity)."""
    error = float(np.mean((picture.astype(np.float64) - reference) ** 2))
    return None if error == 0 else 10 * math.log10(255**2 / error)


def _cut_to_uint8(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (pixels * 255).astype(np.uint8)


def _lab(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """True CIE Lab (L 0..100) of an sRGB picture."""
    return np.asarray(cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2Lab), np.float32)

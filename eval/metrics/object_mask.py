"""The object of a picture when no mask is given: what differs from a background that is smooth at the border."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def object_mask(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The one salient object of a picture: uint8 (H, W), 1 on the object, from an RGB uint8 (H, W, 3).

    A quadratic surface per colour channel is fitted to the border (a tenth of the side); the largest region that
    differs from it by more than Otsu's threshold, holes filled, is the object. Meant for one object over a smooth
    background, away from the border. A picture of one colour has an empty mask.
    """
    height, width = picture.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=-1)
    border = np.maximum(abs(x), abs(y)) > 0.8
    lab = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).astype(np.float64)
    fit, *_ = np.linalg.lstsq(terms[border], lab[border], rcond=None)
    far = np.linalg.norm(lab - terms @ fit, axis=-1)
    if far.max() < 1:  # less than one unit of Lab: nothing is there
        return np.zeros((height, width), np.uint8)
    level = np.minimum(far * 4, 255).astype(np.uint8)
    _, mask = cv2.threshold(level, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    if count < 2:
        return np.zeros((height, width), np.uint8)
    largest = (labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))).astype(np.uint8)
    outlines, _ = cv2.findContours(largest, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(np.zeros_like(largest), outlines, -1, 1, cv2.FILLED), np.uint8)

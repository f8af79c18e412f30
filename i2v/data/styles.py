"""The world drawn in another style: deterministic transforms of finished frames, for style LoRAs.

Both work on areas, not on lines, which a small VAE does not carry: a drawing in ink comes back from the miniature's at
21 dB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np

from i2v.data.scene import Clip
from i2v.data.world import WorldConfig, make_clip


def pastel(frames: np.ndarray) -> np.ndarray:
    """Flat areas of few, pale colours."""
    out = np.empty_like(frames)
    for k, frame in enumerate(frames):
        flat = cv2.bilateralFilter(frame, 5, 40, 3).astype(np.float32)
        levels = np.round(flat / 85) * 85
        out[k] = np.clip(0.5 * levels + 120, 0, 255).astype(np.uint8)
    return out


def night(frames: np.ndarray) -> np.ndarray:
    """Light and dark change places and hues stay: bright colours before a deep background."""
    out = np.empty_like(frames)
    for k, frame in enumerate(frames):
        hls = cv2.cvtColor(cv2.GaussianBlur(frame, (0, 0), 0.6), cv2.COLOR_RGB2HLS)
        light = hls[..., 1].astype(np.float32)
        hls[..., 1] = (225 - 0.8 * light).astype(np.uint8)
        out[k] = cv2.cvtColor(hls, cv2.COLOR_HLS2RGB)
    return out


STYLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"pastel": pastel, "night": night}
"""Name -> transform of (F, H, W, 3) uint8 RGB frames into new ones of the same shape."""


def styled_clip(world: WorldConfig, split: str, num_frames: int, size: int, style: str, index: int) -> Clip:
    """Clip number `index` of a split in a style of `STYLES`, or as it is where `style` is ""."""
    clip = make_clip(world, split, index, num_frames=num_frames, size=size)
    return replace(clip, frames=STYLES[style](clip.frames)) if style else clip

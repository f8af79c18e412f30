"""Pictures with the statistics of photographs, drawn on the fly: what the miniature's VAE learns photographs from.

Dead leaves (Matheron 1968; Lee, Mumford & Huang 2001): opaque shapes whose radii follow a power law of exponent 3 fall
on each other, which gives the edges, occlusions and scale invariance of natural images. Every shape carries shading and
1/f texture, colours of one picture are related, and the light falls off over the frame.
"""

from __future__ import annotations

import zlib

import cv2
import numpy as np

from i2v.data.backgrounds import octaves

SHAPES = 90
DETAIL = 2  # drawn at this multiple of the size, then averaged: smooth edges


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Five related colours, float32 (5, 3) RGB: one hue family and its opposite, mostly muted, dark to light."""
    hue = (rng.uniform(0, 180) + np.array([0, 8, -12, 20, 90]) * rng.uniform(0.3, 1.5, 5)) % 180
    saturation = 255 * rng.beta(1.6, 2.6, 5)
    value = 255 * rng.uniform(0.08, 1.0, 5)
    hsv = np.stack([hue, saturation, value], axis=1).astype(np.uint8)
    return np.asarray(cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0], np.float32) / 255


def _outline(rng: np.random.Generator, radius: float) -> np.ndarray:
    """A polygon around the origin, (n, 2): a blob, an oblong or an angular shape."""
    corners = int(rng.choice([4, 5, 24, 24]))
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + rng.uniform(0, 2 * np.pi)
    wave = 1 + 0.3 * rng.uniform(-1, 1) * np.cos(rng.integers(2, 5) * angles + rng.uniform(0, 6))
    points = radius * wave[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    stretch, turn = np.exp(rng.normal(0, 0.45)), rng.uniform(0, np.pi)
    c, s = np.cos(turn), np.sin(turn)
    return np.asarray(points * [stretch, 1 / stretch] @ np.array([[c, s], [-s, c]]))


def natural_picture(split: str, index: int, size: int = 64) -> np.ndarray:
    """Picture number `index` of a split: uint8 (size, size, 3) RGB, the same in every process."""
    rng = np.random.default_rng((zlib.crc32(f"natural {split}".encode()), index))
    side = DETAIL * size
    colours = _palette(rng)
    line = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    y, x = np.meshgrid(line, line, indexing="ij")
    texture = 0.25 * octaves(rng, side, (2, 4, 8, 16, 32), 0.6)
    fine = rng.normal(0, 1, (side, side)).astype(np.float32)
    picture = np.broadcast_to(colours[0], (side, side, 3)) + (0.5 * texture * rng.uniform(0, 1))[..., None]
    smallest = rng.uniform(0.02, 0.12)
    number = int(SHAPES * rng.uniform(0.15, 1) ** 2) + 4
    for _ in range(number):
        # the inverse of the power law's distribution, between `smallest` and half a frame
        radius = (smallest**-2 + rng.random() * (0.5**-2 - smallest**-2)) ** -0.5
        centre = rng.uniform(-0.6, 0.6, 2)
        points = ((_outline(rng, radius) + centre + 0.5) * side * 16).astype(np.int32)
        low = np.clip(points.min(0) // 16 - 1, 0, side)
        high = np.clip(points.max(0) // 16 + 2, 0, side)
        if (high - low).min() < 2:
            continue
        part = np.s_[low[1] : high[1], low[0] : high[0]]
        mask = np.zeros((high[1] - low[1], high[0] - low[0]), np.float32)
        cv2.fillPoly(mask, [points - low * 16], 1.0, cv2.LINE_8, 4)
        if rng.random() < 0.25:  # out of focus
            mask = np.asarray(cv2.GaussianBlur(mask, (0, 0), float(rng.uniform(0.5, 4))), np.float32)
        colour = colours[rng.integers(5)] + rng.normal(0, 0.06, 3)
        slope = rng.normal(0, 0.5, 2)
        shade = slope[0] * (x[part] - centre[0]) + slope[1] * (y[part] - centre[1])
        shade = shade + rng.uniform(0, 0.8) * texture[part] + rng.exponential(0.03) * fine[part]
        leaf = colour.astype(np.float32) * (1 + shade[..., None]) + 0.3 * shade[..., None]
        picture = picture if picture.flags.writeable else picture.copy()
        picture[part] += mask[..., None] * (leaf - picture[part])
    light = rng.normal(0, 0.25, 2)
    picture = picture * (1 + light[0] * x + light[1] * y)[..., None]
    if rng.random() < 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.5, 3)))
    small = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
    small = small + rng.exponential(0.01) * rng.normal(0, 1, small.shape)
    return np.asarray((255 * small.clip(0, 1) + 0.5).astype(np.uint8))

"""Procedural backgrounds of the miniature world: muted colours, smooth gradients and textures of natural statistics."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

Drawing = Callable[[np.random.Generator, np.ndarray, np.ndarray, int], np.ndarray]


def octaves(rng: np.random.Generator, side: int, cells: tuple[int, ...], slope: float = 0.0) -> np.ndarray:
    """Noise of zero mean and unit deviation, float32 (side, side): one random grid per entry of `cells`, enlarged.

    Every octave has equal energy at `slope` 0, which is the 1/f amplitude spectrum of natural pictures; a larger
    slope is smoother. The grids do not depend on `side`: a clip looks the same at every resolution.
    """
    field = np.zeros((side, side), np.float32)
    for k in cells:
        grid = rng.standard_normal((k, k), np.float32)
        method = cv2.INTER_CUBIC if k <= side else cv2.INTER_AREA
        field += cv2.resize(grid, (side, side), interpolation=method) * float(cells[0] / k) ** slope
    field -= field.mean()
    return field / max(float(field.std()), 1e-6)


def muted(rng: np.random.Generator, low: float = 0.45, high: float = 0.85) -> np.ndarray:
    """A colour of low saturation, float32 (3,) RGB: objects are the saturated things in a picture."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(0.08, 0.35), rng.uniform(low, high)
    ramps = [min(max(abs((hue - shift) % 6 - 3) - 1, 0.0), 1.0) for shift in (0.0, 2.0, 4.0)]
    return (value * (1 - saturation * (1 - np.array(ramps)))).astype(np.float32)


def _mix(weight: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a where the weight is 0, b where it is 1."""
    return a + (b - a) * weight[..., None]


def _colour(*rgb: float) -> np.ndarray:
    return np.array(rgb, np.float32)


def _plain(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    light = 1.04 - 0.10 * y + rng.uniform(-0.08, 0.08) * (x - 0.5) + 0.025 * octaves(rng, side, (2, 4, 8, 16), 0.7)
    return muted(rng) * light[..., None]


def _sky(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    top = _colour(0.42, 0.62, 0.86) * np.float32(rng.uniform(0.85, 1.05))
    bottom = _colour(0.82, 0.90, 0.96)
    weight = (y + 0.06 * octaves(rng, side, (2, 4), 0.5)).clip(0, 1)
    return _mix(weight * np.float32(rng.uniform(0.75, 1.0)), top, bottom)


def _sunset(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    top = _colour(0.36, 0.32, 0.55) * np.float32(rng.uniform(0.85, 1.1))
    middle, bottom = _colour(0.80, 0.50, 0.52), _colour(0.96, 0.74, 0.50)
    height = (y + rng.uniform(-0.1, 0.1) + 0.05 * octaves(rng, side, (2, 4), 0.5)).clip(0, 1)
    lower = (height * 2 - 1).clip(0, 1)
    return _mix(lower, _mix((height * 2).clip(0, 1), top, middle), bottom)


def _clouds(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    field = octaves(rng, side, (2, 4, 8, 16), 1.0) + rng.uniform(-0.3, 0.5)
    white = 1 / (1 + np.exp(-2.0 * field))
    blue = _colour(0.47, 0.65, 0.86) * np.float32(rng.uniform(0.85, 1.05))
    return _mix(white.astype(np.float32), blue, _colour(0.95, 0.95, 0.96))


def _two_tones(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    first = muted(rng, 0.6, 0.9)
    return first, (first * rng.uniform(0.72, 0.85) + 0.05 * (muted(rng) - 0.5)).astype(np.float32)


def _stripes(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    angle, period, first = rng.uniform(0, math.pi), rng.uniform(0.16, 0.3), rng.uniform(0, 1)
    wave = np.sin(2 * math.pi * ((x * math.cos(angle) + y * math.sin(angle)) / period + first))
    return _mix((0.5 + 4 * wave).clip(0, 1), *_two_tones(rng))


def _checks(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    angle, period = rng.uniform(0, math.pi / 2), rng.uniform(0.3, 0.5)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    wave = np.sin(2 * math.pi * u / period) * np.sin(2 * math.pi * v / period)
    return _mix((0.5 + 5 * wave).clip(0, 1), *_two_tones(rng))


def _bricks(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    height = rng.uniform(0.11, 0.17)
    row = np.floor(y / height)
    across, up = (x / (2.2 * height) + 0.5 * (row % 2)) % 1, (y / height) % 1
    edge = np.minimum(np.minimum(across, 1 - across) * 2.2, np.minimum(up, 1 - up))
    tone = 1 + 0.08 * octaves(rng, side, (6, 12, 24, 48))
    brick = _colour(0.66, 0.45, 0.40) * np.float32(rng.uniform(0.85, 1.1))
    return _mix(((edge - 0.06) * 14).clip(0, 1), _colour(0.80, 0.77, 0.73), brick) * tone[..., None]


def _grass(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    tall = rng.standard_normal((20, 64), np.float32)
    blades = cv2.resize(tall, (side, side), interpolation=cv2.INTER_CUBIC)
    tone = (0.5 + 0.16 * blades + 0.14 * octaves(rng, side, (4, 8, 16, 32))).clip(0, 1)
    return _mix(tone, _colour(0.33, 0.46, 0.27), _colour(0.62, 0.70, 0.42))


def _leaves(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    tones = np.stack([muted(rng) for _ in range(4)])
    picture = np.ascontiguousarray(np.broadcast_to(tones[0], (side, side, 3)))
    for _ in range(160):  # sizes fall as a power: dead leaves have the statistics of natural pictures
        radius = side * 0.035 / max(0.15, rng.random() ** 0.7)
        centre, axes = rng.uniform(0, side, 2), (radius, radius * rng.uniform(0.5, 1))
        tone = tones[rng.integers(4)] * rng.uniform(0.85, 1.15)
        cv2.ellipse(
            picture, (tuple(centre), (2 * axes[0], 2 * axes[1]), rng.uniform(0, 180)), tuple(map(float, tone)), -1
        )
    return cv2.GaussianBlur(picture, (0, 0), 0.6)


def _stars(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    picture = _mix(
        (0.7 * y + 0.12 * octaves(rng, side, (2, 4, 8), 0.5)).clip(0, 1),
        _colour(0.08, 0.09, 0.22),
        _colour(0.26, 0.24, 0.42),
    )
    spread = 1.1 / 128 * side / float(x[0, -1] - x[0, 0] + 1e-6)
    glow = np.zeros((side, side), np.float32)
    for _ in range(60):
        at = rng.integers(0, side * 16, 2)
        cv2.circle(
            glow,
            (int(at[0]), int(at[1])),
            max(int(16 * spread * rng.uniform(0.6, 1.4)), 8),
            float(rng.uniform(0.4, 1)),
            -1,
            cv2.LINE_8,
            4,
        )
    return _mix(cv2.GaussianBlur(glow, (0, 0), 0.5), picture, _colour(1.0, 0.98, 0.9))


DRAWINGS: dict[str, Drawing] = {
    "plain": _plain,
    "sky": _sky,
    "sunset": _sunset,
    "clouds": _clouds,
    "stripes": _stripes,
    "checks": _checks,
    "bricks": _bricks,
    "grass": _grass,
    "leaves": _leaves,
    "stars": _stars,
}
PLACES: dict[str, str] = {
    "plain": "a plain background",
    "sky": "a blue sky",
    "sunset": "a sunset",
    "clouds": "soft clouds",
    "stripes": "stripes",
    "checks": "a checkerboard",
    "bricks": "a brick wall",
    "grass": "green grass",
    "leaves": "fallen leaves",
    "stars": "a starry night",
}


def background(name: str, rng: np.random.Generator, size: int, margin: float = 0.0) -> np.ndarray:
    """A background: float32 (s, s, 3) RGB in [0, 1] with s = round(size * (1 + 2 * margin)).

    `size` is the frame's side in pixels; `margin` (in frames) is drawn around it on all sides for a moving camera.
    Gradients run over the frame itself. Raises KeyError for an unknown name.
    """
    side = round(size * (1 + 2 * margin))
    line = (np.arange(side, dtype=np.float32) + 0.5) / side * (1 + 2 * margin) - margin
    y, x = np.meshgrid(line, line, indexing="ij")
    return DRAWINGS[name](rng, x, y, side).clip(0, 1).astype(np.float32)

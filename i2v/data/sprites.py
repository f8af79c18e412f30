"""The procedural world's objects: drawn as polygons in a square from -1 to 1, outlined, shaded, cut out."""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np

Point = tuple[float, float]
Shape = tuple[list[Point], str]  # outline and paint; "own" is the object's colour, "hole" cuts through

COLOURS = {
    "red": (225, 45, 45), "orange": (245, 140, 30), "yellow": (250, 215, 50), "green": (60, 175, 75),
    "cyan": (50, 200, 215), "blue": (55, 90, 220), "purple": (140, 70, 200), "pink": (250, 130, 185),
}  # fmt: skip
PAINTS = {
    "dark": (45, 45, 55), "white": (245, 245, 240), "brown": (125, 80, 45), "glass": (170, 215, 240),
    "leaf": (50, 140, 60), "fire": (255, 150, 30), "gold": (250, 200, 60),
}  # fmt: skip
OUTLINE = (38, 34, 44)


def _ellipse(cx: float, cy: float, rx: float, ry: float | None = None) -> list[Point]:
    ry = rx if ry is None else ry
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 40, endpoint=False)]


def _arc(cx: float, cy: float, r: float, start: float, end: float) -> list[Point]:
    return [(cx + r * math.cos(a), cy + r * math.sin(a)) for a in np.radians(np.linspace(start, end, 21))]


def _box(x0: float, y0: float, x1: float, y1: float) -> list[Point]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _star(points: int, outer: float, inner: float) -> list[Point]:
    turn = [math.radians(-90 + 180 * i / points) for i in range(2 * points)]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in zip(turn, [outer, inner] * points)]


def _heart() -> list[Point]:
    out = []
    for a in np.linspace(0, 2 * math.pi, 50):
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        out.append((0.058 * 16 * math.sin(a) ** 3, -0.058 * y))
    return out


def _wedge(start: float, end: float) -> list[Point]:
    return [(0.0, 0.0), *_arc(0, 0, 0.9, start, end)]


SHAPES: dict[str, list[Shape]] = {
    "ball": [(_ellipse(0, 0, 0.9), "own"), *((_wedge(a, a + 60), "white") for a in (-30, 90, 210))],
    "star": [(_star(5, 1, 0.42), "own")],
    "heart": [(_heart(), "own")],
    "house": [
        (_box(-0.7, -0.1, 0.7, 0.9), "white"), ([(-0.95, -0.05), (0, -0.95), (0.95, -0.05)], "own"),
        (_box(-0.2, 0.3, 0.2, 0.9), "brown"), (_box(0.32, 0.15, 0.58, 0.42), "glass"),
    ],
    "car": [
        (_box(-0.98, -0.02, 0.98, 0.42), "own"), ([(-0.6, 0), (-0.4, -0.5), (0.3, -0.5), (0.65, 0)], "own"),
        ([(-0.45, -0.03), (-0.32, -0.38), (0.24, -0.38), (0.47, -0.03)], "glass"),
        (_ellipse(-0.52, 0.45, 0.24), "dark"), (_ellipse(0.52, 0.45, 0.24), "dark"),
    ],
    "fish": [
        (_ellipse(-0.15, 0, 0.72, 0.48), "own"), ([(0.4, 0), (0.98, -0.5), (0.98, 0.5)], "own"),
        (_ellipse(-0.5, -0.12, 0.12), "white"), (_ellipse(-0.53, -0.12, 0.06), "dark"),
    ],
    "rocket": [
        ([(-0.3, 0.6), (-0.3, -0.3), (0, -0.98), (0.3, -0.3), (0.3, 0.6)], "white"),
        ([(-0.28, -0.3), (0, -0.98), (0.28, -0.3)], "own"), ([(-0.3, 0.1), (-0.7, 0.8), (-0.3, 0.6)], "own"),
        ([(0.3, 0.1), (0.7, 0.8), (0.3, 0.6)], "own"), (_ellipse(0, -0.05, 0.16), "glass"),
        ([(-0.2, 0.62), (0, 0.98), (0.2, 0.62)], "fire"),
    ],
    "mushroom": [
        (_box(-0.25, 0, 0.25, 0.85), "white"), (_arc(0, 0.1, 0.92, 180, 360), "own"),
        (_ellipse(-0.4, -0.25, 0.15), "white"), (_ellipse(0.15, -0.5, 0.15), "white"),
        (_ellipse(0.5, -0.12, 0.12), "white"),
    ],
    "boat": [
        ([(-0.95, 0.3), (0.95, 0.3), (0.55, 0.85), (-0.6, 0.85)], "own"), (_box(-0.06, -0.9, 0.06, 0.3), "brown"),
        ([(0.1, -0.85), (0.8, 0.15), (0.1, 0.15)], "white"), ([(-0.12, -0.6), (-0.12, 0.15), (-0.6, 0.15)], "white"),
    ],
    "tree": [
        (_box(-0.14, 0.3, 0.14, 0.98), "brown"), ([(-0.75, 0.45), (0, -0.3), (0.75, 0.45)], "own"),
        ([(-0.6, -0.05), (0, -0.98), (0.6, -0.05)], "own"),
    ],
    "flower": [
        (_box(-0.07, 0.2, 0.07, 0.98), "leaf"),
        *((_ellipse(0.42 * math.cos(a), -0.3 + 0.42 * math.sin(a), 0.3), "own") for a in np.arange(6) * math.pi / 3),
        (_ellipse(0, -0.3, 0.24), "gold"),
    ],
    "kite": [
        ([(0, -0.98), (0.6, -0.2), (0, 0.6), (-0.6, -0.2)], "own"), ([(0, -0.98), (0.6, -0.2), (0, -0.2)], "white"),
        ([(0, 0.6), (-0.6, -0.2), (0, -0.2)], "white"),
        ([(-0.15, 0.75), (0.15, 0.98), (0.15, 0.75), (-0.15, 0.98)], "own"),
    ],
    "gift": [
        (_box(-0.75, -0.35, 0.75, 0.9), "own"), (_box(-0.85, -0.5, 0.85, -0.2), "own"),
        (_box(-0.14, -0.5, 0.14, 0.9), "white"), (_ellipse(-0.25, -0.7, 0.25, 0.18), "white"),
        (_ellipse(0.25, -0.7, 0.25, 0.18), "white"),
    ],
    "crown": [
        ([(-0.85, 0.6), (-0.95, -0.5), (-0.45, 0), (0, -0.8), (0.45, 0), (0.95, -0.5), (0.85, 0.6)], "own"),
        (_box(-0.85, 0.55, 0.85, 0.8), "gold"), (_ellipse(0, 0.25, 0.14), "white"),
    ],
    "umbrella": [
        (_arc(0, 0.05, 0.95, 180, 360), "own"), ([(-0.32, 0.05), (0, -0.9), (0.32, 0.05)], "white"),
        (_box(-0.05, 0.05, 0.05, 0.85), "brown"), (_box(-0.3, 0.8, 0.05, 0.92), "brown"),
    ],
    "robot": [
        (_box(-0.6, -0.6, 0.6, 0.35), "own"), (_box(-0.4, 0.4, 0.4, 0.98), "white"),
        (_box(-0.04, -0.95, 0.04, -0.6), "dark"), (_ellipse(0, -0.92, 0.12), "gold"),
        (_ellipse(-0.25, -0.25, 0.16), "white"), (_ellipse(0.25, -0.25, 0.16), "white"),
        (_box(-0.3, 0.08, 0.3, 0.2), "dark"),
    ],
    "butterfly": [
        (_ellipse(-0.48, -0.35, 0.45, 0.4), "own"), (_ellipse(0.48, -0.35, 0.45, 0.4), "own"),
        (_ellipse(-0.4, 0.4, 0.36), "own"), (_ellipse(0.4, 0.4, 0.36), "own"), (_ellipse(0, 0, 0.1, 0.75), "dark"),
        (_ellipse(-0.48, -0.35, 0.17), "white"), (_ellipse(0.48, -0.35, 0.17), "white"),
    ],
    "balloon": [
        (_ellipse(0, -0.3, 0.6, 0.66), "own"), ([(-0.12, 0.42), (0.12, 0.42), (0, 0.3)], "own"),
        (_box(-0.03, 0.42, 0.03, 0.98), "dark"), (_ellipse(-0.22, -0.55, 0.12, 0.18), "white"),
    ],
    "cup": [
        (_ellipse(0.55, 0.05, 0.38), "own"), (_ellipse(0.55, 0.05, 0.2), "hole"),
        ([(-0.75, -0.7), (0.55, -0.7), (0.4, 0.75), (-0.6, 0.75)], "own"), (_ellipse(-0.1, -0.68, 0.64, 0.15), "brown"),
    ],
    "key": [
        (_ellipse(-0.5, 0, 0.46), "own"), (_ellipse(-0.5, 0, 0.2), "hole"), (_box(-0.1, -0.12, 0.98, 0.12), "own"),
        (_box(0.5, 0.1, 0.64, 0.42), "own"), (_box(0.8, 0.1, 0.94, 0.42), "own"),
    ],
    "apple": [
        (_ellipse(-0.28, 0.1, 0.58, 0.72), "own"), (_ellipse(0.28, 0.1, 0.58, 0.72), "own"),
        (_box(-0.06, -0.9, 0.06, -0.45), "brown"), (_ellipse(0.28, -0.75, 0.26, 0.13), "leaf"),
    ],
    "bell": [
        ([(-0.15, -0.8), (0.15, -0.8), (0.5, -0.3), (0.55, 0.35), (0.85, 0.6), (-0.85, 0.6), (-0.55, 0.35),
          (-0.5, -0.3)], "own"), (_ellipse(0, 0.72, 0.18), "dark"),
    ],
    "moon": [(_arc(0, 0, 0.92, 60, 300) + _arc(0.35, 0, 0.72, 270, 90), "own")],
    "cactus": [
        (_ellipse(0, 0.05, 0.3, 0.85), "own"), (_box(-0.75, -0.05, -0.2, 0.2), "own"),
        (_ellipse(-0.68, -0.2, 0.18, 0.35), "own"), (_box(0.2, 0.1, 0.75, 0.35), "own"),
        (_ellipse(0.68, -0.05, 0.18, 0.4), "own"), (_box(-0.45, 0.7, 0.45, 0.98), "brown"),
    ],
}  # fmt: skip
KINDS = tuple(SHAPES)


def side_for(pixels: float) -> int:
    """The side of the sprite that is drawn for an object of `pixels` pixels: a multiple of 8, so that few are kept."""
    return max(16, 8 * math.ceil(pixels / 8))


def _relief(cover: np.ndarray) -> np.ndarray:
    """How much a part that bulges towards the eye is lit from the upper left: float32 like `cover`, about +-0.3."""
    soft = cv2.GaussianBlur(cover, (0, 0), 0.05 * cover.shape[0])
    slope = 0.6 * cv2.Sobel(soft, cv2.CV_32F, 1, 0) + 0.8 * cv2.Sobel(soft, cv2.CV_32F, 0, 1)
    return (slope * (0.05 * cover.shape[0] / 14)).clip(-0.35, 0.35)


@lru_cache(maxsize=2048)
def sprite(kind: str, colour: str, side: int) -> np.ndarray:
    """One object: (side, side, 4) float32 in [0, 1], RGB premultiplied by coverage, read-only.

    Drawn at four times the size and averaged. Raises KeyError for an unknown kind or colour.
    """
    big = 4 * side
    dark = np.array(OUTLINE, np.float32)
    rgb = np.empty((big, big, 3), np.float32)
    rgb[:] = dark
    cover = np.zeros((big, big), np.float32)

    def pixels(outline: list[Point]) -> np.ndarray:
        return np.round((np.array(outline) * (big / 2 * 0.94) + big / 2) * 16).astype(np.int32)  # 4 fractional bits

    for outline, paint in SHAPES[kind]:
        if paint != "hole":
            cv2.polylines(cover, [pixels(outline)], True, 1.0, big // 26, cv2.LINE_8, 4)
    for outline, paint in SHAPES[kind]:
        part = np.zeros((big, big), np.float32)
        cv2.fillPoly(part, [pixels(outline)], 1.0, cv2.LINE_8, 4)
        if paint == "hole":
            cover *= 1 - part
            continue
        cover = np.maximum(cover, part)
        light = _relief(part) if paint == "own" else np.zeros_like(part)
        shade = np.minimum(1 + light, 1)[..., None] * np.array(PAINTS.get(paint, COLOURS[colour]), np.float32)
        shade += (255 - shade) * np.maximum(light, 0)[..., None]
        rgb += (shade - rgb) * part[..., None]
    y, x = np.mgrid[0:big, 0:big].astype(np.float32) / big
    rgb *= (1.12 - 0.14 * x - 0.2 * y)[..., None]  # light from the upper left
    both = np.concatenate([rgb.clip(0, 255) / 255 * cover[..., None], cover[..., None]], axis=2)
    out = cv2.resize(both, (side, side), interpolation=cv2.INTER_AREA)
    out.flags.writeable = False
    return out

"""True clips spoilt on purpose: what the metrics must bear, and what they must see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i2v.data.backgrounds import background
from i2v.data.scene import Scene, render

Video = NDArray[np.uint8]


def blurred(frames: Video, sigma: float = 2.0) -> Video:
    """Gaussian blur; sigma in pixels of a 64-pixel frame."""
    sigma *= frames.shape[1] / 64
    return np.stack([np.asarray(cv2.GaussianBlur(frame, (0, 0), sigma), np.uint8) for frame in frames])


def noisy(frames: Video, deviation: float = 15.0) -> Video:
    """Independent noise on every value."""
    return _bytes(frames + np.random.default_rng(0).normal(0, deviation, frames.shape))


def flickering(frames: Video, deviation: float = 14.0) -> Video:
    """The colour of every frame as a whole is off."""
    return _bytes(frames + np.random.default_rng(0).normal(0, deviation, (len(frames), 1, 1, 3)))


def blotched(frames: Video, deviation: float = 25.0) -> Video:
    """Large blobs of wrong colour, other ones in every frame."""
    rng, side = np.random.default_rng(0), frames.shape[1]
    grids = [rng.normal(0, deviation, (5, 5, 3)) for _ in frames]
    return _bytes(frames + np.stack([cv2.resize(g, (side, side), interpolation=cv2.INTER_CUBIC) for g in grids]))


def fading(frames: Video, end: float = 0.6) -> Video:
    """Contrast is lost over the clip, down to 1 - end."""
    share = np.linspace(0, end, len(frames))[:, None, None, None]
    return _bytes(frames * (1 - share) + np.median(frames, axis=(0, 1, 2)) * share)


def all_at_once(frames: Video) -> Video:
    """Blurred, noisy and flickering."""
    return noisy(flickering(blurred(frames)))


def frozen(frames: Video) -> Video:
    """Frame 0 repeated."""
    return np.repeat(frames[:1], len(frames), axis=0)


def frozen_and_flickering(frames: Video) -> Video:
    """Frame 0 repeated, blotched, blurred and flickering: much changes, nothing moves."""
    return blotched(flickering(blurred(frozen(frames))))


def shuffled_colours(frames: Video) -> Video:
    """As it is, red and blue exchanged: the probe may not depend on the object's colour."""
    return np.ascontiguousarray(frames[..., ::-1])


def _bytes(values: NDArray[Any]) -> Video:
    return (values + 0.5).clip(0, 255).astype(np.uint8)


DEGRADED: dict[str, Callable[[Video], Video]] = {
    "true": lambda frames: frames,
    "blurred": blurred,
    "noisy": noisy,
    "flickering": flickering,
    "blotched": blotched,
    "fading": fading,
    "blurred, noisy and flickering": all_at_once,
    "red and blue exchanged": shuffled_colours,
}
MOTIONLESS: dict[str, Callable[[Video], Video]] = {
    "frame 0 repeated": frozen,
    "frame 0 repeated, blotched, blurred and flickering": frozen_and_flickering,
}


def degraded(frames: Video, change: Callable[[Video], Video]) -> Video:
    """A changed clip whose frame 0 stays as given, as it does in image-to-video."""
    out = change(frames).copy()
    out[0] = change(frames[:1])[0] if change is shuffled_colours else frames[0]
    return out


def drifting(scene: Scene | None, frames: Video) -> Video:
    """Red comes, blue goes: 30 levels by the end."""
    return _bytes(frames + np.linspace(0, 1, len(frames))[:, None, None, None] * np.array([30, 0, -30]))


def dissolving(scene: Scene, frames: Video) -> Video:
    """The object fades into the background; for scenes whose camera rests."""
    size, corner = frames.shape[1], round(frames.shape[1] * scene.margin)
    wide = background(scene.background, np.random.default_rng(scene.seed), size, scene.margin) * 255
    share = np.linspace(0, 1, len(frames))[:, None, None, None]
    return _bytes(frames * (1 - share) + wide[corner : corner + size, corner : corner + size] * share)


def exchanged(scene: Scene, frames: Video) -> Video:
    """From the second frame on, the object is of another kind and colour."""
    other = replace(scene, kind="house" if scene.kind != "house" else "fish",
                    colour="blue" if scene.colour in ("red", "orange", "yellow", "pink") else "red")  # fmt: skip
    return np.concatenate([frames[:1], render(other, len(frames), frames.shape[1]).frames[1:]])


def jumping(scene: Scene, frames: Video) -> Video:
    """The whole picture jumps to and fro, by 3 of 64 pixels."""
    step = round(3 * frames.shape[1] / 64)
    return np.stack([np.roll(frame, (0, step * (i % 2)), axis=(0, 1)) for i, frame in enumerate(frames)])


def another_colour(frames: Video) -> Video:
    """After frame 0, red is 10 levels stronger and blue weaker."""
    return np.concatenate([frames[:1], _bytes(frames[1:] + np.array([10.0, 0, -10]))])


def softer(frames: Video, sigma: float = 1.5) -> Video:
    """After frame 0, blurred by 1.5 of 64 pixels."""
    return np.concatenate([frames[:1], blurred(frames[1:], sigma)])


def displaced(frames: Video) -> Video:
    """After frame 0, shifted by 3 of 64 pixels."""
    return np.concatenate([frames[:1], np.roll(frames[1:], round(3 * frames.shape[2] / 64), axis=2)])


# Fault -> how it is made; the metric that has to see it; by how much it has to fall (below 0: rise).
FAULTS: dict[str, tuple[Callable[[Scene, Video], Video], str, float]] = {
    "frozen": (lambda scene, frames: frozen(frames), "displacement", 0.1),
    "colours drift": (drifting, "colour_drift", -3.0),
    "flickering": (lambda scene, frames: flickering(frames, 8.0), "flicker", -1.0),
    "the object dissolves": (dissolving, "identity", 0.2),
    "another object": (exchanged, "identity", 0.2),
    "the picture jumps": (jumping, "static_psnr", 5.0),
    "blurred": (lambda scene, frames: blurred(frames), "object_psnr", 3.0),
}

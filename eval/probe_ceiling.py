"""How often `measure_motion` is right when the truth is known: `python -m eval probe`.

Prints a Markdown table over true clips of the miniature world, plain, degraded in the ways that networks degrade
them, and with their motion taken away. No model's clip can be judged better than this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval.intervals import wilson_interval
from eval.metrics.motion_class import measure_motion
from i2v import config
from i2v.config import flag
from i2v.data.world import WORLDS, Clip, make_clip

Video = NDArray[np.uint8]


@dataclass(frozen=True)
class ProbeCeiling:
    """Measure the motion probe on clips whose motion is known."""

    world: str = flag("level_1", "level of the procedural world")
    split: str = flag("val", "which of its clips; the thresholds were fixed on train")
    clips: int = flag(120, "how many")
    num_frames: int = flag(16, "frames of each")
    size: int = flag(64, "side in pixels")


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


def right(clip: Clip, change: Callable[[Video], Video], still: bool = False) -> bool:
    """Whether the verdict on a changed clip is its motion, or "stays still" where the motion was taken away."""
    wanted = "stays still" if still else clip.motion
    return measure_motion(degraded(clip.frames, change), clip.mask).motion == wanted


def main(argv: list[str] | None = None) -> None:
    cfg = config.from_command_line(ProbeCeiling, argv, "python -m eval probe")
    clips = [make_clip(WORLDS[cfg.world], cfg.split, i, cfg.num_frames, cfg.size) for i in range(cfg.clips)]
    print("| clips | right | share | 95 % interval |\n|---|---|---|---|")
    for still, changes in ((False, DEGRADED), (True, MOTIONLESS)):
        for name, change in changes.items():
            good = sum(right(clip, change, still) for clip in tqdm(clips, desc=name, mininterval=5, file=sys.stderr))
            low, high = wilson_interval(good, len(clips))
            cells = (name, f"{good} of {len(clips)}", f"{good / len(clips):.3f}", f"{low:.3f} to {high:.3f}")
            print("|", " | ".join(cells), "|", flush=True)

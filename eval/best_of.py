"""Which of several videos of one picture to keep: four faults, seen from the pixels alone, without weights.

static: nothing moves. drifting: the colours leave the picture's. flickering: light or colours jump from frame to frame.
seam: one step differs from all others, as between the given picture and what was made. Nothing here sees the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from eval.metrics.background import lab
from eval.metrics.flow import Flow, flows_from_first, grey_pictures, step_flows
from i2v.picture import resize
from i2v.video import read_video

Frames = NDArray[np.uint8]
Colours = NDArray[np.float32]
SIDE, TILES = 128, 8  # pixels, squeezed to a square; tiles a side
# thresholds, fixed on true and spoilt clips of split "train"
STATIC, UNCHANGED = 2.5, 0.1  # % of the frame; of its pixels, by CHANGE
CHANGE = 8.0  # delta E
DRIFTING = 3.0  # delta E of CIE 1976
FLICKERING = 1.5  # delta E
SEAM = 1.7  # times the other steps
FLOORS = (0.5, 1.0)  # delta E, % of the frame: below these a step's size says nothing


@dataclass(frozen=True)
class Examined:
    """motion: how far things get from frame 0, % of the frame. changed: pixels that change, %. drift: of the colours in
    the last quarter from frame 0, delta E. flicker: of a frame against the mean of its neighbours, delta E. seam: the
    largest step over the third largest, and seam_after, the frame before it."""

    motion: float
    changed: float
    drift: float
    flicker: float
    seam: float
    seam_after: int

    @property
    def ratios(self) -> dict[str, float]:
        """Each fault against its threshold: above 1 it is there."""
        return {
            "static": min(STATIC / max(self.motion, 1e-3), UNCHANGED / max(self.changed, 1e-3)),
            "drifting": self.drift / DRIFTING,
            "flickering": self.flicker / FLICKERING,
            "seam": self.seam / SEAM,
        }

    @property
    def faults(self) -> list[str]:
        return [name for name, ratio in self.ratios.items() if ratio > 1]

    def told(self) -> str:
        """For people: `static (0.3 % of the frame), seam after frame 0 (4.1 times the other steps)`."""
        words = {
            "static": f"static (moves {self.motion:.1f} % of the frame)",
            "drifting": f"drifting (colours {self.drift:.1f} delta E from the picture)",
            "flickering": f"flickering ({self.flicker:.1f} delta E from frame to frame)",
            "seam": f"seam after frame {self.seam_after} ({self.seam:.1f} times the other steps)",
        }
        return ", ".join(words[name] for name in self.faults) or "no fault"


def examine(frames: Frames) -> Examined:
    """A video of any shape, uint8 (F, H, W, 3) RGB, F >= 4. Raises ValueError for others."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < 4:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}; faults show in uint8 (F, H, W, 3), F >= 4")
    shots = np.stack([resize(frame, SIDE, SIDE) for frame in frames])
    grey = grey_pictures(shots)
    steps = step_flows(grey)
    ways = flows_from_first(grey, steps)
    colours = [lab(shot.astype(np.float32)) for shot in shots]
    seam, after = _seam(colours, steps)
    return Examined(_motion(ways), _changed(colours), _drift(colours, ways), _flicker(colours), seam, after)


def ranked(videos: Mapping[str, Frames]) -> dict[str, Examined]:
    """The best first: the one whose worst fault is farthest below its threshold."""
    found = {name: examine(frames) for name, frames in videos.items()}
    return dict(sorted(found.items(), key=lambda pair: max(pair[1].ratios.values())))


def ranking(files: Sequence[Path]) -> list[str]:
    """A line for each file, the best first, with its faults. Raises ValueError for a file that cannot be read."""
    found = ranked({str(file): read_video(file) for file in files})
    lines = [f"{place}. {name}: {one.told()}" for place, (name, one) in enumerate(found.items(), 1)]
    return [f"best of {len(files)}, by motion, colours, flicker and seams (not by the prompt):", *lines]


def _motion(ways: Sequence[Flow]) -> float:
    """The 98th percentile over pixels of the way from frame 0, averaged over a quarter of the frames, which noise does
    not survive; of the quarter where it is largest."""
    quarters = [np.mean(part, axis=0) for part in np.array_split(np.stack(ways), min(4, len(ways))) if len(part)]
    return max(float(np.percentile(np.linalg.norm(way, axis=-1), 98)) for way in quarters) / SIDE * 100


def _changed(colours: Sequence[Colours]) -> float:
    """Pixels whose mean colour over a quarter of the frames, softened, is another than in frame 0, beyond what changes
    in most of the frame; of the quarter where they are most. Flow does not see a plain thing turn or grow."""
    quarters = np.array_split(np.stack(colours[1:]), min(4, len(colours) - 1))
    shares = []
    for quarter in quarters:
        change = np.asarray(cv2.GaussianBlur(quarter.mean(axis=0) - colours[0], (0, 0), 1.5))
        change = change - np.median(change, axis=(0, 1))
        shares.append(float((np.linalg.norm(change, axis=-1) > CHANGE).mean()) * 100)
    return max(shares)


def _drift(colours: Sequence[Colours], ways: Sequence[Flow]) -> float:
    """The smaller of two: the median over tiles of what is left once motion is undone, and the mean colour's way. A
    moving camera that shows new things changes one of them at most."""
    late = max(len(ways) // 4, 1)
    left, seen = np.zeros((TILES * TILES, 3)), np.zeros((TILES * TILES, 1))
    for colour, way in zip(colours[-late:], ways[-late:], strict=True):
        inside = _inside(way)
        left += _tiles((_warped(colour, way) - colours[0]) * inside)
        seen += _tiles(np.repeat(inside, 3, axis=2))[:, :1]
    known = seen[:, 0] > 0.5 * late
    mean = np.mean([colour.mean(axis=(0, 1)) for colour in colours[-late:]], axis=0) - colours[0].mean(axis=(0, 1))
    whole = float(np.linalg.norm(mean))
    return min(whole, float(np.median(np.linalg.norm(left[known] / seen[known], axis=1)))) if known.any() else whole


def _flicker(colours: Sequence[Colours]) -> float:
    """The median over tiles: one moving thing is not everywhere. Frame 0 is left out, see `_seam`."""
    tiles = [_tiles(colour) for colour in colours[1:]]
    middle = zip(tiles, tiles[1:], tiles[2:])
    return float(np.mean([np.median(np.linalg.norm(b - (a + c) / 2, axis=1)) for a, b, c in middle]))


def _seam(colours: Sequence[Colours], steps: Sequence[Flow]) -> tuple[float, int]:
    """The largest step over the third largest (two known frames make two seams), of what is left once motion is undone,
    and of the motion of most of the frame."""
    soft = [np.asarray(cv2.GaussianBlur(colour, (0, 0), 1.0), np.float32) for colour in colours]
    left = [float(np.linalg.norm(_warped(b, way) - a, axis=-1).mean()) for a, b, way in zip(soft, soft[1:], steps)]
    moved = [float(np.median(np.linalg.norm(way, axis=-1))) / SIDE * 100 for way in steps]
    found = [(max(sizes) / (sorted(sizes)[-3] + floor), int(np.argmax(sizes)))
             for sizes, floor in zip((left, moved), FLOORS, strict=True)]  # fmt: skip
    return max(found)


def _warped(picture: Colours, way: Flow) -> Colours:
    """Sampled where the flow points."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    return np.asarray(
        cv2.remap(picture, x + way[..., 0], y + way[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE),
        np.float32,
    )


def _inside(way: Flow) -> Colours:
    """(SIDE, SIDE, 1): 1 where the flow points into the frame."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    place = np.stack([x + way[..., 0], y + way[..., 1]], axis=-1)
    inside: NDArray[np.bool_] = np.all((place >= 0) & (place <= SIDE - 1), axis=-1, keepdims=True)
    return inside.astype(np.float32)


def _tiles(picture: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean colours of TILES x TILES tiles, (TILES^2, 3)."""
    side = SIDE // TILES
    return picture.reshape(TILES, side, TILES, side, 3).mean(axis=(1, 3), dtype=np.float64).reshape(-1, 3)

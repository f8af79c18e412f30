"""How often `sample.py --best-of` sees a planted fault, and sees one where there is none: `python -m eval faults`.

True clips of the miniature world that show some motion, plain and with faults planted in them; Markdown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from eval.best_of import Examined, examine
from eval.damage import (
    Video,
    another_colour,
    blurred,
    displaced,
    drifting,
    flickering,
    frozen,
    noisy,
    softer,
)
from i2v import config
from i2v.config import ConfigError, flag
from i2v.data.scene import Clip
from i2v.data.world import WORLDS, WorldConfig, draw_scene, make_clip

NAMES = ("static", "drifting", "flickering", "seam")
# what is done to a true clip, and the fault that has to be seen, "" where none may be
CASES: dict[str, tuple[Callable[[Video], Video], str]] = {
    "true": (lambda frames: frames, ""),
    "noisy (deviation 3 of 255)": (lambda frames: noisy(frames, 3.0), ""),
    "blurred (sigma 1 pixel)": (lambda frames: blurred(frames, 1.0), ""),
    "frame 0 repeated": (frozen, "static"),
    "frame 0 repeated, noisy": (lambda frames: noisy(frozen(frames), 3.0), "static"),
    "red comes, blue goes": (lambda frames: drifting(None, frames), "drifting"),
    "every frame's colour is off (deviation 8)": (lambda frames: flickering(frames, 8.0), "flickering"),
    "after frame 0, other colours": (another_colour, "seam"),
    "after frame 0, blurred": (softer, "seam"),
    "after frame 0, shifted": (displaced, "seam"),
}


@dataclass(frozen=True)
class FaultRates:
    """Measure the fault detectors of sample.py --best-of on planted faults."""

    split: str = flag("val", "which of the world's clips; the thresholds were fixed on train")
    first: int = flag(0, "number of the first clip looked at; the clips from 0 on were seen while this was built")
    clips: int = flag(20, "of each level")
    num_frames: int = flag(16, "frames of each")
    size: int = flag(64, "side in pixels")


def moving(world: WorldConfig, cfg: FaultRates) -> list[Clip]:
    """Clips of the split, from `first` on, whose object or camera moves."""
    out: list[Clip] = []
    index = cfg.first
    while len(out) < cfg.clips:
        scene = draw_scene(world, cfg.split, index)
        if scene.motion != "stays still" or scene.camera:
            out.append(make_clip(world, cfg.split, index, cfg.num_frames, cfg.size))
        index += 1
    return out


def row(case: str, wanted: str, found: list[Examined]) -> str:
    """How many of the clips have each fault, the wanted one in bold."""
    counts = {name: sum(name in one.faults for one in found) for name in NAMES}
    cells = [f"**{count}**" if name == wanted else str(count) for name, count in counts.items()]
    return f"| {case} | {len(found)} | {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    cfg = config.from_command_line(FaultRates, argv, "python -m eval faults")
    if cfg.clips < 1 or cfg.num_frames < 4:
        raise ConfigError(f"--clips {cfg.clips} --num-frames {cfg.num_frames}: expected at least 1 clip of 4 frames")
    if cfg.first < 0:
        raise ConfigError(f"--first {cfg.first}: expected 0 or more")
    clips = [clip for world in WORLDS.values() for clip in moving(world, cfg)]
    print(f"| | clips | {' | '.join(NAMES)} |\n|---|---|---|---|---|---|")
    for case, (change, wanted) in CASES.items():
        bar = tqdm(clips, desc=case, leave=False, mininterval=5, file=sys.stderr)
        print(row(case, wanted, [examine(change(clip.frames)) for clip in bar]), flush=True)

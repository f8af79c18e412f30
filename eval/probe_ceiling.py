"""How far the metrics can be trusted, on clips whose truth is known: `python -m eval probe`.

Prints Markdown: how often the motion of object and camera is right on true clips of the miniature world, plain,
degraded in the ways that networks degrade them, and with their motion taken away; what every metric says of true clips,
of the same through the VAE and of frame 0 repeated; and how often a planted fault is seen. No model's clip can be
judged better than this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval.answers import through_vae
from eval.damage import DEGRADED, FAULTS, MOTIONLESS, Video, degraded, frozen, noisy
from eval.intervals import bootstrap_interval, wilson_interval
from eval.metrics.all import Value, measure_clip
from eval.metrics.camera import verdict
from eval.metrics.motion_class import motion_of
from eval.metrics.view import look
from i2v import config
from i2v.config import flag
from i2v.data.world import WORLDS, Clip, WorldConfig, draw_scene, make_clip
from i2v.load import load


@dataclass(frozen=True)
class ProbeCeiling:
    """Measure the metrics on clips whose truth is known."""

    world: str = flag("level_1", "level of the procedural world")
    split: str = flag("val", "which of its clips; the thresholds were fixed on train")
    clips: int = flag(120, "how many; the rows of damaged clips take a part of them")
    num_frames: int = flag(16, "frames of each")
    size: int = flag(64, "side in pixels")
    weights: Path | None = flag(None, "folder of the miniature's parts, for its VAE; not given: the shipped one")


def right(clip: Clip, change: Callable[[Video], Video], still: bool = False, world: WorldConfig | None = None
          ) -> tuple[bool, bool]:  # fmt: skip
    """Whether the verdicts on a changed clip are its object's and camera's, or rest where motion was taken away."""
    view = look(degraded(clip.frames, change), clip.mask)
    motions = world.motions if world else (clip.motion, "stays still")
    cameras = world.cameras if world else ("", clip.camera)
    wanted = ("stays still", "") if still else (clip.motion, clip.camera)
    return motion_of(view, motions).motion == wanted[0], verdict(view.camera, cameras) == wanted[1]


def share(good: Sequence[bool]) -> str:
    """`118 of 120 (0.94 to 1.00)`, Wilson's 95 % interval."""
    low, high = wilson_interval(sum(good), len(good))
    return f"{sum(good)} of {len(good)} ({low:.3f} to {high:.3f})"


def mean(values: Sequence[Value], digits: int = 2) -> str:
    """`31.2 (30.8 to 31.6)`, the bootstrap's 95 % interval; "-" below two values."""
    have = [float(v) for v in values if isinstance(v, float)]
    if len(have) < 2:
        return "-"
    low, high = bootstrap_interval(have)
    return f"{np.mean(have):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def row(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


def head(*cells: str) -> None:
    print()
    row(*cells)
    print("|" + "---|" * len(cells))


def moving_cameras(world: WorldConfig, cfg: ProbeCeiling) -> list[Clip]:
    """The first clips of the split whose camera moves, half as many as all; none where all cameras rest."""
    found: list[Clip] = []
    index = 0
    while len(world.cameras) > 1 and cfg.split != "held_out" and len(found) < cfg.clips // 2:
        if draw_scene(world, cfg.split, index).camera:
            found.append(make_clip(world, cfg.split, index, cfg.num_frames, cfg.size))
        index += 1
    return found


def verdicts(world: WorldConfig, clips: Sequence[Clip], moving: Sequence[Clip], vae: Callable[[Video], Video]) -> None:
    """The table of right verdicts; the damaged rows are of the first third of the clips."""
    head("clips", "object right", "camera right")
    rows = [(False, name, change) for name, change in {"true, through the VAE": vae, **DEGRADED}.items()]
    rows += [(True, name, change) for name, change in MOTIONLESS.items()]
    for still, name, change in rows:
        some = clips if change in (vae, frozen, DEGRADED["true"]) else clips[: max(len(clips) // 3, 3)]
        pairs = [right(c, change, still, world) for c in tqdm(some, desc=name, mininterval=5, file=sys.stderr)]
        row(name, share([p[0] for p in pairs]), share([p[1] for p in pairs]))
    if moving:
        pairs = [right(c, DEGRADED["true"], False, world) for c in moving]
        row("true, the camera moves", share([p[0] for p in pairs]), share([p[1] for p in pairs]))


def bounds(clips: Sequence[Clip], vae: Callable[[Video], Video]) -> None:
    """The table of what each metric says of truth, VAE and frame 0 repeated."""
    made: dict[str, list[dict[str, Value]]] = {}
    changes = {"true": DEGRADED["true"], "true, through the VAE": vae, "frame 0 repeated": frozen}
    for name, change in changes.items():
        made[name] = [
            measure_clip(degraded(c.frames, change), c.frames[0], c.mask)
            for c in tqdm(clips, desc=f"metrics, {name}", mininterval=5, file=sys.stderr)
        ]
    head("mean (95 % interval)", *made)
    for key in (k for k in made["true"][0] if k not in ("motion", "camera")):
        cells = [mean([values[key] for values in table]) for table in made.values()]
        row(key, *cells)


def faults(world: WorldConfig, split: str, count: int, num_frames: int, size: int) -> None:
    """The table of planted faults: seen, and seen where there is only faint noise."""
    motion = "moves right"
    head("fault", "metric", "seen", "false alarms")
    found: dict[str, tuple[list[bool], list[bool]]] = {name: ([], []) for name in FAULTS}
    for i in tqdm(range(count), desc="faults", mininterval=5, file=sys.stderr):
        scene = draw_scene(world, split, i, motion=motion, camera="")
        clip = make_clip(world, split, i, num_frames, size, motion=motion, camera="")
        true, faint = (measure_clip(f, clip.frames[0], clip.mask) for f in (clip.frames, noisy(clip.frames, 3.0)))
        for name, (change, metric, fall) in FAULTS.items():
            spoilt = measure_clip(change(scene, clip.frames), clip.frames[0], clip.mask)
            for kept, values in zip(found[name], (spoilt, faint), strict=True):
                kept.append(differs(true[metric], values[metric], fall))
    for name, (hits, alarms) in found.items():
        row(name, FAULTS[name][1], share(hits), share(alarms))


def differs(true: Value, value: Value, fall: float) -> bool:
    """Whether a metric has fallen by `fall` or more (risen, where that is negative)."""
    if not isinstance(true, float) or not isinstance(value, float):
        return False
    return true - value >= fall if fall > 0 else true - value <= fall


def main(argv: list[str] | None = None) -> None:
    cfg = config.from_command_line(ProbeCeiling, argv, "python -m eval probe")
    if cfg.world not in WORLDS:
        raise config.ConfigError(f"--world {cfg.world}: expected one of {', '.join(WORLDS)}")
    if cfg.clips < 3 or cfg.num_frames < 3:
        raise config.ConfigError(f"--clips {cfg.clips} --num-frames {cfg.num_frames}: expected 3 or more of each")
    world, pipe = WORLDS[cfg.world], load("tiny", "cpu", "float32", cfg.weights)
    clips = [make_clip(world, cfg.split, i, cfg.num_frames, cfg.size) for i in range(cfg.clips)]

    def vae(frames: Video) -> Video:
        return through_vae(pipe, frames)

    verdicts(world, clips, moving_cameras(world, cfg), vae)
    bounds(clips[: max(cfg.clips // 4, 3)], vae)
    faults(world, cfg.split, max(cfg.clips // 10, 3), cfg.num_frames, cfg.size)

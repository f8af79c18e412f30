"""Does an object follow a drawn path, and does the first frame stay? `python -m eval path` (paper, Sec. 4.5, figure 5).

A picture of the world that the miniature never saw, a caption, and for every frame the edges of the picture's object
along a path that the caption does not tell: there and back, an arc, a corner. They are the control pictures of the
edge ControlNet; the I2V-Adapter and all else is as without it. Where the object is in each frame is measured
from the pixels. Beside it: without the ControlNet, and with the ControlNet but without the I2V-Adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval.answers import write_clip
from eval.held_out import level_of
from eval.intervals import bootstrap_interval, paired_interval
from eval.metrics.similarity import first_frame_similarity
from eval.metrics.view import look
from eval.sheets import write_sheet
from i2v import config
from i2v.config import ConfigError, flag
from i2v.control import canny
from i2v.data.scene import Scene, render
from i2v.data.world import WORLDS, draw_scene
from i2v.load import load
from i2v.pipeline import I2VPipeline
from i2v.presets import WEIGHTS, find
from i2v.video import write_video

Video = NDArray[np.uint8]
FOUND = 0.35  # least share of the object that has to be there, as for the verdict on its motion
TURN = 2 * np.pi
STRAIGHT = "to the left, as the caption says"  # the only path that the model takes without the ControlNet, too
# (dx, dy) at time u in [0, 1], of the frame: right and down
PATHS: dict[str, Callable[[float], tuple[float, float]]] = {
    "there and back": lambda u: (0.22 * np.sin(TURN / 2 * u), 0.0),
    "arc": lambda u: (0.12 * (1 - np.cos(TURN / 2 * u)), -0.2 * np.sin(TURN / 2 * u)),
    "corner": lambda u: (-0.22 * min(2 * u, 1), 0.22 * max(2 * u - 1, 0)),
    STRAIGHT: lambda u: (-0.3 * u, 0.0),
    "circle": lambda u: (0.15 * (1 - np.cos(TURN * u)), 0.15 * np.sin(TURN * u)),
}
ROWS = ("with the ControlNet", "without", "with it, without the I2V-Adapter", "the drawn clip itself")


@dataclass(frozen=True)
class PathEvaluation:
    """Measure how a miniature's object follows a drawn path under its edge ControlNet."""

    weights: Path | None = flag(None, "folder of the model's parts; not given: the shipped one")
    controlnet: Path | None = flag(None, "the edge ControlNet; not given: the folder's controlnet.safetensors")
    out: Path = flag(Path("outputs/path"), "folder for the clips, results.json and the picture")
    scenes: int = flag(6, "unseen pictures, each with every path")
    steps: int = flag(25, "sampling steps")
    scale: float = flag(1.0, "strength of the control")
    picture: Path | None = flag(None, "a file for the picture of the first paths, such as docs/media/path.webp")


def drawn(scene: Scene, path: str, frames: int, size: int) -> tuple[Video, NDArray[np.float64], Video]:
    """The clip in which the object takes the path, its displacements (F, 2) of the frame, and the first mask."""
    offsets = np.array([PATHS[path](i / (frames - 1)) for i in range(frames)])
    clips = [render(_at(scene, dx, dy), 1, size) for dx, dy in offsets]
    return np.concatenate([clip.frames for clip in clips]), offsets, clips[0].mask


def _at(scene: Scene, dx: float, dy: float) -> Scene:
    return replace(scene, motion="stays still", x=scene.x + dx, y=scene.y + dy)


def distance(frames: Video, mask: Video, offsets: NDArray[np.float64]) -> float:
    """Mean distance of the object from its place on the path, of the frame; half a frame where it is not found."""
    track = look(frames, mask).track
    if track is None:
        raise ValueError("a picture without an object follows no path; give its mask")
    places = zip(track.poses, track.found, offsets[1:], strict=True)
    far = [np.hypot(pose.dx - x, pose.dy - y) if found >= FOUND else 0.5 for pose, found, (x, y) in places]
    return float(np.mean(far))


@dataclass(frozen=True)
class Clip:
    """One made clip: of which picture and path, how, and its measurements."""

    scene: int
    path: str
    row: str
    frames: Video
    far: float
    similarity: float


def run(cfg: PathEvaluation) -> list[Clip]:
    """Makes and measures all clips; they are kept in `out/clips`."""
    folder = cfg.weights or WEIGHTS / "tiny"
    file = cfg.controlnet or folder / "controlnet.safetensors"
    if not file.is_file():
        raise ConfigError(f"there is no {file}; train one with configs/tiny/edges.json and give it with --controlnet")
    world = WORLDS[level_of(folder) or "level_1"]
    preset, pipe = find("tiny"), load("tiny", folder=folder, controlnet=f"canny={file}")
    out = []
    jobs = [(number, path) for number in range(cfg.scenes) for path in PATHS]
    for number, path in tqdm(jobs, desc="paths", unit="path", disable=None):
        scene = replace(draw_scene(world, "val", number, camera=""), motion="stays still")
        truth, offsets, mask = drawn(scene, path, preset.num_frames, preset.side)
        place = cfg.out / "drawn" / f"{number} {path}"
        write_video(place, truth, preset.fps, overwrite=True)
        for row in ROWS:
            frames = truth if row == ROWS[3] else made(pipe, row, truth[0], scene, place, number, cfg)
            far, near = distance(frames, mask, offsets), first_frame_similarity(frames).psnr
            out.append(Clip(number, path, row, frames, far, near))
            clip = cfg.out / "clips" / f"{number} {path}, {row}.png"
            clip.parent.mkdir(parents=True, exist_ok=True)
            write_clip(clip, frames)
    return out


def made(pipe: I2VPipeline, row: str, first: Video, scene: Scene, maps: Path, seed: int, cfg: PathEvaluation) -> Video:
    """The model's clip; the caption says what is there, but nothing of a motion (but for the straight path)."""
    words = " moves left" if maps.name.endswith(STRAIGHT) else ""
    caption = scene.caption.replace(f" {scene.motion}", words)
    control = [] if row == ROWS[1] else [f"canny={maps}:{cfg.scale:g}"]
    i2v = 0.0 if row == ROWS[2] else 1.0
    return pipe(first, caption, seed=seed, steps=cfg.steps, control=control, i2v_scale=i2v).frames


def table(clips: list[Clip]) -> str:
    """Markdown: a row for each way, means with 95 % intervals over pictures.

    Similarities are of the straight path alone, which is taken with and without the ControlNet: a clip that stands
    still is always more similar to its first frame than one that moves.
    """
    heads = (
        "",
        "distance from the path",
        "on the straight path",
        "similarity to frame 0 there (dB)",
        "against without",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    of = {row: [clip for clip in clips if clip.row == row and clip.path == STRAIGHT] for row in ROWS}
    plain = [clip.similarity for clip in of[ROWS[1]]]
    for row in ROWS:
        bent = [clip for clip in clips if clip.row == row and clip.path != STRAIGHT]
        near = [clip.similarity for clip in of[row]]
        cells = [
            told([clip.far for clip in bent], 3, [str(clip.scene) for clip in bent]),
            told([clip.far for clip in of[row]], 3),
            told(near, 1),
        ]
        low, high = paired_interval(near, plain)
        change = f"{np.mean(near) - np.mean(plain):+.1f} [{low:+.1f}, {high:+.1f}]"
        lines.append(f"| {row} | {' | '.join(cells)} | {'' if row == ROWS[1] else change} |")
    return "\n".join(lines)


def told(values: list[float], digits: int, groups: list[str] | None = None) -> str:
    """Mean and interval."""
    low, high = bootstrap_interval(values, groups=groups)
    return f"{np.mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def sheet(clips: list[Clip], paths: int = 3) -> tuple[list[Video], list[str]]:
    """The first paths, unchosen: the drawn edges and what became of them."""
    rows, captions = [], []
    for number, path in enumerate(list(PATHS)[:paths]):
        of = {
            clip.row: clip.frames for clip in clips if (clip.scene, clip.path) == (min(number, clips[-1].scene), path)
        }
        for row, title in ((ROWS[3], "the edges that are given"), (ROWS[0], ROWS[0]), (ROWS[1], ROWS[1])):
            rows.append(np.stack([canny(frame) for frame in of[row]]) if row == ROWS[3] else of[row])
            captions.append(f"{path}: {title}")
    return rows, captions


def main(argv: list[str] | None = None) -> None:
    """The command; raises ConfigError for what is not there."""
    cfg = config.from_command_line(PathEvaluation, argv, prog="python -m eval path")
    if cfg.scenes < 2:
        raise ConfigError(f"--scenes {cfg.scenes}: expected 2 or more, for the intervals")
    clips = run(cfg)
    rows = [{"scene": c.scene, "path": c.path, "row": c.row, "distance": c.far, "psnr": c.similarity} for c in clips]
    config.write_text(cfg.out / "results.json", json.dumps(rows, indent=1) + "\n")
    for file in filter(None, (cfg.out / "sheet.png", cfg.picture)):
        write_sheet(file, *sheet(clips))
    print(table(clips))

"""What becomes of colour and identity in a long video: `python -m eval long`.

Unseen pictures of the miniature's world, each made into a video of several windows, with the first picture in every
window (the default) and with windows that hold their own frames alone. Each quarter of a video is measured against the
first picture, by the pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval.answers import write_clip
from eval.held_out import level_of
from eval.intervals import NARROW, bootstrap_interval, paired_interval
from eval.metrics.background import colour_drift
from eval.metrics.identity import identity
from eval.metrics.view import View, look
from eval.tables import count_of
from i2v import config
from i2v.config import ConfigError, flag
from i2v.data.world import WORLDS, make_clip
from i2v.load import load
from i2v.pipeline import I2VPipeline
from i2v.presets import WEIGHTS

Video = NDArray[np.uint8]
QUARTERS = 4
MEASURES = {"colour": "colour drift of the background (delta E)", "identity": "identity of the object (1 is equal)"}
WAYS = {"first picture in every window": True, "windows alone": False}
TRUTH = "the true clip"


@dataclass(frozen=True)
class LongEvaluation:
    """Measure how colour and identity drift in a miniature's long videos, with and without the shared first picture."""

    weights: Path | None = flag(None, "folder of the model's parts; not given: the shipped one")
    out: Path = flag(Path("outputs/long"), "folder for the videos and results.json")
    scenes: int = flag(6, "unseen pictures")
    num_frames: int = flag(64, "frames of each video")
    window_overlap: int | None = flag(None, "frames that neighbouring windows share")
    steps: int = flag(25, "sampling steps")


def measured(frames: Video, mask: Video) -> list[dict[str, float]]:
    """Of each quarter of the frames after the first: colour drift, and the object's identity (0 where it is gone).

    Object and background are followed through the whole video, from frame to frame.
    """
    whole, out = look(frames, mask), []
    for part in np.array_split(np.arange(1, len(frames)), QUARTERS):
        view = quarter_of(whole, part)
        out.append({"colour": colour_drift(view) or 0.0, "identity": identity(view) or 0.0})
    return out


def quarter_of(view: View, frames: NDArray[np.int64]) -> View:
    """Frame 0 and the frames of these numbers."""
    shown, poses = [0, *frames.tolist()], [k - 1 for k in frames.tolist()]
    return View(
        [view.shots[k] for k in shown],
        None if view.track is None else replace(view.track, poses=[view.track.poses[k] for k in poses]),
        [view.covered[k] for k in shown],
        replace(view.camera, poses=[view.camera.poses[k] for k in poses]),
    )


def run(cfg: LongEvaluation) -> list[dict[str, object]]:
    """A row for each picture, way and quarter."""
    folder = cfg.weights or WEIGHTS / "tiny"
    world = WORLDS[level_of(folder) or "level_1"]
    pipe, rows = load("tiny", folder=folder), list[dict[str, object]]()
    (cfg.out / "clips").mkdir(parents=True, exist_ok=True)
    jobs = [(number, way) for number in range(cfg.scenes) for way in (*WAYS, TRUTH)]
    for number, way in tqdm(jobs, desc="videos", unit="video", disable=None):
        clip = make_clip(world, "val", number, cfg.num_frames, pipe.preset.side, camera="")
        frames = clip.frames
        if way in WAYS:
            frames = made(pipe, clip.frames[0], clip.caption, number, WAYS[way], cfg)
            write_clip(cfg.out / "clips" / f"{number}, {way}.png", frames)
        for quarter, values in enumerate(measured(frames, clip.mask), 1):
            rows.append({"scene": number, "way": way, "quarter": quarter, **values})
    return rows


def made(pipe: I2VPipeline, first: Video, caption: str, seed: int, anchor: bool, cfg: LongEvaluation) -> Video:
    return pipe(
        first, caption, seed=seed, steps=cfg.steps, num_frames=cfg.num_frames, window=pipe.preset.num_frames,
        window_overlap=cfg.window_overlap, window_anchor=anchor,
    ).frames  # fmt: skip


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: each way's means by quarter, and the first two's difference, with 95 % intervals over pictures."""
    lines = [f"| | {' | '.join(f'quarter {k + 1}' for k in range(QUARTERS))} |", f"|---{'|---' * QUARTERS}|"]

    def values(name: str, way: str, quarter: int) -> list[float]:
        return [float(str(r[name])) for r in rows if (r["way"], r["quarter"]) == (way, quarter)]

    ways = list(dict.fromkeys(str(row["way"]) for row in rows))
    for name, title in MEASURES.items():
        for way in ways:
            cells = []
            for quarter in range(1, QUARTERS + 1):
                found = values(name, way, quarter)
                low, high = bootstrap_interval(found)
                cells.append(f"{np.mean(found):.2f} [{low:.2f}, {high:.2f}]")
            lines.append(f"| {title}: {way} | {' | '.join(cells)} |")
        cells = []
        for quarter in range(1, QUARTERS + 1):
            ours, theirs = (values(name, way, quarter) for way in ways[:2])
            low, high = paired_interval(ours, theirs)
            cells.append(f"{np.mean(ours) - np.mean(theirs):+.2f} [{low:+.2f}, {high:+.2f}]")
        lines.append(f"| the first minus the second, picture by picture | {' | '.join(cells)} |")
    count = len({row["scene"] for row in rows})
    return "\n".join([*lines, "", f"Of {count_of(count, 'picture')}. The intervals are too narrow: {NARROW}."])


def main(argv: list[str] | None = None) -> None:
    """The command; raises ConfigError for settings out of their range."""
    cfg = config.from_command_line(LongEvaluation, argv, prog="python -m eval long")
    if cfg.scenes < 2:
        raise ConfigError(f"--scenes {cfg.scenes}: expected 2 or more, for the intervals")
    if cfg.num_frames < 2 * QUARTERS + 1:
        raise ConfigError(f"--num-frames {cfg.num_frames}: expected {2 * QUARTERS + 1} or more, two for each quarter")
    rows = run(cfg)
    config.write_text(cfg.out / "results.json", json.dumps(rows, indent=1) + "\n")
    print(table(rows))

"""Does the miniature obey? One picture under every caption, the motion measured: `python -m eval miniature`.

For each unseen scene the same first frame is animated under each motion of the world. `measure_motion` never reads the
caption; its thresholds were fixed on true clips. Rows: the full model, the model without its I2V-Adapter, without its
Content-Adapter, and the bounds that no model passes: frame 0 repeated, and the true clip through the VAE.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from eval.intervals import bootstrap_interval, wilson_interval
from eval.metrics.motion_class import measure_motion
from eval.metrics.similarity import first_frame_similarity
from eval.sheets import write_sheet
from i2v import config
from i2v.config import flag
from i2v.data.world import WORLDS, Clip, counterfactuals
from i2v.load import load
from i2v.pipeline import I2VPipeline

Video = NDArray[np.uint8]
# name -> scale of the I2V-Adapter, scale of the Content-Adapter
VARIANTS = {"full": (1.0, 1.0), "without-i2v": (0.0, 1.0), "without-content": (1.0, 0.0)}
SEEN = 0.35  # share of the first frame's object that has to be explained in the last frames to call it recognisable


@dataclass(frozen=True)
class MiniatureEvaluation:
    """Measure a miniature on unseen scenes, each under every motion of its world."""

    weights: Path | None = flag(None, "folder of the model's parts; not given: the shipped one")
    out: Path = flag(Path("outputs/miniature"), "folder for results.json, table.md and sheet.png")
    world: str = flag("level_1", "level of the procedural world")
    split: str = flag("val", "val: unseen scenes; held_out: pairs of object and motion that were never trained")
    scenes: int = flag(20, "pictures; each is animated once per motion")
    rows: tuple[str, ...] = flag(("full", "without-i2v", "without-content"), "variants that are sampled")
    steps: int = flag(25, "sampling steps")
    guidance_scale: float | None = flag(None, "guidance; not given: the preset's")
    t0: float | None = flag(None, "where sampling starts; not given: the preset's")
    p: float | None = flag(None, "mask probability of the prior; not given: the preset's")
    dtype: str = flag("float32", "number format of the networks")


@dataclass
class Row:
    """Measurements of one variant: per clip the asked and the measured motion, and numbers."""

    asked: list[str]
    measured: list[str]
    values: dict[str, list[float]]

    def summary(self) -> dict[str, Any]:
        """Accuracy with Wilson's interval, means with the bootstrap's."""
        right = sum(a == m for a, m in zip(self.asked, self.measured))
        out: dict[str, Any] = {
            "clips": len(self.asked),
            "motion_accuracy": right / len(self.asked),
            "motion_accuracy_95": wilson_interval(right, len(self.asked)),
        }
        for name, values in self.values.items():
            out[name] = float(np.mean(values))
            out[f"{name}_95"] = bootstrap_interval(values)
        return out


def measure(videos: list[tuple[Clip, Video]]) -> Row:
    """Each made video against the true clip that it was asked to be."""
    row = Row([], [], {"similarity": [], "displacement": [], "object_found": [], "recognisable": [], "truth_psnr": []})
    for clip, frames in videos:
        motion = measure_motion(frames, clip.mask)
        row.asked.append(clip.motion)
        row.measured.append(motion.motion)
        row.values["similarity"].append(first_frame_similarity(frames).psnr)
        row.values["displacement"].append(float(np.hypot(motion.dx, motion.dy)))
        row.values["object_found"].append(motion.found)
        row.values["recognisable"].append(float(motion.found >= SEEN))
        error = np.square(frames[-1].astype(np.float64) - clip.frames[-1]).mean()
        row.values["truth_psnr"].append(float(10 * np.log10(255**2 / max(error, 1e-3))))
    return row


def confusion(row: Row, motions: tuple[str, ...]) -> list[list[int]]:
    """Rows asked, columns measured."""
    pairs = list(zip(row.asked, row.measured))
    return [[pairs.count((asked, measured)) for measured in motions] for asked in motions]


@torch.no_grad()
def through_vae(pipe: I2VPipeline, frames: Video) -> Video:
    """The true clip encoded and decoded: what a perfect network would give."""
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float().to(pipe.device) / 127.5 - 1
    out = pipe.vae.decode(pipe.vae.encode(x).mode()).clamp(-1, 1)
    return ((out + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).cpu().numpy()


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, one line per variant."""
    lines = [
        "| | clips | motion right | similarity (dB) | displacement | recognisable | last frame against truth (dB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        cells = []
        for key in ("motion_accuracy", "similarity", "displacement", "recognisable", "truth_psnr"):
            low, high = row[f"{key}_95"]
            cells.append(f"{row[key]:.2f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {name} | {row['clips']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    cfg = config.from_command_line(MiniatureEvaluation, argv, "python -m eval miniature")
    unknown = set(cfg.rows) - VARIANTS.keys()
    if unknown or not cfg.rows:
        raise SystemExit(f"--rows {' '.join(unknown)}: expected one or more of {', '.join(VARIANTS)}")
    pipe = load("tiny", dtype=cfg.dtype, folder=cfg.weights)
    world = WORLDS[cfg.world]
    clips = [counterfactuals(world, cfg.split, i) for i in range(cfg.scenes)]

    def sampled(name: str) -> list[tuple[Clip, Video]]:
        i2v_scale, ip_scale = VARIANTS[name]
        made = []
        pairs = [(i, clip) for i, clips_of in enumerate(clips) for clip in clips_of.values()]
        for index, clip in tqdm(pairs, desc=name, mininterval=5):
            result = pipe(
                clip.frames[0], clip.caption, seed=index, steps=cfg.steps, guidance_scale=cfg.guidance_scale,
                num_frames=len(clip.frames), t0=cfg.t0, p=cfg.p, i2v_scale=i2v_scale, ip_scale=ip_scale,
            )  # fmt: skip
            made.append((clip, result.frames))
        return made

    def every(change: Callable[[Clip], Video]) -> list[tuple[Clip, Video]]:
        return [(clip, change(clip)) for clips_of in clips for clip in clips_of.values()]

    began = time.monotonic()
    videos = {
        **{name: sampled(name) for name in cfg.rows},
        "floor: frame 0 repeated": every(lambda clip: np.repeat(clip.frames[:1], len(clip.frames), 0)),
        "ceiling: truth through the VAE": every(lambda clip: through_vae(pipe, clip.frames)),
    }
    rows = {name: measure(made) for name, made in videos.items()}
    results = {name: row.summary() for name, row in rows.items()}
    matrix = confusion(rows[cfg.rows[0]], world.motions)
    cfg.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "settings": config.to_dict(cfg), "weights": pipe.weights, "seconds": round(time.monotonic() - began, 1),
        "results": results, "motions": world.motions, "confusion": matrix,
        "clips": {name: vars(row) for name, row in rows.items()},
    }  # fmt: skip
    config.write_text(cfg.out / "results.json", json.dumps(facts, indent=1) + "\n")
    config.write_text(cfg.out / "table.md", table(results))
    first = videos[cfg.rows[0]][:20]  # in order, unchosen
    write_sheet(cfg.out / "sheet.png", [frames for _, frames in first], [clip.caption for clip, _ in first])
    print(table(results))
    print("asked (rows) against measured (columns):", *world.motions, sep="\n  ")
    for name, counts in zip(world.motions, matrix):
        print(f"{name:14}", *(f"{count:4}" for count in counts))

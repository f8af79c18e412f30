"""`python -m eval known-flow`: FlowScore and WarpingError of clips whose motion is known, beside the truth.

The clips are a texture of waves, evaluated where each pixel came from, so that no resampling blurs them. Whoever has
RAFT's weights sees here whether they were read rightly.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tqdm import tqdm

from eval.flow_networks import Dis, FlowNetwork, Raft
from eval.metrics.flow_score import flow_score
from eval.metrics.warping_error import half, pair_error, warping_error
from eval.raft.load import load_raft

Array = NDArray[np.float64]
WAVES = 100


@dataclass(frozen=True)
class Motion:
    """What happens from one frame to the next: shift in pixels, turn in degrees about the centre, growth, light."""

    title: str
    dx: float = 0.0
    dy: float = 0.0
    turn: float = 0.0
    zoom: float = 1.0
    noise: float = 0.0  # deviation in levels of 0..255, new in every frame
    light: float = 1.0

    def step(self, points: Array, middle: float) -> Array:
        """Where points (..., 2) of a frame are in the next one."""
        return (points - middle) @ self._matrix().T + middle + np.array([self.dx, self.dy])

    def back(self, points: Array, middle: float) -> Array:
        """Where points of a frame were in the one before."""
        return (points - middle - np.array([self.dx, self.dy])) @ np.linalg.inv(self._matrix()).T + middle

    def _matrix(self) -> Array:
        angle = np.deg2rad(self.turn)
        return self.zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


MOTIONS = (
    *(Motion(f"{d:g} px", 0.8 * d, 0.6 * d) for d in (0.25, 0.5, 1, 2, 4, 8, 16)),
    Motion("rotation, 0.5 degrees", turn=0.5),
    Motion("zoom, 1.01", zoom=1.01),
    Motion("zoom, 1.03", zoom=1.03),
    Motion("1 px, noise of deviation 2", 0.8, 0.6, noise=2),
    Motion("still"),
    Motion("still, noise of deviation 2", noise=2),
    Motion("still, noise of deviation 5", noise=5),
    Motion("still, 5 % brighter", light=1.05),
)


def grid(size: int) -> Array:
    """(size, size, 2): each pixel's (x, y)."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float64)
    return np.stack([x, y], axis=-1)


def clip(motion: Motion, size: int = 256, frames: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 (frames, size, size, 3): waves of 4 to 128 pixels, amplitude as their length, moved as told."""
    rng = np.random.default_rng(seed)
    length = np.exp(rng.uniform(np.log(4), np.log(128), WAVES))
    angle, phase = rng.uniform(0, 2 * np.pi, (2, WAVES))
    wave = 2 * np.pi / length * np.stack([np.cos(angle), np.sin(angle)])  # (2, WAVES)
    colour = length[:, None] * rng.uniform(0.3, 1, (WAVES, 3))
    colour *= 45 / np.sqrt(0.5 * np.square(colour).sum(axis=0))
    points, out = grid(size), []
    for number in range(frames):
        values = (128 + np.sin(points @ wave + phase) @ colour) * motion.light**number
        values += motion.noise * rng.standard_normal(values.shape)
        out.append(np.clip(np.rint(values), 0, 255).astype(np.uint8))
        points = motion.back(points, (size - 1) / 2)
    return np.stack(out)


def true_flow(motion: Motion, size: int = 256, backwards: bool = False) -> NDArray[np.float32]:
    """(size, size, 2): each pixel's shift to the next frame, or to the one before."""
    points, move = grid(size), motion.back if backwards else motion.step
    return (move(points, (size - 1) / 2) - points).astype(np.float32)


@dataclass(frozen=True)
class Row:
    """FlowScore in pixels, end-point error in pixels, WarpingError raw: with the true flow, measured, without flow."""

    title: str
    truth: float
    measured: float
    error: float
    warping_truth: float
    warping: float
    warping_still: float


def measure(motion: Motion, network: FlowNetwork, size: int = 256) -> Row:
    """One clip of three frames through both metrics; `size` is a multiple of 16."""
    frames, truth = clip(motion, size), true_flow(motion, size)
    first, second = torch.from_numpy(frames[:2]).permute(0, 3, 1, 2).float()
    seen = network(first, second).permute(1, 2, 0).numpy()
    one, two = half(torch.stack([first, second]) / 255)
    # A pixel of half size covers two by two: its shift is half their mean.
    forth, back = (torch.from_numpy(true_flow(motion, size, way)).permute(2, 0, 1)[None] for way in (False, True))
    forth, back = (F.avg_pool2d(flow, 2)[0] / 2 for flow in (forth, back))
    still = torch.zeros_like(forth)
    return Row(
        motion.title,
        float(np.linalg.norm(truth, axis=-1).mean()),
        flow_score(frames, network).value,
        float(np.linalg.norm(seen - truth, axis=-1).mean()),
        pair_error(one, two, forth, back)[0],
        warping_error(frames, network).value,
        pair_error(one, two, still, still)[0],
    )


def table(rows: Sequence[Row], name: str) -> str:
    """The rows as a markdown table; WarpingError times 10,000."""
    lines = [
        f"| per frame | true FlowScore | {name} | end-point error | WarpingError with true flow | {name} | zero flow |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = " | ".join(f"{1e4 * x:.1f}" for x in (row.warping_truth, row.warping, row.warping_still))
        lines.append(f"| {row.title} | {row.truth:.3f} | {row.measured:.3f} | {row.error:.3f} | {errors} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command; raises ValueError and OSError for a file that is no RAFT."""
    parser = argparse.ArgumentParser(prog="python -m eval known-flow", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--raft", metavar="FILE", help="RAFT's weights; without them DIS is measured")
    parser.add_argument("--size", type=int, default=256, help="pixels a side: 256 or a larger multiple of 16")
    args = parser.parse_args(argv)
    if args.size < 256 or args.size % 16:
        raise ValueError(f"--size {args.size}: expected a multiple of 16 from 256 on")
    network: FlowNetwork = Dis() if args.raft is None else Raft(load_raft(args.raft))
    rows = [measure(motion, network, args.size) for motion in tqdm(MOTIONS, desc="clips", leave=False, disable=None)]
    print(table(rows, network.name))

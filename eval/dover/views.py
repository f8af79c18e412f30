"""What DOVER sees of a clip: a mosaic of fragments in full resolution, and whole frames at 224 pixels."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

GRID, CELL = 7, 32  # fragments a side, pixels of each
SIDE = GRID * CELL
CLIPS, FRAMES, STEP = 3, 32, 2  # of the technical view
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

Indices = NDArray[np.int64]


def technical_frames(count: int, rng: np.random.Generator) -> Indices:
    """(CLIPS, FRAMES): every second frame of three clips, one in each third, going round at the end.

    Clips are placed at random where a third has more than 64 frames.
    """
    third, room = count // CLIPS, count // CLIPS - FRAMES * STEP
    start = rng.integers(0, room, CLIPS) if room > 0 else np.zeros(CLIPS, np.int64)
    return ((third * np.arange(CLIPS) + start)[:, None] + STEP * np.arange(FRAMES)) % count


def aesthetic_frames(count: int, rng: np.random.Generator) -> Indices:
    """(FRAMES,): one frame of each of 32 equal parts; of fewer than 32 frames, 32 times the first."""
    part = count // FRAMES
    room = part - STEP
    return part * np.arange(FRAMES) + (rng.integers(0, room, FRAMES) if room > 0 else 0)


def fragments(
    video: Tensor, rng: np.random.Generator, grid: tuple[int, int] = (GRID, GRID), cell: int = CELL, times: int = FRAMES
) -> Tensor:
    """uint8 (C, T, H, W) -> uint8 (C, T, grid * cell): one piece of `cell` pixels out of each part of the frame.

    Pieces lie at random in their part, at the same place for `times` frames. Rows are drawn before columns, an axis
    without room is not drawn. A frame smaller than the mosaic is enlarged first, while the parts keep its old size, so
    that only its upper left is seen: the reference does so. Raises ValueError where a part is smaller than a piece even
    then.
    """
    height, width = video.shape[-2:]
    if min(height, width) < cell:
        raise ValueError(f"frames of {width} x {height} pixels; DOVER needs at least {cell} on each side")
    ratio = min(height / (grid[0] * cell), width / (grid[1] * cell))
    if ratio < 1:
        enlarged = F.interpolate(video.transpose(0, 1) / 255.0, scale_factor=1 / ratio, mode="bilinear")
        video = (enlarged * 255).to(torch.uint8).transpose(0, 1)
    chunks = video.shape[1] // times
    offsets = []
    for size, count in zip((height, width), grid):
        room = size // count - cell
        shape = (*grid, chunks)
        offsets.append(rng.integers(0, room, shape) if room > 0 else np.zeros(shape, np.int64))
    out = torch.empty(*video.shape[:2], grid[0] * cell, grid[1] * cell, dtype=video.dtype)
    for i, j, t in np.ndindex(*grid, chunks):
        top = min(height // grid[0] * i, height - cell) + int(offsets[0][i, j, t])
        left = min(width // grid[1] * j, width - cell) + int(offsets[1][i, j, t])
        when = slice(t * times, (t + 1) * times)
        out[:, when, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell] = video[
            :, when, top : top + cell, left : left + cell
        ]
    return out


def resized(video: Tensor, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
    """uint8 (C, T, H, W) -> uint8 at another size, its shape not kept: bilinear with antialiasing, rounded."""
    small = F.interpolate(video.transpose(0, 1).float(), size, mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).transpose(0, 1)


def normalised(video: Tensor) -> Tensor:
    """uint8 (C, T, H, W) -> float32 by the statistics of ImageNet."""
    mean, deviation = (torch.tensor(values).reshape(3, 1, 1, 1) for values in (MEAN, DEVIATION))
    return (video.float() - mean) / deviation

"""Canny edges of the procedural world's clips: what a ControlNet of the miniature is trained on."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from i2v.control import CANNY_THRESHOLDS, canny
from i2v.data.latents import WorldLatents, drawn
from i2v.data.styles import styled_clip


def edges_of(data: WorldLatents, folder: Path) -> np.ndarray:
    """(clips, F, H, W / 8) uint8, memory-mapped: edges of every frame of the clips, one bit per pixel.

    They are drawn as `--control canny=...` draws a user's. Kept in `folder` for the next run; complete or absent.
    """
    about = (repr(data.world), data.split, data.style, str(data.size), str(data.num_frames), str(CANNY_THRESHOLDS))
    digest = hashlib.sha256("/".join(about).encode()).hexdigest()[:12]
    file = folder / f"edges-{digest}-{len(data)}.npy"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.{os.getpid()}.npy")
        shape = (len(data), data.num_frames, data.size, data.size // 8)
        out = np.lib.format.open_memmap(aside, mode="w+", dtype=np.uint8, shape=shape)
        draw = partial(styled_clip, data.world, data.split, data.num_frames, data.size, data.style)
        for row, clip in zip(out, tqdm(drawn(draw, len(data)), "edges of the clips", len(data), mininterval=2)):
            row[:] = np.packbits(np.stack([canny(frame)[..., 0] for frame in clip.frames]) > 0, axis=-1)
        out.flush()
        os.replace(aside, file)
    return np.load(file, mmap_mode="r")


def as_maps(bits: np.ndarray) -> np.ndarray:
    """(..., H, W / 8) packed -> (..., 3, H, W) float32, 0 or 1: control pictures as a ControlNet reads them."""
    grey = np.unpackbits(np.ascontiguousarray(bits), axis=-1).astype(np.float32)
    return np.repeat(grey[..., None, :, :], 3, axis=-3)

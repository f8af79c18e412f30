"""Random tensors that depend on what they are for, not on when they are drawn.

Every frame's numbers are a function of (seed, purpose, absolute frame, step) and of nothing else: not of the batch
size, of how a long video is cut into windows, of the number of threads, of the device or of earlier draws. So a
video can be made again from its settings, and two windows that share a frame share its noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def normal(seed: int, purpose: str, frames: Sequence[int], step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, one independent draw per frame.

    Args:
        seed: the run's seed, any integer.
        purpose: what the numbers are for, e.g. "start" or "sampler"; different purposes are independent.
        frames: absolute frame numbers, repeated ones give equal rows.
        step: position in the loop that draws, 0 where there is none.
        shape: of one frame, e.g. (C, h, w).

    Returns:
        float32 on the CPU, (len(frames), *shape).
    """
    out = np.empty((len(frames), *shape), dtype=np.float32)
    for row, frame in enumerate(frames):
        _generator(seed, purpose, frame, step).standard_normal(dtype=np.float32, out=out[row, ...])
    return torch.from_numpy(out)


def uniform(
    seed: int, purpose: str, frames: Sequence[int], step: int, shape: tuple[int, ...], among: int = 1
) -> Tensor:
    """Numbers uniform in [0, 1), one independent draw per frame; arguments and result as `normal`.

    among: how many things they choose from. Above 2^20 they are float64: the 2^24 values of float32 would choose some
    of these more often than others.
    """
    kind = np.float32 if among <= 2**20 else np.float64
    out = np.empty((len(frames), *shape), dtype=kind)
    for row, frame in enumerate(frames):
        _generator(seed, purpose, frame, step).random(dtype=kind, out=out[row, ...])
    return torch.from_numpy(out)


def _generator(seed: int, purpose: str, frame: int, step: int) -> np.random.Generator:
    """Philox keyed by a 128-bit hash: torch's CPU generator keeps 32 bits of a seed, too few to keep keys apart."""
    # The free text comes last, so that no two different keys are written alike.
    name = f"{int(seed)}/{int(frame)}/{int(step)}/{purpose}"
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))

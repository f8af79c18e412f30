"""DoverVQA: how free of technical faults (blur, noise, flicker, blocks) a video looks, as a trained network rates it.

Unit: none, a rating. Range: 0 to 1; generated clips lie at 0.02 to 0.1. Direction: higher is better. The tables of
the paper have 0.026 to 0.094.

Definition: DOVER's technical branch gives a raw value, the mean over its map and over three clips; the rating is
sigmoid((raw - 0.1107) / 0.07355), the constants of DOVER's own script since August 2023. Which constants the paper
used is not stated; these are the published ones that give values in its range, EvalCrafter's give 0.33 to 0.92. The
aesthetic rating, sigmoid((raw + 0.08285) / 0.03774), and the overall one, sigmoid of 0.6104 and 0.3896 of the two,
are options. Raw values are in the result, so that others can be made from them.

Preprocessing: three clips of 32 frames, every second frame, going round at the end; each is a mosaic of 7 x 7
fragments of 32 x 32 pixels in full resolution, at random places drawn from `seed`, so compare with one seed. Frames
below 224 pixels are enlarged, of which the reference sees the upper left alone. The aesthetic branch sees 32 whole
frames at 224 x 224; of a clip below 32 frames only the first one, 32 times.

Network: DOVER.pth (the technical branch, 28.1 M parameters; both, 56.2 M).

Source: DOVER (arXiv 2211.04894), `evaluate_a_set_of_videos.py`; the paper names the metric and gives no formula (Sec.
4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from eval.dover.network import DOVER
from eval.dover.views import CELL, aesthetic_frames, fragments, normalised, resized, technical_frames
from eval.missing import MissingNetwork


@dataclass(frozen=True)
class DoverVQA:
    """Ratings in 0..1 and the raw values that they are made from; None where the aesthetic branch is not loaded."""

    technical: float
    technical_raw: float
    seed: int
    aesthetic: float | None = None
    aesthetic_raw: float | None = None
    overall: float | None = None


def dover_vqa(frames: NDArray[np.uint8], model: DOVER | None, seed: int = 0) -> DoverVQA:
    """DoverVQA of a clip, uint8 (F, H, W, 3) RGB; `technical` is the number of the paper's tables.

    Raises MissingNetwork without a network and ValueError for other arrays and frames below 32 pixels.
    """
    if model is None:
        raise MissingNetwork("DoverVQA needs DOVER's weights (DOVER.pth of its release): none were given; "
                             "nothing without weights measures the same")  # fmt: skip
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or min(frames.shape[:3]) < 1:
        raise ValueError(f"DoverVQA: frames are {frames.dtype} {frames.shape}; expected uint8 (F, H, W, 3), F >= 1")
    if min(frames.shape[1:3]) < CELL:
        raise ValueError(f"DoverVQA: frames of {frames.shape[2]} x {frames.shape[1]} pixels, expected at least {CELL} "
                         "on each side and meant for 224; give larger frames")  # fmt: skip
    rng = np.random.default_rng(seed)
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)
    clips = technical_frames(len(frames), rng)
    mosaics = fragments(video[:, torch.from_numpy(clips.reshape(-1))], rng)
    chunks = tqdm(mosaics.split(clips.shape[1], dim=1), desc="DoverVQA", leave=False, disable=None)
    technical = float(np.mean([_rated(model, clip) for clip in chunks]))
    if model.aesthetic_backbone is None:
        return ratings(technical, seed)
    whole = resized(video[:, torch.from_numpy(aesthetic_frames(len(frames), rng))])
    return ratings(technical, seed, _rated(model, whole, aesthetic=True))


@torch.inference_mode()
def _rated(model: DOVER, clip: Tensor, aesthetic: bool = False) -> float:
    """The raw value of one clip, uint8 (3, 32, 224, 224)."""
    x = normalised(clip)[None].to(next(model.parameters()).device)
    return float(model.aesthetic(x) if aesthetic else model.technical(x))


def ratings(technical_raw: float, seed: int, aesthetic_raw: float | None = None) -> DoverVQA:
    """Raw values -> the result with its ratings."""
    t = (technical_raw - 0.1107) / 0.07355
    if aesthetic_raw is None:
        return DoverVQA(_sigmoid(t), technical_raw, seed)
    a = (aesthetic_raw + 0.08285) / 0.03774
    return DoverVQA(_sigmoid(t), technical_raw, seed, _sigmoid(a), aesthetic_raw, _sigmoid(0.6104 * t + 0.3896 * a))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))

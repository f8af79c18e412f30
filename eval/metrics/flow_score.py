"""FlowScore: how much a clip moves.

Unit: pixels per frame, of the clip as it is. Range: 0 upwards. Direction: higher is more motion, not better. Table 1 of
the paper has 0.13 to 0.71.

Definition: for every two consecutive frames, the mean over pixels of the length of the optical flow; then the mean over
pairs. It is divided neither by the frames' size nor by their rate: compare clips of one size and rate.

Preprocessing: none; frames at full resolution, 0..255, their border repeated up to multiples of 8. The flow of the
border is left out before averaging; `padded` keeps it, as EvalCrafter does (the same where sides are multiples of 8).
Deviation: it is left out by default.

Network: RAFT's large network ("things"), 20 iterations, as EvalCrafter. With another one the result carries its name
and does not stand beside the paper's.

Source: EvalCrafter (arXiv 2310.11440); the paper names the metric and gives no formula (Sec. 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from eval.flow_networks import FlowNetwork, given, pictures
from eval.raft.padding import pad, unpad


@dataclass(frozen=True)
class FlowScore:
    """value: pixels per frame, the mean of per_pair (F - 1,). network: what measured it."""

    value: float
    per_pair: NDArray[np.float64]
    network: str
    beside_paper: bool


def flow_score(frames: NDArray[np.uint8], network: FlowNetwork | None, padded: bool = False) -> FlowScore:
    """FlowScore of a clip, uint8 (F, H, W, 3) RGB, F >= 2.

    Raises MissingNetwork without a network, ValueError for other arrays and frames that are too small for it (RAFT:
    128 pixels).
    """
    network = given(network, "FlowScore")
    clip = pictures(frames, f"FlowScore with {network.name}", network.smallest)
    height, width = frames.shape[1:3]
    lengths = []
    for n in tqdm(range(len(frames) - 1), desc="FlowScore", leave=False, disable=None):
        shift = network(pad(clip(n)[None])[0], pad(clip(n + 1)[None])[0])
        shift = shift if padded else unpad(shift, height, width)
        lengths.append(float(shift.double().norm(dim=0).mean()))
    return FlowScore(float(np.mean(lengths)), np.array(lengths), network.name, network.beside_paper)

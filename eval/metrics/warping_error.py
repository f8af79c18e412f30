"""WarpingError: how much a frame differs from the next one once motion is undone.

Unit: squared difference of RGB in 0..1, summed over the three channels, per pixel that is compared. Range: 0 upwards.
Direction: lower is better, but it grows with motion and a still clip has 0: read it beside FlowScore.

The paper's 9.5 to 24.6 carry a factor that it does not state. Other published values and simulated clips fit 10,000
best; that is a guess, so results hold the raw value and `times_10_000` beside it.

Definition, for every two consecutive frames: frame t + 1 is sampled where the flow from t to t + 1 points (bilinear,
clamped at the border) and compared with frame t. Left out are pixels whose flow there and back does not cancel,
|fw + bw|^2 > 0.01 (|fw|^2 + |bw|^2) + 0.5 with bw taken where fw points, and edges of the flow,
|grad fw|^2 > 0.01 |fw|^2 + 0.002. The error of a pair is the sum of squares over its kept pixels, divided by their
number; of a pair with nothing kept it is 0, which is why `empty` names those pairs. The score is the mean over pairs.

Preprocessing: half size (bilinear), the border repeated up to multiples of 8 and counted.

Variants: "fixed" gives RAFT pictures in 0..255, as it was trained; "evalcrafter" in 0..1 as in the published code, so
that RAFT sees almost constant pictures and its flows are degraded. Deviation: "fixed" is the default.

Network: RAFT's large network ("things"), 20 iterations.

Source: EvalCrafter (arXiv 2310.11440), after Lai et al. 2018 (arXiv 1808.00449); the paper gives no formula (Sec. 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from eval.flow_networks import FlowNetwork, given, pictures
from eval.raft.correlation import places, sample
from eval.raft.padding import pad

Variant = Literal["fixed", "evalcrafter"]


@dataclass(frozen=True)
class WarpingError:
    """value: the mean of per_pair (F - 1,), raw. kept: the share of pixels compared in each pair, 0 to 1."""

    value: float
    per_pair: NDArray[np.float64]
    kept: NDArray[np.float64]
    variant: Variant
    network: str
    beside_paper: bool

    @property
    def times_10_000(self) -> float:
        """The scale that the paper's numbers seem to have; a guess."""
        return self.value * 10_000

    @property
    def empty(self) -> list[int]:
        """Pairs of which no pixel was compared and whose 0 says nothing; pair n is frames n and n + 1."""
        return [int(n) for n in np.flatnonzero(self.kept == 0)]


def warping_error(frames: NDArray[np.uint8], network: FlowNetwork | None, variant: Variant = "fixed") -> WarpingError:
    """WarpingError of a clip, uint8 (F, H, W, 3) RGB, F >= 2.

    Raises MissingNetwork without a network, ValueError for other arrays, an unknown variant, frames that are too small
    for the network (RAFT: 256 pixels), and the variant "evalcrafter" with a network that is no RAFT.
    """
    network = given(network, "WarpingError")
    if variant not in get_args(Variant):
        raise ValueError(f"WarpingError: variant {variant!r}; expected one of {', '.join(get_args(Variant))}")
    if variant == "evalcrafter" and not network.name.startswith("RAFT"):
        raise ValueError(f"WarpingError: 'evalcrafter' is what RAFT makes of pictures in 0..1; with {network.name} "
                         "take the variant 'fixed'")  # fmt: skip
    clip = pictures(frames, f"WarpingError with {network.name}", 2 * network.smallest)
    levels = 1 if variant == "fixed" else 255  # the published code gives pictures in 0..1
    errors, kept = [], []
    for n in tqdm(range(len(frames) - 1), desc="WarpingError", leave=False, disable=None):
        first, second = (half(clip(k)[None])[0] for k in (n, n + 1))
        forth, back = network(first / levels, second / levels), network(second / levels, first / levels)
        error, share = pair_error(first / 255, second / 255, forth, back)
        errors.append(error)
        kept.append(share)
    return WarpingError(float(np.mean(errors)), np.array(errors), np.array(kept), variant, network.name,
                        network.beside_paper)  # fmt: skip


def pair_error(first: Tensor, second: Tensor, forth: Tensor, back: Tensor) -> tuple[float, float]:
    """Pictures (3, H, W) in 0..1, flows (2, H, W) there and back -> error of the pair, share of pixels kept."""
    keep = ~excluded(forth[None], back[None])
    difference = (warp(second[None], forth[None]) - first[None]).double().square().sum(dim=1)
    return float((difference * keep).sum() / keep.sum().clamp(min=1)), float(keep.double().mean())


def half(clip: Tensor) -> Tensor:
    """(F, 3, H, W) -> half size, its border repeated up to multiples of 8."""
    return pad(F.interpolate(clip, scale_factor=0.5, mode="bilinear", align_corners=False))


def warp(picture: Tensor, shift: Tensor) -> Tensor:
    """(N, C, H, W) sampled at every pixel + shift (N, 2, H, W); outside, the border's value."""
    return sample(picture, (places(shift) + shift).permute(0, 2, 3, 1), padding="border")


def excluded(forth: Tensor, back: Tensor) -> Tensor:
    """Flows (N, 2, H, W) there and back -> (N, H, W), true where a pixel is hidden or at an edge of the flow."""
    back = warp(back, forth)
    length = square(forth)
    hidden = square(forth + back) > 0.01 * (length + square(back)) + 0.5
    right = F.pad(forth.diff(dim=3), (0, 1))
    down = F.pad(forth.diff(dim=2), (0, 0, 0, 1))
    return hidden | (square(right) + square(down) > 0.01 * length + 0.002)


def square(vectors: Tensor) -> Tensor:
    """(N, 2, H, W) -> squared lengths (N, H, W)."""
    return vectors.square().sum(dim=1)

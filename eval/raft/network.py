"""RAFT (Teed and Deng 2020, arXiv 2003.12039), large and small: optical flow between two pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.raft.correlation import LEVELS, look_up, places, pyramid
from eval.raft.encoder import Encoder
from eval.raft.update import Update

STRIDE = 8  # features are at an eighth of the picture's size
SMALLEST = 128  # pixels: below, the coarsest level of correlations has one cell and no scale


@dataclass(frozen=True)
class RAFTConfig:
    """Sizes of a RAFT network; the two published ones are LARGE ("things", "sintel", "kitti") and SMALL."""

    small: bool
    widths: tuple[int, int, int]
    features: int
    hidden: int
    context: int
    radius: int

    @property
    def name(self) -> str:
        return "RAFT small" if self.small else "RAFT"


LARGE = RAFTConfig(False, (64, 96, 128), 256, 128, 128, radius=4)
SMALL = RAFTConfig(True, (32, 64, 96), 128, 96, 64, radius=3)


class Step(NamedTuple):
    """One iteration: h and w are an eighth of the picture's height and width."""

    correlations: Tensor  # (N, LEVELS * (2 radius + 1)^2, h, w)
    hidden: Tensor  # (N, hidden, h, w)
    correction: Tensor  # (N, 2, h, w)
    flow: Tensor  # (N, 2, h, w), after the correction, in pixels of this size
    mask: Tensor | None  # (N, 576, h, w), how the large network upsamples its flow


class RAFT(nn.Module):
    """The network, with the parameter names of the original files."""

    def __init__(self, cfg: RAFTConfig = LARGE):
        super().__init__()
        self.cfg = cfg
        self.fnet = Encoder(cfg.widths, cfg.features, "instance", cfg.small)
        self.cnet = Encoder(cfg.widths, cfg.hidden + cfg.context, "none" if cfg.small else "batch", cfg.small)
        correlations = LEVELS * (2 * cfg.radius + 1) ** 2
        self.update_block = Update(cfg.hidden, cfg.context, correlations, cfg.small)

    def steps(self, first: Tensor, second: Tensor, iterations: int, start: Tensor | None = None) -> Iterator[Step]:
        """The iterations, one after the other; arguments as `forward`."""
        check_pictures(first, second)
        first, second = (2 * (picture / 255) - 1 for picture in (first, second))
        levels = pyramid(*self.fnet(torch.cat([first, second])).chunk(2))
        hidden, context = self.cnet(first).split([self.cfg.hidden, self.cfg.context], dim=1)
        hidden, context = torch.tanh(hidden), F.relu(context)
        here = places(hidden)
        flow = torch.zeros_like(here) if start is None else start
        for _ in range(iterations):
            correlations = look_up(levels, here + flow, self.cfg.radius)
            hidden, correction, mask = self.update_block(hidden, context, correlations, flow)
            flow = flow + correction
            yield Step(correlations, hidden, correction, flow, mask)

    def forward(self, first: Tensor, second: Tensor, iterations: int = 20, start: Tensor | None = None) -> Tensor:
        """Where each pixel of `first` is in `second`, as a shift (x, y) in pixels: (N, 2, H, W).

        first, second: (N, 3, H, W) float RGB in 0..255, H and W multiples of 8, at least SMALLEST. start: a first
        guess (N, 2, H/8, W/8). Raises ValueError for other sizes and fewer than one iteration.
        """
        if iterations < 1:
            raise ValueError(f"{iterations} iterations; expected at least 1")
        for step in self.steps(first, second, iterations, start):
            last = step
        return upsample(last.flow, last.mask)


def check_pictures(first: Tensor, second: Tensor) -> None:
    """Raises ValueError unless RAFT can read the pair."""
    n, *size = first.shape
    if first.shape != second.shape or first.ndim != 4 or size[0] != 3 or size[1] % STRIDE or size[2] % STRIDE:
        got = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"pictures {got}; expected two of (N, 3, H, W), H and W multiples of {STRIDE}")
    if min(size[1:]) < SMALLEST:
        raise ValueError(
            f"pictures of {size[2]} x {size[1]} pixels; RAFT needs at least {SMALLEST} on each side: "
            "give larger frames, or measure with DIS"
        )


def upsample(flow: Tensor, mask: Tensor | None) -> Tensor:
    """(N, 2, h, w) -> (N, 2, 8h, 8w) in pixels of that size: convex combinations of nine; bilinear without a mask."""
    if mask is None:
        return STRIDE * F.interpolate(flow, scale_factor=STRIDE, mode="bilinear", align_corners=True)
    n, _, h, w = flow.shape
    weights = mask.view(n, 1, 9, STRIDE, STRIDE, h, w).softmax(dim=2)
    around = F.unfold(STRIDE * flow, 3, padding=1).view(n, 2, 9, 1, 1, h, w)
    fine = (weights * around).sum(dim=2)  # (n, 2, 8, 8, h, w)
    return fine.permute(0, 1, 4, 2, 5, 3).reshape(n, 2, STRIDE * h, STRIDE * w)

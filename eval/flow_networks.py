"""What measures motion: RAFT with its weights, or OpenCV's DIS, which needs none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.metrics.flow import flow
from eval.missing import MissingNetwork
from eval.raft.network import LARGE, RAFT, SMALLEST


class FlowNetwork(Protocol):
    """Optical flow between two pictures.

    `name` stands in every result. `beside_paper`: whether results may stand beside the paper's, which were made with
    RAFT's large network. `smallest`: the least width and height in pixels.
    """

    @property
    def name(self) -> str: ...
    @property
    def beside_paper(self) -> bool: ...
    @property
    def smallest(self) -> int: ...

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Float RGB (3, H, W) in 0..255, H and W multiples of 8 -> shifts (2, H, W), (x, y), in pixels."""
        ...


@dataclass(frozen=True)
class Raft:
    """RAFT as EvalCrafter runs it: 20 iterations, each pair from zero."""

    model: RAFT
    iterations: int = 20
    smallest: int = SMALLEST

    @property
    def name(self) -> str:
        return self.model.cfg.name

    @property
    def beside_paper(self) -> bool:
        return self.model.cfg == LARGE and self.iterations == 20

    @torch.inference_mode()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        return self.model(first[None].to(device), second[None].to(device), self.iterations)[0].to(first.device)


@dataclass(frozen=True)
class Dis:
    """OpenCV's DIS (`eval.metrics.flow.flow`) on luma: for comparing clips of one model, never beside the paper's."""

    name: str = "DIS"
    beside_paper: bool = False
    smallest: int = 16

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.from_numpy(flow(_grey(first), _grey(second)).transpose(2, 0, 1).copy())


def _grey(picture: Tensor) -> NDArray[np.uint8]:
    rgb = picture.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), np.uint8)


def given(network: FlowNetwork | None, metric: str) -> FlowNetwork:
    """The network itself; raises MissingNetwork, in words for a table, if there is none."""
    if network is None:
        raise MissingNetwork(
            f"{metric} needs RAFT's weights (raft-things.pth of the RAFT release, or torchvision's "
            "raft_large_C_T_V1-22a6c225.pth): none were given; without them, DIS measures motion under its own name"
        )
    return network


def pictures(frames: NDArray[np.uint8], metric: str, least: int) -> Callable[[int], Tensor]:
    """Of a clip, uint8 (F, H, W, 3), each frame by its number as float (3, H, W) in 0..255: the whole clip would be
    four times as large.

    Raises ValueError for other arrays, fewer than two frames, or fewer than `least` pixels a side.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < 2:
        raise ValueError(f"{metric}: frames are {frames.dtype} {frames.shape}; expected uint8 (F, H, W, 3), F >= 2")
    height, width = frames.shape[1:3]
    if min(height, width) < least:
        other = "" if metric.endswith(Dis.name) else ", or measure with DIS"
        raise ValueError(
            f"{metric}: frames of {width} x {height} pixels, expected at least {least} on each side: "
            f"give larger frames (enlarging them changes the score){other}"
        )
    return lambda number: torch.from_numpy(np.ascontiguousarray(frames[number])).permute(2, 0, 1).float()

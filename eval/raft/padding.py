"""Frames of any size -> multiples of 8, as the flow metrics were defined."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from eval.raft.network import STRIDE


def pads(height: int, width: int) -> tuple[int, int, int, int]:
    """How many pixels to add: left, right, top, bottom. An odd one goes to the right and to the bottom."""
    down, right = -height % STRIDE, -width % STRIDE
    return right // 2, right - right // 2, down // 2, down - down // 2


def pad(x: Tensor) -> Tensor:
    """(N, C, H, W) with its border repeated up to multiples of 8."""
    return F.pad(x, pads(*x.shape[-2:]), mode="replicate")


def unpad(x: Tensor, height: int, width: int) -> Tensor:
    """The height x width pixels inside a padded (..., H, W)."""
    left, _, top, _ = pads(height, width)
    return x[..., top : top + height, left : left + width]

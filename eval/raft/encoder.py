"""RAFT's two encoders: a picture -> features at an eighth of its size."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["instance", "batch", "none"]


class FrozenBatchNorm(nn.Module):
    """Batch norm with the statistics of the file, whatever mode the network is in."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return FrozenBatchNorm(channels)
    return nn.InstanceNorm2d(channels) if kind == "instance" else nn.Identity()


class Block(nn.Module):
    """Convolutions, each with norm and ReLU, and a residual.

    Two of 3x3 (large), or 1x1, 3x3, 1x1 with a quarter of the channels between them (small).
    """

    downsample: nn.Sequential | None

    def __init__(self, inside: int, outside: int, norm: Norm, stride: int, bottleneck: bool):
        super().__init__()
        if bottleneck:
            middle = outside // 4
            convs = [
                nn.Conv2d(inside, middle, 1),
                nn.Conv2d(middle, middle, 3, stride, padding=1),
                nn.Conv2d(middle, outside, 1),
            ]
        else:
            convs = [
                nn.Conv2d(inside, outside, 3, stride, padding=1),
                nn.Conv2d(outside, outside, 3, padding=1),
            ]
        self.count = len(convs)
        for n, conv in enumerate(convs, 1):
            self.add_module(f"conv{n}", conv)
            self.add_module(f"norm{n}", norm_layer(norm, conv.out_channels))
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride), norm_layer(norm, outside))
        self.register_module("downsample", shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for n in range(1, self.count + 1):
            y = F.relu(self.get_submodule(f"norm{n}")(self.get_submodule(f"conv{n}")(y)))
        return F.relu((x if self.downsample is None else self.downsample(x)) + y)


class Encoder(nn.Module):
    """(N, 3, H, W) in [-1, 1] -> (N, out, H/8, W/8)."""

    def __init__(self, widths: tuple[int, int, int], out: int, norm: Norm, bottleneck: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3)
        self.norm1 = norm_layer(norm, widths[0])
        before = widths[0]
        for n, width in enumerate(widths, 1):
            first = Block(before, width, norm, 1 if n == 1 else 2, bottleneck)
            self.add_module(f"layer{n}", nn.Sequential(first, Block(width, width, norm, 1, bottleneck)))
            before = width
        self.conv2 = nn.Conv2d(before, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        for n in (1, 2, 3):
            x = self.get_submodule(f"layer{n}")(x)
        return self.conv2(x)

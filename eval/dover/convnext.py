"""DOVER's aesthetic branch: a ConvNeXt over space and time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
TIMES = (1, 3, 1)  # how many frames a block's depthwise convolution sees, in turn


@dataclass(frozen=True)
class ConvNeXtConfig:
    """Sizes of the aesthetic branch; the defaults are the published ones."""

    widths: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 9, 3)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, T, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, EPS).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, MLP, scale, residual; (B, C, T, H, W) -> the same."""

    def __init__(self, width: int, times: int):
        super().__init__()
        self.dwconv = nn.Conv3d(width, width, (times, 7, 7), padding=(times // 2, 3, 3), groups=width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).movedim(1, -1))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).movedim(-1, 1)


class ConvNeXt(nn.Module):
    """Normalised clips (B, 3, T, H, W) -> features (B, C, T/2, H/32, W/32)."""

    def __init__(self, cfg: ConvNeXtConfig):
        super().__init__()
        stem = nn.Sequential(nn.Conv3d(3, cfg.widths[0], (2, 4, 4), stride=(2, 4, 4)), ChannelNorm(cfg.widths[0]))
        halves = [
            nn.Sequential(ChannelNorm(a), nn.Conv3d(a, b, (1, 2, 2), stride=(1, 2, 2)))
            for a, b in zip(cfg.widths[:-1], cfg.widths[1:])
        ]
        self.downsample_layers = nn.ModuleList([stem, *halves])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width, TIMES[n % 3]) for n in range(depth)))
            for width, depth in zip(cfg.widths, cfg.depths, strict=True)
        )
        self.norm = nn.LayerNorm(cfg.widths[-1], eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        for smaller, stage in zip(self.downsample_layers, self.stages):
            x = stage(smaller(x))
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)

"""RAFT's recurrent step: what was looked up, the flow so far and a hidden state -> a correction of the flow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallMotionEncoder(nn.Module):
    """Correlations (N, 196, h, w) and flow (N, 2, h, w) -> (N, 82, h, w), the flow itself last."""

    def __init__(self, correlations: int):
        super().__init__()
        self.convc1 = nn.Conv2d(correlations, 96, 1)
        self.convf1 = nn.Conv2d(2, 64, 7, padding=3)
        self.convf2 = nn.Conv2d(64, 32, 3, padding=1)
        self.conv = nn.Conv2d(128, 80, 3, padding=1)

    def forward(self, correlations: Tensor, flow: Tensor) -> Tensor:
        alike = F.relu(self.convc1(correlations))
        moved = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([alike, moved], dim=1))), flow], dim=1)


class MotionEncoder(nn.Module):
    """Correlations (N, 324, h, w) and flow (N, 2, h, w) -> (N, 128, h, w), the flow itself last."""

    def __init__(self, correlations: int):
        super().__init__()
        self.convc1 = nn.Conv2d(correlations, 256, 1)
        self.convc2 = nn.Conv2d(256, 192, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 128, 7, padding=3)
        self.convf2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(256, 126, 3, padding=1)

    def forward(self, correlations: Tensor, flow: Tensor) -> Tensor:
        alike = F.relu(self.convc2(F.relu(self.convc1(correlations))))
        moved = F.relu(self.convf2(F.relu(self.convf1(flow))))
        return torch.cat([F.relu(self.conv(torch.cat([alike, moved], dim=1))), flow], dim=1)


class GRU(nn.Module):
    """Convolutional gated units, one after the other: 3x3 (small), or 1x5 and then 5x1 (large)."""

    def __init__(self, hidden: int, inside: int, separable: bool):
        super().__init__()
        self.passes = ("1", "2") if separable else ("",)
        for number in self.passes:
            kernel = {"": (3, 3), "1": (1, 5), "2": (5, 1)}[number]
            padding = (kernel[0] // 2, kernel[1] // 2)
            for gate in "zrq":
                self.add_module(f"conv{gate}{number}", nn.Conv2d(hidden + inside, hidden, kernel, padding=padding))

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        for number in self.passes:
            z, r, q = (self.get_submodule(f"conv{gate}{number}") for gate in "zrq")
            both = torch.cat([hidden, x], dim=1)
            update = torch.sigmoid(z(both))
            new = torch.tanh(q(torch.cat([torch.sigmoid(r(both)) * hidden, x], dim=1)))
            hidden = (1 - update) * hidden + update * new
        return hidden


class FlowHead(nn.Module):
    """Hidden state -> correction of the flow (N, 2, h, w)."""

    def __init__(self, hidden: int, middle: int):
        super().__init__()
        self.conv1 = nn.Conv2d(hidden, middle, 3, padding=1)
        self.conv2 = nn.Conv2d(middle, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


class Update(nn.Module):
    """One step: hidden state, context, correlations, flow -> hidden state, correction, upsampling mask or None."""

    mask: nn.Sequential | None

    def __init__(self, hidden: int, context: int, correlations: int, small: bool):
        super().__init__()
        self.encoder = SmallMotionEncoder(correlations) if small else MotionEncoder(correlations)
        self.gru = GRU(hidden, context + (82 if small else 128), separable=not small)
        self.flow_head = FlowHead(hidden, 128 if small else 256)
        mask = None if small else nn.Sequential(nn.Conv2d(hidden, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 576, 1))
        self.register_module("mask", mask)

    def forward(
        self, hidden: Tensor, context: Tensor, correlations: Tensor, flow: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = self.gru(hidden, torch.cat([context, self.encoder(correlations, flow)], dim=1))
        # A quarter, as in training: it balances the mask's gradient against the flow's.
        mask = None if self.mask is None else 0.25 * self.mask(hidden)
        return hidden, self.flow_head(hidden), mask

"""DOVER (Wu et al. 2023, arXiv 2211.04894): a technical and an aesthetic rating of a video."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from eval.dover.convnext import ConvNeXt, ConvNeXtConfig
from eval.dover.swin import Swin, SwinConfig


@dataclass(frozen=True)
class DOVERConfig:
    """Sizes; the defaults are the published ones. `aesthetic` None: the technical branch alone."""

    technical: SwinConfig = SwinConfig()
    aesthetic: ConvNeXtConfig | None = None
    hidden: int = 64


class Head(nn.Module):
    """Features (B, C, T, H, W) -> a value at every place (B, 1, T, H, W)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc_hid = nn.Conv3d(channels, hidden, 1)
        self.fc_last = nn.Conv3d(hidden, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_last(F.gelu(self.fc_hid(x)))


class DOVER(nn.Module):
    """The network, with the parameter names of DOVER.pth."""

    aesthetic_backbone: ConvNeXt | None
    aesthetic_head: Head | None

    def __init__(self, cfg: DOVERConfig = DOVERConfig()):
        super().__init__()
        self.cfg = cfg
        self.technical_backbone = Swin(cfg.technical)
        self.technical_head = Head(cfg.technical.channels, cfg.hidden)
        other = cfg.aesthetic
        self.register_module("aesthetic_backbone", None if other is None else ConvNeXt(other))
        self.register_module("aesthetic_head", None if other is None else Head(other.widths[-1], cfg.hidden))

    def technical(self, clips: Tensor) -> Tensor:
        """Mosaics of fragments (B, 3, 32, 224, 224), normalised -> one raw value each, (B,)."""
        return self.technical_head(self.technical_backbone(clips)).mean(dim=(1, 2, 3, 4))

    def aesthetic(self, clips: Tensor) -> Tensor:
        """Whole frames (B, 3, 32, 224, 224), normalised -> one raw value each, (B,).

        Raises ValueError for a network that was made without this branch.
        """
        if self.aesthetic_backbone is None or self.aesthetic_head is None:
            raise ValueError("this DOVER holds the technical branch alone; load it with aesthetic=True")
        return self.aesthetic_head(self.aesthetic_backbone(clips)).mean(dim=(1, 2, 3, 4))

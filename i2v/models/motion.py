"""AnimateDiff motion modules (arXiv:2307.04725): attention along the frames, after each layer of the UNet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from i2v.models.chunks import by_rows, rows_at_once
from i2v.models.conditioning import Conditioning
from i2v.models.layers import Attention, FeedForward, Linear, ResBlock, scaled
from i2v.models.norms import FrameGroupNorm, LayerNorm
from i2v.models.unet import UNet


@dataclass(frozen=True)
class MotionConfig:
    """A motion set, and the two group norms whose statistics it was trained to see over whole clips."""

    max_frames: int  # longest clip that it was trained on
    mid_block: bool  # one module in the middle too
    resnet_norm_over_frames: bool  # norms of the ResBlocks and the last one pool over the frames of a clip
    motion_norm_over_frames: bool  # the input norm of each motion module does
    heads: int = 8
    attentions: int = 2  # temporal attentions per module


MOTION_V1 = MotionConfig(24, mid_block=False, resnet_norm_over_frames=True, motion_norm_over_frames=False)
MOTION_V2 = MotionConfig(32, mid_block=True, resnet_norm_over_frames=False, motion_norm_over_frames=False)
MOTION_V3 = MotionConfig(32, mid_block=False, resnet_norm_over_frames=False, motion_norm_over_frames=False)
MOTION_SDXL = MotionConfig(32, mid_block=False, resnet_norm_over_frames=False, motion_norm_over_frames=True)


def frame_positions(num_frames: int, dim: int, device: torch.device) -> Tensor:
    """(F, dim) float32: sines on even channels, cosines on odd ones."""
    frame = torch.arange(num_frames, device=device, dtype=torch.float32)
    frequency = torch.exp(torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / dim))
    angle = frame[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class TemporalBlock(nn.Module):
    """Self-attention along the frames, usually twice, then a feed-forward; (B*h*w, F, C) -> (B*h*w, F, C)."""

    def __init__(self, dim: int, cfg: MotionConfig):
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(dim) for _ in range(cfg.attentions))
        self.attention_blocks = nn.ModuleList(Attention(dim, cfg.heads) for _ in range(cfg.attentions))
        self.ff_norm = LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        # made here rather than kept: a table built on the meta device would stay there after an assigned load
        positions = frame_positions(x.shape[1], x.shape[2], x.device)
        for norm, attention in zip(self.norms, self.attention_blocks):
            h = norm(x)
            x = x + attention(h + positions.to(h.dtype))
        return x + self.ff(x, self.ff_norm)


class MotionModule(nn.Module):
    """Mixes the frames of a clip at each pixel, with a residual; (B*F, C, h, w) -> (B*F, C, h, w).

    `proj_out` starts at zero: a fresh module changes nothing.
    """

    def __init__(self, channels: int, cfg: MotionConfig, groups: int):
        super().__init__()
        self.max_frames = cfg.max_frames
        self.scale = 1.0  # of what is added; 0: every frame alone
        self.norm = FrameGroupNorm(groups, channels, eps=1e-6, over_frames=cfg.motion_norm_over_frames)
        self.proj_in = Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TemporalBlock(channels, cfg)])
        self.proj_out = Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Raises ValueError for more frames than the module was trained on."""
        frames = cond.num_frames
        if frames > self.max_frames:
            raise ValueError(
                f"these motion modules were trained on at most {self.max_frames} frames, got {frames}: "
                "make a longer video window by window"
            )
        if rows_at_once(cond.budget, x) >= len(x):
            return x + self.pixels(self.norm(x, frames), frames)
        h = by_rows(self.norm.normed, cond.budget, x, *self.norm.by_frames(frames, cond.budget, x))

        def sum_of(h: Tensor, x: Tensor) -> Tensor:
            """Some lines of a clip's frames, (lines, f, c, w)."""
            return x + rearrange(self.pixels(rearrange(h, "h f c w -> f c h w"), frames), "f c h w -> h f c w")

        for clip in range(0, len(x), frames):
            lines, original = (rearrange(t[clip : clip + frames], "f c h w -> h f c w") for t in (h, x))
            by_rows(sum_of, cond.budget, lines, original, into=lines)  # a view of h
        return h

    def pixels(self, h: Tensor, frames: int) -> Tensor:
        """(B*F, C, h, w) after the norm -> what is added to the input; every pixel is computed alone."""
        height, width = h.shape[-2:]
        h = rearrange(h, "(b f) c h w -> (b h w) f c", f=frames)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h)
        h = self.proj_out(h)
        return scaled(rearrange(h, "(b h w) f c -> (b f) c h w", h=height, w=width), self.scale)


def add_motion_modules(unet: UNet, cfg: MotionConfig) -> dict[str, nn.Module]:
    """Put a motion module after each layer (and in the middle, v2) and set the norms that the motion set wants.

    Returns the modules by their path in the UNet. They are made on the device and in the dtype of the UNet.
    Raises ValueError where there are motion modules already.
    """
    blocks = {f"{side}_blocks.{i}": b for side in ("down", "up") for i, b in enumerate(getattr(unet, f"{side}_blocks"))}
    if any(len(block.motion_modules) for block in blocks.values()):
        raise ValueError("this UNet has motion modules: call remove_motion_modules before others are added")
    counts = {path: len(block.resnets) for path, block in blocks.items()}
    if cfg.mid_block:
        blocks["mid_block"], counts["mid_block"] = unet.mid_block, 1

    added: dict[str, nn.Module] = {}
    weight = unet.conv_in.weight
    for path, block in blocks.items():
        channels = block.resnets[0].conv1.out_channels
        for i in range(counts[path]):
            with weight.device:
                module = MotionModule(channels, cfg, unet.cfg.groups).to(weight.dtype)
            block.motion_modules.append(module)
            added[f"{path}.motion_modules.{i}"] = module
    for norm in _resnet_norms(unet):
        norm.over_frames = cfg.resnet_norm_over_frames
    return added


def remove_motion_modules(unet: UNet) -> None:
    """Take out all motion modules; every norm sees single frames again."""
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        block.motion_modules = nn.ModuleList()
    for norm in _resnet_norms(unet):
        norm.over_frames = False


def _resnet_norms(unet: UNet) -> Iterator[FrameGroupNorm]:
    yield unet.conv_norm_out
    for module in unet.modules():
        if isinstance(module, ResBlock):
            yield module.norm1
            yield module.norm2

"""DOVER's technical branch: a video Swin transformer whose position biases know the fragments of its input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from eval.dover.windows import Size, cut, fitted, gate, joined, regions, relative_index

ROOM = 16 * 2**20  # elements of attention biases that exist at a time; the reference makes all of them, 2.9 GB


@dataclass(frozen=True)
class SwinConfig:
    """Sizes of the technical branch; the defaults are the published ones. `gated`: levels with fragment biases."""

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: Size = (8, 7, 7)
    gated: tuple[bool, ...] = (True, True, True, False)

    @property
    def channels(self) -> int:
        return self.width * 2 ** (len(self.depths) - 1)


class WindowAttention(nn.Module):
    """Self-attention inside windows: bias = R g + F (1 - g), R and F tables by offset, g the fragments between."""

    fragment_position_bias_table: nn.Parameter | None

    def __init__(self, width: int, heads: int, window: Size, gated: bool):
        super().__init__()
        self.heads, self.window = heads, window
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        fragments = nn.Parameter(torch.zeros(rows, heads)) if gated else None
        self.register_parameter("fragment_position_bias_table", fragments)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, size: Size, window: Size, shift: Size) -> Tensor:
        """(B, windows, tokens, C), cut from tokens of `size`, rolled by `shift` -> the same."""
        count, tokens = x.shape[1:3]
        q, k, v = rearrange(self.qkv(x), "b n t (x h d) -> x b n h t d", x=3, h=self.heads)
        index = relative_index(self.window)[:tokens, :tokens].to(x.device)
        near = self.relative_position_bias_table[index].permute(2, 0, 1)  # (h, t, t)
        table = self.fragment_position_bias_table
        apart = None if table is None else gate(size, window, shift, window[1:]).to(x)
        within = None if table is None else table[index].permute(2, 0, 1)
        region = regions(size, window, shift).to(x.device) if any(shift) else None
        step = max(ROOM // (self.heads * tokens**2), 1)
        out = []
        for start in range(0, count, step):
            some = torch.arange(start, min(start + step, count), device=x.device)
            bias = near.expand(len(some), -1, -1, -1)
            if apart is not None and within is not None:
                g = apart[some % len(apart)].repeat(1, window[0], window[0])[:, None]
                bias = within + g * (near - within)
            if region is not None:
                mine = region[some]
                bias = bias - 100.0 * (mine[:, None, :, None] != mine[:, None, None, :])
            here = slice(start, start + len(some))
            out.append(torch.stack([
                F.scaled_dot_product_attention(q[b, here], k[b, here], v[b, here], attn_mask=bias)
                for b in range(len(x))
            ]))  # fmt: skip
        return self.proj(rearrange(torch.cat(out, dim=1), "b n h t d -> b n t (h d)"))


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Window attention and MLP, each behind a layer norm and with a residual; (B, D, H, W, C) -> the same."""

    def __init__(self, width: int, heads: int, window: Size, shifted: bool, gated: bool):
        super().__init__()
        self.window = window
        self.shift: Size = (window[0] // 2, window[1] // 2, window[2] // 2) if shifted else (0, 0, 0)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, gated)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attention(self, x: Tensor) -> Tensor:
        """Pad, roll, cut, attend, and back."""
        d, h, w = x.shape[1:4]
        window, shift = fitted((d, h, w), self.window, self.shift)
        x = F.pad(x, (0, 0, 0, -w % window[2], 0, -h % window[1], 0, -d % window[0]))
        size: Size = (x.shape[1], x.shape[2], x.shape[3])
        x = x.roll([-s for s in shift], dims=(1, 2, 3))
        x = joined(self.attn(cut(x, window), size, window, shift), window, size)
        return x.roll(shift, dims=(1, 2, 3))[:, :d, :h, :w]


class PatchMerging(nn.Module):
    """(B, D, H, W, C) -> (B, D, H/2, W/2, 2C): four neighbours side by side, normed, projected."""

    def __init__(self, width: int):
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        neighbours = [x[:, :, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


class PatchEmbedding(nn.Module):
    """Pixels (B, 3, F, H, W) -> tokens (B, F/2, H/4, W/4, C), zeros filling up odd sizes."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv3d(3, width, (2, 4, 4), stride=(2, 4, 4))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        f, h, w = x.shape[2:]
        x = self.proj(F.pad(x, (0, -w % 4, 0, -h % 4, 0, -f % 2)))
        return self.norm(rearrange(x, "b c d h w -> b d h w c"))


class Level(nn.Module):
    """Blocks, every second one shifted, then the step to half the size."""

    downsample: PatchMerging | None

    def __init__(self, width: int, depth: int, heads: int, window: Size, gated: bool, last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(width, heads, window, n % 2 == 1, gated) for n in range(depth))
        self.register_module("downsample", None if last else PatchMerging(width))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Swin(nn.Module):
    """Normalised clips (B, 3, 32, 224, 224), mosaics of fragments -> features (B, C, 16, 7, 7)."""

    def __init__(self, cfg: SwinConfig):
        super().__init__()
        self.patch_embed = PatchEmbedding(cfg.width)
        last = len(cfg.depths) - 1
        self.layers = nn.ModuleList(
            Level(cfg.width * 2**n, depth, heads, cfg.window, gated, n == last)
            for n, (depth, heads, gated) in enumerate(zip(cfg.depths, cfg.heads, cfg.gated, strict=True))
        )
        self.norm = nn.LayerNorm(cfg.channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for level in self.layers:
            x = level(x)
        return rearrange(self.norm(x), "b d h w c -> b c d h w")

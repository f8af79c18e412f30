"""The Stable Diffusion UNet. One class: SD1.5, SDXL and the miniature differ by fields of `UNetConfig`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i2v.models import cpu
from i2v.models.chunks import by_rows, rows_at_once
from i2v.models.conditioning import Conditioning, ContextKV, per_condition, per_frame
from i2v.models.layers import (
    Attention,
    Conv3x3,
    Downsample,
    FrameGroupNorm,
    Linear,
    ResBlock,
    SpatialTransformer,
    TransformerBlock,
    Upsample,
)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a UNet. Per-level tuples start at the finest level."""

    channels: tuple[int, ...]
    depths: tuple[int, ...]  # transformer blocks per attention, 0 = level without attention
    heads: tuple[int, ...]
    context_dim: int  # width of the text tokens
    mid_depth: int = 1
    layers: int = 2  # residual blocks per level, one more on the way up
    linear_proj: bool = False
    pooled_dim: int = 0  # width of SDXL's pooled text, which joins the time embedding; 0 = none
    size_dim: int = 256  # features of each size number; only with pooled text
    size_numbers: int = 6  # height and width, crop top and left, target height and width
    latent_channels: int = 4
    groups: int = 32  # of every group norm

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.depths) == len(self.heads):
            raise ValueError(
                "channels, depths and heads need one entry per level, "
                f"got {self.channels}, {self.depths} and {self.heads}"
            )
        for width, heads in zip(self.channels, self.heads):
            if width % heads or width % self.groups:
                raise ValueError(f"{width} channels do not split into {heads} heads and {self.groups} groups")


SD15 = UNetConfig(channels=(320, 640, 1280, 1280), depths=(1, 1, 1, 0), heads=(8, 8, 8, 8), context_dim=768)
SDXL = UNetConfig(
    channels=(320, 640, 1280),
    depths=(0, 2, 10),
    heads=(5, 10, 20),
    context_dim=2048,
    mid_depth=10,
    linear_proj=True,
    pooled_dim=1280,
)


@dataclass
class DeepFeatures:
    """The state of a UNet before its last layer, taken over from one call into others: an approximation, DeepCache's
    (Ma et al., 2312.00858). What lies deeper changes little from one denoising step to the next.

    state: (N, C, h, w); None until the first call, which computes everything and leaves it here.
    """

    state: Tensor | None = None


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """(R,) -> (R, dim) float32, cosines first."""
    exponent = torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Two linear layers with SiLU; (R, in_dim) -> (R, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.linear_1 = Linear(in_dim, out_dim)
        self.linear_2 = Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Level(nn.Module):
    """One resolution: a few layers of ResBlock, SpatialTransformer (unless its depth is 0) and motion slot."""

    def __init__(self, widths: Sequence[tuple[int, int]], temb_dim: int, cfg: UNetConfig, level: int):
        """`widths`: (in, out) channels of each layer; `level`: index into the tuples of `cfg`."""
        super().__init__()
        out, depth = cfg.channels[level], cfg.depths[level]
        self.resnets = nn.ModuleList(ResBlock(i, o, temb_dim, cfg.groups) for i, o in widths)
        self.attentions = nn.ModuleList(
            SpatialTransformer(out, cfg.heads[level], depth, cfg.context_dim, cfg.linear_proj, cfg.groups)
            for _ in widths
            if depth
        )
        self.motion_modules = nn.ModuleList()  # filled by motion.add_motion_modules


class DownLevel(Level):
    """A level on the way down; every level but the coarsest ends with a downsampler."""

    def __init__(self, widths: Sequence[tuple[int, int]], temb_dim: int, cfg: UNetConfig, level: int):
        super().__init__(widths, temb_dim, cfg, level)
        out = cfg.channels[level]
        self.downsamplers = nn.ModuleList([Downsample(out)] if level < len(cfg.channels) - 1 else [])

    def forward(self, x: Tensor, cond: Conditioning) -> list[Tensor]:
        """(N, C, h, w) -> what the skip connections keep: the state after each layer and after the downsampler."""
        states = []
        for i in range(len(self.resnets)):
            x = self.resnets[i](x, cond)
            if self.attentions:
                x = self.attentions[i](x, cond)
            if self.motion_modules:
                x = self.motion_modules[i](x, cond)
            states.append(x)
        for down in self.downsamplers:
            states.append(down(x))
        return states


class UpLevel(Level):
    """A level on the way up; every level but the finest ends with an upsampler."""

    def __init__(self, widths: Sequence[tuple[int, int]], temb_dim: int, cfg: UNetConfig, level: int):
        super().__init__(widths, temb_dim, cfg, level)
        self.upsamplers = nn.ModuleList([Upsample(cfg.channels[level])] if level > 0 else [])

    def forward(self, states: list[Tensor], cond: Conditioning, deep: DeepFeatures | None = None) -> Tensor:
        """Takes x (N, C, h, w) and its skip connections off the end of `states`, puts x' (N, C', h', w') there, too.

        x lies in the list, too, and is no argument, since the caller would hold it meanwhile: a UNet's memory is at its
        peak here.
        deep: what it holds is the x of the last layer, which alone is computed; else that x is put into it.
        """
        last = len(self.resnets) - 1
        x = states.pop()
        for i in range(last if deep is not None and deep.state is not None else 0, last + 1):
            if deep is not None and i == last:
                deep.state = x
            x = self.resnets[i](x, cond, per_condition(states.pop(), cond))
            if self.attentions:
                x = self.attentions[i](x, cond)
            if self.motion_modules:
                x = self.motion_modules[i](x, cond)
        for up in self.upsamplers:
            x = up(x, states[-1].shape[-2:], cond.budget)
        states.append(x)
        return x


class MidBlock(nn.Module):
    """The coarsest resolution: ResBlock, SpatialTransformer, motion slot (v2), ResBlock."""

    def __init__(self, temb_dim: int, cfg: UNetConfig):
        super().__init__()
        width = cfg.channels[-1]
        self.resnets = nn.ModuleList(ResBlock(width, width, temb_dim, cfg.groups) for _ in range(2))
        self.attentions = nn.ModuleList(
            [SpatialTransformer(width, cfg.heads[-1], cfg.mid_depth, cfg.context_dim, cfg.linear_proj, cfg.groups)]
        )
        self.motion_modules = nn.ModuleList()

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, cond), cond)
        for motion in self.motion_modules:
            x = motion(x, cond)
        return self.resnets[1](x, cond)


def skip_channels(cfg: UNetConfig) -> list[int]:
    """Channels of the skip connections: after conv_in, each layer and each downsampler."""
    last = len(cfg.channels) - 1
    levels = [[out] * (cfg.layers + (i < last)) for i, out in enumerate(cfg.channels)]
    return [cfg.channels[0], *sum(levels, [])]


class Encoder(nn.Module):
    """The way down and the middle, with the timestep and the text: half of a UNet, and what a ControlNet copies."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        self.budget = 0  # bytes of its input that a block works on at once where no gradients are wanted; 0: all
        ch = cfg.channels
        temb = ch[0] * 4
        self.time_embedding = TimeEmbedding(ch[0], temb)
        sizes = cfg.size_numbers * cfg.size_dim
        self.add_embedding = TimeEmbedding(cfg.pooled_dim + sizes, temb) if cfg.pooled_dim else None
        self.conv_in = Conv3x3(cfg.latent_channels, ch[0])

        self.down_blocks, width = nn.ModuleList(), ch[0]
        for i, out in enumerate(ch):
            widths = [(width if j == 0 else out, out) for j in range(cfg.layers)]
            self.down_blocks.append(DownLevel(widths, temb, cfg, i))
            width = out

        self.mid_block = MidBlock(temb, cfg)

    def context_kv(self, context: Tensor, image_tokens: Tensor | None = None) -> ContextKV:
        """Keys and values of all cross-attentions, from text and image tokens that stay the same over a run.

        context (R, L, C), image_tokens (R, M, C) or None; R is B (one per clip) or B*F (one per frame), each its own.
        Raises ValueError where image tokens are missing (an IP-Adapter is there) or useless (none is).
        """
        if context.ndim != 3 or context.shape[2] != self.cfg.context_dim:
            raise ValueError(f"context {tuple(context.shape)}: expected (R, L, {self.cfg.context_dim}), of a text "
                             "encoder of this UNet's base")  # fmt: skip
        attentions, slots = self._cross_attentions()
        if bool(slots) != (image_tokens is not None):
            raise ValueError(
                "this UNet has an IP-Adapter: pass image_tokens (zeros for none), or call remove_ip_adapter first"
                if slots
                else "image_tokens given, but this UNet has no IP-Adapter: call add_ip_adapter first"
            )
        return ContextKV(
            text={attention: attention.kv(context) for attention in attentions},
            image={s: s.kv(image_tokens) for s in slots},
            rows=len(context),
        )

    def _cross_attentions(self) -> tuple[list[Attention], list[Any]]:
        """All text cross-attentions and all filled IP-Adapter slots, whose class is in a file that imports this one."""
        blocks = [m for m in self.modules() if isinstance(m, TransformerBlock)]
        return [b.attn2 for b in blocks], [b.ip_adapter for b in blocks if b.ip_adapter is not None]

    def embed_time(self, timesteps: Tensor, pooled: Tensor | None, size_ids: Tensor | None) -> Tensor:
        """timesteps (R,), pooled (R, P), size_ids (R, 6) -> (R, D)."""
        dtype = self.conv_in.weight.dtype
        temb = self.time_embedding(sinusoid(timesteps, self.cfg.channels[0]).to(dtype))
        if self.add_embedding is None:
            return temb
        if pooled is None or size_ids is None:
            raise ValueError(
                f"this UNet adds pooled text and picture sizes to the timestep (SDXL): pass pooled (B, "
                f"{self.cfg.pooled_dim}) and size_ids (B, {self.cfg.size_numbers})"
            )
        sizes = sinusoid(size_ids.flatten(), self.cfg.size_dim).reshape(len(size_ids), -1).to(dtype)
        added = self.add_embedding(torch.cat([pooled, sizes], dim=-1))
        rows = max(len(temb), len(added))
        return per_frame(temb, rows) + per_frame(added, rows)

    def conditioning(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | ContextKV,
        num_frames: int,
        image_tokens: Tensor | None,
        pooled: Tensor | None,
        size_ids: Tensor | None,
        anchor: int,
        conditions: int = 1,
    ) -> Conditioning:
        """What the blocks look at, from the arguments of `UNet.forward`; raises ValueError where rows do not fit."""
        if num_frames < 1 or len(latents) % num_frames or not 0 <= anchor < num_frames:
            raise ValueError(f"{len(latents)} latents are no clips of {num_frames} frames with anchor {anchor}")
        if isinstance(context, ContextKV) and image_tokens is not None:
            raise ValueError("pass image_tokens to context_kv: a ContextKV already holds their keys and values")
        rows = {"timesteps": timesteps, "image_tokens": image_tokens, "pooled": pooled, "size_ids": size_ids}
        counts = {name: len(x) for name, x in rows.items() if x is not None}
        counts["context"] = context.rows if isinstance(context, ContextKV) else len(context)
        for name, count in counts.items():
            all_frames = len(latents) * (1 if name == "timesteps" else conditions)
            if count not in (all_frames // num_frames, all_frames):
                raise ValueError(
                    f"{name} has {count} rows, expected one per clip ({all_frames // num_frames}) "
                    f"or per frame ({all_frames})"
                )

        kv = context if isinstance(context, ContextKV) else self.context_kv(context, image_tokens)
        if [list(kv.text), list(kv.image)] != list(self._cross_attentions()):
            raise ValueError("this ContextKV is another UNet's, or older than its IP-Adapter: call context_kv again")
        temb = self.embed_time(timesteps.repeat(conditions), pooled, size_ids)
        budget = 0 if torch.is_grad_enabled() else self.budget
        return Conditioning(temb, kv, num_frames, anchor, conditions * len(latents), budget)

    def conv_first(self, latents: Tensor, conditions: int = 1) -> Tensor:
        """(N, C, h, w) -> (N, C', h, w), or one such for every condition where they differ from the start (SDXL)."""
        if cpu.applies(latents):  # all that follows keeps this order, in which the tokens of a picture are a view;
            # not for training: the backward pass of PyTorch's GroupNorm crashes on it where the input needs no gradient
            latents = latents.contiguous(memory_format=torch.channels_last)
        if self.add_embedding is not None and conditions > 1:
            latents = latents.repeat(conditions, 1, 1, 1)
        return self.conv_in(latents)

    def down(self, x: Tensor, cond: Conditioning) -> tuple[list[Tensor], Tensor]:
        """What conv_in returned, (N, C, h, w) -> what the skip connections keep, from `x` on, and the middle."""
        skips = [x]
        for block in self.down_blocks:
            skips += block(skips[-1], cond)
        return skips, self.mid_block(skips[-1], cond)


class UNet(Encoder):
    """Predicts noise (or what the schedule says) for frames folded into the batch. Parameter names are diffusers'."""

    def __init__(self, cfg: UNetConfig):
        super().__init__(cfg)
        skips, width, temb = skip_channels(cfg), cfg.channels[-1], cfg.channels[0] * 4
        self.up_blocks = nn.ModuleList()
        for i, out in reversed(list(enumerate(cfg.channels))):
            widths = []
            for _ in range(cfg.layers + 1):
                widths.append((width + skips.pop(), out))
                width = out
            self.up_blocks.append(UpLevel(widths, temb, cfg, i))

        self.conv_norm_out = FrameGroupNorm(cfg.groups, cfg.channels[0])
        self.conv_out = Conv3x3(cfg.channels[0], cfg.latent_channels)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | ContextKV,
        *,
        num_frames: int = 1,
        image_tokens: Tensor | None = None,
        pooled: Tensor | None = None,
        size_ids: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
        anchor: int = 0,
        conditions: int = 1,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        """Predict the noise; (B*F, C, h, w) -> (B*F, C, h, w).

        latents: (B*F, C, h, w), scaled, frame fastest; any h and w. num_frames: F.
        timesteps: (B,) or (B*F,), 0 to 999.
        context, image_tokens: (B, L, C) or (B*F, L, C); a `ContextKV` stands for both.
        pooled, size_ids: SDXL only, (B, P) and (B, 6), or B*F rows.
        control: ControlNet residuals, one per skip connection, then one for the middle; B*F rows, or B for all frames.
            A list is emptied: they are as large as the skip connections, and each is let go of when it has been added.
        anchor: the frame whose keys and values the I2V-Adapter shares.
        conditions: G, how many predictions to make of the same latents and timesteps, the halves of guidance: all other
            arguments and the result have G times the rows above, the first condition's first. What comes before the
            first cross-attention is computed once.
        deep: filled by a first call on these clips and conditions, taken over by the next ones, which compute the first
            convolution, the last layer and the output alone; not together with `control`, which acts in between.
        Raises ValueError where row counts do not fit, and for `deep` with `control`.
        """
        if deep is not None and control is not None:
            raise ValueError("deep features stand in for the levels that control acts on: pass one of both")
        cond = self.conditioning(
            latents, timesteps, context, num_frames, image_tokens, pooled, size_ids, anchor, conditions
        )
        x = self.conv_first(latents, conditions)
        if deep is not None and deep.state is not None:
            if len(deep.state) != cond.rows:
                raise ValueError(f"deep features of {len(deep.state)} frames, expected {cond.rows}: pass fresh ones")
            return self.out(self.up_blocks[-1]([x, deep.state], cond, deep), cond)
        skips, x = self.down(x, cond)

        if control is not None:
            if len(control) != len(skips) + 1:
                raise ValueError(f"control has {len(control)} tensors, expected {len(skips)} for the skips, 1 for mid")
            left = control if isinstance(control, list) else list(control)
            x = x + per_frame(left.pop(), len(x))
            for i in reversed(range(len(skips))):
                skips[i] = per_condition(skips[i], cond) + per_frame(left.pop(), cond.rows)

        states = [*skips, x]
        del skips, x
        *inner, last = self.up_blocks
        for block in inner:
            block(states, cond)
        last(states, cond, deep)
        return self.out(states.pop(), cond)

    def out(self, x: Tensor, cond: Conditioning) -> Tensor:
        """(N, C, h, w) -> the prediction (N, latent_channels, h, w)."""
        norm = self.conv_norm_out
        if rows_at_once(cond.budget, x) >= len(x):
            return self.conv_out(F.silu(norm(x, cond.num_frames)))
        clip = norm.by_frames(cond.num_frames, cond.budget, x)
        return by_rows(lambda x, *clip: self.conv_out(F.silu(norm.normed(x, *clip))), cond.budget, x, *clip)

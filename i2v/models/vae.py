"""The autoencoder between pixels and latents (Stable Diffusion's AutoencoderKL). Latents are always scaled here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2v.models import cpu
from i2v.models.layers import Conv1x1, Conv3x3, Linear, attend
from i2v.models.norms import GroupNorm
from i2v.models.tiles import in_tiles

OVERLAP = 64  # pixels that neighbouring tiles share


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder. `channels` starts at the finest level."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2  # residual blocks per level, one more in the decoder
    latent_channels: int = 4
    scaling_factor: float = 0.18215  # brings latents to about unit variance
    pixel_channels: int = 3
    groups: int = 32
    patch: int = 1  # pixels folded into channels before the first convolution, unfolded after the last one
    mid_attention: bool = True
    quant_conv: bool = True  # 1x1 convolutions on both sides of the latents
    float16_safe: bool = True  # False: activations overflow in float16, keep the weights in float32 or bfloat16

    @property
    def factor(self) -> int:
        """Pixels per latent, in height and in width."""
        return self.patch * 2 ** (len(self.channels) - 1)


SD_VAE = VAEConfig()
SDXL_VAE = VAEConfig(scaling_factor=0.13025, float16_safe=False)


@dataclass(frozen=True)
class Posterior:
    """q(latents | picture): a normal distribution per element, in scaled units; both (N, C, h, w) float32."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise; `noise` is standard normal, one row per picture, or one row for all."""
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The likeliest latents."""
        return self.mean


class PictureNorm(GroupNorm):
    """GroupNorm over a picture. Of a tile: with statistics that it saw of the whole picture, made smaller."""

    looking = False
    seen: tuple[Tensor, Tensor] | None = None  # variance and mean (N, groups) of the whole

    def forward(self, x: Tensor) -> Tensor:
        if self.looking and cpu.applies(x):
            self.seen = cpu.moments(x, self.num_groups)
        elif self.looking:
            self.seen = torch.var_mean(x.float().unflatten(1, (self.num_groups, -1)).flatten(2), 2, correction=0)
        if self.looking or self.seen is None:
            return super().forward(x)
        var, mean = (s.repeat_interleave(self.num_channels // self.num_groups, 1) for s in self.seen)
        scale = torch.rsqrt(var + self.eps) * self.weight.float()
        shift = self.bias.float() - mean * scale
        return torch.addcmul(shift[..., None, None].to(x.dtype), x, scale[..., None, None].to(x.dtype))


def with_norms_of_all(
    network: nn.Module, x: Tensor, tile: int, overlap: int, multiple: int, run: Callable[[Tensor], Tensor]
) -> Tensor:
    """run(x) in tiles of `tile`, whose norms have the statistics of all of `x`, made as small as a tile."""
    if tile >= max(x.shape[-2:]):
        return run(x)
    shrink = tile / max(x.shape[-2:])
    small = [max(round(side * shrink / multiple), 1) * multiple for side in x.shape[-2:]]
    norms = [module for module in network.modules() if isinstance(module, PictureNorm)]
    try:
        for norm in norms:
            norm.looking = True
        run(F.interpolate(x, size=small, mode="nearest"))  # which keeps the contrast of neighbours
        for norm in norms:
            norm.looking = False
        return in_tiles(run, x, tile, overlap, multiple)
    finally:
        for norm in norms:
            norm.looking, norm.seen = False, None


def silu(x: Tensor) -> Tensor:
    """Written over its input, which a norm has just made, unless gradients need it: the finest level is large."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class VAEResBlock(nn.Module):
    """Two convolutions and a residual; (N, C, H, W) -> (N, C', H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = PictureNorm(groups, in_channels, eps=1e-6)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = PictureNorm(groups, out_channels, eps=1e-6)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = Conv1x1(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class VAEAttention(nn.Module):
    """Self-attention of one head over all positions of a picture, with a residual; (N, C, h, w) -> (N, C, h, w)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = PictureNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "n c h w -> n (h w) c")
        out = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens), heads=1)
        return x + rearrange(self.to_out[0](out), "n (h w) c -> n c h w", h=x.shape[-2])


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class VAEDownsample(nn.Module):
    """Halves height and width. Padded at the right and the bottom only, which keeps pixel 0 under latent 0."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class VAEUpsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VAELevel(nn.Module):
    """Residual blocks of one resolution, then the change to the next one; none after the last level."""

    downsamplers: nn.ModuleList | None
    upsamplers: nn.ModuleList | None

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(VAEResBlock(a, b, groups) for a, b in pairwise(widths))
        self.register_module("downsamplers", None)
        self.register_module("upsamplers", None)

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for change in self.downsamplers or self.upsamplers or ():
            x = change(x)
        return x


class Encoder(nn.Module):
    """Pixels (N, 3, H, W) -> mean and log variance (N, 2 * latent_channels, h, w)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths, last = cfg.channels, len(cfg.channels) - 1
        self.patch, self.factor = cfg.patch, cfg.factor
        self.conv_in = Conv3x3(cfg.pixel_channels * cfg.patch**2, widths[0])
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = VAELevel(widths[max(i - 1, 0)], width, cfg.layers, cfg.groups)
            if i < last:
                level.downsamplers = nn.ModuleList([VAEDownsample(width)])
            self.down_blocks.append(level)
        self.mid_block = MidBlock(widths[-1], cfg.groups, cfg.mid_attention)
        self.conv_norm_out = PictureNorm(cfg.groups, widths[-1], eps=1e-6)
        self.conv_out = Conv3x3(widths[-1], 2 * cfg.latent_channels)

    def forward(self, x: Tensor, tile: int = 0) -> Tensor:
        """`tile`: pixels of the tiles in which all but the coarsest level is computed; 0: whole."""
        x = self.fine(x) if not tile else with_norms_of_all(self, x, tile, OVERLAP, self.factor, self.fine)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(self.down_blocks[-1](x)))))

    def fine(self, x: Tensor) -> Tensor:
        """Up to the coarsest level's size."""
        x = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for level in self.down_blocks[:-1]:
            x = level(x)
        return x


class Decoder(nn.Module):
    """Latents (N, latent_channels, h, w) -> pixels (N, 3, H, W)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths, last = cfg.channels[::-1], len(cfg.channels) - 1
        self.patch, self.factor = cfg.patch, cfg.factor
        self.conv_in = Conv3x3(cfg.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], cfg.groups, cfg.mid_attention)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            level = VAELevel(widths[max(i - 1, 0)], width, cfg.layers + 1, cfg.groups)
            if i < last:
                level.upsamplers = nn.ModuleList([VAEUpsample(width)])
            self.up_blocks.append(level)
        self.conv_norm_out = PictureNorm(cfg.groups, widths[-1], eps=1e-6)
        self.conv_out = Conv3x3(widths[-1], cfg.pixel_channels * cfg.patch**2)

    def forward(self, x: Tensor, tile: int = 0) -> Tensor:
        """`tile`: pixels of the tiles in which all but the coarsest level is computed; 0: whole."""
        x = self.up_blocks[0](self.mid_block(self.conv_in(x)))
        scale = self.factor // 2 if len(self.up_blocks) > 1 else self.factor  # pixels per element
        return self.fine(x) if not tile else with_norms_of_all(self, x, tile // scale, OVERLAP // scale, 1, self.fine)

    def fine(self, x: Tensor) -> Tensor:
        """From the end of the coarsest level to pixels."""
        for level in self.up_blocks[1:]:
            x = level(x)
        return F.pixel_shuffle(self.conv_out(silu(self.conv_norm_out(x))), self.patch)


def own_format(x: Tensor) -> AbstractContextManager[object]:
    """Without gradients autocast stays outside: the weights' number format is one that holds the activations."""
    kind = x.device.type
    inside = torch.amp.is_autocast_available(kind) and not torch.is_grad_enabled()
    return torch.autocast(kind, enabled=False) if inside else nullcontext()


class VAE(nn.Module):
    """Autoencoder with diffusers' parameter names. It computes in its weights' dtype, whatever it is given."""

    quant_conv: nn.Conv2d | None
    post_quant_conv: nn.Conv2d | None

    def __init__(self, cfg: VAEConfig = SD_VAE):
        super().__init__()
        self.cfg = cfg
        latent = cfg.latent_channels
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.register_module("quant_conv", nn.Conv2d(2 * latent, 2 * latent, 1) if cfg.quant_conv else None)
        self.register_module("post_quant_conv", nn.Conv2d(latent, latent, 1) if cfg.quant_conv else None)

    def encode(self, pixels: Tensor, tile: int = 0) -> Posterior:
        """RGB in [-1, 1], (N, 3, H, W) -> distribution of scaled latents (N, C, H / factor, W / factor).

        tile: see `decode`.
        Raises ValueError for sizes that are no multiple of `cfg.factor` and for weights in an unsafe dtype.
        """
        self._check_tile(tile)
        self._check(pixels, self.cfg.pixel_channels, "pixels")
        if any(side % self.cfg.factor for side in pixels.shape[-2:]):
            height, width = pixels.shape[-2:]
            raise ValueError(f"pixels are {height}x{width}; resize them to multiples of {self.cfg.factor}")
        with own_format(pixels):
            moments = self.encoder(self._cast(pixels), tile)
            if self.quant_conv is not None:
                moments = self.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))  # the clamp is part of the trained model
        return Posterior(mean * self.cfg.scaling_factor, std * self.cfg.scaling_factor)

    def decode(self, latents: Tensor, tile: int = 0) -> Tensor:
        """Scaled latents (N, C, h, w) -> RGB around [-1, 1], not clamped, (N, 3, h * factor, w * factor) float32.

        tile: pixels of the square tiles in which all but the coarsest level is computed, a multiple of `cfg.factor`
        above twice `OVERLAP`; they fade into each other. Memory is that of one tile. The result is not quite the
        same: norms have the statistics of the picture made as small as a tile. 0: no tiles.
        Raises ValueError for a wrong shape or tile and for weights in an unsafe dtype.
        """
        self._check_tile(tile)
        self._check(latents, self.cfg.latent_channels, "latents")
        with own_format(latents):
            x = self._cast(latents.float() / self.cfg.scaling_factor)
            if self.post_quant_conv is not None:
                x = self.post_quant_conv(x)
            return self.decoder(x, tile).float()

    def _check(self, x: Tensor, channels: int, what: str) -> None:
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"{what}: expected (N, {channels}, height, width), got {tuple(x.shape)}")
        if not self.cfg.float16_safe and self.encoder.conv_in.weight.dtype == torch.float16:
            raise ValueError("this VAE overflows in float16; load its weights in float32 or bfloat16")

    def _check_tile(self, tile: int) -> None:
        if tile and (tile <= 2 * OVERLAP or tile % self.cfg.factor):
            raise ValueError(f"tile={tile}: expected 0 or a multiple of {self.cfg.factor} above {2 * OVERLAP} pixels")

    def _cast(self, x: Tensor) -> Tensor:
        """In the weights' dtype; on a CPU channels last, in which convolutions are quicker."""
        x = x.to(self.encoder.conv_in.weight.dtype)
        return x.contiguous(memory_format=torch.channels_last) if cpu.applies(x) else x

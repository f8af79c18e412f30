"""ControlNet (Zhang et al., 2302.05543): a copy of the UNet's way down that reads a control picture per frame.

What it returns is added to the UNet's skip connections and middle, `UNet.forward(control=...)`; nothing is put into the
UNet, so a call without it is the base's own. It is a network of pictures: no motion modules, no adapter, frames do not
see each other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from i2v.models.conditioning import ContextKV
from i2v.models.layers import scaled
from i2v.models.unet import SD15, SDXL, Encoder, UNet, UNetConfig, skip_channels

PIXEL_CHANNELS = 3  # of control pictures, which are RGB even where they are grey


@dataclass(frozen=True)
class ControlNetConfig(UNetConfig):
    """The sizes of the UNet that it is for, and of the convolutions from the picture to the latents' size."""

    hint_channels: tuple[int, ...] = (16, 32, 96, 256)  # each but the first halves height and width

    @classmethod
    def of(cls, unet: UNetConfig, hint_channels: tuple[int, ...] = hint_channels) -> ControlNetConfig:
        """For that UNet."""
        fields = {f.name: getattr(unet, f.name) for f in dataclasses.fields(UNetConfig)}
        return cls(**fields, hint_channels=hint_channels)

    @property
    def base(self) -> UNetConfig:
        """Of the UNet that it is for."""
        return UNetConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(UNetConfig)})

    @property
    def factor(self) -> int:
        """Pixels of the picture per latent."""
        return 2 ** (len(self.hint_channels) - 1)


CONTROL_SD15 = ControlNetConfig.of(SD15)
CONTROL_SDXL = ControlNetConfig.of(SDXL)


class HintEmbedding(nn.Module):
    """Convolutions from the picture to the first features of the latents; (N, 3, H, W) -> (N, C, h, w)."""

    def __init__(self, cfg: ControlNetConfig):
        super().__init__()
        widths = cfg.hint_channels
        self.conv_in = nn.Conv2d(PIXEL_CHANNELS, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in zip(widths, widths[1:]):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = _zero(nn.Conv2d(widths[-1], cfg.channels[0], 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv_in, *self.blocks):
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """Residuals for a UNet of the same sizes from latents and control pictures. Parameter names are diffusers'."""

    cfg: ControlNetConfig

    def __init__(self, cfg: ControlNetConfig):
        super().__init__(cfg)
        self.controlnet_cond_embedding = HintEmbedding(cfg)
        self.controlnet_down_blocks = nn.ModuleList(_zero(nn.Conv2d(c, c, 1)) for c in skip_channels(cfg))
        self.controlnet_mid_block = _zero(nn.Conv2d(cfg.channels[-1], cfg.channels[-1], 1))

    def hint(self, pictures: Tensor) -> Tensor:
        """Control pictures (N, 3, H, W) in [0, 1] -> (N, C, h, w): the same at every step.

        Raises ValueError where height or width is no multiple of `cfg.factor`.
        """
        sides = pictures.shape[2:]
        if pictures.ndim != 4 or pictures.shape[1] != PIXEL_CHANNELS or any(side % self.cfg.factor for side in sides):
            raise ValueError(
                f"control pictures are {tuple(pictures.shape)}, expected (N, {PIXEL_CHANNELS}, H, W) with sides that "
                f"are multiples of {self.cfg.factor}"
            )
        return self.controlnet_cond_embedding(pictures)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor | ContextKV,
        hint: Tensor,
        *,
        num_frames: int = 1,
        pooled: Tensor | None = None,
        size_ids: Tensor | None = None,
        scale: float = 1.0,
    ) -> list[Tensor]:
        """Residuals, one per skip connection and one for the middle: what `UNet.forward` takes as `control`.

        latents to size_ids: as for the UNet; a `ContextKV` has to be this network's own. hint: (F, C, h, w) of
        `self.hint`, the same for every clip, or (B*F, C, h, w). scale: factor of every residual.
        Raises ValueError where rows or sizes do not fit.
        """
        if len(hint) not in (num_frames, len(latents)) or hint.shape[2:] != latents.shape[2:]:
            raise ValueError(
                f"the hint is {tuple(hint.shape)}, expected {num_frames} or {len(latents)} rows of the latents' size "
                f"{tuple(latents.shape[2:])}"
            )
        cond = self.conditioning(latents, timesteps, context, num_frames, None, pooled, size_ids, anchor=0)
        clips = len(latents) // len(hint)
        skips, middle = self.down(self.conv_first(latents) + hint.repeat(clips, 1, 1, 1), cond)
        # taken off the list, so that a residual takes the place of the state that it is made of
        out = [scaled(conv(skips.pop(0)), scale) for conv in self.controlnet_down_blocks]
        return [*out, scaled(self.controlnet_mid_block(middle), scale)]


def controlnet_from(unet: UNet, hint_channels: tuple[int, ...] = ControlNetConfig.hint_channels) -> ControlNet:
    """A fresh ControlNet to be trained: the UNet's own way down, copied, and zeros at the end, so it changes nothing.

    It is float32 on the UNet's device. What was put into the UNet (motion modules, adapters) is not copied.
    Deviation: the convolutions from the picture begin with He's variance; under PyTorch's default, which the original
    keeps, eight layers let the picture fade to a thousandth, and it takes long until it is heard.
    """
    net = ControlNet(ControlNetConfig.of(unet.cfg, hint_channels))
    for conv in (net.controlnet_cond_embedding.conv_in, *net.controlnet_cond_embedding.blocks):
        nn.init.kaiming_normal_(conv.weight)
    own, base = net.state_dict(), unet.state_dict()
    net.load_state_dict(own | {key: base[key].float() for key in own if key in base})
    return net.to(unet.conv_in.weight.device)


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv

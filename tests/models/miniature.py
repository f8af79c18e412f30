"""A small UNet for tests of behaviour: built in a second, with every part of the large ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import add_ip_adapter
from i2v.models.motion import MotionConfig, add_motion_modules
from i2v.models.unet import UNet, UNetConfig

CLIPS, FRAMES = 2, 3
CONFIG = UNetConfig(
    channels=(32, 48), depths=(1, 1), heads=(4, 4), context_dim=24, layers=1, groups=16, latent_channels=16
)
MOTION = MotionConfig(8, mid_block=True, resnet_norm_over_frames=True, motion_norm_over_frames=False, heads=4)


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter from a generator of its own: what starts at zero does not hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5 * 0.8 if p.ndim > 1 else p)
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module


def base(config: UNetConfig = CONFIG) -> UNet:
    """The UNet alone."""
    with torch.random.fork_rng(devices=[]):
        unet = UNet(config)
    randomize(unet)
    return unet


def complete(config: UNetConfig = CONFIG, motion: MotionConfig = MOTION) -> UNet:
    """With motion modules, I2V-Adapter and IP-Adapter, none of them fresh."""
    unet = base(config)
    with torch.random.fork_rng(devices=[]):
        add_motion_modules(unet, motion)
        add_i2v_adapter(unet)
        add_ip_adapter(unet)
    randomize(unet, 1)
    return unet


def inputs(
    seed: int = 2, clips: int = CLIPS, frames: int = FRAMES, side: tuple[int, int] = (8, 8)
) -> dict[str, Tensor]:
    """Keyword arguments of a call, one row of text, image tokens and timestep per clip."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "latents": draw(clips * frames, CONFIG.latent_channels, *side),
        "timesteps": torch.randint(0, 1000, (clips,), generator=generator),
        "context": draw(clips, 7, CONFIG.context_dim),
        "image_tokens": draw(clips, 4, CONFIG.context_dim),
    }

"""The VAE against diffusers' AutoencoderKL: same keys, same posterior, same pixels."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from i2v.models.vae import VAE, VAEConfig

diffusers: ModuleType = pytest.importorskip("diffusers")

TOLERANCE = 2e-5
SMALL = VAEConfig(channels=(16, 32), layers=1, groups=8)
CONFIGS = {
    "two_levels": SMALL,
    "sd_shape": VAEConfig(channels=(8, 16, 16, 16), layers=2, groups=4),
    "no_mid_attention": VAEConfig(channels=(16, 32), layers=1, groups=8, mid_attention=False),
    "wide_latent_no_quant": VAEConfig((16, 32, 32), 1, 16, scaling_factor=0.3, groups=16, quant_conv=False),
}


def original(cfg: VAEConfig) -> nn.Module:
    """diffusers' network of that config, with random weights that are not small: each layer must show."""
    levels = len(cfg.channels)
    module: nn.Module = diffusers.AutoencoderKL(
        block_out_channels=cfg.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=cfg.layers,
        latent_channels=cfg.latent_channels,
        norm_num_groups=cfg.groups,
        mid_block_add_attention=cfg.mid_attention,
        use_quant_conv=cfg.quant_conv,
        use_post_quant_conv=cfg.quant_conv,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def both(cfg: VAEConfig) -> tuple[VAE, Any]:
    theirs = original(cfg)
    ours = VAE(cfg)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs


@torch.no_grad()
def errors(ours: VAE, theirs: Any, height: int, width: int) -> dict[str, float]:
    """Largest differences, relative to the largest value."""
    cfg = ours.cfg
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
    posterior, expected = ours.encode(pixels), theirs.encode(pixels).latent_dist
    latents = torch.randn(posterior.mean.shape, generator=generator)
    pairs = {
        "mean": (posterior.mean / cfg.scaling_factor, expected.mean),
        "std": (posterior.std / cfg.scaling_factor, expected.std),
        "pixels": (ours.decode(latents * cfg.scaling_factor), theirs.decode(latents).sample),
    }
    assert all(a.shape == b.shape for a, b in pairs.values())
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(16, 16), (32, 8), (24, 40)])
def test_encode_and_decode(name: str, size: tuple[int, int]) -> None:
    found = errors(*both(CONFIGS[name]), *size)
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("fault", ["padding", "attention", "eps", "shortcut"])
def test_a_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = both(SMALL)
    if fault == "padding":  # on all sides, as in the UNet
        monkeypatch.setattr("i2v.models.vae.VAEDownsample.forward", lambda self, x: nn.functional.conv2d(
            x, self.conv.weight, self.conv.bias, stride=2, padding=1))  # fmt: skip
    elif fault == "attention":
        monkeypatch.setattr("i2v.models.vae.VAEAttention.forward", lambda self, x: x)
    elif fault == "eps":
        for module in ours.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = 1e-2
    else:
        level: Any = ours.decoder.up_blocks[1]
        level.resnets[0].conv_shortcut.bias.data.zero_()
    assert max(errors(ours, theirs, 16, 16).values()) > 20 * TOLERANCE

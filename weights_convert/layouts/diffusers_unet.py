"""diffusers' naming of the UNet: our own names, so every rule keeps the key."""

from __future__ import annotations

from i2v.models.unet import UNetConfig
from weights_convert.layouts.ldm_unet import ldm_unet
from weights_convert.rules import Rename, Rule


def diffusers_unet(cfg: UNetConfig) -> list[Rule]:
    """Rules for `unet/diffusion_pytorch_model.safetensors`."""
    return [Rename(rule.inverted().source, rule.target) for rule in ldm_unet(cfg) if isinstance(rule, Rename)]

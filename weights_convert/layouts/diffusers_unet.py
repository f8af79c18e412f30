"""diffusers' naming of the UNet: our own names, so every rule keeps the key."""

from __future__ import annotations

from dataclasses import replace

from i2v.models.unet import SD15, SDXL, UNetConfig
from weights_convert.layout import Layout, always
from weights_convert.layouts.animatediff import QUERY
from weights_convert.layouts.ldm_unet import ldm_unet
from weights_convert.layouts.transformer_blocks import FIRST, TO_K
from weights_convert.rules import Rename, Rule


def kept(rules: list[Rule]) -> list[Rule]:
    """The same targets, from files that use them as names already."""
    return [replace(rule, source=rule.inverted().source) for rule in rules if isinstance(rule, Rename)]


def diffusers_unet(cfg: UNetConfig) -> list[Rule]:
    """Rules for `unet/diffusion_pytorch_model.safetensors`."""
    return kept(ldm_unet(cfg))


LAYOUTS = (
    Layout(
        "sd15-unet-diffusers",
        "Stable Diffusion 1.5's UNet alone, diffusers' names",
        kind="UNet",
        fits=("sd15",),
        parts=("unet",),
        has={"conv_in.weight": (320, 4, 3, 3), f"{FIRST['sd15']}.attn2.to_k.weight": TO_K["sd15"]},
        build=always(lambda: diffusers_unet(SD15), "unet."),
        lacks=(f"{FIRST['sd15']}.attn2.to_k_ip.weight", QUERY, "controlnet_mid_block.weight"),
        configs={"unet": SD15},
    ),
    Layout(
        "sdxl-unet-diffusers",
        "SDXL's UNet alone, diffusers' names",
        kind="UNet",
        fits=("sdxl",),
        parts=("unet",),
        has={"conv_in.weight": (320, 4, 3, 3), "add_embedding.linear_1.weight": (1280, 2816)},
        build=always(lambda: diffusers_unet(SDXL), "unet."),
        lacks=("controlnet_mid_block.weight",),
        configs={"unet": SDXL},
    ),
)

"""IP-Adapter files: the projection of the image features and the numbered attentions."""

from __future__ import annotations

from i2v.models.ip_adapter import (
    IP_PLUS_SD15,
    IP_PLUS_SDXL_VIT_H,
    IP_SD15,
    IP_SDXL,
    IP_SDXL_VIT_H,
    IPAdapterConfig,
)
from i2v.models.unet import SD15, SDXL, UNetConfig
from weights_convert.layout import Layout, Shape, always
from weights_convert.layouts.transformer_blocks import TO_K, transformer_blocks
from weights_convert.rules import Rename, Rule

PROJECTIONS = {
    "linear": ("proj.weight", "proj.bias", "norm.weight", "norm.bias"),
    "plus": (
        "latents",
        "{layer:proj_in|proj_out|norm_out}.{p:weight|bias}",
        r"layers.{n:\d+}.0.{layer:norm1|norm2}.{p:weight|bias}",
        r"layers.{n:\d+}.0.{layer:to_q|to_kv|to_out}.weight",
        r"layers.{n:\d+}.1.0.{p:weight|bias}",
        r"layers.{n:\d+}.1.{layer:1|3}.weight",
    ),
}


def image_projection(kind: str) -> list[Rule]:
    """The projection alone, "linear" or "plus"; its names are kept."""
    return [Rename(template, template) for template in PROJECTIONS[kind]]


def ip_attentions(cfg: UNetConfig, target: str = "") -> list[Rule]:
    """`N.to_k_ip.weight`: N counts the self- and cross-attentions of all blocks in turn, so only odd numbers occur.

    The way up comes before the middle. The widths of many attentions are equal, so a wrong order would load.
    """
    return [
        Rename(f"{2 * n + 1}.to_{{kv:k|v}}_ip.weight", f"{target}{path}.ip_adapter.to_{{kv}}_ip.weight", expect=2)
        for n, path in enumerate(transformer_blocks(cfg))
    ]


def ip_adapter(cfg: UNetConfig, kind: str) -> list[Rule]:
    """A published file, towards `image_proj...` and `ip_adapter.<path in the UNet>.ip_adapter...`.

    The nested .bin and the flat safetensors have the same keys once read.
    """
    return [
        *(rule.prefixed("image_proj.", "image_proj.") for rule in image_projection(kind)),
        *(rule.prefixed("ip_adapter.", "ip_adapter.") for rule in ip_attentions(cfg)),
    ]


def _layout(name: str, sign: str, shape: Shape, config: IPAdapterConfig, encoder: str) -> Layout:
    base, unet = ("sd15", SD15) if config.context_dim == SD15.context_dim else ("sdxl", SDXL)
    return Layout(
        name,
        f"IP-Adapter{'-plus' if config.kind == 'plus' else ''} for {base.upper()} and {encoder}",
        kind="IP-Adapter",
        fits=(base,),
        parts=("ip_adapter",),
        has={"ip_adapter.1.to_k_ip.weight": TO_K[base], f"image_proj.{sign}": shape},
        build=always(lambda: ip_adapter(unet, config.kind), "ip_adapter."),
        configs={"ip_adapter": config},
        note=f"reads the features of {encoder}",
    )


VIT_H, VIT_BIGG = "CLIP ViT-H/14", "CLIP ViT-bigG/14"
LAYOUTS = (
    _layout("ip-adapter-sd15", "proj.weight", (3072, 1024), IP_SD15, VIT_H),
    _layout("ip-adapter-plus-sd15", "proj_out.weight", (768, 768), IP_PLUS_SD15, VIT_H),
    _layout("ip-adapter-sdxl", "proj.weight", (8192, 1280), IP_SDXL, VIT_BIGG),
    _layout("ip-adapter-sdxl-vit-h", "proj.weight", (8192, 1024), IP_SDXL_VIT_H, VIT_H),
    _layout("ip-adapter-plus-sdxl-vit-h", "proj_out.weight", (2048, 1280), IP_PLUS_SDXL_VIT_H, VIT_H),
)

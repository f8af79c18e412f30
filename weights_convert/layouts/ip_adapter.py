"""IP-Adapter files: the projection of the image features and the numbered attentions."""

from __future__ import annotations

from i2v.models.unet import UNetConfig
from weights_convert.layouts.transformer_blocks import transformer_blocks
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

"""The released I2V-Adapter: animatediff_v15_v1_ipplus.pth (a whole UNet) and i2v_module.pth (the adapter)."""

from __future__ import annotations

from i2v.models.motion import MotionConfig
from i2v.models.unet import UNetConfig
from weights_convert.layouts.animatediff import animatediff
from weights_convert.layouts.diffusers_unet import diffusers_unet
from weights_convert.layouts.transformer_blocks import transformer_blocks
from weights_convert.rules import Rename, Rule

BLOCK = r"{block*}.transformer_blocks.{n:\d+}"


def i2v_module(cfg: UNetConfig) -> list[Rule]:
    """The trained parameters alone: W_Q' and W_O' of every spatial self-attention."""
    count = len(transformer_blocks(cfg))
    return [
        Rename(f"{BLOCK}.attn1.to_q_ff.weight", f"{BLOCK}.i2v_adapter.to_q.weight", expect=count),
        Rename(f"{BLOCK}.attn1.to_out_ff.{{p:weight|bias}}", f"{BLOCK}.i2v_adapter.to_out.{{p}}", expect=2 * count),
    ]


def ip_attention(cfg: UNetConfig) -> list[Rule]:
    """The keys and values of the image tokens, named inside the UNet's cross-attentions."""
    count = 2 * len(transformer_blocks(cfg))
    return [Rename(f"{BLOCK}.attn2.to_{{kv:k|v}}_ip.weight", f"{BLOCK}.ip_adapter.to_{{kv}}_ip.weight", expect=count)]


def ipplus_unet(cfg: UNetConfig, motion: MotionConfig) -> list[Rule]:
    """The base file: SD1.5, motion modules and IP-Adapter-plus attentions, without the adapter's own parameters."""
    return [*ip_attention(cfg), *animatediff(motion), *diffusers_unet(cfg)]


def full_unet(cfg: UNetConfig, motion: MotionConfig) -> list[Rule]:
    """Everything in one state dict: the base file with the adapter loaded on top."""
    return [*i2v_module(cfg), *ipplus_unet(cfg, motion)]

"""The released I2V-Adapter: animatediff_v15_v1_ipplus.pth (a whole UNet) and i2v_module.pth (the adapter)."""

from __future__ import annotations

from i2v.models.motion import MOTION_V1, MotionConfig
from i2v.models.unet import SD15, SDXL, UNetConfig
from weights_convert.layout import Layout, always
from weights_convert.layouts.animatediff import QUERY, SCHEDULES, animatediff
from weights_convert.layouts.diffusers_unet import diffusers_unet
from weights_convert.layouts.transformer_blocks import FIRST, TO_K, transformer_blocks
from weights_convert.rules import Rename, Rule, prefixed

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


def _parts_of_ipplus() -> list[Rule]:
    """The base file, each adapter towards its own part."""
    return [
        *prefixed(ip_attention(SD15), "", "ip_adapter.ip_adapter."),
        *prefixed(animatediff(MOTION_V1), "", "motion."),
        *prefixed(diffusers_unet(SD15), "", "unet."),
    ]


def _parts_of_full() -> list[Rule]:
    return [*prefixed(i2v_module(SD15), "", "i2v_adapter."), *_parts_of_ipplus()]


QUERY_FF = {base: f"{first}.attn1.to_q_ff.weight" for base, first in FIRST.items()}
IMAGE_KEYS = f"{FIRST['sd15']}.attn2.to_k_ip.weight"
PROJECTION = "the IP-Adapter's projection is a file of its own (ip-adapter-plus_sd15)"
CONFIGS = {"unet": SD15, "motion": MOTION_V1}

LAYOUTS = (
    Layout(
        "i2v-adapter-base",
        "the authors' UNet with AnimateDiff v1 and IP-Adapter-plus (animatediff_v15_v1_ipplus)",
        kind="UNet with adapters",
        fits=("sd15",),
        parts=("unet", "motion", "ip_adapter"),
        has={"conv_in.weight": (320, 4, 3, 3), QUERY: None, IMAGE_KEYS: TO_K["sd15"]},
        build=always(_parts_of_ipplus),
        lacks=(QUERY_FF["sd15"],),
        configs=CONFIGS,
        schedule=SCHEDULES["sd15"],
        note=PROJECTION,
    ),
    Layout(
        "i2v-adapter-full",
        "the authors' UNet with all adapters, the I2V-Adapter too",
        kind="UNet with adapters",
        fits=("sd15",),
        parts=("unet", "motion", "ip_adapter", "i2v_adapter"),
        has={"conv_in.weight": (320, 4, 3, 3), QUERY: None, QUERY_FF["sd15"]: (320, 320)},
        build=always(_parts_of_full),
        configs=CONFIGS,
        schedule=SCHEDULES["sd15"],
        note=PROJECTION,
    ),
    Layout(
        "i2v-adapter-sd15",
        "the authors' I2V-Adapter for Stable Diffusion 1.5 (i2v_module)",
        kind="I2V-Adapter",
        fits=("sd15",),
        parts=("i2v_adapter",),
        has={QUERY_FF["sd15"]: (320, 320)},
        build=always(lambda: i2v_module(SD15), "i2v_adapter."),
        lacks=("conv_in.weight",),
    ),
    Layout(
        "i2v-adapter-sdxl",
        "an I2V-Adapter for SDXL in the authors' names",
        kind="I2V-Adapter",
        fits=("sdxl",),
        parts=("i2v_adapter",),
        has={QUERY_FF["sdxl"]: (640, 640)},
        build=always(lambda: i2v_module(SDXL), "i2v_adapter."),
        lacks=("conv_in.weight", QUERY_FF["sd15"]),
    ),
)

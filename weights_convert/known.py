"""Every published file format that is read: how it is told from the others, its rules, and what it settles."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from i2v.models.clip_text import CLIP_L, OPENCLIP_BIGG, CLIPTextConfig
from i2v.models.clip_vision import VIT_B32, VIT_BIGG14, VIT_H14, VIT_L14
from i2v.models.ip_adapter import IP_PLUS_SD15, IP_PLUS_SDXL_VIT_H, IP_SD15, IP_SDXL, IP_SDXL_VIT_H
from i2v.models.motion import MOTION_SDXL, MOTION_V1, MOTION_V2, MOTION_V3
from i2v.models.unet import SD15, SDXL
from i2v.models.vae import SD_VAE, SDXL_VAE
from weights_convert.layouts.animatediff import animatediff
from weights_convert.layouts.clip import clip_both, clip_text, clip_vision, openclip_text
from weights_convert.layouts.diffusers_unet import diffusers_unet
from weights_convert.layouts.ip_adapter import ip_adapter
from weights_convert.layouts.ldm_unet import ldm_unet
from weights_convert.layouts.official_i2v import i2v_module, ip_attention
from weights_convert.layouts.single_file import sd15_single_file, sdxl_single_file
from weights_convert.layouts.vae import vae_diffusers, vae_ldm_file
from weights_convert.refusals import fits
from weights_convert.rules import Rule, prefixed

Shape = tuple[int | None, ...]
# From the file's keys (None: it is to be written) and whether the running average is wanted.
Build = Callable[[Collection[str] | None, bool], list[Rule]]


@dataclass(frozen=True)
class Layout:
    """A published file format: how it is told from others, its rules, and the configs of the parts in it.

    `has` are keys with their shapes (None for any size; None as a whole for any shape), `lacks` are keys that belong
    to a larger format. `configs` names what the format settles; an autoencoder does not say which base it is of.
    """

    name: str
    has: Mapping[str, Shape | None]
    build: Build
    lacks: tuple[str, ...] = ()
    configs: Mapping[str, Any] = field(default_factory=dict)

    def unmet(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Signs that are not there, in words."""
        wrong = []
        for key, shape in self.has.items():
            if key not in tensors:
                wrong.append(f"no {key}")
            elif not fits(tuple(tensors[key].shape), shape):
                wrong.append(f"{key} is {tuple(tensors[key].shape)}, expected {_shown(shape)}")
        return wrong + [f"there is {key}" for key in self.lacks if key in tensors]

    def near(self, tensors: Mapping[str, Tensor]) -> float:
        """How many of the signs are there, 0 to 1; for messages."""
        return sum(key in tensors for key in self.has) / len(self.has)


def _shown(shape: Shape | None) -> str:
    return "any" if shape is None else "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"


def _always(rules: Callable[[], list[Rule]], target: str = "") -> Build:
    """Rules that depend on nothing in the file, towards the part's prefix."""
    return lambda keys, ema: prefixed(rules(), "", target)


CLIP_B32 = CLIPTextConfig(hidden_size=512, intermediate_size=2048, num_heads=8, projection_dim=512)
IN, LEVEL = "model.diffusion_model.input_blocks", "transformer_blocks.0"
TO_K = {"sd15": (320, 768), "sdxl": (640, 2048)}
FIRST = {"sd15": "down_blocks.0", "sdxl": "down_blocks.1"}
MOTION = "motion_modules.0.temporal_transformer"
PE = f"down_blocks.0.{MOTION}.{LEVEL}.attention_blocks.0.pos_encoder.pe"
QUERY = f"down_blocks.0.{MOTION}.{LEVEL}.attention_blocks.0.to_q.weight"
MIDDLE = f"mid_block.{MOTION}.norm.weight"


def _first(base: str, leaf: str) -> str:
    return f"{FIRST[base]}.attentions.0.{LEVEL}.{leaf}"


def _ip(name: str, base: str, kind: str, sign: str, shape: Shape, config: Any) -> Layout:
    unet = SD15 if base == "sd15" else SDXL
    return Layout(
        name,
        {"ip_adapter.1.to_k_ip.weight": TO_K[base], f"image_proj.{sign}": shape},
        _always(lambda: ip_adapter(unet, kind), "ip_adapter."),
        configs={"ip_adapter": config},
    )


def _text(name: str, width: int, projection: bool, config: CLIPTextConfig) -> Layout:
    projected = "text_projection.weight"
    has: dict[str, Shape | None] = {"text_model.embeddings.token_embedding.weight": (None, width)}
    lacks = ["vision_model.embeddings.class_embedding"]
    if projection:
        has[projected] = None
    else:
        lacks.append(projected)
    build = _always(lambda: clip_text(projection=projection), "text_encoder.")
    return Layout(name, has, build, tuple(lacks), {"text_encoder": config})


def _vision(name: str, width: int, out: int, config: Any) -> Layout:
    return Layout(
        name,
        {"vision_model.embeddings.class_embedding": (width,), "visual_projection.weight": (out, width)},
        _always(clip_vision, "image_encoder."),
        lacks=("text_model.embeddings.token_embedding.weight",),
        configs={"image_encoder": config},
    )


def _ipplus() -> list[Rule]:
    """The released UNet file, each adapter towards its own part."""
    return [
        *prefixed(ip_attention(SD15), "", "ip_adapter.ip_adapter."),
        *prefixed(animatediff(MOTION_V1), "", "motion."),
        *prefixed(diffusers_unet(SD15), "", "unet."),
    ]


def _full() -> list[Rule]:
    return [*prefixed(i2v_module(SD15), "", "i2v_adapter."), *_ipplus()]


LAYOUTS = (
    Layout(
        "sd15-single-file",
        {f"{IN}.0.0.weight": (320, 4, 3, 3), f"{IN}.1.1.{LEVEL}.attn2.to_k.weight": TO_K["sd15"]},
        lambda keys, ema: sd15_single_file(SD15, SD_VAE, keys, ema),
        configs={"unet": SD15, "vae": SD_VAE, "text_encoder": CLIP_L},
    ),
    Layout(
        "sdxl-single-file",
        {f"{IN}.0.0.weight": (320, 4, 3, 3), "model.diffusion_model.label_emb.0.0.weight": (1280, 2816)},
        lambda keys, ema: sdxl_single_file(SDXL, SDXL_VAE, keys, ema),
        configs={"unet": SDXL, "vae": SDXL_VAE, "text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIGG},
    ),
    Layout(
        "sd15-unet-ldm",
        {"input_blocks.0.0.weight": (320, 4, 3, 3), f"input_blocks.1.1.{LEVEL}.attn2.to_k.weight": TO_K["sd15"]},
        _always(lambda: ldm_unet(SD15), "unet."),
        configs={"unet": SD15},
    ),
    Layout(
        "sdxl-unet-ldm",
        {"input_blocks.0.0.weight": (320, 4, 3, 3), "label_emb.0.0.weight": (1280, 2816)},
        _always(lambda: ldm_unet(SDXL), "unet."),
        configs={"unet": SDXL},
    ),
    Layout(
        "sd15-unet-diffusers",
        {"conv_in.weight": (320, 4, 3, 3), _first("sd15", "attn2.to_k.weight"): TO_K["sd15"]},
        _always(lambda: diffusers_unet(SD15), "unet."),
        lacks=(_first("sd15", "attn2.to_k_ip.weight"), QUERY),
        configs={"unet": SD15},
    ),
    Layout(
        "sdxl-unet-diffusers",
        {"conv_in.weight": (320, 4, 3, 3), "add_embedding.linear_1.weight": (1280, 2816)},
        _always(lambda: diffusers_unet(SDXL), "unet."),
        configs={"unet": SDXL},
    ),
    Layout(
        "i2v-adapter-base",  # animatediff_v15_v1_ipplus.pth
        {"conv_in.weight": (320, 4, 3, 3), QUERY: None, _first("sd15", "attn2.to_k_ip.weight"): TO_K["sd15"]},
        _always(_ipplus),
        lacks=(_first("sd15", "attn1.to_q_ff.weight"),),
        configs={"unet": SD15, "motion": MOTION_V1},
    ),
    Layout(
        "i2v-adapter-full",
        {"conv_in.weight": (320, 4, 3, 3), QUERY: None, _first("sd15", "attn1.to_q_ff.weight"): (320, 320)},
        _always(_full),
        configs={"unet": SD15, "motion": MOTION_V1},
    ),
    Layout(
        "i2v-adapter-sd15",  # i2v_module.pth
        {_first("sd15", "attn1.to_q_ff.weight"): (320, 320)},
        _always(lambda: i2v_module(SD15), "i2v_adapter."),
        lacks=("conv_in.weight",),
    ),
    Layout(
        "i2v-adapter-sdxl",
        {_first("sdxl", "attn1.to_q_ff.weight"): (640, 640)},
        _always(lambda: i2v_module(SDXL), "i2v_adapter."),
        lacks=("conv_in.weight", _first("sd15", "attn1.to_q_ff.weight")),
    ),
    Layout(
        "animatediff-v1",  # mm_sd_v14, mm_sd_v15
        {QUERY: (320, 320), PE: (1, 24, 320), f"down_blocks.3.{MOTION}.norm.weight": (1280,)},
        _always(lambda: animatediff(MOTION_V1), "motion."),
        lacks=("conv_in.weight", MIDDLE),
        configs={"motion": MOTION_V1},
    ),
    Layout(
        "animatediff-v2",
        {QUERY: (320, 320), MIDDLE: (1280,)},
        _always(lambda: animatediff(MOTION_V2), "motion."),
        lacks=("conv_in.weight",),
        configs={"motion": MOTION_V2},
    ),
    Layout(
        "animatediff-v3",
        {QUERY: (320, 320), PE: (1, 32, 320), f"down_blocks.3.{MOTION}.norm.weight": (1280,)},
        _always(lambda: animatediff(MOTION_V3), "motion."),
        lacks=("conv_in.weight", MIDDLE),
        configs={"motion": MOTION_V3},
    ),
    Layout(
        "animatediff-sdxl",
        {QUERY: (320, 320), f"down_blocks.2.{MOTION}.norm.weight": (1280,)},
        _always(lambda: animatediff(MOTION_SDXL), "motion."),
        lacks=("conv_in.weight", MIDDLE, f"down_blocks.3.{MOTION}.norm.weight"),
        configs={"motion": MOTION_SDXL},
    ),
    _ip("ip-adapter-sd15", "sd15", "linear", "proj.weight", (3072, 1024), IP_SD15),
    _ip("ip-adapter-plus-sd15", "sd15", "plus", "proj_out.weight", (768, 768), IP_PLUS_SD15),
    _ip("ip-adapter-sdxl", "sdxl", "linear", "proj.weight", (8192, 1280), IP_SDXL),
    _ip("ip-adapter-sdxl-vit-h", "sdxl", "linear", "proj.weight", (8192, 1024), IP_SDXL_VIT_H),
    _ip("ip-adapter-plus-sdxl-vit-h", "sdxl", "plus", "proj_out.weight", (2048, 1280), IP_PLUS_SDXL_VIT_H),
    Layout(
        "vae-ldm",
        {"encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3), "quant_conv.weight": (8, 8, 1, 1)},
        _always(lambda: vae_ldm_file(SD_VAE), "vae."),
    ),
    Layout(
        "vae-diffusers",
        {"encoder.mid_block.attentions.0.to_q.weight": (512, 512), "quant_conv.weight": (8, 8, 1, 1)},
        _always(lambda: vae_diffusers(SD_VAE), "vae."),
    ),
    Layout(
        "vae-diffusers-old",
        {"encoder.mid_block.attentions.0.query.weight": (512, 512), "quant_conv.weight": (8, 8, 1, 1)},
        _always(lambda: vae_diffusers(SD_VAE, old=True), "vae."),
    ),
    _text("clip-text-l", 768, projection=False, config=CLIP_L),
    _text("clip-text-bigg", 1280, projection=True, config=OPENCLIP_BIGG),
    Layout(
        "openclip-text-bigg",
        {"positional_embedding": (77, 1280), "transformer.resblocks.0.attn.in_proj_weight": (3840, 1280)},
        _always(openclip_text, "text_encoder."),
        lacks=("visual.proj",),
        configs={"text_encoder": OPENCLIP_BIGG},
    ),
    Layout(
        "clip-l14",
        {"text_projection.weight": (768, 768), "visual_projection.weight": (768, 1024), "logit_scale": ()},
        _always(clip_both),
        configs={"text_encoder": replace(CLIP_L, projection_dim=768), "image_encoder": VIT_L14},
    ),
    Layout(
        "clip-b32",
        {"text_projection.weight": (512, 512), "visual_projection.weight": (512, 768), "logit_scale": ()},
        _always(clip_both),
        configs={"text_encoder": CLIP_B32, "image_encoder": VIT_B32},
    ),
    _vision("clip-vision-h14", 1280, 1024, VIT_H14),
    _vision("clip-vision-bigg14", 1664, 1280, VIT_BIGG14),
)

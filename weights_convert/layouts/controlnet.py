"""ControlNet in original and in diffusers' names, towards diffusers', which are our own."""

from __future__ import annotations

from collections.abc import Callable, Collection

from i2v.models.clip_text import CLIP_L
from i2v.models.controlnet import CONTROL_SD15, CONTROL_SDXL
from i2v.models.unet import SD15, SDXL, UNetConfig, skip_channels
from i2v.models.vae import SD_VAE
from weights_convert.layout import Layout, Shape, always
from weights_convert.layouts.diffusers_unet import kept
from weights_convert.layouts.ldm_unet import ldm_down
from weights_convert.layouts.single_file import sd15_single_file
from weights_convert.layouts.transformer_blocks import FIRST, TO_K
from weights_convert.rules import Rename, Rule, prefixed

HINTS = ("conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out")  # convolutions from the picture to the latents
PREFIX, PART = "control_model.", "controlnet."
CONFIGS = {"sd15": CONTROL_SD15, "sdxl": CONTROL_SDXL}
NOTE = "its content does not say for which pictures it was trained; sample.py takes it as --controlnet TYPE=FILE"


def controlnet_ldm(cfg: UNetConfig) -> list[Rule]:
    """Rules without a prefix; most files begin their keys with `control_model.`."""
    both = "{p:weight|bias}"
    rules: list[Rule] = [
        Rename(f"input_hint_block.{2 * i}.{both}", f"controlnet_cond_embedding.{name}.{both}", expect=2)
        for i, name in enumerate(HINTS)
    ]
    rules += [
        Rename(f"zero_convs.{i}.0.{both}", f"controlnet_down_blocks.{i}.{both}", expect=2)
        for i in range(len(skip_channels(cfg)))
    ]
    rules.append(Rename(f"middle_block_out.0.{both}", f"controlnet_mid_block.{both}", expect=2))
    return rules + ldm_down(cfg)


def controlnet_diffusers(cfg: UNetConfig) -> list[Rule]:
    """diffusers' ControlNetModel."""
    return kept(controlnet_ldm(cfg))


def _whole(keys: Collection[str] | None, ema: bool) -> list[Rule]:
    """The first releases hold the base model too."""
    rules = sd15_single_file(SD15, SD_VAE, None if keys is None else [k for k in keys if not k.startswith(PREFIX)], ema)
    return [*prefixed(controlnet_ldm(SD15), PREFIX, PART), *rules]


def _layout(name: str, base: str, names: str, has: dict[str, Shape | None], rules: Callable[[], list[Rule]]) -> Layout:
    return Layout(
        f"controlnet-{base}-{name}",
        f"a ControlNet for {base.upper()}, {names} names",
        kind="ControlNet",
        fits=(base,),
        parts=("controlnet",),
        has=has,
        build=always(rules, PART),
        lacks=("model.diffusion_model.input_blocks.0.0.weight",),
        configs={"controlnet": CONFIGS[base]},
        note=NOTE,
    )


def _layouts(base: str, cfg: UNetConfig) -> tuple[Layout, ...]:
    hint: Shape = (16, 3, 3, 3)
    key: tuple[str, Shape] = ("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", TO_K["sd15"])
    theirs: tuple[str, Shape] = (f"{FIRST['sd15']}.attn2.to_k.weight", TO_K["sd15"])
    if base == "sdxl":
        key = theirs = ("label_emb.0.0.weight", (1280, 2816))
        theirs = ("add_embedding.linear_1.weight", (1280, 2816))
    return (
        _layout(
            "ldm",
            base,
            "original",
            {f"{PREFIX}input_hint_block.0.weight": hint, PREFIX + key[0]: key[1]},
            lambda: prefixed(controlnet_ldm(cfg), PREFIX),
        ),
        _layout(
            "ldm-bare",
            base,
            "original",
            {"input_hint_block.0.weight": hint, key[0]: key[1]},
            lambda: controlnet_ldm(cfg),
        ),
        _layout(
            "diffusers",
            base,
            "diffusers'",
            {"controlnet_cond_embedding.conv_in.weight": hint, theirs[0]: theirs[1]},
            lambda: controlnet_diffusers(cfg),
        ),
    )


LAYOUTS = (
    *_layouts("sd15", SD15),
    *_layouts("sdxl", SDXL),
    Layout(
        "controlnet-sd15-whole",
        "a ControlNet of the first release, with Stable Diffusion 1.5 in the same file",
        kind="ControlNet",
        fits=("sd15",),
        parts=("controlnet", "unet", "vae", "text_encoder"),
        has={
            f"{PREFIX}input_hint_block.0.weight": (16, 3, 3, 3),
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": TO_K["sd15"],
        },
        build=_whole,
        configs={"unet": SD15, "vae": SD_VAE, "text_encoder": CLIP_L, "controlnet": CONTROL_SD15},
        note=NOTE,
    ),
)

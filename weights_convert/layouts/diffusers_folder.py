"""A whole pipeline as diffusers saves it: a folder of folders, whose keys are read as `unet.<key>`, `vae.<key>`..."""

from __future__ import annotations

from collections.abc import Collection

from i2v.models.clip_text import CLIP_L, OPENCLIP_BIGG
from i2v.models.unet import SD15, SDXL, UNetConfig
from i2v.models.vae import SD_VAE, SDXL_VAE, VAEConfig
from weights_convert.layout import Layout
from weights_convert.layouts.clip import clip_text
from weights_convert.layouts.diffusers_unet import diffusers_unet
from weights_convert.layouts.single_file import SCHEDULE
from weights_convert.layouts.transformer_blocks import FIRST, TO_K
from weights_convert.layouts.vae import ATTENTION, vae_diffusers
from weights_convert.rules import Rule, prefixed

SUBFOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2")
OLD = tuple(f".{old}." for new, old in ATTENTION.values() if new != old)


def diffusers_folder(unet: UNetConfig, vae: VAEConfig, keys: Collection[str] | None) -> list[Rule]:
    """Rules for the joined keys. The text encoder of SD1.5's folder holds `position_ids`, SDXL's do not.

    The autoencoder is in old or new names, whichever the file has, and is written in the new ones. `vae` and the
    text encoders may be absent.
    """
    there = set(SUBFOLDERS) if keys is None else {key.split(".", 1)[0] for key in keys}
    sdxl = bool(unet.pooled_dim)
    rules = prefixed(diffusers_unet(unet), "unet.", "unet.")
    if "vae" in there:
        old = keys is not None and any(key.startswith("vae.") and any(word in key for word in OLD) for key in keys)
        rules += prefixed(vae_diffusers(vae, old=old), "vae.", "vae.")
    if "text_encoder" in there:
        rules += prefixed(clip_text(position_ids=not sdxl), "text_encoder.", "text_encoder.")
    if sdxl and "text_encoder_2" in there:
        rules += prefixed(clip_text(projection=True), "text_encoder_2.", "text_encoder_2.")
    return rules


LAYOUTS = (
    Layout(
        "sd15-diffusers-folder",
        "Stable Diffusion 1.5 as a diffusers folder",
        kind="checkpoint",
        fits=("sd15",),
        parts=("unet", "vae", "text_encoder"),
        has={"unet.conv_in.weight": (320, 4, 3, 3), f"unet.{FIRST['sd15']}.attn2.to_k.weight": TO_K["sd15"]},
        build=lambda keys, ema: diffusers_folder(SD15, SD_VAE, keys),
        configs={"unet": SD15, "vae": SD_VAE, "text_encoder": CLIP_L},
        schedule=SCHEDULE,
    ),
    Layout(
        "sdxl-diffusers-folder",
        "SDXL as a diffusers folder",
        kind="checkpoint",
        fits=("sdxl",),
        parts=("unet", "vae", "text_encoder", "text_encoder_2"),
        has={"unet.conv_in.weight": (320, 4, 3, 3), "unet.add_embedding.linear_1.weight": (1280, 2816)},
        build=lambda keys, ema: diffusers_folder(SDXL, SDXL_VAE, keys),
        configs={"unet": SDXL, "vae": SDXL_VAE, "text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIGG},
        schedule=SCHEDULE,
    ),
)

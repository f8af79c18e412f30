"""Stable Diffusion 1.5 and SDXL in one file: UNet, autoencoder and text encoders, towards one prefix per part."""

from __future__ import annotations

import logging
from collections.abc import Collection

from i2v.models.clip_text import CLIP_L, OPENCLIP_BIGG
from i2v.models.unet import SD15, SDXL, UNetConfig
from i2v.models.vae import SD_VAE, SDXL_VAE, VAEConfig
from weights_convert.layout import Layout
from weights_convert.layouts.clip import clip_text
from weights_convert.layouts.ldm_unet import ldm_unet
from weights_convert.layouts.openclip import openclip_text
from weights_convert.layouts.transformer_blocks import TO_K
from weights_convert.layouts.vae import vae_ldm_file
from weights_convert.rules import Drop, Lookup, Rename, Rule, prefixed

log = logging.getLogger(__name__)

UNET, VAE = "model.diffusion_model.", "first_stage_model."
BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
    "denoiser.sigmas",
)
KNOWN = (UNET, VAE, "model_ema.", "cond_stage_model.", "conditioner.")  # what is strange among these is an error
MOST_STRANGE = 16


def ema_name(key: str) -> str:
    """Where a training run keeps the running average of a UNet key: all dots gone, so only a table leads back."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def _unet(cfg: UNetConfig, keys: Collection[str] | None, ema: bool) -> list[Rule]:
    rules = prefixed(ldm_unet(cfg), UNET, "unet.")
    if keys is None:
        return rules
    plain = [key for key in keys if key.startswith(UNET)]
    averaged = {ema_name(key): key for key in plain}
    counters = Drop("model_ema.{p:decay|num_updates}", "counters of the averaging during training")
    stored = averaged.keys() & set(keys)
    if not (ema and plain and len(stored) == len(plain)):
        why = "running average; the plain weights are taken"
        if ema and stored:
            why = f"running average of {len(stored)} of {len(plain)} tensors only; the plain weights are taken"
            log.warning("the running average of the UNet is incomplete: %s", why)
        return [*rules, counters, Drop(r"model_ema.{p:diffusion_model\w+}", why)]
    log.warning("of the UNet the running average is taken; merges may carry that of another model: `python -m "
                "weights_convert convert FILE FOLDER --to own --no-ema` takes the other weights")  # fmt: skip
    renames = tuple(rule for rule in rules if isinstance(rule, Rename))
    return [
        Lookup(averaged, renames, "model_ema.diffusion_model... -> unet, the running average"),
        counters,
        Drop(UNET + "{p*}", "last training step; the running average is taken", expect=len(plain)),
    ]


def _vae(cfg: VAEConfig, keys: Collection[str] | None) -> list[Rule]:
    """No rules for a file that was saved without one ("noVAE")."""
    there = keys is None or any(key.startswith(VAE) for key in keys)
    return prefixed(vae_ldm_file(cfg), VAE, "vae.") if there else []


def _others(keys: Collection[str] | None) -> list[Rule]:
    """The schedule's buffers, and a few tensors that no one knows: merging tools leave such in a file.

    Many of them mean that the file is something else, so that no rule claims them and they are an error.
    """
    rules: list[Rule] = [Drop(name, "part of the noise schedule, which is a config here") for name in BUFFERS]
    strange = [key for key in keys or () if not key.startswith(KNOWN) and key not in BUFFERS]
    if not 0 < len(strange) <= MOST_STRANGE:
        return rules
    log.warning("%d tensors are no part of Stable Diffusion and are left out: %s", len(strange), ", ".join(strange))
    return [*rules, *(Drop(key, "no part of Stable Diffusion") for key in strange)]


def sd15_single_file(unet: UNetConfig, vae: VAEConfig, keys: Collection[str] | None, ema: bool = True) -> list[Rule]:
    """v1-5-pruned-emaonly, v1-5-pruned and community files of their kind.

    `keys` are those of the file, None to write one. With `ema`, the running average of the UNet is taken where a
    file holds all of it beside the plain weights.
    """
    clip = "cond_stage_model."
    return [
        *_unet(unet, keys, ema),
        *_vae(vae, keys),
        Drop(f"{clip}{{p:logit_scale|text_projection}}", "not used by Stable Diffusion 1.5"),
        Drop(f"{clip}clip_l.{{p:logit_scale|text_projection}}", "not used by Stable Diffusion 1.5"),
        Drop(f"{clip}{{x*}}.text_projection.weight", "not used by Stable Diffusion 1.5"),
        *prefixed(clip_text(position_ids=True), f"{clip}transformer.", "text_encoder."),
        *prefixed(clip_text(), f"{clip}clip_l.transformer.", "text_encoder."),
        *_others(keys),
    ]


def sdxl_single_file(unet: UNetConfig, vae: VAEConfig, keys: Collection[str] | None, ema: bool = True) -> list[Rule]:
    """sd_xl_base_1.0 and community files of its kind; some are saved without text encoders."""
    clip, second = "conditioner.embedders.0.", "conditioner.embedders.1.model."
    there = keys is None or any(key.startswith(second) for key in keys)
    return [
        *_unet(unet, keys, ema),
        *_vae(vae, keys),
        Drop(f"{clip}{{p:logit_scale|text_projection}}", "not used by SDXL"),
        *prefixed(clip_text(position_ids=True), f"{clip}transformer.", "text_encoder."),
        *(prefixed(openclip_text(), second, "text_encoder_2.") if there else []),
        *_others(keys),
    ]


SCHEDULE = "scaled linear betas 0.00085 to 0.012, 1000 steps, predicts the noise"
LAYOUTS = (
    Layout(
        "sd15-single-file",
        "Stable Diffusion 1.5",
        kind="checkpoint",
        fits=("sd15",),
        parts=("unet", "vae", "text_encoder"),
        has={
            f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3),
            f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": TO_K["sd15"],
        },
        build=lambda keys, ema: sd15_single_file(SD15, SD_VAE, keys, ema),
        lacks=("control_model.input_hint_block.0.weight",),
        configs={"unet": SD15, "vae": SD_VAE, "text_encoder": CLIP_L},
        schedule=SCHEDULE,
    ),
    Layout(
        "sdxl-single-file",
        "SDXL",
        kind="checkpoint",
        fits=("sdxl",),
        parts=("unet", "vae", "text_encoder", "text_encoder_2"),
        has={f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3), f"{UNET}label_emb.0.0.weight": (1280, 2816)},
        build=lambda keys, ema: sdxl_single_file(SDXL, SDXL_VAE, keys, ema),
        configs={"unet": SDXL, "vae": SDXL_VAE, "text_encoder": CLIP_L, "text_encoder_2": OPENCLIP_BIGG},
        schedule=SCHEDULE,
    ),
    Layout(
        "vae-single-file",
        "an autoencoder cut out of a Stable Diffusion checkpoint",
        kind="autoencoder",
        fits=("sd15", "sdxl"),
        parts=("vae",),
        has={f"{VAE}encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3)},
        build=lambda keys, ema: [*_vae(SD_VAE, keys), *_others(keys)],
        lacks=(UNET,),
        note="its content does not say of which of the two bases it is",
    ),
)

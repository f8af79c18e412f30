"""Every published file format that is read."""

from __future__ import annotations

from weights_convert.layout import Layout
from weights_convert.layouts import (
    animatediff,
    animatediff_training,
    clip,
    controlnet,
    diffusers_folder,
    diffusers_unet,
    ip_adapter,
    ldm_unet,
    official_i2v,
    openclip,
    single_file,
    sparse_control,
    taesd,
    vae,
)

__all__ = ["LAYOUTS", "Layout"]

LAYOUTS: tuple[Layout, ...] = (
    *single_file.LAYOUTS,
    *diffusers_folder.LAYOUTS,
    *ldm_unet.LAYOUTS,
    *diffusers_unet.LAYOUTS,
    *official_i2v.LAYOUTS,
    *animatediff.LAYOUTS,
    *animatediff_training.LAYOUTS,
    *ip_adapter.LAYOUTS,
    *vae.LAYOUTS,
    *clip.LAYOUTS,
    *openclip.LAYOUTS,
    *controlnet.LAYOUTS,
    *sparse_control.LAYOUTS,
    *taesd.LAYOUTS,
)

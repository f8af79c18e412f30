"""What our networks hold: keys and shapes of each part, built without memory. A file fits if it has just these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from i2v.models.clip_text import CLIP_L, OPENCLIP_BIGG, CLIPTextModel
from i2v.models.clip_vision import CLIPVisionModel
from i2v.models.controlnet import CONTROL_SD15, CONTROL_SDXL, ControlNet
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import add_ip_adapter, image_projection
from i2v.models.motion import MOTION_V3, add_motion_modules
from i2v.models.unet import SD15, SDXL, UNet, UNetConfig
from i2v.models.vae import SD_VAE, SDXL_VAE, VAE
from weights_convert.layouts.sparse_control import FRAMES, as_diffusers
from weights_convert.layouts.taesd import taesd_shapes

FAMILIES: dict[str, dict[str, Any]] = {  # what is settled by the base model, whatever file a part comes from
    "sd15": {"unet": SD15, "vae": SD_VAE, "text_encoder": CLIP_L, "controlnet": CONTROL_SD15},
    "sdxl": {
        "unet": SDXL,
        "vae": SDXL_VAE,
        "text_encoder": CLIP_L,
        "text_encoder_2": OPENCLIP_BIGG,
        "controlnet": CONTROL_SDXL,
    },
}
HINT = "controlnet_cond_embedding"
TITLES = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL", "motion": "AnimateDiff's motion modules",
          "motion v2": "AnimateDiff's motion modules of version 2"}  # fmt: skip


@lru_cache
def expected(part: str, config: Any, unet: UNetConfig) -> Mapping[str, Tensor]:
    """Keys of our part file -> tensors on the meta device.

    `unet` is the base that motion modules and adapters are for. Without a config, an `ip_adapter` is its attention
    alone, as in the authors' release.
    """
    with torch.device("meta"):
        if part == "unet":
            return dict(UNet(config).state_dict())
        if part == "vae":
            return dict(VAE(config).state_dict())
        if part in ("text_encoder", "text_encoder_2"):
            return dict(CLIPTextModel(config).state_dict())
        if part == "image_encoder":
            return dict(CLIPVisionModel(config).state_dict())
        if part == "controlnet":
            return dict(ControlNet(config).state_dict())
        if part == "taesd":
            return {key: torch.empty(shape) for half in config for key, shape in taesd_shapes(half).items()}
        base = UNet(unet)
        if part == "sparse_control":
            return _sparse_control(base, scribble=config == "scribble")
        if part == "motion":
            return _flat(add_motion_modules(base, config))
        if part == "i2v_adapter":
            return _flat(add_i2v_adapter(base))
        projection = {} if config is None else {"image_proj": image_projection(config)}
        return _flat(projection) | _flat(add_ip_adapter(base), "ip_adapter.")


def _sparse_control(base: UNet, scribble: bool) -> dict[str, Tensor]:
    """A ControlNet whose way down has motion modules of one attention; a picture passes as latents and a mask."""
    motion = add_motion_modules(base, replace(MOTION_V3, attentions=1, max_frames=FRAMES))
    down = {as_diffusers(key): v for key, v in _flat(motion).items() if key.startswith("down_blocks.")}
    keys = dict(ControlNet(CONTROL_SD15).state_dict())
    width = base.cfg.channels[0]
    if scribble:
        keys[f"{HINT}.conv_in.weight"] = torch.empty(16, 4, 3, 3)
    else:
        keys = {key: v for key, v in keys.items() if not key.startswith(f"{HINT}.")}
        keys |= {f"{HINT}.weight": torch.empty(width, 5, 3, 3), f"{HINT}.bias": torch.empty(width)}
    return keys | down


def _flat(modules: Mapping[str, nn.Module], prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{path}.{key}": v for path, module in modules.items() for key, v in module.state_dict().items()}


def misfits(part: str, tensors: Mapping[str, Tensor], config: Any, unet: UNetConfig) -> list[str]:
    """Every key that is missing, too many, or of another shape than in our network."""
    want = expected(part, config, unet)
    wrong = [f"{part}: {key} is missing, expected {tuple(want[key].shape)}" for key in want if key not in tensors]
    for key, tensor in tensors.items():
        if key not in want:
            wrong.append(f"{part}: {key} {tuple(tensor.shape)} is no parameter of the network")
        elif tensor.shape != want[key].shape:
            wrong.append(f"{part}: {key} is {tuple(tensor.shape)}, expected {tuple(want[key].shape)}")
    return wrong

"""The named models: where their weights lie, at which size they were trained, and the settings they like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from i2v.config import ConfigError
from i2v.diffusion.schedule import ANIMATEDIFF_SD15, ANIMATEDIFF_SDXL, Schedule
from i2v.models.clip_text import CLIP_L, OPENCLIP_BIGG, CLIPTextConfig
from i2v.models.clip_vision import VIT_H14, CLIPVisionConfig
from i2v.models.motion import MOTION_SDXL, MOTION_V1, MotionConfig
from i2v.models.unet import SD15, SDXL, UNetConfig
from i2v.models.vae import SD_VAE, SDXL_VAE, VAEConfig

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


@dataclass(frozen=True)
class Networks:
    """The configs of a preset whose files carry none: published checkpoints are bare tensors."""

    unet: UNetConfig
    vae: VAEConfig
    text: tuple[CLIPTextConfig, ...]
    image: CLIPVisionConfig
    motion: MotionConfig
    schedule: Schedule


@dataclass(frozen=True)
class Preset:
    """One model. Sizes are pixels; `t0` and `p` are the Frame Similarity Prior's coefficients (Sec. 3.3)."""

    name: str
    about: str
    side: int  # short side it was trained at
    multiple: int  # a size chosen from the picture's aspect is a multiple of this
    any_aspect: bool  # False: only squares of `side` were trained on
    num_frames: int = 16
    fps: int = 8
    guidance_scale: float = 7.5
    t0: float = 1.0
    p: float = 0.5
    unconditional_image: str = "zero-pixels"  # the unguided half's picture, see pipeline.UNCONDITIONAL_IMAGES
    folder: Path | None = None  # of self-describing part files; None: not shipped
    networks: Networks | None = None
    needs: Mapping[str, str] = field(default_factory=dict)  # file -> what it is, for a preset that is not shipped


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny",
            "the miniature that comes with the repository: 64x64 pixels, the procedural world's objects and motions",
            side=64,
            multiple=8,
            any_aspect=False,
            guidance_scale=2.5,
            folder=WEIGHTS / "tiny",
        ),
        Preset(
            "i2v-sd15",
            "the authors' release on Stable Diffusion 1.5",
            side=512,
            multiple=64,
            any_aspect=True,
            networks=Networks(SD15, SD_VAE, (CLIP_L,), VIT_H14, MOTION_V1, ANIMATEDIFF_SD15),
            needs={
                "v1-5-pruned-emaonly.safetensors": "VAE and text encoder of Stable Diffusion 1.5",
                "animatediff_v15_v1_ipplus.pth": "UNet with AnimateDiff and IP-Adapter-plus, KwaiVGI/I2V-Adapter",
                "i2v_module.pth": "the I2V-Adapter, KwaiVGI/I2V-Adapter",
                "ip-adapter-plus_sd15.safetensors": "the Resampler, h94/IP-Adapter models/",
                "image_encoder/model.safetensors": "CLIP ViT-H/14, h94/IP-Adapter models/",
            },
        ),
        Preset(
            "i2v-sdxl",
            "the paper's larger model; its I2V-Adapter was never published",
            side=1024,
            multiple=64,
            any_aspect=True,
            networks=Networks(SDXL, SDXL_VAE, (CLIP_L, OPENCLIP_BIGG), VIT_H14, MOTION_SDXL, ANIMATEDIFF_SDXL),
            needs={
                "sd_xl_base_1.0.safetensors": "Stable Diffusion XL",
                "mm_sdxl_v10_beta.ckpt": "AnimateDiff's SDXL motion modules",
                "ip-adapter-plus_sdxl_vit-h.safetensors": "IP-Adapter-plus, h94/IP-Adapter sdxl_models/",
                "image_encoder/model.safetensors": "CLIP ViT-H/14, h94/IP-Adapter models/",
                "an I2V-Adapter for SDXL": "not published: train one with train.py",
            },
        ),
    )
}


def find(name: str) -> Preset:
    """The preset of that name; raises ConfigError with the list where there is none."""
    if name not in PRESETS:
        raise ConfigError(f"--preset {name}: there is no such preset; known are {', '.join(PRESETS)}")
    return PRESETS[name]


def released_settings() -> dict[str, Any]:
    """What the authors' script does, as arguments of the pipeline.

    Sizes follow the picture: its short side is the preset's (512 for SD1.5), both are rounded to multiples of 64.
    The schedule belongs to the motion set; for SD1.5 it is the released one.
    """
    return {
        "fit": "released",
        "steps": 25,
        "sampler": "ddim",
        "guidance_scale": 7.5,
        "t0": 1.0,
        "p": 0.5,
        "posterior": "sample",
        "unconditional_image": "zero-pixels",
        "ip_scale": 1.0,
        "i2v_scale": 1.0,
        "color_match": True,
        "first_frame": "vae",
    }

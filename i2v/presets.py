"""The named models: where their weights lie, at which size they were trained, and the settings they like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from i2v.config import ConfigError
from i2v.diffusion.schedule import ANIMATEDIFF_SD15, ANIMATEDIFF_SDXL, Schedule
from i2v.models.unet import SD15, SDXL, UNetConfig
from i2v.models.vae import SD_VAE, SDXL_VAE, VAEConfig

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
CONFIGS = WEIGHTS.parent / "configs"
HUB = "https://huggingface.co"
AUTHORS = "https://github.com/KwaiVGI/I2V-Adapter"


@dataclass(frozen=True)
class Networks:
    """What published files leave open, since they are bare tensors: the base that a preset is for."""

    family: str  # as weights_convert calls it
    title: str  # as people do
    unet: UNetConfig
    vae: VAEConfig  # an autoencoder's file does not say which base it is of
    schedule: Schedule  # of the motion modules made for this base


@dataclass(frozen=True)
class Wanted:
    """A published file that a preset is made of, and where users get it."""

    flag: str  # that takes it, as a field of `assemble.ModelFiles`
    file: str  # its published name
    layouts: tuple[str, ...]  # of weights_convert; the content decides, the name only tells where to look first
    parts: tuple[str, ...]  # that it is wanted for
    about: str
    where: str
    size: int  # bytes
    licence: str
    sha256: str = ""  # "" where it is not known

    def __str__(self) -> str:
        return f"{self.file} ({self.about}; {self.size / 1e9:.1f} GB, licence: {self.licence}; {self.where})"


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
    unconditional_image: str = "zero-pixels"  # the unguided half's picture, see `request.Request`
    folder: Path | None = None  # of self-describing part files; None: not shipped
    networks: Networks | None = None  # None: the part files tell
    needs: tuple[Wanted, ...] = ()  # for a preset that is not shipped; where two hold a part, the later one counts


VIT_H = Wanted("image_encoder", "image_encoder/model.safetensors", ("clip-vision-h14",),
    ("image_encoder",), "CLIP ViT-H/14",
               f"{HUB}/h94/IP-Adapter, models/", 2_528_373_448, "Apache-2.0",
               "6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030")  # fmt: skip

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
            networks=Networks("sd15", "Stable Diffusion 1.5", SD15, SD_VAE, ANIMATEDIFF_SD15),
            needs=(
                Wanted(
                    "base",
                    "v1-5-pruned-emaonly.safetensors",
                    ("sd15-single-file", "sd15-diffusers-folder"),
                    ("vae", "text_encoder"),
                    "Stable Diffusion 1.5: VAE and text encoder",
                    f"{HUB}/stable-diffusion-v1-5/stable-diffusion-v1-5",
                    4_265_146_304,
                    "CreativeML OpenRAIL-M",
                    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
                ),
                Wanted(
                    "base",
                    "animatediff_v15_v1_ipplus.pth",
                    ("i2v-adapter-base", "i2v-adapter-full"),
                    ("unet", "motion", "ip_adapter"),
                    "the UNet with AnimateDiff and IP-Adapter-plus",
                    AUTHORS,
                    5_186_690_576,
                    "none stated",
                ),
                Wanted(
                    "i2v",
                    "i2v_module.pth",
                    ("i2v-adapter-sd15",),
                    ("i2v_adapter",),
                    "the I2V-Adapter",
                    AUTHORS,
                    99_173_120,
                    "none stated",
                ),
                Wanted(
                    "ip_adapter",
                    "ip-adapter-plus_sd15.safetensors",
                    ("ip-adapter-plus-sd15",),
                    ("image_projection",),
                    "the Resampler",
                    f"{HUB}/h94/IP-Adapter, models/",
                    98_183_288,
                    "Apache-2.0",
                    "a1c250be40455cc61a43da1201ec3f1edaea71214865fb47f57927e06cbe4996",
                ),
                VIT_H,
            ),
        ),
        Preset(
            "i2v-sdxl",
            "the paper's larger model; its I2V-Adapter was never published",
            side=1024,
            multiple=64,
            any_aspect=True,
            networks=Networks("sdxl", "SDXL", SDXL, SDXL_VAE, ANIMATEDIFF_SDXL),
            needs=(
                Wanted(
                    "base",
                    "sd_xl_base_1.0.safetensors",
                    ("sdxl-single-file", "sdxl-diffusers-folder"),
                    ("unet", "vae", "text_encoder", "text_encoder_2"),
                    "SDXL: UNet, VAE and both text encoders",
                    f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0",
                    6_938_078_334,
                    "CreativeML Open RAIL++-M",
                    "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
                ),
                Wanted(
                    "motion",
                    "mm_sdxl_v10_beta.ckpt",
                    ("animatediff-sdxl", "motion-adapter-sdxl"),
                    ("motion",),
                    "AnimateDiff's motion modules",
                    f"{HUB}/guoyww/animatediff",
                    949_984_000,
                    "Apache-2.0",
                ),
                Wanted(
                    "i2v",
                    "i2v_adapter.safetensors",
                    ("i2v-adapter-sdxl",),
                    ("i2v_adapter",),
                    "an I2V-Adapter for SDXL",
                    "none was published: train one with train.py",
                    819_532_800,
                    "yours",
                ),
                Wanted(
                    "ip_adapter",
                    "ip-adapter-plus_sdxl_vit-h.safetensors",
                    ("ip-adapter-plus-sdxl-vit-h",),
                    ("image_projection", "ip_adapter"),
                    "IP-Adapter-plus",
                    f"{HUB}/h94/IP-Adapter, sdxl_models/",
                    847_517_512,
                    "Apache-2.0",
                    "3f5062b8400c94b7159665b21ba5c62acdcd7682262743d7f2aefedef00e6581",
                ),
                VIT_H,
            ),
        ),
    )
}


def find(name: str) -> Preset:
    """The preset of that name; raises ConfigError with the list where there is none."""
    if name not in PRESETS:
        raise ConfigError(f"--preset {name}: there is no such preset; known are {', '.join(PRESETS)}{_as_config(name)}")
    return PRESETS[name]


def _as_config(name: str) -> str:
    """Words for a name that is no preset's, but a training config's."""
    there = (CONFIGS / f"{name}.json").is_file()
    return f"; to train give --config configs/{name}.json" if there else ""


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
        "guidance_start": 0.0,
        "guidance_end": 1.0,
        "deep_every": 1,
        "t0": 1.0,
        "p": 0.5,
        "posterior": "sample",
        "unconditional_image": "zero-pixels",
        "ip_scale": 1.0,
        "i2v_scale": 1.0,
        "color_match": True,
        "first_frame": "vae",
    }

"""Checkpoints of AnimateDiff's training script: a whole UNet in diffusers' names with the motion modules in it."""

from __future__ import annotations

from functools import partial

from i2v.models.motion import MotionConfig
from i2v.models.unet import SD15
from weights_convert.layout import Layout, always
from weights_convert.layouts.animatediff import SCHEDULES, VERSIONS, animatediff, signs
from weights_convert.layouts.diffusers_unet import diffusers_unet
from weights_convert.layouts.official_i2v import IMAGE_KEYS, QUERY_FF
from weights_convert.rules import Rule, prefixed


def _parts(motion: MotionConfig) -> list[Rule]:
    return [*prefixed(animatediff(motion), "", "motion."), *prefixed(diffusers_unet(SD15), "", "unet.")]


def _layout(version: str) -> Layout:
    title, base, motion = VERSIONS[version]
    has, lacks = signs(version)
    return Layout(
        f"animatediff-{version}-unet",
        f"a UNet of {base.upper()} with AnimateDiff motion modules, {title}",
        kind="UNet with motion modules",
        fits=(base,),
        parts=("unet", "motion"),
        has={**has, "conv_in.weight": (320, 4, 3, 3)},
        build=always(partial(_parts, motion)),
        lacks=(
            *(key for key in lacks if key != "conv_in.weight"),
            IMAGE_KEYS,
            QUERY_FF[base],
            "controlnet_cond_embedding.",
        ),
        configs={"unet": SD15, "motion": motion},
        schedule=SCHEDULES[base],
    )


LAYOUTS = tuple(_layout(version) for version in ("v1", "v2", "v3"))

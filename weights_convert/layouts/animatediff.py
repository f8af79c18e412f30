"""AnimateDiff's motion modules: mm_sd_v14, mm_sd_v15, mm_sd_v15_v2, v3_sd15_mm and the SDXL beta."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from i2v.models.motion import MOTION_SDXL, MOTION_V1, MOTION_V2, MOTION_V3, MotionConfig, frame_positions
from weights_convert.layout import Layout, Shape, always
from weights_convert.rules import Rebuild, Rename, Rule

MODULE = "motion_modules.0.temporal_transformer"
ATTENTION = f"down_blocks.0.{MODULE}.transformer_blocks.0.attention_blocks.0"
QUERY, PE = f"{ATTENTION}.to_q.weight", f"{ATTENTION}.pos_encoder.pe"
MIDDLE, LAST = f"mid_block.{MODULE}.norm.weight", f"down_blocks.3.{MODULE}.norm.weight"
SCHEDULES = {
    "sd15": "linear betas 0.00085 to 0.012, 1000 steps, predicts the noise",
    "sdxl": "scaled linear betas 0.00085 to 0.020, 1000 steps, predicts the noise",
}


def _positions(max_frames: int, beside: Tensor) -> Tensor:
    """(1, max_frames, C) with C the input width of the query projection `beside`."""
    return frame_positions(max_frames, beside.shape[1], beside.device)[None]


def animatediff(motion: MotionConfig) -> list[Rule]:
    """Rules for a file of motion modules alone, towards `down_blocks.I.motion_modules.J...`.

    The published files also hold the table of frame positions beside each attention. It is a fixed sinusoid: its
    values are checked and not kept.
    """
    at = r"{at:down_blocks\.\d+|up_blocks\.\d+|mid_block}.motion_modules.{j:\d+}"
    block = at + r".temporal_transformer.transformer_blocks.0.attention_blocks.{k:\d+}"
    return [
        Rebuild(
            f"{block}.pos_encoder.pe",
            beside=f"{block}.to_q.weight",
            build=partial(_positions, motion.max_frames),
            why=f"the sinusoid of {motion.max_frames} frame positions",
        ),
        Rename(f"{at}.temporal_transformer.{{p*}}", f"{at}.{{p*}}"),
    ]


def _layout(
    version: str, title: str, base: str, has: dict[str, Shape | None], lacks: tuple[str, ...], motion: MotionConfig
) -> Layout:
    return Layout(
        f"animatediff-{version}",
        f"AnimateDiff motion modules, {title}",
        kind="motion modules",
        fits=(base,),
        parts=("motion",),
        has={QUERY: (320, 320), **has},
        build=always(lambda: animatediff(motion), "motion."),
        lacks=("conv_in.weight", *lacks),
        configs={"motion": motion},
        schedule=SCHEDULES[base],
    )


LAYOUTS = (
    _layout("v1", "version 1 (mm_sd_v14, mm_sd_v15)", "sd15", {PE: (1, 24, 320), LAST: (1280,)}, (MIDDLE,), MOTION_V1),
    _layout("v2", "version 2 (mm_sd_v15_v2)", "sd15", {MIDDLE: (1280,)}, (), MOTION_V2),
    _layout("v3", "version 3 (v3_sd15_mm)", "sd15", {PE: (1, 32, 320), LAST: (1280,)}, (MIDDLE,), MOTION_V3),
    _layout(
        "sdxl",
        "SDXL beta (mm_sdxl_v10_beta)",
        "sdxl",
        {f"down_blocks.2.{MODULE}.norm.weight": (1280,)},
        (MIDDLE, LAST),
        MOTION_SDXL,
    ),
)

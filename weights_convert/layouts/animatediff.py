"""AnimateDiff's motion modules: mm_sd_v14, mm_sd_v15, mm_sd_v15_v2, v3_sd15_mm and the SDXL beta."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from i2v.models.motion import MotionConfig, frame_positions
from weights_convert.rules import Rebuild, Rename, Rule


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

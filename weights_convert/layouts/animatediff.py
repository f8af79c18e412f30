"""AnimateDiff's motion modules: mm_sd_v14, mm_sd_v15, mm_sd_v15_v2, v3_sd15_mm and the SDXL beta."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from i2v.models.motion import MotionConfig
from weights_convert.rules import Rebuild, Rename, Rule


def sinusoid_table(max_frames: int, beside: Tensor) -> Tensor:
    """(1, max_frames, C) with C the input width of `beside`: sines on even channels, cosines on odd ones."""
    dim = beside.shape[1]
    steps = torch.arange(0, dim, 2, device=beside.device, dtype=torch.float32)
    rate = torch.exp(steps * (-math.log(10000.0) / dim))
    angle = torch.arange(max_frames, device=beside.device, dtype=torch.float32)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[None]


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
            build=partial(sinusoid_table, motion.max_frames),
            why=f"the sinusoid of {motion.max_frames} frame positions",
        ),
        Rename(f"{at}.temporal_transformer.{{p*}}", f"{at}.{{p*}}"),
    ]

"""AnimateDiff's motion modules: mm_sd_v14, mm_sd_v15, mm_sd_v15_v2, v3_sd15_mm and the SDXL beta."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor

from i2v.models.motion import MOTION_SDXL, MOTION_V1, MOTION_V2, MOTION_V3, MotionConfig, frame_positions
from weights_convert.layout import Layout, Shape, always
from weights_convert.rules import Rebuild, Rename, Rule

MODULE = "motion_modules.0.temporal_transformer"
QUERY = f"down_blocks.0.{MODULE}.transformer_blocks.0.attention_blocks.0.to_q.weight"
SCHEDULES = {
    "sd15": "linear betas 0.00085 to 0.012, 1000 steps, predicts the noise",
    "sdxl": "scaled linear betas 0.00085 to 0.020, 1000 steps, predicts the noise",
}


def positions(max_frames: int, beside: Tensor) -> Tensor:
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
            build=partial(positions, motion.max_frames),
            why=f"the sinusoid of {motion.max_frames} frame positions",
            longer=True,  # LongAnimateDiff's has 64
        ),
        Rename(f"{at}.temporal_transformer.{{p*}}", f"{at}.{{p*}}"),
    ]


def motion_adapter(motion: MotionConfig) -> list[Rule]:
    """diffusers' MotionAdapter, towards the same names. It keeps one table of positions per module."""
    at = r"{at:down_blocks\.\d+|up_blocks\.\d+|mid_block}.motion_modules.{j:\d+}"
    block = f"{at}.transformer_blocks.0"
    rules: list[Rule] = [
        Rebuild(
            f"{block}.pos_embed.pe",
            beside=f"{block}.attn1.to_q.weight",
            build=partial(positions, motion.max_frames),
            why=f"the sinusoid of {motion.max_frames} frame positions",
            longer=True,
        ),
        Rename(f"{at}.{{leaf:norm|proj_in|proj_out}}.{{p:weight|bias}}", f"{at}.{{leaf}}.{{p}}"),
        Rename(f"{block}.ff.{{p*}}", f"{block}.ff.{{p*}}"),
        Rename(f"{block}.norm3.{{p:weight|bias}}", f"{block}.ff_norm.{{p}}"),
    ]
    for i in range(motion.attentions):
        rules.append(Rename(f"{block}.attn{i + 1}.{{p*}}", f"{block}.attention_blocks.{i}.{{p*}}"))
        rules.append(Rename(f"{block}.norm{i + 1}.{{p:weight|bias}}", f"{block}.norms.{i}.{{p}}"))
    return rules


# What tells a version: the length of its table of positions, a module in the middle, and how many levels there are.
VERSIONS = {
    "v1": ("version 1 (mm_sd_v14, mm_sd_v15)", "sd15", MOTION_V1),
    "v2": ("version 2 (mm_sd_v15_v2)", "sd15", MOTION_V2),
    "v3": ("version 3 (v3_sd15_mm)", "sd15", MOTION_V3),
    "sdxl": ("SDXL beta (mm_sdxl_v10_beta)", "sdxl", MOTION_SDXL),
}


def _signs(version: str, module: str, query: str, table: str) -> tuple[dict[str, Shape | None], tuple[str, ...]]:
    """Keys that are there and keys that are not; `module` is the path of a motion module's insides."""
    middle, last = f"mid_block.{module}norm.weight", f"down_blocks.3.{module}norm.weight"
    first = f"down_blocks.0.{module}transformer_blocks.0."
    has: dict[str, Shape | None] = {first + query: (320, 320)}
    if version == "v2":
        return {**has, middle: (1280,)}, ("conv_in.weight",)
    if version == "sdxl":
        return {**has, f"down_blocks.2.{module}norm.weight": (1280,)}, ("conv_in.weight", middle, last)
    return {**has, first + table: (1, VERSIONS[version][2].max_frames, 320), last: (1280,)}, ("conv_in.weight", middle)


def signs(version: str) -> tuple[dict[str, Shape | None], tuple[str, ...]]:
    """Of AnimateDiff's own files: keys that are there and keys that are not."""
    return _signs(version, f"{MODULE}.", "attention_blocks.0.to_q.weight", "attention_blocks.0.pos_encoder.pe")


def _layouts(version: str) -> tuple[Layout, Layout]:
    title, base, motion = VERSIONS[version]
    original = signs(version)
    adapter = _signs(version, "motion_modules.0.", "attn1.to_q.weight", "pos_embed.pe")
    plain = Layout(
        f"animatediff-{version}",
        f"AnimateDiff motion modules, {title}",
        kind="motion modules",
        fits=(base,),
        parts=("motion",),
        has=original[0],
        build=always(lambda: animatediff(motion), "motion."),
        lacks=original[1],
        configs={"motion": motion},
        schedule=SCHEDULES[base],
    )
    same = (
        "version 1 saved with 32 positions has the same keys and shapes, and its config.json the same settings; "
        "if it is that, give the original file, or convert it with --layout motion-adapter-v1"
    )
    return plain, replace(
        plain,
        name=f"motion-adapter-{version}",
        title=f"{plain.title}, as diffusers' MotionAdapter",
        has=adapter[0],
        build=always(lambda: motion_adapter(motion), "motion."),
        lacks=adapter[1],
        note=same if version == "v3" else "",
        doubtful=version == "v3",
    )


LAYOUTS = tuple(layout for version in VERSIONS for layout in _layouts(version))

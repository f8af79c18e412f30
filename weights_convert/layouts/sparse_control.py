"""SparseCtrl, in the release's and in diffusers' names, towards diffusers'; no network here reads it yet."""

from __future__ import annotations

from functools import partial

from i2v.models.unet import SD15, UNetConfig, skip_channels
from weights_convert.layout import Layout, Shape, always
from weights_convert.layouts.animatediff import SCHEDULES, positions
from weights_convert.layouts.controlnet import HINTS
from weights_convert.layouts.diffusers_unet import kept
from weights_convert.layouts.ldm_unet import ldm_down
from weights_convert.rules import Rebuild, Rename, Rule

AT = r"down_blocks.{i:\d+}.motion_modules.{j:\d+}"
INNER = {"attention_blocks.0": "attn1", "norms.0": "norm1", "ff_norm": "norm3", "ff": "ff"}
FRAMES = 32


def as_diffusers(path: str) -> str:
    """A parameter of our motion modules in diffusers' names."""
    for ours, theirs in INNER.items():
        path = path.replace(f".transformer_blocks.0.{ours}.", f".transformer_blocks.0.{theirs}.")
    return path


def sparse_control(cfg: UNetConfig, scribble: bool, diffusers: bool = False) -> list[Rule]:
    """A ControlNet whose way down has motion modules with one attention each.

    `scribble`: the condition passes a stack of convolutions, else it is a latent and passes one. `diffusers`: the
    file is in diffusers' names already. The table of frame positions is a fixed sinusoid, checked and not kept.
    """
    both = "{p:weight|bias}"
    hints = [f"controlnet_cond_embedding.{name}" for name in HINTS] if scribble else ["controlnet_cond_embedding"]
    names = [*hints, *(f"controlnet_down_blocks.{i}" for i in range(len(skip_channels(cfg)))), "controlnet_mid_block"]
    rules: list[Rule] = [Rename(f"{name}.{both}", f"{name}.{both}", expect=2) for name in names]
    outer, inner, table, query = f"{AT}.temporal_transformer", INNER, "attention_blocks.0.pos_encoder.pe", ""
    if diffusers:
        outer, inner, table = AT, {name: name for name in INNER.values()}, "pos_embed.pe"
    query = next(iter(inner))
    rules.append(
        Rebuild(
            f"{outer}.transformer_blocks.0.{table}",
            beside=f"{outer}.transformer_blocks.0.{query}.to_q.weight",
            build=partial(positions, FRAMES),
            why=f"the sinusoid of {FRAMES} frame positions",
        )
    )
    leaves = "{leaf:norm|proj_in|proj_out}"
    rules.append(Rename(f"{outer}.{leaves}.{both}", f"{AT}.{leaves}.{both}"))
    for (theirs, _), name in zip(inner.items(), INNER.values()):
        rules.append(
            Rename(f"{outer}.transformer_blocks.0.{theirs}.{{p*}}", f"{AT}.transformer_blocks.0.{name}.{{p*}}")
        )
    return rules + kept(ldm_down(cfg))


def _layout(scribble: bool, diffusers: bool) -> Layout:
    kind = "scribble" if scribble else "rgb"
    sign: tuple[str, Shape] = ("controlnet_cond_embedding.weight", (320, 5, 3, 3))
    if scribble:
        sign = ("controlnet_cond_embedding.conv_in.weight", (16, 4, 3, 3))
    module = "down_blocks.0.motion_modules.0."
    query = (
        "transformer_blocks.0.attn1" if diffusers else "temporal_transformer.transformer_blocks.0.attention_blocks.0"
    )
    return Layout(
        f"sparsectrl-{kind}{'-diffusers' if diffusers else ''}",
        f"AnimateDiff's SparseCtrl for {'sketches' if scribble else 'pictures'}, "
        f"{'diffusers' if diffusers else 'original'} names (v3_sd15_sparsectrl_{kind})",
        kind="SparseCtrl",
        fits=("sd15",),
        parts=("sparse_control",),
        has={sign[0]: sign[1], f"{module}{query}.to_q.weight": (320, 320)},
        build=always(lambda: sparse_control(SD15, scribble, diffusers), "sparse_control."),
        configs={"sparse_control": kind},
        schedule=SCHEDULES["sd15"],
        note="read and checked by its names and shapes; there is no SparseCtrl in this project yet",
    )


LAYOUTS = tuple(_layout(scribble, diffusers) for scribble in (False, True) for diffusers in (False, True))

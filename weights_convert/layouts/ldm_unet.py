"""The original Stable Diffusion and SDXL naming of the UNet (`input_blocks.N`), towards diffusers' names."""

from __future__ import annotations

from i2v.models.unet import SD15, SDXL, UNetConfig
from weights_convert.layout import Layout, always
from weights_convert.layouts.transformer_blocks import TO_K
from weights_convert.rules import Rename, Rule

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _leaf(source: str, target: str) -> list[Rule]:
    return [Rename(f"{source}.{{p:weight|bias}}", f"{target}.{{p}}", expect=2)]


def _resnet(source: str, target: str, widens: bool) -> list[Rule]:
    named = [(a, b) for a, b in RESNET.items() if widens or a != "skip_connection"]
    return [rule for a, b in named for rule in _leaf(f"{source}.{a}", f"{target}.{b}")]


def _attention(source: str, target: str) -> list[Rule]:
    """Inside a transformer the names are the same on both sides."""
    return [Rename(f"{source}.{{p*}}", f"{target}.{{p*}}")]


def ldm_down(cfg: UNetConfig) -> list[Rule]:
    """The way down and the middle, which ControlNets copy. `input_blocks` counts residual layers and downsamplers."""
    rules = _leaf("time_embed.0", "time_embedding.linear_1") + _leaf("time_embed.2", "time_embedding.linear_2")
    if cfg.pooled_dim:
        rules += _leaf("label_emb.0.0", "add_embedding.linear_1") + _leaf("label_emb.0.2", "add_embedding.linear_2")
    rules += _leaf("input_blocks.0.0", "conv_in")
    n, width = 1, cfg.channels[0]
    for i, out in enumerate(cfg.channels):
        for j in range(cfg.layers):
            rules += _resnet(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", widens=width != out)
            if cfg.depths[i]:
                rules += _attention(f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}")
            n, width = n + 1, out
        if i < len(cfg.channels) - 1:
            rules += _leaf(f"input_blocks.{n}.0.op", f"down_blocks.{i}.downsamplers.0.conv")
            n += 1
    rules += _resnet("middle_block.0", "mid_block.resnets.0", widens=False)
    rules += _attention("middle_block.1", "mid_block.attentions.0")
    return rules + _resnet("middle_block.2", "mid_block.resnets.1", widens=False)


def ldm_unet(cfg: UNetConfig) -> list[Rule]:
    """Rules without a prefix; in a single file the keys begin with `model.diffusion_model.`.

    `output_blocks` counts residual layers only; the upsampler is the last part of its level's last one.
    """
    rules = ldm_down(cfg) + _leaf("out.0", "conv_norm_out") + _leaf("out.2", "conv_out")
    n = 0
    for up, i in enumerate(reversed(range(len(cfg.channels)))):
        for j in range(cfg.layers + 1):
            rules += _resnet(f"output_blocks.{n}.0", f"up_blocks.{up}.resnets.{j}", widens=True)
            if cfg.depths[i]:
                rules += _attention(f"output_blocks.{n}.1", f"up_blocks.{up}.attentions.{j}")
            if j == cfg.layers and i > 0:
                conv = f"output_blocks.{n}.{2 if cfg.depths[i] else 1}.conv"
                rules += _leaf(conv, f"up_blocks.{up}.upsamplers.0.conv")
            n += 1
    return rules


LAYOUTS = (
    Layout(
        "sd15-unet-ldm",
        "Stable Diffusion 1.5's UNet alone, original names",
        kind="UNet",
        fits=("sd15",),
        parts=("unet",),
        has={
            "input_blocks.0.0.weight": (320, 4, 3, 3),
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": TO_K["sd15"],
        },
        build=always(lambda: ldm_unet(SD15), "unet."),
        lacks=("input_hint_block.0.weight",),
        configs={"unet": SD15},
    ),
    Layout(
        "sdxl-unet-ldm",
        "SDXL's UNet alone, original names",
        kind="UNet",
        fits=("sdxl",),
        parts=("unet",),
        has={"input_blocks.0.0.weight": (320, 4, 3, 3), "label_emb.0.0.weight": (1280, 2816)},
        build=always(lambda: ldm_unet(SDXL), "unet."),
        lacks=("input_hint_block.0.weight",),
        configs={"unet": SDXL},
    ),
)

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


def ldm_unet(cfg: UNetConfig) -> list[Rule]:
    """Rules without a prefix; in a single file the keys begin with `model.diffusion_model.`.

    `input_blocks` counts residual layers and resamplers of all levels in one sequence, `output_blocks` residual
    layers only. Inside a transformer the names are the same on both sides.
    """
    rules: list[Rule] = []

    def leaf(source: str, target: str) -> None:
        rules.append(Rename(f"{source}.{{p:weight|bias}}", f"{target}.{{p}}", expect=2))

    def resnet(source: str, target: str, widens: bool) -> None:
        for theirs, ours in RESNET.items():
            if theirs != "skip_connection" or widens:
                leaf(f"{source}.{theirs}", f"{target}.{ours}")

    def attention(source: str, target: str) -> None:
        rules.append(Rename(f"{source}.{{p*}}", f"{target}.{{p*}}"))

    leaf("time_embed.0", "time_embedding.linear_1")
    leaf("time_embed.2", "time_embedding.linear_2")
    if cfg.pooled_dim:
        leaf("label_emb.0.0", "add_embedding.linear_1")
        leaf("label_emb.0.2", "add_embedding.linear_2")
    leaf("input_blocks.0.0", "conv_in")
    leaf("out.0", "conv_norm_out")
    leaf("out.2", "conv_out")

    n, width = 1, cfg.channels[0]
    for i, out in enumerate(cfg.channels):
        for j in range(cfg.layers):
            resnet(f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", widens=width != out)
            if cfg.depths[i]:
                attention(f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}")
            n, width = n + 1, out
        if i < len(cfg.channels) - 1:
            leaf(f"input_blocks.{n}.0.op", f"down_blocks.{i}.downsamplers.0.conv")
            n += 1

    resnet("middle_block.0", "mid_block.resnets.0", widens=False)
    attention("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1", widens=False)

    n = 0
    for up, i in enumerate(reversed(range(len(cfg.channels)))):
        for j in range(cfg.layers + 1):
            resnet(f"output_blocks.{n}.0", f"up_blocks.{up}.resnets.{j}", widens=True)
            if cfg.depths[i]:
                attention(f"output_blocks.{n}.1", f"up_blocks.{up}.attentions.{j}")
            if j == cfg.layers and i > 0:
                leaf(f"output_blocks.{n}.{2 if cfg.depths[i] else 1}.conv", f"up_blocks.{up}.upsamplers.0.conv")
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
        configs={"unet": SDXL},
    ),
)

"""The autoencoder's three namings: original, diffusers, and diffusers before it renamed its attention."""

from __future__ import annotations

from collections.abc import Callable

from i2v.models.vae import SD_VAE, VAEConfig
from weights_convert.layout import Layout, Shape, always
from weights_convert.rules import CONV_TO_LINEAR, SAME, Drop, Rename, Rule

ATTENTION = {  # original: (ours, old diffusers)
    "norm": ("group_norm", "group_norm"),
    "q": ("to_q", "query"),
    "k": ("to_k", "key"),
    "v": ("to_v", "value"),
    "proj_out": ("to_out.0", "proj_attn"),
}
RESNET = ("norm1", "conv1", "norm2", "conv2")


def _places(cfg: VAEConfig) -> list[tuple[str, str]]:
    """(original, ours) paths of all layers outside the two attentions."""
    last = len(cfg.channels) - 1
    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        pairs += [(f"{half}.conv_in", f"{half}.conv_in"), (f"{half}.conv_out", f"{half}.conv_out")]
        pairs.append((f"{half}.norm_out", f"{half}.conv_norm_out"))
        for n, block in enumerate(("block_1", "block_2")):
            pairs += [(f"{half}.mid.{block}.{leaf}", f"{half}.mid_block.resnets.{n}.{leaf}") for leaf in RESNET]

    def level(source: str, target: str, blocks: int, widens: bool) -> None:
        for j in range(blocks):
            theirs, ours = f"{source}.block.{j}", f"{target}.resnets.{j}"
            pairs.extend((f"{theirs}.{leaf}", f"{ours}.{leaf}") for leaf in RESNET)
            if j == 0 and widens:
                pairs.append((f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut"))

    for i, out in enumerate(cfg.channels):
        up = last - i  # the original counts the decoder's levels from the finest, diffusers from the coarsest
        finer, coarser = cfg.channels[max(i - 1, 0)], cfg.channels[min(i + 1, last)]
        level(f"encoder.down.{i}", f"encoder.down_blocks.{i}", cfg.layers, widens=finer != out)
        level(f"decoder.up.{i}", f"decoder.up_blocks.{up}", cfg.layers + 1, widens=coarser != out)
        if i < last:
            pairs.append((f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv"))
        if i > 0:
            pairs.append((f"decoder.up.{i}.upsample.conv", f"decoder.up_blocks.{up}.upsamplers.0.conv"))
    return pairs


def vae_ldm(cfg: VAEConfig) -> list[Rule]:
    """The original naming, without a prefix; in a single file the keys begin with `first_stage_model.`.

    The attention's projections are 1x1 convolutions there and linear layers here. Some exporters wrote diffusers'
    names (`mid.attn_1.to_q`) and matrices into otherwise original files: both are read, the original is written.
    """
    rules: list[Rule] = []
    for theirs, (ours, _) in ATTENTION.items():
        op = SAME if theirs == "norm" else CONV_TO_LINEAR
        target = "{half:encoder|decoder}.mid_block.attentions.0." + ours
        for name in (theirs, ours):
            source = "{half:encoder|decoder}.mid.attn_1." + name
            rules.append(Rename(f"{source}.weight", f"{target}.weight", op=op, optional=True))
            rules.append(Rename(f"{source}.bias", f"{target}.bias", optional=True))
    rules += [Rename(f"{a}.{{p:weight|bias}}", f"{b}.{{p}}", expect=2) for a, b in _places(cfg)]
    return rules


def vae_ldm_file(cfg: VAEConfig) -> list[Rule]:
    """A file with the autoencoder alone: what its training left beside the weights is dropped."""
    return [
        Drop("model_ema.{p:decay|num_updates}", "counters of the averaging during training"),
        Drop("loss.{p*}", "the discriminator and perceptual loss of its training"),
        *vae_ldm(cfg),
    ]


def vae_diffusers(cfg: VAEConfig, old: bool = False) -> list[Rule]:
    """diffusers' naming, which is ours; `old` names the attention `query`, `key`, `value`, `proj_attn`."""
    half = "{half:encoder|decoder}.mid_block.attentions.0."
    rules: list[Rule] = [
        Rename(f"{half}{before if old else ours}.{{p:weight|bias}}", f"{half}{ours}.{{p}}", expect=4)
        for ours, before in ATTENTION.values()
    ]
    rules += [Rename(f"{name}.{{p:weight|bias}}", f"{name}.{{p}}", expect=2) for _, name in _places(cfg)]
    return rules


def _layout(name: str, names: str, sign: str, shape: Shape, rules: Callable[[], list[Rule]]) -> Layout:
    return Layout(
        name,
        f"the autoencoder of Stable Diffusion 1.5 or SDXL, {names} names",
        kind="autoencoder",
        fits=("sd15", "sdxl"),
        parts=("vae",),
        has={sign: shape, "quant_conv.weight": (8, 8, 1, 1)},
        build=always(rules, "vae."),
        note="its content does not say of which of the two bases it is",
    )


QUERY = "encoder.mid_block.attentions.0"
LAYOUTS = (
    _layout(
        "vae-ldm",
        "original",
        "encoder.down.0.block.0.conv1.weight",
        (128, 128, 3, 3),
        lambda: vae_ldm_file(SD_VAE),
    ),
    _layout("vae-diffusers", "diffusers'", f"{QUERY}.to_q.weight", (512, 512), lambda: vae_diffusers(SD_VAE)),
    _layout(
        "vae-diffusers-old",
        "diffusers' old",
        f"{QUERY}.query.weight",
        (512, 512),
        lambda: vae_diffusers(SD_VAE, old=True),
    ),
)

"""TAESD, the tiny autoencoder: a file per half, or both in diffusers' names; no network here reads it yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from weights_convert.layout import Layout, Shape, always
from weights_convert.rules import Rename, Rule

# Layers with parameters as diffusers counts them, with "conv" for a residual block and the leaves of each.
ENCODER = {0: "wb", 1: "conv", 2: "w", **dict.fromkeys((3, 4, 5), "conv"), 6: "w", **dict.fromkeys((7, 8, 9), "conv")}
ENCODER |= {10: "w", **dict.fromkeys((11, 12, 13), "conv"), 14: "wb"}
DECODER = {0: "wb", **dict.fromkeys((2, 3, 4), "conv"), 6: "w", **dict.fromkeys((7, 8, 9), "conv"), 11: "w"}
DECODER |= {**dict.fromkeys((12, 13, 14), "conv"), 16: "w", 17: "conv", 18: "wb"}
LEAVES = {"wb": ("{p:weight|bias}", 2), "w": ("weight", 1), "conv": ("conv.{k:0|2|4}.{p:weight|bias}", 6)}


def _half(layers: Mapping[int, str], source: str, target: str, first: int) -> list[Rule]:
    rules: list[Rule] = []
    for n, kind in layers.items():
        leaf, count = LEAVES[kind]
        rules.append(Rename(f"{source}{n + first}.{leaf}", f"{target}{n}.{leaf}", expect=count))
    return rules


def taesd_encoder() -> list[Rule]:
    """taesd_encoder.pth: a plain sequence."""
    return _half(ENCODER, "", "encoder.layers.", first=0)


def taesd_decoder() -> list[Rule]:
    """taesd_decoder.pth: its sequence begins with a layer without parameters, which diffusers does not count."""
    return _half(DECODER, "", "decoder.layers.", first=1)


def taesd_diffusers() -> list[Rule]:
    """diffusers' AutoencoderTiny, both halves."""
    return _half(ENCODER, "encoder.layers.", "encoder.layers.", 0) + _half(
        DECODER, "decoder.layers.", "decoder.layers.", 0
    )


def taesd_shapes(half: str) -> dict[str, tuple[int, ...]]:
    """Every key of the "encoder" or "decoder" of diffusers' AutoencoderTiny."""
    layers, ends = (ENCODER, {0: (64, 3), 14: (4, 64)}) if half == "encoder" else (DECODER, {0: (64, 4), 18: (3, 64)})
    out: dict[str, tuple[int, ...]] = {}
    for n, kind in layers.items():
        channels = ends.get(n, (64, 64))  # out, in
        for name in [f"conv.{k}." for k in (0, 2, 4)] if kind == "conv" else [""]:
            out[f"{half}.layers.{n}.{name}weight"] = (*channels, 3, 3)
            if kind != "w":
                out[f"{half}.layers.{n}.{name}bias"] = channels[:1]
    return out


def _layout(name: str, title: str, has: dict[str, Shape | None], rules: Callable[[], list[Rule]]) -> Layout:
    return Layout(
        f"taesd-{name}",
        f"TAESD, the tiny autoencoder{title}",
        kind="tiny autoencoder",
        fits=("sd15", "sdxl"),
        parts=("taesd",),
        has=has,
        build=always(rules, "taesd."),
        configs={"taesd": ("encoder", "decoder") if name == "diffusers" else (name,)},
        note="read and checked by its names and shapes, no network in this project uses it yet; "
        "its content does not say of which of the two bases it is",
    )


LAYOUTS = (
    _layout("encoder", "'s encoder", {"0.weight": (64, 3, 3, 3), "14.weight": (4, 64, 3, 3)}, taesd_encoder),
    _layout("decoder", "'s decoder", {"1.weight": (64, 4, 3, 3), "19.weight": (3, 64, 3, 3)}, taesd_decoder),
    _layout(
        "diffusers",
        ", diffusers' names",
        {"encoder.layers.0.weight": (64, 3, 3, 3), "decoder.layers.18.weight": (3, 64, 3, 3)},
        taesd_diffusers,
    ),
)

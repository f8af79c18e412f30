"""DOVER from its published file, DOVER.pth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from eval.dover.convnext import ConvNeXtConfig
from eval.dover.network import DOVER, DOVERConfig
from weights_convert import files
from weights_convert.layouts import dover as layout
from weights_convert.rules import ConversionError, convert, load_strict

TECHNICAL = "technical_backbone.patch_embed.proj.weight"
MOBILE = "technical_backbone.downsample_layers.0.0.weight"


def load_dover(path: str | Path, aesthetic: bool = False) -> DOVER:
    """The network of a file, float32 on the CPU, frozen; with `aesthetic` both branches.

    Raises OSError where there is no file and ConversionError for one that holds something else.
    """
    tensors, _ = files.read(path)
    return build(tensors, str(path), aesthetic)


def build(tensors: Mapping[str, Tensor], file: str, aesthetic: bool = False, cfg: DOVERConfig | None = None) -> DOVER:
    """`load_dover` for tensors that are read already; `cfg` for other sizes than the published ones."""
    if MOBILE in tensors:
        raise ConversionError(f"{file}: this is DOVER-Mobile, another network with other ratings; give DOVER.pth")
    if TECHNICAL not in tensors:
        some = ", ".join(list(tensors)[:3])
        raise ConversionError(f"{file}: expected DOVER's weights, found the keys {some}...; give DOVER.pth")
    found, _ = convert(tensors, layout.dover(aesthetic), "DOVER", file)
    with torch.device("meta"):
        model = DOVER(cfg or DOVERConfig(aesthetic=ConvNeXtConfig() if aesthetic else None))
    load_strict(model, {key: value.float() for key, value in found.items()}, file)
    return model.eval().requires_grad_(False)

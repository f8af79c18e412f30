"""RAFT from a published file: raft-things.pth, raft-small.pth, or torchvision's of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from eval.raft.network import LARGE, RAFT, SMALL
from weights_convert import files
from weights_convert.layouts.raft import raft_rules
from weights_convert.rules import ConversionError, convert, load_strict


def load_raft(path: str | Path) -> RAFT:
    """The network of a file, float32 on the CPU, frozen; large or small is told from its content.

    Raises OSError where there is no file and ConversionError for one that holds something else.
    """
    tensors, _ = files.read(path)
    return build(tensors, str(path))


def build(tensors: Mapping[str, Tensor], file: str) -> RAFT:
    """`load_raft` for tensors that are read already."""
    starts = {".".join(key.removeprefix("module.").split(".")[:1]) for key in tensors}
    if not {"fnet", "cnet"} <= starts and not {"feature_encoder", "context_encoder"} <= starts:
        some = ", ".join(list(tensors)[:3])
        raise ConversionError(
            f"{file}: expected RAFT's weights, found the keys {some}...; give raft-things.pth or raft-small.pth of the "
            "RAFT release, or torchvision's raft_large_C_T_V1 or raft_small_C_T_V1"
        )
    found, _ = convert(tensors, raft_rules(tensors.keys()), "RAFT", file)
    with torch.device("meta"):
        model = RAFT(LARGE if "update_block.mask.0.weight" in found else SMALL)
    load_strict(model, {key: value.float() for key, value in found.items()}, file)
    return model.eval().requires_grad_(False)

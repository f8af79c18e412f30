"""What the tests of LoRA files share: one toy change in the names of every grammar, sparse files."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2v.models.lora import LoRAPair
from i2v.models.unet import UNetConfig
from weights_convert import files
from weights_convert.layouts.lora import Base
from weights_convert.lora import LoRAFile

SMALL = Base("small", UNetConfig((32, 48), (1, 1), (4, 4), context_dim=24, layers=1, groups=16), (24,))
SMALL_XL = Base("small XL", UNetConfig((32, 48), (0, 2), (4, 4), 24, 2, 1, True, pooled_dim=16, groups=16), (24, 40))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(path: Path, tensors: Mapping[str, Mapping[str, Any]]) -> Path:
    """A safetensors file with this header whose payload takes no room on disk; its values are zeros."""
    sizes = {"float16": ("F16", 2), "float32": ("F32", 4), "int64": ("I64", 8)}
    header, end = {}, 0
    for key, spec in tensors.items():
        name, width = sizes[spec["dtype"]]
        start, end = end, end + torch.Size(spec["shape"]).numel() * width
        header[key] = {"dtype": name, "shape": spec["shape"], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


UNET = "down_blocks.0.attentions.0.transformer_blocks.0."
TEXT = "text_model.encoder.layers.1.self_attn."
MOTION = "up_blocks.1.motion_modules.0.transformer_blocks.0.attention_blocks."
OLD_MOTION = MOTION.replace(".transformer_blocks", ".temporal_transformer.transformer_blocks")

# our (part, path) -> shape of the weight
CHANGED = {
    ("unet", f"{UNET}attn1.to_q"): (32, 32),
    ("unet", f"{UNET}attn2.to_k"): (32, 24),
    ("unet", f"{UNET}attn2.to_out.0"): (32, 32),
    ("text_encoder", f"{TEXT}v_proj"): (24, 24),
    ("text_encoder", f"{TEXT}out_proj"): (24, 24),
    ("motion", f"{MOTION}1.to_out.0"): (32, 32),
}
# grammar -> the published names of these six layers, and how a key goes on after them
Q, K, OUT = ("attn1.to_q", "attn2.to_k", "attn2.to_out.0")
FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
FLAT_TEXT = "text_model_encoder_layers_1_self_attn_"
FLAT_MOTION = "up_blocks_1_motion_modules_0_transformer_blocks_0_attention_blocks_1_to_out_0"
KOHYA = [f"lora_te_{FLAT_TEXT}v_proj", f"lora_te_{FLAT_TEXT}out_proj", f"lora_unet_{FLAT_MOTION}"]
GRAMMARS: dict[str, tuple[list[str], tuple[str, str]]] = {
    "kohya": (
        [f"{FLAT}attn1_to_q", f"{FLAT}attn2_to_k", f"{FLAT}attn2_to_out_0", *KOHYA],
        ("lora_down.weight", "lora_up.weight"),
    ),
    "kohya, original names": (
        [f"lora_unet_input_blocks_1_1_transformer_blocks_0_{x.replace('.', '_')}" for x in (Q, K, OUT)] + KOHYA,
        ("lora_down.weight", "lora_up.weight"),
    ),
    "kohya, broken exporter": (
        [f"unet.{FLAT}attn1_to_q", f"unet.{FLAT}attn2_to_k", f"unet.{FLAT}attn2_to_out_0", *KOHYA],
        ("lora_down.weight", "lora_up.weight"),
    ),
    "attention processors": (
        [f"unet.{UNET}attn1.processor.to_q_lora", f"unet.{UNET}attn2.processor.to_k_lora"]
        + [f"unet.{UNET}attn2.processor.to_out_lora"]
        + [f"text_encoder.{TEXT}to_v_lora", f"text_encoder.{TEXT}to_out_lora"]
        + [f"{OLD_MOTION}1.processor.to_out_lora"],
        ("down.weight", "up.weight"),
    ),
    "attention processors, oldest": (
        [f"{UNET}attn1.processor.to_q_lora", f"{UNET}attn2.processor.to_k_lora"]
        + [f"{UNET}attn2.processor.to_out_lora"]
        + [f"text_encoder.{TEXT}v_proj.lora_linear_layer", f"text_encoder.{TEXT}out_proj.lora_linear_layer"]
        + [f"unet.{OLD_MOTION.replace('temporal_transformer.', '').replace('attention_blocks.', 'attn2')}.to_out_lora"],
        ("down.weight", "up.weight"),
    ),
    "diffusers": (
        [f"unet.{UNET}{x}.lora" for x in (Q, K, OUT)]
        + [f"text_encoder.{TEXT}v_proj.lora_linear_layer", f"text_encoder.{TEXT}out_proj.lora_linear_layer"]
        + [f"unet.{MOTION}1.to_out.0.lora"],
        ("down.weight", "up.weight"),
    ),
    "peft": (
        [f"unet.{UNET}{x}" for x in (Q, K, OUT)]
        + [f"text_encoder.{TEXT}v_proj", f"text_encoder.{TEXT.removeprefix('text_model.')}out_proj"]
        + [f"unet.{MOTION}1.to_out.0"],
        ("lora_A.weight", "lora_B.weight"),
    ),
    "peft, a model of its own": (
        [f"base_model.model.{UNET}{x}" for x in (Q, K, OUT)]
        + [f"base_model.model.{TEXT}v_proj", f"base_model.model.{TEXT}out_proj"]
        + [f"base_model.model.{MOTION}1.to_out.0"],
        ("lora_A.default.weight", "lora_B.default.weight"),
    ),
}


def toy() -> dict[tuple[str, str], LoRAPair]:
    """Ranks differ from layer to layer."""
    return {
        target: LoRAPair(draw(2 + n, shape[1], seed=n), draw(shape[0], 2 + n, seed=n + 50))
        for n, (target, shape) in enumerate(CHANGED.items())
    }


def written(path: Path, names: list[str], ends: tuple[str, str], **extra: Tensor) -> Path:
    down, up = ends
    tensors = {}
    for name, pair in zip(names, toy().values(), strict=True):
        tensors |= {f"{name}.{down}": pair.down, f"{name}.{up}": pair.up}
    files.write(path, {**tensors, **extra})
    return path


def flat(lora: LoRAFile) -> dict[tuple[str, str], LoRAPair]:
    return {(part, path): pair for part, pairs in lora.parts.items() for path, pair in pairs.items()}


def peft_folder(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    written(folder / "adapter_model.safetensors", *GRAMMARS["peft, a model of its own"])
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **settings}))
    return folder


def saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    files.write(path, tensors)
    return path

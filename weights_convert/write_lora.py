"""LoRA pairs written in a published grammar, with what our own reader and others need to know in the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2v.models.lora import LoRAPair
from weights_convert import files
from weights_convert.layouts.lora import Base, kohya_prefixes, resolve, width
from weights_convert.lora import DIFFUSERS_SETTINGS, OWN_BASE
from weights_convert.rules import ConversionError

LAYOUTS = ("peft", "diffusers", "kohya")


def write_lora(
    path: str | Path,
    parts: Mapping[str, Mapping[str, LoRAPair]],
    base: Base,
    layout: str = "peft",
    **facts: Any,
) -> Path:
    """Write pairs by part (unet, text_encoder, text_encoder_2, motion) and path of ours; whole or not at all.

    layout: "peft" (also our own: diffusers and PEFT read it too), "diffusers" (its training scripts') or "kohya"
    (ComfyUI, A1111; alpha beside each pair). Tensors keep their dtype. `facts` (recipe, steps, hash of the base, ...)
    go into the metadata, beside the base's config. Raises ConversionError for a layout that is not known, no pairs,
    a part or layer that the base lacks, a pair of another width, and a pair with a middle in another layout than
    kohya's, which alone has them.
    """
    if layout not in LAYOUTS:
        raise ConversionError(
            f"{path}: no LoRA is written in the layout {layout!r}, expected one of {LAYOUTS}; name one"
        )
    if not any(parts.values()):
        raise ConversionError(f"{path}: there is no pair to write, expected at least one; give some")
    prefixes = kohya_prefixes(base)
    tensors: dict[str, Tensor] = {}
    for part, pairs in parts.items():
        if part not in prefixes:
            raise ConversionError(f"{path}: {base.name} has no {part}, expected {', '.join(prefixes)}; name its base")
        for layer, pair in pairs.items():
            if pair.mid is not None and layout != "kohya":
                raise ConversionError(
                    f"{path}: {layer} has a middle tensor, which only the layout kohya holds; expected pairs: write it "
                    "in that layout"
                )
            if resolve(_kohya(prefixes, part, layer), base) != (part, layer):
                raise ConversionError(
                    f"{path}: {base.name} has no layer {part}.{layer}, expected its own; name its base"
                )
            has, wanted = (pair.up.shape[0], pair.down.shape[1]), width(part, layer, base)
            if wanted is not None and has != wanted:
                raise ConversionError(
                    f"{path}: {part}.{layer} changes a weight {has}, expected {wanted}, that of {base.name}; name its "
                    "base"
                )
            tensors |= _named(layout, part, layer, pair, prefixes)
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    metadata[OWN_BASE] = json.dumps({"name": base.name, "unet": asdict(base.unet), "text": base.text})
    if layout != "kohya":
        metadata[DIFFUSERS_SETTINGS] = json.dumps(_settings(parts), sort_keys=True)
    files.write(path, {k: v.detach().contiguous() for k, v in tensors.items()}, metadata)
    return Path(path)


def _kohya(prefixes: Mapping[str, str], part: str, layer: str) -> str:
    return prefixes[part] + layer.replace(".", "_")


def _diffusers(part: str, layer: str) -> str:
    """diffusers calls the two temporal attentions of a block attn1 and attn2, and has them in its UNet."""
    names = layer.replace("attention_blocks.0", "attn1").replace("attention_blocks.1", "attn2")
    return f"unet.{names}" if part == "motion" else f"{part}.{layer}"


def _named(layout: str, part: str, layer: str, pair: LoRAPair, prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    if layout == "kohya":
        name = _kohya(prefixes, part, layer)
        out = {f"{name}.lora_down.weight": pair.down, f"{name}.lora_up.weight": pair.up}
        if pair.mid is not None:
            out[f"{name}.lora_mid.weight"] = pair.mid
        return out | {f"{name}.alpha": torch.tensor(float(pair.alpha or pair.rank))}
    name = _diffusers(part, layer)
    if layout == "peft":
        return {f"{name}.lora_A.weight": pair.down, f"{name}.lora_B.weight": pair.up}
    kind = "lora_linear_layer" if part.startswith("text_encoder") else "lora"
    return {f"{name}.{kind}.down.weight": pair.down, f"{name}.{kind}.up.weight": pair.up}


def _settings(parts: Mapping[str, Mapping[str, LoRAPair]]) -> dict[str, Any]:
    """PEFT's settings of each adapted model, as diffusers keeps them: common rank and alpha, and what differs.

    PEFT compares the ends of names, and transformers 5 has no level `text_model.`: without it, layers are found in
    every version.
    """
    models: dict[str, dict[str, LoRAPair]] = {}
    for part, pairs in parts.items():
        for layer, pair in pairs.items():
            model, _, name = _diffusers(part, layer).partition(".")
            models.setdefault(model, {})[name.removeprefix("text_model.")] = pair
    out: dict[str, Any] = {}
    for model, named in models.items():
        rank, alpha = _commonest(named, lambda p: p.rank), _commonest(named, lambda p: p.alpha or p.rank)
        ranks = {k: p.rank for k, p in named.items() if p.rank != rank}
        alphas = {k: p.alpha or p.rank for k, p in named.items() if (p.alpha or p.rank) != alpha}
        values = {"r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas}
        values["target_modules"] = sorted(named)
        out |= {f"{model}.{key}": value for key, value in values.items()}
    return out


def _commonest(named: Mapping[str, LoRAPair], value: Callable[[LoRAPair], float]) -> float:
    values = [value(pair) for pair in named.values()]
    return max(sorted(set(values)), key=values.count)

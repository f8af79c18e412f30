"""Writes a model as a folder that diffusers loads: unet/, vae/, text_encoder/..., each with its config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2v.models.unet import UNetConfig
from weights_convert import diffusers_configs, files, own_format
from weights_convert.layouts.animatediff import motion_adapter
from weights_convert.layouts.ip_adapter import ip_adapter
from weights_convert.own_format import TEXT_FILES, Part
from weights_convert.rules import convert, inverted

Json = dict[str, Any]
IP_ADAPTER = "ip_adapter/ip-adapter.safetensors"
CLASSES = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
SECOND_PAD = "!"  # SDXL's second tokenizer pads with id 0


def documents(parts: Mapping[str, Part], unet: UNetConfig, tokenizer: Mapping[str, str]) -> dict[str, str]:
    """The small files: name in the folder -> text. Raises ConversionError for a network that diffusers lacks."""
    out: dict[str, Json] = {}
    for name, part in parts.items():
        if name in diffusers_configs.FOLDERS:
            folder, _ = diffusers_configs.FOLDERS[name]
            out[f"{folder}/config.json"] = diffusers_configs.to_json(part.config, unet)
    texts = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
    if {"unet", "vae", "text_encoder"} <= parts.keys() and tokenizer:
        out["scheduler/scheduler_config.json"] = _scheduler(parts["unet"])
        out["model_index.json"] = _index(parts)
    written = {name: json.dumps(values, indent=2, sort_keys=True) + "\n" for name, values in out.items()}
    for name in texts if tokenizer else ():
        folder = name.replace("text_encoder", "tokenizer")
        settings = _tokenizer(parts[name].config.max_length, SECOND_PAD if name.endswith("_2") else "<|endoftext|>")
        written |= {f"{folder}/{file}": json.dumps(v, indent=2) + "\n" for file, v in settings.items()}
        written |= {f"{folder}/{file}": tokenizer[file] for file in TEXT_FILES}
    return written


def _index(parts: Mapping[str, Part]) -> Json:
    second = "text_encoder_2" in parts
    values: Json = {
        "_class_name": "StableDiffusionXLPipeline" if second else "StableDiffusionPipeline",
        "_diffusers_version": "0.20.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", _scheduler(parts["unet"])["_class_name"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **{name: list(kind) for name, kind in CLASSES.items() if name in parts},
    }
    if second:
        return values | {"force_zeros_for_empty_prompt": True, "tokenizer_2": ["transformers", "CLIPTokenizer"]}
    return values | {"requires_safety_checker": False, "safety_checker": [None, None]}


def _scheduler(unet: Part) -> Json:
    """Stable Diffusion's own, or the one that a UNet of one's own was trained with."""
    common = {
        "_diffusers_version": "0.20.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "trained_betas": None,
    }
    if unet.schedule is not None:
        own = unet.schedule
        return common | {
            "_class_name": "DDIMScheduler",
            "beta_end": own.beta_end,
            "beta_schedule": own.kind,
            "beta_start": own.beta_start,
            "num_train_timesteps": own.num_train_timesteps,
            "prediction_type": {"v": "v_prediction"}.get(own.prediction, own.prediction),
            "rescale_betas_zero_snr": own.zero_terminal_snr,
            "set_alpha_to_one": own.final_alpha_one,
            "steps_offset": own.steps_offset,
            "timestep_spacing": own.spacing,
        }
    if unet.config.pooled_dim:
        return common | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    return common | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}


def _tokenizer(length: int, pad: str) -> dict[str, Json]:
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": length,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {"tokenizer_config.json": settings | special, "special_tokens_map.json": special}


def weights(name: str, part: Part, unet: UNetConfig) -> tuple[str, Mapping[str, Tensor]] | None:
    """File name and tensors of a part in diffusers' names, which are ours but for the IP-Adapter's; None: no place."""
    if name == "ip_adapter":
        rules = inverted(ip_adapter(unet, part.config.kind))
        return IP_ADAPTER, convert(part.tensors, rules, "IP-Adapter", "the IP-Adapter's part")[0]
    if name not in diffusers_configs.FOLDERS:
        return None
    tensors = part.tensors
    if name == "motion":
        tensors = convert(tensors, inverted(motion_adapter(part.config)), "MotionAdapter", "the motion modules")[0]
    folder, stem = diffusers_configs.FOLDERS[name]
    return f"{folder}/{stem}.safetensors", tensors


def write(
    folder: Path,
    parts: Mapping[str, Part],
    unet: UNetConfig,
    tokenizer: Mapping[str, str],
    dtype: torch.dtype | None,
    done: Callable[[int], object],
) -> list[Path]:
    """Writes all files, each under its name only when it is complete; returns their paths.

    Older shards of a part, which diffusers would read in place of the new file, are removed. `tokenizer` is the text
    of vocab.json and merges.txt, or empty: then the folder is no whole pipeline.
    """
    texts = documents(parts, unet, tokenizer)
    paths: list[Path] = []
    for name, part in parts.items():
        found = weights(name, part, unet)
        if found is not None:
            with files.after(paths):
                files.write(folder / found[0], found[1], {"format": "pt"}, dtype, done)
            paths.append(folder / found[0])
            _remove_shards(paths[-1])
    for file, text in texts.items():
        paths.append(folder / file)
        own_format.write_text(paths[-1], text)
    return paths


def _remove_shards(new: Path) -> None:
    """The shards that lie beside a part's new file, of every variant and kind, and their index."""
    for pattern in (f"{new.stem}*.index*.json", f"{new.stem}*-of-*"):
        for old in new.parent.glob(pattern):
            old.unlink()

"""A preset's files -> a built, strictly loaded pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from i2v.config import ConfigError
from i2v.device import pick_device, pick_dtype
from i2v.diffusion.schedule import Schedule
from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import IPAdapterConfig, add_ip_adapter, image_projection
from i2v.models.motion import MotionConfig, add_motion_modules
from i2v.models.tokenizer import Tokenizer
from i2v.models.unet import UNet, UNetConfig
from i2v.models.vae import VAE, VAEConfig
from i2v.parts import PartFile, from_json, open_part, save_part
from i2v.pipeline import I2VPipeline
from i2v.presets import Preset, find
from weights_convert.rules import check_shapes

__all__ = ["PartFile", "header", "headers", "load", "save_part"]

CONFIGS: dict[str, type | None] = {
    "vae": VAEConfig,
    "text_encoder": CLIPTextConfig,
    "image_encoder": CLIPVisionConfig,
    "unet": UNetConfig,
    "motion": MotionConfig,  # with the schedule that it was trained on
    "i2v_adapter": None,
    "ip_adapter": IPAdapterConfig,
}
PROJECTION, CONTENT = "image_proj.", "ip_adapter."  # the two groups of keys in ip_adapter.safetensors
TEXT_FILES = ("vocab.json", "merges.txt")


def headers(folder: Path) -> dict[str, PartFile]:
    """What lies in a model's folder, no tensor read; raises ConfigError that names what is missing or damaged."""
    wanted = (*(f"{part}.safetensors" for part in CONFIGS), *TEXT_FILES)
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}; a model's folder holds one file per part")
    return {name: header(folder / f"{name}.safetensors") for name in CONFIGS}


def header(path: Path) -> PartFile:
    """One part, no tensor read; the file's name says which part it is."""
    if path.stem not in CONFIGS:
        raise ConfigError(f"{path}: no part has this name; parts are {', '.join(CONFIGS)}")
    return open_part(path, CONFIGS[path.stem])


def folder_of(preset: Preset, folder: Path | None = None) -> Path:
    """Where the preset's files lie; raises ConfigError that lists what is needed where none are shipped."""
    if folder is not None:
        return folder
    if preset.folder is not None:
        return preset.folder
    needed = "; ".join(f"{file} ({what})" for file, what in preset.needs.items())
    raise ConfigError(f"--preset {preset.name}: its weights are not part of this repository. It needs {needed}")


def load(
    preset: str = "tiny",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    folder: Path | None = None,
) -> I2VPipeline:
    """The preset, ready to run: `load("tiny")(image, prompt)`. `folder` takes its place with weights of your own.

    Networks are built without memory on the meta device and then given the files' tensors, in `dtype`; the adapter
    stays float32 and is cast where it is used. Every tensor must have its place, and every place a tensor.
    Raises ConfigError for a missing, damaged or unfitting file.
    """
    chosen = find(preset)
    place = pick_device(device)
    number = pick_dtype(dtype, place)
    where = folder_of(chosen, folder)
    parts = headers(where)
    with torch.device("meta"):
        vae = VAE(parts["vae"].config)
        text = CLIPTextModel(parts["text_encoder"].config)
        image = CLIPVisionModel(parts["image_encoder"].config)
        projection = image_projection(parts["ip_adapter"].config)
        unet = UNet(parts["unet"].config)
        base = set(unet.state_dict())
        motion = add_motion_modules(unet, parts["motion"].config)
        adapter = add_i2v_adapter(unet)
        content = {CONTENT + path: module for path, module in add_ip_adapter(unet).items()}
    ours = parts["ip_adapter"].tensors()
    projected = {k.removeprefix(PROJECTION): ours.pop(k) for k in list(ours) if k.startswith(PROJECTION)}
    safe = number if number != torch.float16 or parts["vae"].config.float16_safe else torch.float32
    _fill({"": vae}, parts["vae"].tensors(), parts["vae"].path, place, safe)
    _fill({"": text}, parts["text_encoder"].tensors(), parts["text_encoder"].path, place, number)
    _fill({"": image}, parts["image_encoder"].tensors(), parts["image_encoder"].path, place, number)
    _fill({"": projection}, projected, parts["ip_adapter"].path, place, number)
    _fill(motion, parts["motion"].tensors(), parts["motion"].path, place, number)
    _fill(content, ours, parts["ip_adapter"].path, place, number)
    _fill(adapter, parts["i2v_adapter"].tensors(), parts["i2v_adapter"].path, place, torch.float32)
    _fill({"": unet}, parts["unet"].tensors(), parts["unet"].path, place, number, only=base)
    return I2VPipeline(
        preset=chosen,
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=Tokenizer.from_files(
            where / TEXT_FILES[0], where / TEXT_FILES[1], length=parts["text_encoder"].config.max_length
        ),
        image_encoder=image,
        image_projection=projection,
        image_config=parts["ip_adapter"].config,
        i2v_adapter=adapter,
        ip_adapter=content,
        schedule=schedule_of(parts["motion"]),
        max_frames=parts["motion"].config.max_frames,
        device=place,
        dtype=number,
        weights={name: {"file": part.path.name, "sha256": part.sha256()} for name, part in parts.items()},
        folder=folder,
    )


def schedule_of(motion: PartFile) -> Schedule:
    """The noise schedule that the motion modules were trained on, from their file's metadata."""
    if "schedule" not in motion.metadata:
        raise ConfigError(f"{motion.path} names no schedule in its metadata; save_part(..., schedule=Schedule(...))")
    return from_json(Schedule, json.dumps(motion.metadata["schedule"]), str(motion.path))


def _fill(
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    only: set[str] | None = None,
) -> None:
    """Put a file's tensors into modules built on meta; `only` names the keys that are this file's business."""
    dotted = {f"{name}." if name else "": module for name, module in modules.items()}
    wanted = {start + key: v for start, module in dotted.items() for key, v in module.state_dict().items()}
    if only is not None:
        wanted = {key: v for key, v in wanted.items() if key in only}
    check_shapes(wanted, tensors, str(path))
    for start, module in dotted.items():
        placed = {
            key: tensors[start + key].to(device, dtype if tensors[start + key].is_floating_point() else None)
            for key in module.state_dict()
            if start + key in wanted
        }
        module.load_state_dict(module.state_dict() | placed, strict=True, assign=True)
        module.requires_grad_(False).eval()

"""The files of a model of our own: one safetensors file per part, each describing itself in its metadata.

The metadata holds the part's config as json, so that a network of another size loads without a change in the code.
Keys are module paths in the UNet.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from i2v.config import ConfigError
from i2v.models.clip_text import CLIPTextConfig
from i2v.models.clip_vision import CLIPVisionConfig
from i2v.models.controlnet import ControlNetConfig
from i2v.models.ip_adapter import IPAdapterConfig
from i2v.models.motion import MotionConfig
from i2v.models.unet import UNetConfig
from i2v.models.vae import VAEConfig
from weights_convert import files

C = TypeVar("C")

CONFIGS: dict[str, type | None] = {  # the parts of a model, and the config that each file's metadata hold
    "vae": VAEConfig,
    "text_encoder": CLIPTextConfig,
    "text_encoder_2": CLIPTextConfig,  # SDXL
    "image_encoder": CLIPVisionConfig,
    "unet": UNetConfig,
    "motion": MotionConfig,  # with the schedule that it was trained on
    "i2v_adapter": None,
    "ip_adapter": IPAdapterConfig,
}
KINDS: dict[str, type | None] = {  # with what may be added to a model
    **CONFIGS,
    "controlnet": ControlNetConfig,  # with the type of its pictures, as in --control TYPE=PATH
}


@dataclass(frozen=True)
class PartFile:
    """One weight file, its tensors not yet read."""

    name: str
    path: Path
    config: Any  # a frozen dataclass; None for the I2V-Adapter, whose shape follows from the UNet
    metadata: Mapping[str, Any]  # json decoded

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the file, on the CPU, in the stored format."""
        return files.read(self.path)[0]


def save_part(
    path: str | Path,
    part: nn.Module | Mapping[str, nn.Module] | Mapping[str, Tensor],
    config: Any = None,
    *,
    dtype: torch.dtype = torch.float16,
    family: str = "tiny",
    name: str | None = None,
    **metadata: Any,
) -> Path:
    """Write one part, complete or not at all; floating-point tensors are stored as `dtype`.

    part: a module, the dict that an `add_...` function returned (path -> module), or tensors by key.
    config: its frozen dataclass. name: of the part (unet, controlnet, ...); not given, the file's.
    Other metadata (schedule, recipe, steps, date) are dataclasses or what json can hold.
    """
    path = Path(path)
    tensors = {k: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype) for k, v in flat(part).items()}
    bad = [k for k, v in tensors.items() if not torch.isfinite(v).all()]
    if bad:
        raise ValueError(
            f"{path}: {len(bad)} tensors would hold infinities or NaN as {dtype}, first {bad[0]}, expected finite "
            "numbers; use float32 if they are too large for it"
        )
    facts = {"family": family, "part": name or path.stem, "config": config, **metadata}
    header = {k: v if isinstance(v, str) else json.dumps(_plain(v)) for k, v in facts.items() if v is not None}
    files.write(path, tensors, header)
    return path


def flat(part: nn.Module | Mapping[str, nn.Module] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's tensors under one level of keys."""
    if isinstance(part, nn.Module):
        return dict(part.state_dict())
    out: dict[str, Tensor] = {}
    for name, value in part.items():
        if isinstance(value, nn.Module):
            out |= {f"{name}.{key}": tensor for key, tensor in value.state_dict().items()}
        else:
            out[name] = value
    return out


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def from_json(cls: type[C], text: str, where: str) -> C:
    """A config dataclass from a file's metadata; lists become tuples. Raises ConfigError for what it cannot hold."""
    known = ", ".join(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
    try:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{where}: its {cls.__name__} cannot be used ({error}), expected the fields {known}; take the file anew, "
            "or use the version of this repository that wrote it"
        ) from None


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def is_part(path: Path) -> str:
    """The name of the part that `save_part` wrote there; "" for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("part", ""))
    except (SafetensorError, OSError):
        return ""


def open_part(path: Path, config: type | None) -> PartFile:
    """A part's header, from the file's first bytes alone; `config` is the dataclass that its metadata must hold.

    Raises ConfigError for a damaged file and for metadata that do not fit.
    """
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
    except SafetensorError as error:
        raise ConfigError(
            f"{path} is damaged or no safetensors file ({error}), expected a part of a model; take the file anew"
        ) from None
    if config is not None and "config" not in raw:
        raise ConfigError(f"{path} has no config in its metadata, expected one; write it with i2v.parts.save_part")
    built = from_json(config, raw["config"], str(path)) if config is not None else None
    return PartFile(path.stem, path, built, {k: _decoded(v) for k, v in raw.items()})

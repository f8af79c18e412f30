"""What is in a file or folder, told by its content: a published layout, a part of our own format, or something else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from i2v.models.clip_text import CLIPTextConfig
from i2v.models.unet import UNetConfig
from i2v.models.vae import VAEConfig
from weights_convert import diffusers_configs, files, own_format
from weights_convert.detect import KNOWN, completed, files_of, is_pipeline, named, read_pipeline, recognise, split_parts
from weights_convert.layout import Layout, always
from weights_convert.layouts.clip import clip_text, clip_vision
from weights_convert.layouts.diffusers_folder import SUBFOLDERS
from weights_convert.layouts.diffusers_unet import diffusers_unet
from weights_convert.layouts.vae import vae_diffusers
from weights_convert.lora import FOLDER_FILES, LoRAFile, read_lora
from weights_convert.refusals import Refusal, refused
from weights_convert.rules import ConversionError, Rule, account

IP_ADAPTER = "ip-adapter.safetensors"
OLD_VAE = "encoder.mid_block.attentions.0.query.weight"


@dataclass(frozen=True)
class Content:
    """One file, or one folder. Just one of `layout`, `own`, `lora` and `problem` is set. No tensor is read."""

    path: Path
    tensors: Mapping[str, Tensor]  # as they are named in the file
    metadata: Mapping[str, str]
    layout: Layout | None = None
    own: own_format.Part | None = None
    part: str = ""  # of an own file
    lora: LoRAFile | None = None
    problem: str = ""  # what else this is, or why it is not known
    refusal: Refusal | None = None  # the kind that `problem` tells of, if it is a known one
    known: bool = True  # False: nobody knows what it is

    @property
    def files(self) -> list[Path]:
        """Those that its weights lie in."""
        return files_of(_weights(self.path))

    def rules(self, ema: bool = True) -> list[Rule]:
        """Of the layout."""
        return self.layout.build(self.tensors.keys(), ema) if self.layout else []


@dataclass
class Accounted:
    """A content in our names: parts, how many keys each rule claimed, and every problem."""

    parts: dict[str, own_format.Part] = field(default_factory=dict)
    report: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def look(path: Path, layout: str | None = None) -> list[Content]:
    """What lies at `path`: one content for a file, several for a folder of a whole model.

    `layout` names it where the content leaves it open. Raises OSError for what is not there, ConversionError for
    what is damaged.
    """
    if not path.is_dir():
        return [_file(path, layout)]
    own = sorted(p for p in path.glob("*.safetensors") if own_format.part_name(p))
    if own:
        return [_file(p, None) for p in own]
    folders = [folder for folder, _ in diffusers_configs.FOLDERS.values()] + ["ip_adapter"]
    inside = [path / folder for folder in folders if (path / folder).is_dir()]
    if is_pipeline(path):
        whole = _recognised(path, *read_pipeline(path), config=None)
        if whole.layout is not None or whole.known:
            extra = [folder for folder in inside if folder.name not in SUBFOLDERS]
            return [whole, *(_file(folder, None) for folder in extra)]
    return [_file(folder, None) for folder in inside] or [_file(path, layout)]


def _file(path: Path, layout: str | None) -> Content:
    if own_format.part_name(path):
        part = own_format.read_part(path)
        metadata = files.read(path, widen=False)[1]
        return Content(path, part.tensors, metadata, own=part, part=own_format.part_name(path))
    tensors, metadata = files.read(_weights(path), widen=False)  # 8-bit floats are what they are, and stay unread
    if layout is not None:
        return Content(path, tensors, metadata, layout=named(layout))
    # of a known other kind nobody asks for a config that could be read
    return _recognised(path, tensors, metadata, None if refused(tensors, metadata) else _config(path))


def _weights(path: Path) -> Path:
    """The file of a folder that holds an adapter and no network: an IP-Adapter as we write it, a PEFT LoRA."""
    inside = [path / name for name in (IP_ADAPTER, *FOLDER_FILES) if (path / name).is_file()]
    return inside[0] if inside else path


def _recognised(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: Any) -> Content:
    content = Content(path, tensors, metadata)
    try:
        found = recognise(tensors, str(path), metadata)
    except ConversionError as error:
        if config is None:
            return replace(content, problem=_short(error, path), known=False)
        return replace(content, layout=_of_config(path, config, tensors))
    if isinstance(found, Refusal):
        return _lora(content) if found.kind == "lora" else replace(content, problem=str(found), refusal=found)
    known = found.configs.get(found.parts[0])
    if config is not None and len(found.parts) == 1 and (known is None or isinstance(config, type(known))):
        found = replace(found, configs={found.parts[0]: config})
    return replace(content, layout=found)


def _short(error: ConversionError, path: Path) -> str:
    """Without the file's name and the list of all layouts."""
    return str(error).removeprefix(f"{path}: ").split(f"\n{KNOWN}")[0]


def _lora(content: Content) -> Content:
    """With its pairs, or with what keeps it from being read."""
    try:
        return replace(content, lora=read_lora(content.path))
    except ConversionError as error:
        return replace(content, problem=f"LoRA: {str(error).removeprefix(f'{content.path}: ')}")


def _config(path: Path) -> Any:
    """What the config.json beside the weights of a diffusers folder says, None where there is none."""
    file = path / "config.json" if path.is_dir() else path.parent / "config.json"
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{file}: no json ({error}), expected it; take it again with the weights") from error
    return diffusers_configs.from_json(values, str(file)) if isinstance(values, dict) else None


def _of_config(path: Path, config: Any, tensors: Mapping[str, Tensor]) -> Layout:
    """A diffusers folder of a size that was never published: its config.json says what it is."""
    if isinstance(config, UNetConfig):
        part, rules = "unet", diffusers_unet(config)
    elif isinstance(config, VAEConfig):
        part, rules = "vae", vae_diffusers(config, old=OLD_VAE in tensors)
    elif isinstance(config, CLIPTextConfig):
        part, rules = "text_encoder", clip_text(projection=config.projection_dim > 0)
        part = "text_encoder_2" if path.name == "text_encoder_2" else part
    else:
        part, rules = "image_encoder", clip_vision()
    title = f"{part.replace('_', ' ')} of a size of its own, in diffusers' names"
    build = always(lambda: rules, f"{part}.")
    return Layout(f"{part}-by-config", title, part, (), (part,), {}, build, configs={part: config})


def accounted(content: Content, family: str | None = None, ema: bool = True) -> Accounted:
    """All keys of a content claimed or not. `family` says which base it is for where the content leaves that open."""
    if content.own is not None:
        return Accounted({content.part: content.own}, Counter({"our own names, kept": len(content.tensors)}))
    if content.lora is not None:
        pairs = {f"low-rank pairs of {name}": len(part) for name, part in content.lora.parts.items()}
        return Accounted(report=Counter(pairs))
    if content.layout is None:
        return Accounted(problems=[content.problem])
    layout = content.layout
    converted, report, problems = account(content.tensors, content.rules(ema))
    base = family or (layout.fits[0] if len(layout.fits) == 1 else "")
    parts = {}
    for name, tensors in split_parts(completed(converted, layout, str(content.path))).items():
        schedule = own_format.SCHEDULES.get(base) if name == "motion" else None
        parts[name] = own_format.Part(tensors, layout.configs.get(name), base, schedule)
    return Accounted(parts, report, problems)

"""Our own format, written: a folder with one safetensors file per part that says in its metadata what it is.

Beside the config stand the base it belongs to (`base`), the noise schedule of motion modules, how it came about
(`recipe`) and the sha256 of every file that it was made of (`sources`). What reads it is i2v/parts.py.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2v.diffusion.schedule import ANIMATEDIFF_SD15, ANIMATEDIFF_SDXL, Schedule
from i2v.models.clip_text import CLIPTextConfig
from i2v.models.tokenizer import parse_merges, vocabulary
from i2v.parts import KINDS, from_json, is_part, open_part
from weights_convert import files
from weights_convert.rules import ConversionError

SCHEDULES = {"sd15": ANIMATEDIFF_SD15, "sdxl": ANIMATEDIFF_SDXL}  # of the published motion modules
PROJECTION = "image_proj."  # keys of ip_adapter.safetensors that are not attentions
TEXT_FILES = ("vocab.json", "merges.txt")


@dataclass(frozen=True)
class Part:
    """One part of a model in our names, its tensors not yet read, and what is known of it."""

    tensors: Mapping[str, Tensor]
    config: Any  # None for an I2V-Adapter, and for attentions to image tokens without their projection
    family: str  # "sd15", "sdxl" or that of a model of one's own
    schedule: Schedule | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # of our own files: recipe, steps and the like

    @property
    def bare_attentions(self) -> bool:
        """An IP-Adapter's attentions without the projection that makes the image tokens."""
        return self.config is None and any(key.startswith("ip_adapter.") for key in self.tensors)


def part_name(path: Path) -> str:
    """Which part the file at `path` holds, in our own format; "" for any other file."""
    name = is_part(path)
    return name if name in KINDS else ""


def read_part(path: Path) -> Part:
    """One of our own files. Raises ConfigError where its metadata do not fit it."""
    file = open_part(path, KINDS[part_name(path)])
    facts = dict(file.metadata)
    schedule = facts.pop("schedule", None)
    known = from_json(Schedule, json.dumps(schedule), str(path)) if schedule else None
    for key in ("part", "config"):
        facts.pop(key, None)
    return Part(file.tensors(), file.config, str(facts.pop("family", "")), known, facts)


def write_part(
    path: Path,
    part: Part,
    dtype: torch.dtype | None,
    recipe: Mapping[str, Any],
    sources: Mapping[str, str],
    done: Callable[[int], object] | None = None,
) -> None:
    """Streams a part to disk, cast to `dtype` (None: as it is); whole or not at all, the same bytes for the same part.

    `recipe` says how it came about, `sources` the sha256 of each file by name; what an own file already said of its
    making is kept. `done` is told the bytes written.
    """
    facts: dict[str, Any] = {"recipe": recipe, **part.facts}
    facts |= {"family": part.family, "part": path.stem, "base": part.family, "config": part.config}
    facts |= {"schedule": part.schedule, "sources": sources}
    header = {k: v if isinstance(v, str) else json.dumps(plain(v)) for k, v in facts.items() if v is not None}
    files.write(path, part.tensors, header, dtype, done)


def plain(value: Any) -> Any:
    """A config as json holds it."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def with_projection(part: Part, beside: Path) -> Part:
    """Bare attentions completed by the projection of the ip_adapter.safetensors that is already there."""
    if not beside.is_file():
        raise ConversionError(
            f"{beside}: no such file, expected the projection that goes with the attentions to image tokens; "
            "convert the IP-Adapter's file (ip-adapter-plus_sd15.safetensors) into this folder first, or leave "
            "these out with --parts"
        )
    there = read_part(beside)
    projection = {key: tensor for key, tensor in there.tensors.items() if key.startswith(PROJECTION)}
    facts = {**there.facts, "attentions": "of another file than the projection, see sources"}
    return dataclasses.replace(part, tensors={**projection, **part.tensors}, config=there.config, facts=facts)


def clip_tokenizer(config: CLIPTextConfig) -> dict[str, str]:
    """The text files of CLIP's own tokenizer, where the encoder has its vocabulary; nothing for another one."""
    if config.vocab_size != CLIPTextConfig.vocab_size:
        return {}
    merges = gzip.decompress(resources.files("i2v.models").joinpath("data/clip_merges.txt.gz").read_bytes())
    text = merges.decode("utf-8")
    table = vocabulary(parse_merges(text))
    return dict(zip(TEXT_FILES, (json.dumps(table, ensure_ascii=False), text)))


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all."""
    files.write_atomic(path, lambda out: out.write(text.encode("utf-8")))

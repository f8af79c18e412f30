"""Weight files as users have them, each told by its content: which parts of a model it holds, tensors not yet read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from i2v.config import ConfigError
from i2v.diffusion.schedule import Schedule
from i2v.hashes import known_sha256
from i2v.parts import KINDS, PartFile, from_json, is_part, open_part
from i2v.presets import Wanted
from weights_convert.detect import read_parts

OWN = "our own part file"
ENDINGS = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
PROJECTION, IN_ATTENTION = "image_proj.", "ip_adapter."  # the two groups of keys in an IP-Adapter's file
CONTROLNET = "controlnet "  # a model's ControlNets are parts named by the type of their pictures: "controlnet canny"


@dataclass(frozen=True)
class Source:
    """One file or folder. Its IP-Adapter counts as two parts, which need not come from one file: "image_projection"
    and "ip_adapter", the attentions."""

    path: Path
    layout: str  # of weights_convert, or OWN
    parts: Mapping[str, Mapping[str, Tensor]]
    configs: Mapping[str, Any]
    fits: tuple[str, ...] = ()  # the bases that the layout says it goes with; our own files leave it to the shapes
    schedule: Schedule | None = None  # our own motion modules know theirs
    control: str = ""  # our own ControlNet knows the type of its pictures

    @cached_property
    def sha256(self) -> str:
        return known_sha256(self.path)

    def __str__(self) -> str:
        return f"{self.path} ({self.layout})"


def open_source(path: Path) -> Source:
    """Maps a published file or folder, or one of our own part files.

    Raises OSError or ValueError that names the file and says what it is, what was expected and what to do.
    """
    if is_part(path):
        return own_source(path)
    read = read_parts(path)
    return Source(path, read.layout.name, *_split(read.tensors, read.layout.configs), read.layout.fits)


def own_source(path: Path) -> Source:
    """One of our own part files, which describes itself."""
    name = is_part(path) or path.stem
    if name not in KINDS:
        raise ConfigError(f"{path}: no part is called {name}, expected one of {', '.join(KINDS)}; take the file anew")
    file = open_part(path, KINDS[name])
    schedule = schedule_of(file) if name == "motion" else None
    control = str(file.metadata.get("control", ""))
    return Source(path, OWN, *_split({name: file.tensors()}, {name: file.config}), schedule=schedule, control=control)


def schedule_of(motion: PartFile) -> Schedule:
    """The noise schedule that the motion modules were trained on, from their file's metadata."""
    if "schedule" not in motion.metadata:
        raise ConfigError(
            f"{motion.path}: names no schedule in its metadata, expected one; save it with save_part(..., "
            "schedule=Schedule(...))"
        )
    return from_json(Schedule, json.dumps(motion.metadata["schedule"]), str(motion.path))


def _split(
    parts: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Any]
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
    """The IP-Adapter's projection and attentions as two parts; the config is the projection's."""
    out, facts = dict(parts), dict(configs)
    both = out.pop("ip_adapter", {})
    config = facts.pop("ip_adapter", None)
    projection = {k.removeprefix(PROJECTION): v for k, v in both.items() if k.startswith(PROJECTION)}
    attentions = {k: v for k, v in both.items() if not k.startswith(PROJECTION)}
    if projection:
        out["image_projection"], facts["image_projection"] = projection, config
    if attentions:
        out["ip_adapter"] = attentions
    return out, facts


class Library:
    """A folder of weight files in which a preset's are looked for. Each file is opened once, when it is in question."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ConfigError(f"--models {folder}: no such folder, expected one with the preset's files; name it")
        self.folder = folder
        self.paths = list(_candidates(folder))
        self._opened: dict[Path, Source | str] = {}

    def find(self, wanted: Wanted) -> tuple[Source | None, str]:
        """The wanted file, by its published name or else by its content, and what is to be said of the search."""
        named = [path for path in self.paths if f"/{path.as_posix()}".endswith(f"/{wanted.file}")]
        for path in named:
            source = self._open(path)
            if isinstance(source, Source) and self._is(source, wanted):
                return source, ""
        bar = tqdm(self.paths, f"looking through {self.folder}", unit="file", delay=2, leave=False)
        opened = [self._open(path) for path in bar]
        fit = {s.path.resolve(): s for s in opened if isinstance(s, Source) and s.layout in wanted.layouts}
        others = [s for s in fit.values() if s.path.parent.resolve() not in fit]  # of a whole folder no file in it
        if len(others) == 1:
            return others[0], f"{others[0].path} is taken for {wanted.file}"
        if others:
            names = ", ".join(str(source.path) for source in others)
            return None, f"{wanted.file} could be any of {names}, expected one; choose with {flag_of(wanted.flag)}"
        if named:
            return None, f"{named[0]} is not what its name says: {self._open(named[0])}"
        return None, ""

    @staticmethod
    def _is(source: Source, wanted: Wanted) -> bool:
        return source.layout in wanted.layouts or (source.layout == OWN and set(wanted.parts) <= set(source.parts))

    def _open(self, path: Path) -> Source | str:
        """Why not, for what is no weight file of a known kind."""
        if path not in self._opened:
            try:
                self._opened[path] = open_source(path)
            except (ValueError, OSError) as error:
                self._opened[path] = str(error)
        return self._opened[path]


def _candidates(folder: Path) -> Iterator[Path]:
    """Weight files and whole diffusers folders, in the order of their names; of the latter's own folders nothing.

    A folder that is linked to more than once, or from inside itself, is walked once.
    """
    walked = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        real = os.path.realpath(here)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        if "model_index.json" in names:
            folders.clear()
            yield Path(here)
        yield from (Path(here, name) for name in sorted(names) if name.endswith(ENDINGS))


def flag_of(name: str) -> str:
    """As it is typed."""
    return f"--{name.replace('_', '-')}"


def with_scale(text: str) -> tuple[Path, float]:
    """PATH or PATH:SCALE -> both; the scale is 1 where none is given."""
    path, colon, number = text.rpartition(":")
    try:
        return (Path(path), float(number)) if colon and not Path(text).exists() else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

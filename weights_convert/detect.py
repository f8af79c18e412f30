"""Tells from the keys and shapes of a file which layout it is in, and turns it into the parts of a model."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weights_convert import diffusers_configs, files
from weights_convert.known import LAYOUTS, Layout
from weights_convert.layout import still_needed
from weights_convert.layouts.diffusers_folder import SUBFOLDERS
from weights_convert.refusals import Refusal, refused
from weights_convert.rules import ConversionError, convert, inverted

log = logging.getLogger(__name__)
KNOWN = "expected one of these, give such a file: "  # before the long list of all layouts


def recognise(
    tensors: Mapping[str, Tensor], file: str = "this file", metadata: Mapping[str, str] | None = None
) -> Layout | Refusal:
    """The one layout whose signs are all there, or the known kind that gives no part of a model.

    The latter has a `kind`: "lora" for those that `weights_convert.lora` reads, "raft", "dover", "dynamicrafter",
    and "unsupported". Raises ConversionError that names the nearest layouts and what they miss, for any other file.
    """
    unwanted = refused(tensors, metadata)
    if unwanted is not None:
        return unwanted
    fitting = [layout for layout in LAYOUTS if not layout.unmet(tensors)]
    if len(fitting) == 1:
        if fitting[0].doubtful:
            log.warning("%s: taken for %s; %s", file, fitting[0].title, fitting[0].note)
        return fitting[0]
    if fitting:
        raise ConversionError(
            f"{file}: could be {' or '.join(x.name for x in fitting)}, expected one; name the layout, as "
            "`python -m weights_convert convert ... --layout` does"
        )
    near = sorted((layout for layout in LAYOUTS if layout.near(tensors)), key=lambda x: -x.near(tensors))[:3]
    tried = "".join(f"\n  {layout.name}, but {'; '.join(layout.unmet(tensors))}" for layout in near)
    some = ", ".join(list(tensors)[:3])
    raise ConversionError(
        f"{file}: its {len(tensors)} tensors ({some}, ...) are in no known layout"
        + (f"; the nearest:{tried}\n  (as one of these all the same: convert it with --layout)" if near else "")
        + f"\n{KNOWN}{', '.join(layout.name for layout in LAYOUTS)}"
    )


def detect(tensors: Mapping[str, Tensor], file: str = "this file", metadata: Mapping[str, str] | None = None) -> Layout:
    """The one layout whose signs are all there.

    Raises ConversionError that says what the file is and what to do, if it is of a known kind that gives no part of
    a model, and else as `recognise` does.
    """
    found = recognise(tensors, file, metadata)
    if isinstance(found, Refusal):
        raise ConversionError(f"{file}: {found}")
    return found


def named(name: str) -> Layout:
    """The layout of that name, for a file that could be several."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise ConversionError(f"no layout {name!r}, expected one of {', '.join(layout.name for layout in LAYOUTS)}")


@dataclass(frozen=True)
class Parts:
    """A published file in our own naming: tensors by part, and how many keys each rule claimed."""

    layout: Layout
    tensors: Mapping[str, Mapping[str, Tensor]]
    report: Counter[str]
    metadata: Mapping[str, str]

    @property
    def needs(self) -> tuple[str, ...]:
        """The parts of a video's pipeline that this file lacks; a checkpoint may come without its autoencoder."""
        return still_needed(self.layout.fits, self.tensors)


def read_parts(path: str | Path, layout: str | None = None, ema: bool = True) -> Parts:
    """Reads a published file or folder into the parts of a model, with the names of our own part files.

    A folder is one of a single part or a whole diffusers pipeline. Parts are those of "unet", "vae", "text_encoder",
    "text_encoder_2", "image_encoder", "motion", "i2v_adapter", "ip_adapter" and "controlnet" that the file holds;
    "sparse_control" and "taesd" come in diffusers' names and have no network here yet. `layout` names it where the
    content leaves it open; `ema` takes the running average of the UNet where there is one. Raises ConversionError
    (see `detect` and `rules.convert`).
    """
    tensors, metadata = read_pipeline(Path(path)) if is_pipeline(Path(path)) else files.read(path, widen=False)
    parts = to_parts(tensors, str(path), layout, ema, metadata)
    if parts.layout.parts == ("controlnet",) and parts.layout.name.endswith("-diffusers"):
        diffusers_configs.check_controlnet(Path(path))
    return parts


def is_pipeline(path: Path) -> bool:
    """Whether a path is a folder of a whole diffusers pipeline, with a folder for each part."""
    return path.is_dir() and any((path / name).exists() for name in ("model_index.json", "unet"))


def files_of(path: Path) -> list[Path]:
    """The files of weights that are read for this path; of a folder with parts of our own, all of them."""
    own = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not is_pipeline(path):
        try:
            return files.weight_files(path)
        except FileNotFoundError:
            if not own:
                raise
            return own
    return [file for name in SUBFOLDERS if (path / name).is_dir() for file in files.weight_files(path / name)]


def read_pipeline(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a diffusers pipeline as `unet.<key>`, `vae.<key>`..., and what was left beside them ("ignored").

    Raises ConversionError for a pipeline whose scheduler says that the network does not predict the noise.
    """
    settings = folder / "scheduler" / "scheduler_config.json"
    if settings.is_file():
        try:
            values = json.loads(settings.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConversionError(f"{settings}: expected json, {error}; take the folder anew") from error
        values = values if isinstance(values, dict) else {}
        prediction = str(values.get("prediction_type", "epsilon"))
        if str(values.get("_class_name", "")).startswith("EDM") and "beta_schedule" not in values:
            prediction = "EDM"  # Playground v2.5; ordinary models carry that class too, with the betas of their own
        if prediction != "epsilon":
            advice = "use a model that predicts the noise"
            raise ConversionError(f"{settings}: its network predicts {prediction!r}, expected 'epsilon'; {advice}")
    tensors: dict[str, Tensor] = {}
    for name in SUBFOLDERS:
        if (folder / name).is_dir():
            tensors |= {f"{name}.{key}": tensor for key, tensor in files.read(folder / name, widen=False)[0].items()}
    ignored = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in SUBFOLDERS)
    return tensors, {"ignored": ", ".join(ignored)} if ignored else {}


def to_parts(
    tensors: Mapping[str, Tensor],
    file: str,
    layout: str | None = None,
    ema: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> Parts:
    """`read_parts` for tensors that are read already."""
    found = detect(tensors, file, metadata) if layout is None else named(layout)
    converted, report = convert(tensors, found.build(tensors.keys(), ema), found.name, file)
    return Parts(found, split_parts(completed(converted, found, file)), report, dict(metadata or {}))


def to_published(parts: Mapping[str, Mapping[str, Tensor]], layout: str) -> dict[str, Tensor]:
    """Parts in the names of a published format, ready for `files.write`.

    What the format's rules drop is not there; what they rebuild is. Raises ConversionError where a part is missing.
    """
    joined = {f"{part}.{key}": tensor for part, tensors in parts.items() for key, tensor in tensors.items()}
    found = named(layout)
    return convert(joined, inverted(found.build(None, False)), f"{layout}, written", "the given parts")[0]


def completed(converted: Mapping[str, Tensor], layout: Layout, file: str) -> Mapping[str, Tensor]:
    """With zeros for CLIP-L's last layer where an SDXL merge lacks it: SDXL reads what the layer before it gives."""
    first, last = (f"text_encoder.text_model.encoder.layers.{n}." for n in (10, 11))
    if layout.name != "sdxl-single-file" or any(key.startswith(last) for key in converted):
        return converted
    zeros = {last + k.removeprefix(first): torch.zeros_like(v) for k, v in converted.items() if k.startswith(first)}
    if zeros:
        log.warning("%s: lacks the last layer of its first text encoder, which SDXL does not read: zeros there", file)
    return {**converted, **zeros}


def split_parts(converted: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors named `part.key` by part."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in converted.items():
        part, key = name.split(".", 1)
        parts.setdefault(part, {})[key] = tensor
    return parts

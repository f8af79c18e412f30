"""From a preset and files to the parts of one model: who gives what, what is missing, whether it fits together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from i2v import presets
from i2v.config import ConfigError, flag
from i2v.diffusion.schedule import STABLE_DIFFUSION, Schedule
from i2v.lora import check as check_lora
from i2v.models.tokenizer import Tokenizer
from i2v.networks import networks
from i2v.parts import CONFIGS, KINDS
from i2v.presets import Preset
from i2v.prompt import SECOND_PAD
from i2v.sources import CONTROLNET, Library, Source, flag_of, listed, open_source, own_source, with_scale
from weights_convert.detect import KNOWN
from weights_convert.rules import ConversionError, check_shapes

TEXT_FILES = ("vocab.json", "merges.txt")
# a flag that stands for one part, and that part; --base stands for all that its files hold
BASE_PARTS = {"unet", "vae", "text_encoder", "text_encoder_2"}
PART_OF = {"motion": "motion", "i2v": "i2v_adapter", "ip_adapter": "image_projection",
           "image_encoder": "image_encoder", "vae": "vae"}  # fmt: skip


PARTS = ("image_projection", *CONFIGS)  # of a whole model; the second text encoder is SDXL's alone


# of published IP-Adapters: their kind, the width that they read, and whose that is
ENCODERS = {("linear", 1024): "CLIP ViT-H/14", ("linear", 1280): "CLIP ViT-bigG/14",
            ("plus", 1280): "CLIP ViT-H/14", ("plus", 1664): "CLIP ViT-bigG/14"}  # fmt: skip


@dataclass(frozen=True)
class ModelFiles:
    """Which model, and files in place of its parts."""

    preset: str = flag("tiny", "the model", "--model", group="the model")
    weights: Path | None = flag(None, "a folder with one file per part, as train.py writes it")
    models: Path | None = flag(None, "a folder in which the preset's published files are looked for", "--models-dir")
    base: tuple[Path, ...] = flag((), "base model: UNet, VAE, text encoder; of several files the last that holds a "
                                  "part counts", "--base-model", "--ckpt", "--checkpoint")  # fmt: skip
    motion: Path | None = flag(None, "motion modules", "--motion-module", "--motion-adapter", "--mm")
    i2v: Path | None = flag(None, "the I2V-Adapter", "--i2v-adapter", "--i2v-module")
    ip_adapter: Path | None = flag(None, "the Content-Adapter (IP-Adapter)", "--ip-adapter-path")
    image_encoder: Path | None = flag(None, "the Content-Adapter's CLIP image encoder")
    vae: Path | None = flag(None, "the autoencoder", "--vae-path")
    lora: tuple[str, ...] = flag((), "PATH or PATH:SCALE; several add up", "--loras", "--lora-path")
    motion_lora: tuple[str, ...] = flag((), "the same for motion modules", "--motion-loras")
    lora_ignore_alpha: bool = flag(False, "LoRA: take no notice of the files' alpha, as the authors' code")
    controlnet: tuple[str, ...] = flag((), "TYPE=FILE: a ControlNet for the pictures of --control TYPE=...")
    tokenizer: Path | None = flag(None, "a folder with vocab.json and merges.txt")
    int8: bool = flag(False, "hold the UNet's weights as int8, an approximation: less memory, somewhat slower")


@dataclass(frozen=True)
class Part:
    """One part of the model and the file that gives it."""

    tensors: Mapping[str, Tensor]
    config: Any
    source: Source
    given: str  # the flag that gave it, "" for the preset's own


@dataclass
class Plan:
    """What a model is to be made of; nothing is read yet. Built only if nothing is missing and there is no problem."""

    preset: Preset
    files: ModelFiles
    parts: dict[str, Part] = field(default_factory=dict)
    sources: list[tuple[str, Source]] = field(default_factory=list)  # with their flags, those that count most last
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unsure: list[str] = field(default_factory=list)  # why a file that may be the missing one was not taken
    problems: list[str] = field(default_factory=list)
    loras: list[tuple[str, Path, float]] = field(default_factory=list)  # flag, file, scale
    layers: list[int] = field(default_factory=list)  # how many each of them changes
    tokenizer: Path | None = None  # None: CLIP's own, which comes with the package
    wanted: tuple[str, ...] = PARTS  # the parts that it has to have; others are left alone

    @property
    def schedule(self) -> Schedule:
        own = self.parts["motion"].source.schedule if "motion" in self.parts else None
        if own is not None:
            return own
        if self.preset.networks is None:
            return Schedule()
        return self.preset.networks.schedule if "motion" in self.parts else STABLE_DIFFUSION

    def tokenizers(self) -> list[Tokenizer]:
        """One per text encoder; SDXL's second one pads otherwise."""
        out = []
        for name, pad in (("text_encoder", {}), ("text_encoder_2", {"pad_token": SECOND_PAD})):
            if name in self.parts:
                length = self.parts[name].config.max_length
                if self.tokenizer is None:
                    out.append(Tokenizer.clip(length=length, **pad))
                else:
                    vocab, merges = (self.tokenizer / file for file in TEXT_FILES)
                    out.append(Tokenizer.from_files(vocab, merges, length=length, **pad))
        return out

    def refuse(self) -> None:
        """Raises ConfigError that tells all that is missing or wrong, if anything is."""
        if self.problems:
            raise ConfigError("; ".join(self.problems))
        if self.missing:
            if self.folder:
                raise ConfigError(f"{self.folder}: expected a file for each part of a model, lacks "
                                  f"{', '.join(self.missing)}; give a whole folder")  # fmt: skip
            searched = f" ({'; '.join(self.unsure)})" if self.unsure else ""
            folder = "" if self.files.models else "a folder that holds them with --models, or "
            raise ConfigError(f"--preset {self.preset.name} lacks {'; '.join(self.missing)}{searched}, expected every "
                              f"part of a model; give {folder}each with its flag")  # fmt: skip

    @property
    def parameters(self) -> int:
        """Of all parts."""
        return sum(tensor.numel() for part in self.parts.values() for tensor in part.tensors.values())

    @property
    def complete(self) -> bool:
        return not (self.missing or self.problems)

    @property
    def folder(self) -> Path | None:
        """Of files of our own, one per part."""
        return self.files.weights or self.preset.folder

    def told_loras(self) -> list[str]:
        """A line for each LoRA, with the layers that it changes where they were compared."""
        counts = [f"{count} layers changed, " for count in self.layers] or [""] * len(self.loras)
        return [f"{path}: {told}scale {scale:g}" for (_, path, scale), told in zip(self.loras, counts, strict=True)]

    def report(self) -> str:
        """What was found, what is missing and what fits, for people."""
        rows = [("part", "tensors", "parameters", "recognised as", "file")]
        for name, part in self.parts.items():
            size = sum(tensor.numel() for tensor in part.tensors.values())
            row = (name, f"{len(part.tensors):,}", f"{size:,}", part.source.layout, str(part.source.path))
            rows.append(row)
        wide = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [f"{self.preset.name}: {self.preset.about}"]
        lines += [
            "  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, wide)), row[4]]) for row in rows if self.parts
        ]
        lines += [f"  {flag_of(name)} {told}" for (name, *_), told in zip(self.loras, self.told_loras())]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"missing: {one}" for one in self.missing]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join([*lines, "complete, every shape fits" if self.complete else "not complete"])


def plan(files: ModelFiles, wanted: Iterable[str] = PARTS) -> Plan:
    """Opens the files, gives each part to the one that counts most, and compares every shape. No tensor is read.

    wanted: the parts of PARTS that the model is to have; others are neither looked for nor taken.
    What counts more: a part's own flag, then `--base` (the last file first), then what was found for the preset.
    Raises ConfigError for a file that is not there or not readable; all else is told in the plan.
    """
    made = Plan(presets.find(files.preset), files, wanted=tuple(wanted))
    _own_folder(made)
    given = [("base", path) for path in files.base]
    given += [(name, path) for name in PART_OF if (path := getattr(files, name)) is not None]
    opened = [(name, _open(name, path)) for name, path in given]
    _preset_files(made, opened)
    made.sources += [*opened, *_controlnets(files.controlnet)]
    for name, source in made.sources:
        _take(made, name, source)
    _tokenizer(made)
    made.loras = [(name, *with_scale(text)) for name in ("lora", "motion_lora") for text in getattr(files, name)]
    _compare(made)
    projection = made.parts.get("image_projection")
    if made.preset.networks and projection is not None and projection.config.kind == "linear":
        # so published: trained and guided with zeros for CLIP's embedding, IP-Adapter-plus with zero pixels
        made.preset = replace(made.preset, unconditional_image="zero-embedding")
    return made


def _controlnets(texts: Iterable[str]) -> list[tuple[str, Source]]:
    """TYPE=FILE -> the name of the part, and its file."""
    given: dict[str, str] = {}
    for text in texts:
        kind, sign, path = text.partition("=")
        if not (sign and kind and path):
            raise ConfigError(f"--controlnet {text}: expected TYPE=FILE; write it as in "
                              "--controlnet canny=control_v11p_sd15_canny.pth")  # fmt: skip
        if kind in given:
            raise ConfigError(f"--controlnet {text}: {kind} has {given[kind]} already, expected one file for a type; "
                              "leave one out or give it a type of its own")  # fmt: skip
        given[kind] = path
    return [(CONTROLNET + kind, _open("controlnet", Path(path))) for kind, path in given.items()]


def _open(name: str, path: Path) -> Source:
    try:
        source = open_source(path)
    except (ValueError, OSError) as error:
        first, *more = str(error).split("\n")
        nearest = [line.strip() for line in more if line.startswith("  ")]  # of the lists below, what helps
        advice = [line for line in more if not line.startswith(("  ", KNOWN))]
        text = " ".join([first, "; ".join([*nearest[:3], *advice])])
        known = "" if "expected" in text else ", expected a format of docs/weights.md; give such a file"
        raise ConfigError(f"{flag_of(name)} {text.strip()}{known}") from None
    wanted = BASE_PARTS if name == "base" else {PART_OF.get(name, name)}
    if not wanted & source.parts.keys():
        flags = [flag_of(one) for one, part in (*PART_OF.items(), ("controlnet", "controlnet")) if part in source.parts]
        if {"unet", "text_encoder", "text_encoder_2"} & source.parts.keys():
            flags = ["--base"]
        raise ConfigError(f"{flag_of(name)} {source}: it holds {listed(sorted(source.parts))}, expected "
                          f"{' or '.join(sorted(wanted))}; "
                          + (f"give it with {' or '.join(flags)}" if flags else "take another file"))  # fmt: skip
    return source


def _own_folder(made: Plan) -> None:
    """One file per part: the preset's own, or the user's (`--weights`)."""
    folder = made.folder
    if folder is None:
        return
    if made.files.models is not None:
        raise ConfigError(f"--models {made.files.models}: the parts are in {folder}, expected one of the two; "
                          "leave --models out, or choose a preset of published files")  # fmt: skip
    there = [name for name in KINDS if (folder / f"{name}.safetensors").is_file()]
    made.sources += [("", own_source(folder / f"{name}.safetensors")) for name in there]
    made.tokenizer = folder


def _preset_files(made: Plan, given: Iterable[tuple[str, Source]]) -> None:
    """Looks in `--models` for the preset's files whose parts the user does not give."""
    if made.files.models is None:
        return
    library = Library(made.files.models)
    have = {part for name, source in given for part in ([PART_OF[name]] if name in PART_OF else source.parts)}
    for wanted in made.preset.needs:
        if set(wanted.parts) & set(made.wanted) <= have:
            continue
        source, note = library.find(wanted)
        made.notes += [note] * bool(note)
        made.unsure += [note] * (source is None and bool(note))
        if source is not None:
            made.sources.append(("base" if wanted.flag == "base" else wanted.flag, source))


def _take(made: Plan, name: str, source: Source) -> None:
    """Give the parts of one file their places, over those of files that count less."""
    released = made.parts.get("ip_adapter")
    for part, tensors in source.parts.items():
        if part == "controlnet":
            kind = name if name.startswith(CONTROLNET) else CONTROLNET + source.control
            if kind == CONTROLNET:
                made.notes.append(f"{source}: its ControlNet is not used, --controlnet TYPE=FILE does that")
            else:
                made.parts[kind] = Part(tensors, source.configs.get(part), source, name)
            continue
        if name.startswith(CONTROLNET):
            continue  # the base in the same file
        if name == "ip_adapter" and part == "ip_adapter":
            plus = source.configs["image_projection"].kind == "plus"
            if plus and released is not None and "image_projection" not in released.source.parts:
                made.notes.append(f"attentions to image tokens are those of {released.source}, as released")
                continue  # the authors' UNet holds its own, and takes the projection alone from this file
        elif name in PART_OF and part != PART_OF[name]:
            continue
        if part not in made.wanted:
            continue
        config = source.configs.get(part)
        networks = made.preset.networks
        if part == "vae" and config is None:
            if networks is None:
                made.problems.append(f"{source}: it names no config, expected a VAE that does, as the parts of "
                                     f"{made.preset.name}; take one that train.py wrote")  # fmt: skip
                continue
            config = networks.vae
        if part == "text_encoder" and networks and 0 < networks.unet.pooled_dim == getattr(config, "projection_dim", 0):
            part = "text_encoder_2"  # its file alone does not say that it is SDXL's second one
        made.parts[part] = Part(tensors, config, source, name)


def _tokenizer(made: Plan) -> None:
    made.tokenizer = made.files.tokenizer or made.tokenizer
    if made.tokenizer is not None:
        missing = [name for name in TEXT_FILES if not (made.tokenizer / name).is_file()]
        if missing and made.files.tokenizer is not None:
            made.problems.append(f"--tokenizer {made.tokenizer}: it has no {' and no '.join(missing)}, expected both "
                                 f"{' and '.join(TEXT_FILES)}; give the tokenizer's folder")  # fmt: skip
        elif missing:
            made.missing += [f"{made.tokenizer / name}" for name in missing]


def _compare(made: Plan) -> None:
    """Every part there, of the preset's base, and of the shapes that the networks have."""
    parts, preset = made.parts, made.preset
    unet = parts.get("unet")
    if unet is not None and preset.networks is not None and unet.config != preset.networks.unet:
        others = [p.name for p in presets.PRESETS.values() if p.networks and p.networks.unet == unet.config]
        advice = f"use --preset {others[0]}" if others else "take another file"
        made.problems.append(f"{unet.source}: its UNet is another, expected that of {preset.networks.title}; {advice}")
        return
    two = preset.networks.unet.pooled_dim if preset.networks else unet is not None and unet.config.pooled_dim
    wanted = [name for name in PARTS if name in made.wanted and (two or name != "text_encoder_2")]
    lacking = [name for name in wanted if name not in parts]
    if made.folder is not None:
        files = {f"{'ip_adapter' if name == 'image_projection' else name}.safetensors": 0 for name in lacking}
        made.missing += [f"{made.folder / name}" for name in files]
    else:
        for file in preset.needs:
            needed = [name for name in file.parts if name in lacking]
            other = ", or AnimateDiff's own by --motion" if "motion" in needed and file.flag != "motion" else ""
            made.missing += [f"{listed(needed)}: {file}{other}"] if needed else []
            lacking = [name for name in lacking if name not in needed]
        made.missing += lacking
    if made.missing:
        return
    if made.problems:
        return
    for source in {id(part.source): part.source for part in parts.values()}.values():
        if preset.networks and source.fits and preset.networks.family not in source.fits:
            made.problems.append(
                f"{source}: it goes with {listed(source.fits)}, expected {preset.networks.family} for --preset "
                f"{preset.name}; take one made for {preset.networks.title}"
            )
    made.problems += _misfits(parts)
    if made.problems:
        return
    built = networks({name: part.config for name, part in parts.items()})
    for name, part in parts.items():
        try:
            check_shapes(built.shapes(name), part.tensors, str(part.source))
        except ConversionError as error:
            made.problems.append(_short(error))
    for name, path, _ in made.loras:
        made.layers.append(0)
        try:
            made.layers[-1] = sum(map(len, check_lora(built.changed_by(name), path).parts.values()))
        except (ValueError, OSError) as error:
            made.problems.append(f"{flag_of(name)} {_short(error)}")


def _short(error: Exception) -> str:
    """One line: what is wrong, its first two details, and the advice at its end."""
    told = [line.strip() for line in str(error).split("\n")]
    return " ".join([told[0], "; ".join([*told[1:3], *told[3:][-1:]])]).strip()


def _misfits(parts: Mapping[str, Part]) -> Iterable[str]:
    """Parts that are well-formed each and do not belong together."""
    unet, vae = parts["unet"], parts["vae"]
    width = unet.config.context_dim
    if "image_encoder" in parts and "image_projection" in parts:
        image, projection = parts["image_encoder"], parts["image_projection"]
        plus = projection.config.kind == "plus"
        seen = image.config.hidden_size if plus else image.config.projection_dim
        if seen != projection.config.image_dim:
            wanted = ENCODERS.get((projection.config.kind, projection.config.image_dim), "the one it was trained with")
            yield (f"{image.source}: it gives image features of width {seen}, expected {projection.config.image_dim}, "
                   f"which {projection.source} reads; give another --image-encoder, {wanted}")  # fmt: skip
        if projection.config.context_dim != width:
            yield (f"{projection.source}: it makes image tokens of width {projection.config.context_dim}, "
                   f"expected {width}, which {unet.source} reads; give an --ip-adapter for this base")  # fmt: skip
    texts = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
    given = sum(text.config.hidden_size for text in texts)
    if given != width:
        yield (f"{texts[0].source}: it gives text of width {given}, expected {width}, which {unet.source} reads; "
               "take both from one base model")  # fmt: skip
    for name, part in parts.items():
        if not name.startswith(CONTROLNET):
            continue
        if part.config.base != unet.config:
            yield (f"--controlnet {part.source}: it is for a UNet of channels {part.config.channels} and text of width "
                   f"{part.config.context_dim}, expected {unet.config.channels} and {width}, those of {unet.source}; "
                   "take one made for this base")  # fmt: skip
        elif part.config.factor != vae.config.factor:
            yield (f"--controlnet {part.source}: it makes a latent of {part.config.factor} pixels, expected "
                   f"{vae.config.factor}, as {vae.source} does; take one made for this base")  # fmt: skip
    if vae.config.latent_channels != unet.config.latent_channels:
        yield (f"{vae.source}: it has {vae.config.latent_channels} latent channels, expected "
               f"{unet.config.latent_channels}, as {unet.source} has; take both from one base model")  # fmt: skip

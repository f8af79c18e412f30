"""`python -m weights_convert convert SRC DST --to LAYOUT`: from any format that is read to one that is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from i2v.hashes import of_files, sha256
from i2v.models.unet import UNetConfig
from i2v.parts import CONFIGS, KINDS
from weights_convert import files, own_format, write_diffusers
from weights_convert.contents import Content, accounted, look
from weights_convert.detect import named
from weights_convert.diffusers_configs import FOLDERS, NoSetting
from weights_convert.known import LAYOUTS
from weights_convert.layout import Layout, still_needed
from weights_convert.networks import FAMILIES, TITLES, misfits
from weights_convert.own_format import TEXT_FILES, Part
from weights_convert.rules import ConversionError, account, inverted, listed

Json = dict[str, Any]
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
OWN, MODULE, DIFFUSERS = "own", "i2v-module", "diffusers"
TARGETS = (OWN, MODULE, DIFFUSERS, *(layout.name for layout in LAYOUTS))
TORCH_ENDINGS = (".pth", ".ckpt", ".bin", ".pt")
ANEW = "take the whole file anew; `check` lists everything"
UNKNOWN_BASE = "own"  # the family of a network of a size that was never published


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    source: Path
    target: Path
    to: str = OWN
    family: str | None = None  # "sd15" or "sdxl"
    layout: str | None = None  # of the source, where its content leaves it open
    parts: tuple[str, ...] = ()  # only these; none named: all
    dtype: torch.dtype | None = None  # None: as stored
    overwrite: bool = False
    ema: bool = True


def convert(job: Job) -> Json:
    """Does it and says what was written. Everything is compared before the first byte is written.

    Raises ConversionError with every problem, OSError for what is not there or cannot be written.
    """
    parts, read = _gather(job)
    tokenizer = _tokenizer(job.source, parts)
    unet = _unet(job, parts)
    if job.to == OWN:
        return _to_own(job, parts, unet, tokenizer, read)
    _compare(job, parts, unet)
    if job.to == DIFFUSERS:
        return _to_diffusers(job, parts, unet, tokenizer)
    return _to_layout(job, parts, named(_layout_name(job, parts)))


def _gather(job: Job) -> tuple[dict[str, Part], list[Path]]:
    """The source's parts with their base and configs settled, and the files that these lie in."""
    parts: dict[str, Part] = {}
    read: list[Path] = []
    problems: list[str] = []
    contents = look(job.source, job.layout)
    found = [(content, accounted(content, job.family, job.ema)) for content in contents]
    there = list(dict.fromkeys(name for _, result in found for name in result.parts))
    unread = [content for content in contents if content.problem or content.lora]
    if unread and not job.parts:
        raise _unread(unread[0], there)
    for content, result in found:
        if content in unread:
            continue
        problems += [f"{content.path}: {text}" for text in result.problems]
        wanted = {name: part for name, part in result.parts.items() if not job.parts or name in job.parts}
        read += content.files if wanted else []
        for name, part in wanted.items():
            if job.to == OWN and name not in KINDS:  # before anything else is asked for
                raise ConversionError(
                    f"{job.source}: no network here reads a {name}, expected {', '.join(KINDS)}; name one of its "
                    "own layouts with --to"
                )
            if name in parts:
                raise ConversionError(
                    f"{content.path}: a second {name} in {job.source}, expected one; give the file that you mean"
                )
            parts[name] = _settled(job, content, name, part)
    if problems:
        raise ConversionError(f"{job.source}: not what its layout describes, {listed(problems)}\n{ANEW}")
    absent = [name for name in job.parts if name not in parts]
    if absent and unread:
        raise _unread(unread[0], there)
    if absent or not parts:
        raise ConversionError(
            f"{job.source}: it has no part {' or '.join(absent)}, expected {', '.join(sorted(there)) or 'none'} as "
            "--parts; name these or give another file"
        )
    return parts, read


def _unread(content: Content, there: list[str]) -> ConversionError:
    """Why a file or a folder's part is not converted; `there` are the parts beside it that could be."""
    lora = "this is a LoRA, expected a part of a model; it is not converted: give it to sample.py with --lora"
    rest = f"\nto convert what else is there, give --parts {' '.join(there)}" if there else ""
    return ConversionError(f"{content.path}: {content.problem or lora}{rest}")


def _settled(job: Job, content: Content, name: str, part: Part) -> Part:
    """With a base, and with the config that an autoencoder's file leaves open."""
    layout = content.layout
    family = part.family
    if layout is not None and layout.fits and (job.family is not None) and job.family not in layout.fits:
        raise ConversionError(
            f"{content.path}: it is made for {' and '.join(TITLES[x] for x in layout.fits)}, expected one for "
            f"{TITLES[job.family]}; leave --for {job.family} out"
        )
    if not family and layout is not None and not layout.fits:
        family = UNKNOWN_BASE
    family = family or _family_of(job.target)
    if not family:
        bases = " or ".join(layout.fits if layout else FAMILIES)
        raise ConversionError(
            f"{content.path}: its content does not say which base it is for, expected --for; say --for {bases}"
        )
    config = part.config
    if config is None and KINDS[name] is not None and not part.bare_attentions:
        config = FAMILIES[family][name]
    return replace(part, family=family, config=config)


def _family_of(folder: Path) -> str:
    """Of the parts that are there already."""
    found = {own_format.read_part(p).family for p in folder.glob("*.safetensors") if own_format.part_name(p)}
    return found.pop() if len(found) == 1 else ""


def _tokenizer(source: Path, parts: Mapping[str, Part]) -> dict[str, str]:
    if "text_encoder" not in parts:
        return {}
    for folder in (source, source / "tokenizer", source.parent / "tokenizer"):
        if all((folder / name).is_file() for name in TEXT_FILES):
            return {name: (folder / name).read_text(encoding="utf-8") for name in TEXT_FILES}
    return own_format.clip_tokenizer(parts["text_encoder"].config)


def _unet(job: Job, parts: Mapping[str, Part]) -> UNetConfig:
    """The base that the parts are for: among them, in the target or beside the source, or the published one."""
    if "unet" in parts:
        return parts["unet"].config
    beside = [folder / "unet.safetensors" for folder in (job.target, job.source, job.source.parent)]
    for path in beside:
        if own_format.part_name(path) == "unet":
            return own_format.read_part(path).config
    family = next(iter(parts.values())).family
    return FAMILIES.get(family, FAMILIES["sd15"])["unet"]


def _compare(job: Job, parts: Mapping[str, Part], unet: UNetConfig) -> None:
    problems = [text for name, part in parts.items() for text in misfits(name, part.tensors, part.config, unet)]
    if problems:
        advice = f"{ANEW}, or leave the part out with --parts"
        raise ConversionError(f"{job.source}: does not fit the model, {listed(problems)}\n{advice}")


def _free(paths: list[Path], overwrite: bool) -> None:
    there = [str(path) for path in paths if os.path.lexists(path)]  # a link to nothing is there too
    if there and not overwrite:
        raise FileExistsError(f"{', '.join(there)}: already there, expected names that are free; give --overwrite, or "
                              "leave parts out with --parts")  # fmt: skip


@contextmanager
def _bar(parts: Mapping[str, Part], dtype: torch.dtype | None, name: str, more: int = 0) -> Iterator[tqdm]:
    """Counts the bytes that are written, and `more` that are read before; shown when it takes more than a second."""
    tensors = [t for part in parts.values() for t in part.tensors.values()]
    total = sum(t.numel() * files.kind_in_file(t, dtype).itemsize for t in tensors)
    with tqdm(total=total + more, unit="B", unit_scale=True, desc=name, delay=1) as bar:
        yield bar


def _to_own(job: Job, parts: dict[str, Part], unet: UNetConfig, tokenizer: Mapping[str, str], read: list[Path]) -> Json:
    folder = job.target
    if folder.is_file() or folder.suffix == ".safetensors":
        raise ConversionError(f"{folder}: a file, expected a folder, with one file per part in our format; name one")
    if "ip_adapter" in parts and parts["ip_adapter"].bare_attentions:
        parts["ip_adapter"] = own_format.with_projection(parts["ip_adapter"], folder / "ip_adapter.safetensors")
    bases = {part.family for part in parts.values()} | ({_family_of(folder)} - {""})
    if len(bases) > 1:
        raise ConversionError(
            f"{job.source}: parts of different bases, {' and '.join(sorted(bases))}, in {folder}, expected one base; "
            "name another folder"
        )
    _compare(job, parts, unet)
    paths = {name: folder / f"{name}.safetensors" for name in parts}
    _free(list(paths.values()), job.overwrite)
    texts = _new_texts(folder, tokenizer, job.overwrite)
    kind = str(job.dtype).removeprefix("torch.") if job.dtype else "as stored"
    source = Path(os.path.abspath(job.source)).name  # of "." too, and a link keeps its name
    recipe = {"converted_from": source, "dtype": kind, "by": "python -m weights_convert convert"}
    written: list[Path] = []
    with _bar(parts, job.dtype, str(folder), sum(p.stat().st_size for p in read)) as bar:
        sources = {source: _sha256(job.source, read, bar)}
        for name, part in parts.items():
            known = part.facts.get("sources") or {}
            with files.after(written):
                own_format.write_part(paths[name], part, job.dtype, recipe, {**known, **sources}, bar.update)
            written.append(paths[name])
    for name, text in texts.items():
        own_format.write_text(folder / name, text)
        written.append(folder / name)
    have = [name for name in CONFIGS if (folder / f"{name}.safetensors").is_file()]
    return {"written": [str(p) for p in written], "needs": list(still_needed(tuple(bases), have)), "left_out": {}}


def _sha256(source: Path, read: list[Path], bar: tqdm) -> str:
    """Of the file, or of the names and hashes of the files that were read of a folder or an index."""
    if read == [source]:
        return sha256(source, bar.update)
    folder = source if source.is_dir() else source.parent
    return of_files(read, folder, lambda inside: sha256(inside, bar.update))


def _new_texts(folder: Path, tokenizer: Mapping[str, str], overwrite: bool) -> dict[str, str]:
    """The tokenizer's files that are to be written. Raises FileExistsError where another tokenizer's are there."""
    there = {name: folder / name for name in tokenizer if (folder / name).is_file()}
    other = [str(p) for n, p in there.items() if _words(n, p.read_text(encoding="utf-8")) != _words(n, tokenizer[n])]
    if other and not overwrite:
        raise FileExistsError(f"{', '.join(other)}: of another tokenizer than the text encoder's, expected the same; "
                              "name another folder or give --overwrite")  # fmt: skip
    return {name: text for name, text in tokenizer.items() if name not in there or str(there[name]) in other}


def _words(name: str, text: str) -> Any:
    """What such a file says, however it is laid out."""
    try:
        return json.loads(text) if name.endswith(".json") else text.split()
    except ValueError:
        return text


def _to_diffusers(job: Job, parts: dict[str, Part], unet: UNetConfig, tokenizer: Mapping[str, str]) -> Json:
    folder = job.target
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not job.overwrite):
        raise FileExistsError(f"{folder}: already there, expected a new folder; name one or give --overwrite")
    left = {name: LEFT_OUT.get(name, NO_FOLDER) for name in parts if name not in (*FOLDERS, "ip_adapter")}
    if "ip_adapter" in parts and parts["ip_adapter"].bare_attentions:
        left["ip_adapter"] = "attentions without their projection: diffusers loads both together, give their file"
    kept = {name: part for name, part in parts.items() if name not in left}
    if not kept:
        raise ConversionError(
            f"{job.source}: nothing that diffusers has a place for, expected {', '.join(FOLDERS)}; "
            f"{'; '.join(left.values())}"
        )
    with _bar(kept, job.dtype, str(folder)) as bar:
        try:
            written = write_diffusers.write(folder, kept, unet, tokenizer, job.dtype, bar.update)
        except NoSetting as error:
            raise ConversionError(f"{job.source}: {error}") from None
    return {"written": [str(p) for p in written], "left_out": left, "needs": []}


NO_FOLDER = "it is not written as a folder here; write it with --to and the layout of its kind in diffusers' names"
LEFT_OUT = {
    "i2v_adapter": "diffusers has no place for an I2V-Adapter; write it with --to i2v-module",
    "controlnet": "a pipeline's folder has no ControlNet in it; write it with --to controlnet-sd15-diffusers",
}


def _layout_name(job: Job, parts: Mapping[str, Part]) -> str:
    if job.to != MODULE:
        return job.to
    family = next(iter(parts.values())).family
    return f"i2v-adapter-{family if family in FAMILIES else 'sd15'}"


def _to_layout(job: Job, parts: Mapping[str, Part], layout: Layout) -> Json:
    """A published format, one file. What the format holds beside the parts (noise schedule, averages) is not there."""
    path = job.target
    if path.is_dir() or path.suffix not in (".safetensors", *TORCH_ENDINGS):
        endings = ", ".join((".safetensors", *TORCH_ENDINGS))
        raise ConversionError(
            f"{path}: a folder or a name without a known ending, expected a file, which the layout {layout.name} is; "
            f"name one with an ending of {endings}"
        )
    missing = [name for name in layout.parts if name not in parts]
    if missing:
        raise ConversionError(
            f"{job.source}: there is no {', '.join(missing)}, expected {', '.join(layout.parts)}, of which "
            f"{layout.name} is made; give a source that has them, or another --to"
        )
    kept = {name: part for name, part in parts.items() if name in layout.parts}
    wrong = sorted({p.family for p in kept.values()} - set(layout.fits)) if layout.fits else []
    if wrong:
        bases = " or ".join(TITLES[base] for base in layout.fits)
        raise ConversionError(
            f"{job.source}: it is for the base {wrong[0]}, expected one for {bases}, as the layout {layout.name} is; "
            "give another --to"
        )
    _free([path], job.overwrite)
    joined = {f"{name}.{key}": tensor for name, part in kept.items() for key, tensor in part.tensors.items()}
    tensors, _, problems = account(joined, inverted(layout.build(None, False)))
    if problems:
        raise ConversionError(
            f"{job.source}: cannot be written as {layout.name}, {listed(problems)}\nexpected that layout's tensors: "
            "give another --to"
        )
    with _bar(kept, job.dtype, path.name) as bar:
        if path.suffix == ".safetensors":
            files.write(path, tensors, {"format": "pt"}, job.dtype, bar.update)
        else:
            whole = files.cast(tensors, job.dtype, path) if job.dtype else tensors
            whole = {key: tensor.to(files.kind_in_file(tensor)).contiguous().clone() for key, tensor in whole.items()}
            content = _nested(whole) if layout.kind == "IP-Adapter" else whole
            files.write_atomic(path, lambda out: torch.save(content, out))
    left = {name: f"{layout.name} has no place for it" for name in parts if name not in kept}
    return {"written": [str(path)], "left_out": left, "needs": []}


def _nested(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """IP-Adapter's .bin files hold two dicts, image_proj and ip_adapter, and their loaders read no others."""
    out: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        out.setdefault(group, {})[name] = tensor
    return out


def shown(facts: Json) -> str:
    """What was done, for people."""
    lines = [f"wrote {path} ({Path(path).stat().st_size / 1e6:,.1f} MB)" for path in facts["written"]]
    lines += [f"left out {name}: {why}" for name, why in facts["left_out"].items()]
    lines += [f"still needs {', '.join(facts['needs'])}"] if facts["needs"] else []
    return "\n".join(lines)

"""Reads weight files of every published kind into plain tensors, and brings them to one dtype."""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights_convert import safetensors_file, torch_file
from weights_convert.mapped import Mapped, damaged, release
from weights_convert.pickle_names import PickleError, Placeholder, StoredTensor
from weights_convert.rules import ConversionError
from weights_convert.safetensors_file import DTYPES, write_atomic

__all__ = ["DTYPES", "cast", "read", "unwrap", "write", "write_atomic"]

log = logging.getLogger(__name__)

Read = tuple[dict[str, Tensor], dict[str, str]]  # tensors, metadata

# What training scripts wrap a state dict in, tried in this order; only a non-empty dict counts.
WRAPPERS = ("state_dict", "model", "module", "params", "params_ema", "ema", "controlnet")
FOLDER_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", ".fp16", ".non_ema")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.(?:safetensors|bin)$)")
EIGHT_BIT_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale)$")


def read(path: str | Path, widen: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint and its metadata.

    `path` is a safetensors file, a torch file (.ckpt, .pth, .bin, .pt, TorchScript archives too) or a folder of a
    diffusers or transformers model's part, which may be in shards, or their index. The kind is told from the content,
    not from the name. Tensors are mapped, read from disk when used. Wrappers are taken off, and nothing outside of the
    weights (optimiser states) is read; the metadata of a torch file says what ("wrapper", "ignored"). 8-bit floats
    become float16, which holds them exactly; with `widen` False they stay as they are, unread.

    Raises FileNotFoundError, or ConversionError for a file that is something else, is damaged, or holds code.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, widen)
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path}: a link to {path.readlink()}, expected a file there; fetch it again")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file, expected a .safetensors, .ckpt, .pth or .bin file or a folder; give its path"
        )
    if path.name.endswith(".json") and ".index." in path.name:
        return _read_shards(path, widen)
    with path.open("rb") as file:
        head = file.read(512)
        if torch_file.is_torch(head):
            mapped = Mapped(file, path)
            tensors, metadata = _torch(torch_file.read(mapped))
        elif len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= path.stat().st_size - 8:
            mapped = Mapped(file, path)
            tensors, metadata = safetensors_file.read(mapped)
        else:
            raise ConversionError(f"{path}: {_what_is(head)}; expected a safetensors or torch checkpoint")
        mapped.unchanged()
    return _plain(tensors, metadata, path, widen)


def _what_is(head: bytes) -> str:
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the weights: run `git lfs pull` or download the file itself"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page (a failed download?): download the file itself"
    if text.startswith((b"entry not found", b"repository not found", b"invalid username", b'{"error')):
        return "this is a server's error message (a failed download?): download the file itself"
    if head.startswith(b"GGUF"):
        return "this is a quantised GGUF file, which is not supported: use the 16- or 32-bit version"
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\xfd7zXZ")) or head[257:262] == b"ustar":
        return "this is a packed archive: unpack it"
    if len(head) < 9:
        return f"the file has only {len(head)} bytes: download it again"
    if head[:1] == b"\x80":
        return "this is a plain pickle, which is not opened because it may hold code: save it with torch.save"
    return "the content is of no known kind, or the file is cut off: download it again"


def _torch(found: torch_file.TorchFile) -> Read:
    file, content = found.mapped.path, found.content
    script = isinstance(content, Placeholder) and content.is_script
    if script:
        try:
            content = torch_file.flat_script(content)
        except PickleError as error:
            raise torch_file.in_pickle(file, error) from error
    stored, metadata = unwrap(content, str(file))
    if script:
        metadata["wrapper"] = "TorchScript"
    if metadata:
        log.info("%s: %s", file.name, ", ".join(f"{k} {v}" for k, v in metadata.items()))
    return {k: found.tensor(v) if isinstance(v, StoredTensor) else v for k, v in stored.items()}, metadata


def unwrap(content: Any, file: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors inside what a training script saved, and what was taken off or left ("wrapper", "ignored").

    Tensors are those of torch, or StoredTensor, which are still in the file. Raises ConversionError where there are
    none, or two under one name.
    """
    taken: list[str] = []
    ignored: list[str] = []
    while isinstance(content, Mapping) and len(taken) < len(WRAPPERS):
        name = next((w for w in WRAPPERS if _is_state_dict(content.get(w))), None)
        if name is None:
            break
        taken.append(name)
        ignored += [str(k) for k in content if k != name]
        content = content[name]
    if not isinstance(content, Mapping):
        raise ConversionError(f"{file}: holds a {_kind(content)}, expected a dict of tensors; save a state dict")
    tensors: dict[str, Any] = {}

    def put(key: str, value: Any) -> None:
        if key in tensors:
            raise ConversionError(f"{file}: two tensors named {key}, expected one; save the file again")
        tensors[key] = value.detach() if isinstance(value, Tensor) else value

    for key, value in content.items():
        if isinstance(value, (Tensor, StoredTensor)):
            put(str(key), value)
        elif _is_state_dict(value):  # {"image_proj": {...}, "ip_adapter": {...}}
            for inner, tensor in value.items():
                if isinstance(tensor, (Tensor, StoredTensor)):
                    put(f"{key}.{inner}", tensor)
                else:
                    ignored.append(f"{key}.{inner}")
        else:
            ignored.append(str(key))
    if not tensors:
        raise ConversionError(
            f"{file}: holds no tensors, only {sorted(map(str, content))[:8]}, expected weights; give the file with them"
        )
    found = {"wrapper": "/".join(taken), "ignored": ", ".join(ignored)}
    return tensors, {key: value for key, value in found.items() if value}


def _is_state_dict(value: Any) -> bool:
    """A non-empty dict with a tensor among its values; a dict of settings beside the weights is none."""
    return isinstance(value, Mapping) and any(isinstance(v, (Tensor, StoredTensor)) for v in value.values())


def _kind(content: Any) -> str:
    return str(content)[:80] if isinstance(content, Placeholder) else type(content).__name__


def _plain(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path, widen: bool) -> Read:
    """Without the level `module.` of training on several GPUs, without 8-bit floats, and refused where weights mean
    something only together with scales."""
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
        metadata = {**metadata, "wrapper": "/".join(filter(None, (metadata.get("wrapper"), "module.")))}
    eight = [key for key, tensor in tensors.items() if tensor.dtype in EIGHT_BIT_FLOATS]
    scale = next((key for key in tensors if SCALES.search(key)), None)
    if eight and scale:
        raise ConversionError(
            f"{path}: 8-bit floats with scales ({scale}), expected plain weights; use the 16- or 32-bit version"
        )
    quantised = next((k for k, t in tensors.items() if t.dtype == torch.int8 and t.dim() > 1), None)
    if quantised:
        raise ConversionError(
            f"{path}: {quantised} is quantised to int8, expected floating-point weights; use the 16- or 32-bit version"
        )
    if eight:
        stored = ", ".join(sorted({str(tensors[key].dtype).removeprefix("torch.") for key in eight}))
        if widen:
            tensors = {k: v.to(torch.float16) if v.dtype in EIGHT_BIT_FLOATS else v for k, v in tensors.items()}
        metadata = {**metadata, "stored": stored}
        log.info("%s: %d tensors are stored as %s and become float16", path.name, len(eight), stored)
    return tensors, metadata


def weight_files(path: Path) -> list[Path]:
    """The files of weights that `read` opens for this path, in order; raises FileNotFoundError where there are none."""
    found = _chosen(path) if path.is_dir() else path
    if isinstance(found, list):
        return found
    if found.name.endswith(".json") and ".index." in found.name:
        return [found.parent / name for name in _shards_of(found)[0]]
    return [found]


def _read_folder(folder: Path, widen: bool) -> Read:
    found = _chosen(folder)
    return _read_without_index(found, widen) if isinstance(found, list) else read(found, widen)


def _chosen(folder: Path) -> Path | list[Path]:
    """The weights inside `unet/`, `vae/`, `text_encoder/`...: safetensors before .bin, full precision before fp16.

    One file, an index of shards, or shards without one.
    """
    for suffix in (".safetensors", ".bin"):
        for variant in VARIANTS:
            for name in FOLDER_NAMES:
                plain = folder / f"{name}{variant}{suffix}"
                if plain.is_file():
                    return plain
                index = folder / f"{name}{suffix}.index{variant}.json"
                if index.is_file():
                    return index
                shards = sorted(folder.glob(f"{name}{variant}-[0-9]*-of-[0-9]*{suffix}"))
                if shards:
                    return shards
    here = sorted(p.name for p in folder.iterdir())[:10]
    raise FileNotFoundError(f"{folder}: no weights, only {here}, expected some called "
                            f"{', '.join(FOLDER_NAMES)}; give the file itself, or a folder that has one")  # fmt: skip


def _read_without_index(shards: list[Path], widen: bool) -> Read:
    first = shards[0]
    total = int(SHARD.search(first.name)[2]) if SHARD.search(first.name) else 0  # type: ignore[index]
    expected = [SHARD.sub(f"-{n:05d}-of-{total:05d}", first.name) for n in range(1, total + 1)]
    if [p.name for p in shards] != expected:
        raise ConversionError(
            f"{first.parent}: the shards {', '.join(p.name for p in shards)}, expected all {total} of one set; "
            "download the missing ones and the .index.json file"
        )
    log.warning("%s: no index beside its %d shards, all of them are read", first.parent, total)
    return _join(shards, widen)


def _shards_of(index: Path) -> tuple[list[str], dict[str, Any], Any]:
    """Names of the shards, the map from keys to them, and what the index says of itself."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        where, listed = content["weight_map"], content.get("metadata") or {}
        names = sorted(set(where.values()))
        wrong = [n for n in names if Path(n).name != n or "\\" in n or n in (".", "..")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(index, f"no readable weight_map ({str(error)[:100]})", "an index of shards") from None
    if wrong or not names:
        raise damaged(index, f"shards named {wrong[:3]}", "names of files beside it")
    return names, where, listed


def _read_shards(index: Path, widen: bool) -> Read:
    names, where, listed = _shards_of(index)
    missing = [n for n in names if not (index.parent / n).is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent / missing[0]}: no such file, expected every shard that {index.name} "
                                "lists; fetch it")  # fmt: skip
    tensors, _ = _join([index.parent / n for n in names], widen)
    if tensors.keys() != where.keys():
        differing = sorted(tensors.keys() ^ where.keys())[:5]
        raise ConversionError(
            f"{index}: its shards do not hold the keys that it lists, expected these, see {differing}; index and "
            "shards are of different models, or one is of another download: fetch all of them again"
        )
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if isinstance(listed, dict) and listed.get("total_size", size) != size:
        log.warning("%s: says %s bytes in all, found %d; every key is there", index, listed["total_size"], size)
    return tensors, {}


def _join(shards: list[Path], widen: bool) -> Read:
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        new, _ = read(shard, widen)
        double = sorted(new.keys() & tensors.keys())
        if double:
            raise ConversionError(f"{shard}: {double[0]} is in another shard too, expected it once; fetch them again")
        tensors |= new
    return tensors, {}


def cast(
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    file: str | Path,
    then: Callable[[str, Tensor], Tensor] = lambda key, tensor: tensor,
) -> dict[str, Tensor]:
    """Floating-point tensors as `dtype`, one after the other; integers, flags and what has the dtype stay as they are.

    This is the moment when mapped tensors are read; of those that are copied nothing stays in memory. then: what else
    becomes of each, by its name, before the next one is read. Tensors of nothing but NaN are warned of. Raises
    ConversionError that names the tensors whose finite numbers would become infinite: float16 ends at 65,504.
    """
    out: dict[str, Tensor] = {}
    lost: list[str] = []
    empty: list[str] = []
    for key, tensor in tensors.items():
        if _only_nan(tensor):
            empty.append(key)
        new = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if new.dtype != tensor.dtype and _overflows(tensor, new):
            lost.append(key)
        else:
            out[key] = new = then(key, new)
        if new is not tensor:
            release([tensor])
    if empty:
        log.warning("%s: nothing but NaN in %d tensors, first %s; is the file broken?", file, len(empty), empty[0])
    if lost:
        raise ConversionError(
            f"{file}: {len(lost)} tensors hold numbers above {torch.finfo(dtype).max:g}, the largest of "
            f"{str(dtype)[6:]}: {', '.join(lost[:5])}; expected smaller ones; use float32 or bfloat16"
        )
    return out


def _overflows(tensor: Tensor, new: Tensor) -> bool:
    """Whether finite numbers of a tensor became infinite; the usual answer, no, takes one pass over it."""
    limit = torch.finfo(new.dtype).max
    if tensor.numel() == 0 or torch.finfo(tensor.dtype).max <= limit:
        return False
    low, high = (float(x) for x in tensor.aminmax())
    if max(-low, high) <= limit:  # no for NaN
        return False
    return bool((new.isinf() & tensor.isfinite()).any())


def kind_in_file(tensor: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The number format that a tensor is written in: its own, of floating-point ones `dtype` if one is given.

    8-bit floats become float16, which holds them exactly: other tools refuse them in most files.
    """
    if not tensor.is_floating_point():
        return tensor.dtype
    return dtype or (torch.float16 if tensor.dtype in EIGHT_BIT_FLOATS else tensor.dtype)


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    done: Callable[[int], object] | None = None,
) -> None:
    """A safetensors file, one tensor after the other, cast to `dtype` if one is given (see `cast`, `kind_in_file`).

    The file appears under its name only when it is complete. `done` is told the bytes of each tensor.
    """

    def ready(name: str, tensor: Tensor) -> Tensor:
        wanted = kind_in_file(tensor, dtype)
        out = tensor if dtype is None and wanted == tensor.dtype else cast({name: tensor}, wanted, path)[name]
        if done is not None:
            done(out.numel() * out.element_size())
        return out

    safetensors_file.write(path, tensors, metadata, lambda tensor: kind_in_file(tensor, dtype), ready)


@contextmanager
def after(written: Sequence[Path]) -> Iterator[None]:
    """An error in writing the next of several files says which ones are there already."""
    try:
        yield
    except (ConversionError, OSError) as error:
        if not written:
            raise
        raise ConversionError(f"{error}\nalready written: {', '.join(map(str, written))}") from error


def _only_nan(tensor: Tensor) -> bool:
    """One look at the first element is enough for almost every tensor."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or not tensor[(0,) * tensor.dim()].float().isnan():
        return False
    return bool(tensor.float().isnan().all())  # in a format that every PyTorch can ask

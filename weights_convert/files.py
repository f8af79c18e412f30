"""Reads weight files of every published kind into plain tensors, and writes safetensors."""

from __future__ import annotations

import json
import logging
import os
import pickle
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights_convert.rules import ConversionError

log = logging.getLogger(__name__)

# What training scripts wrap a state dict in, tried in this order; only a non-empty dict counts.
WRAPPERS = ("state_dict", "model", "module", "params", "params_ema", "ema", "controlnet")
FOLDER_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ZIP, LEGACY_PICKLE = b"PK\x03\x04", bytes.fromhex("80028a0a6cfc9c46f920")


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a checkpoint and its metadata.

    `path` is a safetensors file, a torch file (.ckpt, .pth, .bin, .pt) or a folder of a diffusers or transformers
    model's part, which may be in shards. The kind is told from the content, not from the name. Tensors of
    safetensors and torch zip files are mapped, read from disk when used. Wrappers are taken off; the metadata of a
    torch file says which ("wrapper") and what beside tensors was left ("ignored").

    Raises FileNotFoundError, or ConversionError for a file that is something else, is damaged, or holds code.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a .safetensors, .ckpt, .pth or .bin file or a folder")
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(ZIP) or head[: len(LEGACY_PICKLE)] == LEGACY_PICKLE:
        return _read_torch(path, mapped=head.startswith(ZIP))
    if len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= path.stat().st_size - 8:
        return _read_safetensors(path)
    raise ConversionError(f"{path}: {_what_is(head)}; expected a safetensors or torch checkpoint")


def _what_is(head: bytes) -> str:
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "this is a git-lfs pointer, not the weights: run `git lfs pull` or download the file itself"
    if text.startswith((b"<!doctype", b"<html")):
        return "this is a web page (a failed download?)"
    if text.startswith((b"entry not found", b"repository not found", b"invalid username")):
        return "this is a server's error message (a failed download?)"
    if head.startswith(b"GGUF"):
        return "this is a quantised GGUF file, which is not supported"
    if len(head) < 9:
        return f"the file has only {len(head)} bytes"
    if head[:1] == b"\x80":
        return "this is a plain pickle, which is not opened because it may hold code"
    return "the content is of no known kind, or the file is cut off"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ConversionError(f"{path}: damaged safetensors file ({error}); download it again") from error


def _read_torch(path: Path, mapped: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ConversionError(
            f"{path}: holds more than tensors and is not opened, because a pickle can run code ({reason}); "
            "use the .safetensors version of this file, or save its state dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError, SafetensorError) as error:
        raise ConversionError(f"{path}: not readable as a torch checkpoint ({error})") from error
    tensors, metadata = unwrap(content, str(path))
    if metadata:
        log.info("%s: %s", path.name, ", ".join(f"{k} {v}" for k, v in metadata.items()))
    return tensors, metadata


def unwrap(content: Any, file: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors inside what a training script saved, and what was taken off or left ("wrapper", "ignored")."""
    taken: list[str] = []
    ignored: list[str] = []
    while isinstance(content, Mapping):
        name = next((w for w in WRAPPERS if _is_state_dict(content.get(w))), None)
        if name is None:
            break
        taken.append(name)
        ignored += [str(k) for k in content if k != name]
        content = content[name]
    if not isinstance(content, Mapping):
        raise ConversionError(f"{file}: holds a {type(content).__name__}, expected a dict of tensors")
    tensors: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            tensors[str(key)] = value.detach()
        elif _is_state_dict(value):  # {"image_proj": {...}, "ip_adapter": {...}}
            tensors |= {f"{key}.{k}": v.detach() for k, v in value.items()}
        else:
            ignored.append(str(key))
    if not tensors:
        raise ConversionError(f"{file}: holds no tensors, only {sorted(map(str, content))[:8]}")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
        taken.append("module.")
    found = {"wrapper": "/".join(taken), "ignored": ", ".join(ignored)}
    return tensors, {key: value for key, value in found.items() if value}


def _is_state_dict(value: Any) -> bool:
    """A non-empty dict with a tensor among its values; a dict of settings beside the weights is none."""
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights inside `unet/`, `vae/`, `text_encoder/`...: safetensors before .bin, full precision before fp16."""
    for suffix in (".safetensors", ".bin"):
        for variant in ("", ".fp16"):
            for name in FOLDER_NAMES:
                plain = folder / f"{name}{variant}{suffix}"
                if plain.is_file():
                    return read(plain)
                index = folder / f"{name}{suffix}.index{variant}.json"
                if index.is_file():
                    return _read_shards(index)
    here = sorted(p.name for p in folder.iterdir())[:10]
    raise FileNotFoundError(f"{folder}: no weights, expected one of {', '.join(FOLDER_NAMES)}; it holds {here}")


def _read_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        shard, _ = read(index.parent / name)
        want = {key for key, file in where.items() if file == name}
        if want != set(shard):
            wrong = sorted(want ^ set(shard))[:5]
            raise ConversionError(f"{index.parent / name}: does not hold the keys that {index.name} says, see {wrong}")
        tensors |= shard
    return tensors, {}


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, tensor after tensor in the order of their names; same content, same bytes.

    The file appears under its name only when it is complete. Raises TypeError for a dtype that the format lacks.
    """
    header: dict[str, Any] = {"__metadata__": {k: str(v) for k, v in sorted((metadata or {}).items())}}
    if not metadata:
        header = {}
    end = 0
    names = sorted(tensors)
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{path}: {name} has dtype {tensor.dtype}, expected one of {[str(d) for d in DTYPES]}")
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def content(file: Any) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)

    _write_atomic(Path(path), content)


def _write_atomic(path: Path, content: Callable[[Any], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

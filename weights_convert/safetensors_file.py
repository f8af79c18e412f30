"""The safetensors format: a header checked to the last byte, tensors mapped, files written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights_convert.mapped import Mapped, damaged, sizes
from weights_convert.rules import ConversionError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAMED = {name: dtype for dtype, name in DTYPES.items()}
MAX_HEADER = 100_000_000  # the reference reader's limit; SDXL's header with a picture in it has 0.4 MB


def read(mapped: Mapped) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, and the metadata (empty where the file has none).

    Raises ConversionError unless the header is one JSON object without repeated keys, and the tensors tile the rest of
    the file exactly.
    """
    path = mapped.path
    start, header = _header(mapped)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "metadata that are no table of texts", "__metadata__ to hold texts by name")
    places: list[tuple[int, int, str, torch.dtype, tuple[int, ...]]] = []
    for key, entry in header.items():
        places.append(_place(path, key, entry))
    end = 0
    for begin, stop, key, _, _ in sorted(places, key=lambda place: place[:2]):
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else f"follows a gap of {begin - end} bytes"
            raise damaged(path, f"{key} at offset {begin} {what}", f"it at offset {end}")
        end = stop
    if start + end != mapped.size:
        raise damaged(path, f"{mapped.size} bytes", f"{start + end}, as the header says")
    return {key: mapped.tensor(dtype, start + begin, shape) for begin, _, key, dtype, shape in places}, metadata


def _header(mapped: Mapped) -> tuple[int, dict[str, Any]]:
    """Where the payload starts, and the header."""
    path = mapped.path
    (length,) = struct.unpack("<Q", mapped.bytes[:8])
    if length > min(MAX_HEADER, mapped.size - 8):
        raise damaged(path, f"a header of {length} bytes", f"at most {min(MAX_HEADER, mapped.size - 8)}")
    try:
        header = json.loads(
            mapped.bytes[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise damaged(path, f"a header that is no UTF-8 ({error.reason})", "JSON text in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"a header that is no valid JSON ({str(error)[:100]})", "one JSON object") from None
    if not isinstance(header, dict):
        raise damaged(path, f"a header that holds a {type(header).__name__}", "one JSON object")
    return 8 + length, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:60]!r} stands in it twice")
        found[name] = value
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _place(path: Path, key: str, entry: Any) -> tuple[int, int, str, torch.dtype, tuple[int, ...]]:
    """One tensor's entry: begin, end, key, dtype, shape."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"a broken header entry of {key}", "dtype, shape and data_offsets")
    name, shape, offsets = entry["dtype"], sizes(entry["shape"]), entry["data_offsets"]
    if not isinstance(name, str) or name not in NAMED:
        raise ConversionError(
            f"{path}: {key} is stored as {str(name)[:40]}, expected one of {', '.join(NAMED)}; "
            "use the 16- or 32-bit version of this file"
        )
    if shape is None:
        raise damaged(path, f"{key} of shape {str(entry['shape'])[:80]}", "a list of sizes that a tensor can have")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        raise damaged(path, f"{key} at offsets {str(offsets)[:80]}", "two integers")
    begin, end = offsets
    wanted = math.prod(shape) * NAMED[name].itemsize
    if not 0 <= begin <= end or end - begin != wanted:
        raise damaged(path, f"{key} at offsets {begin} to {end}", f"{wanted} bytes for {name} of shape {list(shape)}")
    return begin, end, key, NAMED[name], shape


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    kind_of: Callable[[Tensor], torch.dtype] = lambda tensor: tensor.dtype,
    ready: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> None:
    """Writes a safetensors file, tensor after tensor in the order of their names; same content, same bytes.

    The file appears under its name only when it is complete. `kind_of` tells a tensor's dtype in the file; `ready` is
    called for each tensor in turn and returns it so. Raises TypeError for a dtype that the format lacks, OSError where
    nothing can be written.
    """
    header: dict[str, Any] = {"__metadata__": {k: str(v) for k, v in sorted((metadata or {}).items())}}
    if not metadata:
        header = {}
    end = 0
    names = sorted(tensors)
    for name in names:
        tensor = tensors[name]
        kind = kind_of(tensor)
        if kind not in DTYPES:
            raise TypeError(f"{path}: {name} has dtype {kind}, expected one of {[str(d) for d in DTYPES]}")
        size = tensor.numel() * kind.itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def content(file: Any) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            flat = ready(name, tensors[name]).detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)

    write_atomic(Path(path), content)


def write_atomic(path: Path, content: Callable[[Any], None]) -> None:
    """Calls `content` with an open temporary file beside `path`, which gets the name when all is on the disk."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            reason = f"{error.strerror}, nothing was written; choose a folder that can be written and has the room"
            raise OSError(error.errno, reason, str(path)) from error
        raise

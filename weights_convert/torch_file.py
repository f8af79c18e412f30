"""torch's own files, zip archive or older stream: what they hold, and the tensors of it that are wanted."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from weights_convert import pickles
from weights_convert.mapped import Mapped, damaged
from weights_convert.pickle_names import PickleError, Placeholder, Storage, StorageType, StoredTensor
from weights_convert.rules import ConversionError

ZIP = b"PK\x03\x04"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
NOT_A_ZIP = (zipfile.BadZipFile, ValueError, OSError, OverflowError, NotImplementedError, EOFError, struct.error)
MAX_MODULES = 100_000  # of a TorchScript archive


def is_torch(head: bytes) -> bool:
    """Whether a file that starts so was written by torch.save: an archive, or a pickle of the magic number."""
    number = b"\x8a\x0a" + MAGIC.to_bytes(10, "little", signed=True)
    return head.startswith(ZIP) or (head[:1] == b"\x80" and number in head[:32])


@dataclass(frozen=True)
class TorchFile:
    """A torch file whose structure was read: `content` holds StoredTensor where it has tensors."""

    mapped: Mapped
    content: Any
    places: Mapping[str, int]  # the byte where each storage starts

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The numbers themselves."""
        start = self.places[stored.storage.key] + stored.offset * stored.dtype.itemsize
        return self.mapped.tensor(stored.dtype, start, stored.shape, stored.stride)


def read(mapped: Mapped) -> TorchFile:
    """Reads the structure; no tensor is touched. Raises ConversionError, see `pickles` and `_members`."""
    try:
        if mapped.bytes[: len(ZIP)] == ZIP:
            return _read_zip(mapped)
        return _read_legacy(mapped)
    except PickleError as error:
        raise in_pickle(mapped.path, error) from error


def in_pickle(file: str | Path, error: PickleError) -> ConversionError:
    """The error of a file for one in its pickle, with what to do where the pickle's does not say."""
    advice = "" if "; " in str(error) else "; the file is damaged or of another tool: download or save it anew"
    return ConversionError(f"{file}: its pickle holds {error}{advice}")


def _read_zip(mapped: Mapped) -> TorchFile:
    members, file = _members(mapped), mapped.path
    pickled = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickled:
        raise ConversionError(
            f"{file}: a zip archive without data.pkl, expected what torch.save writes; it holds "
            f"{', '.join(list(members)[:5])}; if weights are packed in it, unpack them"
        )
    if len(pickled) > 1:
        raise damaged(file, f"{len(pickled)} pickles ({', '.join(pickled)[:200]})", "one")
    root = pickled[0].removesuffix("data.pkl")

    def content(name: str) -> bytes:
        start, info = members[name]
        if info.file_size > pickles.MAX_BYTES:
            raise damaged(file, f"{name} of {info.file_size} bytes", f"at most {pickles.MAX_BYTES}")
        found: bytes = mapped.bytes[start : start + info.file_size]
        if zlib.crc32(found) != info.CRC:
            raise damaged(file, f"a wrong checksum of {name}", f"{info.CRC:08x}")
        return found

    if root + "byteorder" in members and content(root + "byteorder") != b"little":
        raise ConversionError(f"{file}: numbers in big-endian order, expected little; save it again on a usual machine")
    places: dict[str, int] = {}
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        found = _storage(pid)
        if storages.setdefault(found.key, found).dtype != found.dtype:
            raise PickleError(f"storage {found.key[:40]} in two number formats, expected one")
        name = f"{root}data/{found.key}"
        if name not in members:
            raise damaged(file, f"a tensor in {name[:120]}, which is absent", "every tensor's numbers in the archive")
        start, info = members[name]
        if found.nbytes > info.file_size:
            raise damaged(file, f"{name} with {info.file_size} bytes", f"{found.nbytes}")
        places[found.key] = start
        return found

    value, _ = pickles.load(content(pickled[0]), 0, storage)
    return TorchFile(mapped, value, places)


def _members(mapped: Mapped) -> dict[str, tuple[int, zipfile.ZipInfo]]:
    """Name -> (where its bytes start, its entry), for an archive whose members lie side by side, uncompressed.

    Code of a TorchScript archive may be compressed: it is not read.
    """
    file = mapped.path
    try:
        mapped.file.seek(0)
        with zipfile.ZipFile(mapped.file) as archive:
            infos, end = sorted(archive.infolist(), key=lambda info: info.header_offset), archive.start_dir
    except NOT_A_ZIP as error:
        raise damaged(file, f"an archive without a readable table of contents ({error})", "a whole zip file") from None
    if not infos:
        raise damaged(file, "an archive with nothing in it", "data.pkl and the tensors' bytes")
    found: dict[str, tuple[int, zipfile.ZipInfo]] = {}
    for info, following in zip(infos, [*(i.header_offset for i in infos[1:]), end], strict=True):
        name = info.orig_filename
        shown = ascii(name)[:120]
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise damaged(file, f"a member named {shown}, outside of the archive", "plain names")
        if name in found:
            raise damaged(file, f"two members named {shown}", "one")
        if info.flag_bits & 1:
            raise damaged(file, f"{shown}, which is encrypted", "plain data")
        if info.compress_type != zipfile.ZIP_STORED and "/code/" not in f"/{name}":
            raise ConversionError(
                f"{file}: {shown} is compressed, expected plain data as torch writes it; a compressed member can grow "
                "without limit: unpack the archive and pack it again without compression (zip -0)"
            )
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise damaged(file, f"{shown} with {info.compress_size} bytes", f"{info.file_size}")
        found[name] = (_start(mapped, info, following), info)
    return found


def _start(mapped: Mapped, info: zipfile.ZipInfo, following: int) -> int:
    """Where a member's bytes start; its own header must agree with the archive's table, and no byte be left over."""
    at, shown = info.header_offset, ascii(info.orig_filename)[:120]
    local = mapped.bytes[at : at + 30] if at >= 0 else b""
    if len(local) < 30 or local[:4] != ZIP:
        raise damaged(mapped.path, f"no header of {shown} at byte {at}", "one")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    name = mapped.bytes[at + 30 : at + 30 + name_length]
    start = at + 30 + name_length + extra_length
    end = start + info.compress_size
    if name != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace"):
        raise damaged(mapped.path, f"{ascii(name)[:120]} at the place of {shown}", "the same name")
    # torch writes a descriptor after the data: signature, checksum, both sizes in 4 or 8 bytes
    left = following - end
    after = mapped.bytes[end : end + 8] if left in (16, 24) else b""
    if left != 0 and after != b"PK\x07\x08" + struct.pack("<I", info.CRC):
        raise damaged(mapped.path, f"{shown} up to byte {end} and the next at {following}", "one after the other")
    return start


def _storage(pid: Any) -> Storage:
    """From ("storage", type, key, device, number of elements)."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
        raise PickleError(f"a reference to {str(type(pid).__name__)}, expected a storage")
    kind, key, length = pid[1], pid[2], pid[4]
    if not isinstance(kind, StorageType):
        raise PickleError(f"a storage of {str(kind)[:80]}, expected dense numbers")
    if not isinstance(key, str) or type(length) is not int or not 0 <= length < 2**48:
        raise PickleError("a storage without key or length, expected both")
    return Storage(key, kind.dtype, length)


def _read_legacy(mapped: Mapped) -> TorchFile:
    """Five pickles (magic number, version, machine, content, order of the storages), then the storages."""
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        found = _storage(pid)
        if storages.setdefault(found.key, found) != found:
            raise PickleError(f"storage {found.key[:40]} twice and differently, expected it once")
        return found

    def none(pid: Any) -> Any:
        raise PickleError("a storage before the content, expected none")

    at, parts = 0, []
    for persistent in (none, none, none, storage, none):
        part, at = pickles.load(mapped.bytes, at, persistent)
        parts.append(part)
    magic, version, machine, content, keys = parts
    if magic != MAGIC or version != PROTOCOL:
        raise damaged(mapped.path, "another magic number or version", "those of torch.save")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ConversionError(f"{mapped.path}: numbers in big-endian order, expected little; save it again")
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or sorted(keys) != sorted(storages):
        raise damaged(mapped.path, "a list of storages that differs from those in use", "each once")
    places: dict[str, int] = {}
    for key in keys:
        head = mapped.bytes[at : at + 8]
        if len(head) < 8 or struct.unpack("<q", head)[0] != storages[key].length:
            raise damaged(mapped.path, f"no storage of {storages[key].length} elements at byte {at}", "one")
        places[key] = at + 8
        at += 8 + storages[key].nbytes
    if at != mapped.size:
        raise damaged(mapped.path, f"{mapped.size} bytes", f"{at}, as the storages say")
    return TorchFile(mapped, content, places)


def flat_script(module: Placeholder) -> dict[str, StoredTensor]:
    """The tensors of a TorchScript module, under the paths of its attributes."""
    found: dict[str, StoredTensor] = {}
    waiting, seen = [("", module)], 0
    while waiting:
        prefix, current = waiting.pop()
        seen += 1
        if seen > MAX_MODULES or prefix.count(".") > 100:
            raise PickleError("a TorchScript module inside itself, expected a tree")
        for name, value in (current.attributes or {}).items():
            if isinstance(value, StoredTensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, Placeholder) and value.is_script:
                waiting.append((f"{prefix}{name}.", value))
    return found

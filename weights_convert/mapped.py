"""A file's bytes as tensors, mapped: read from the disk when they are used."""

from __future__ import annotations

import bisect
import math
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from weights_convert.rules import ConversionError

_open: dict[int, weakref.ref[mmap.mmap]] = {}  # the mappings in use, by the address that they begin at
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**48  # far above any checkpoint, far below where 64-bit arithmetic on sizes overflows


def damaged(file: str | Path, found: str, expected: str) -> ConversionError:
    """The error for a file that is not what its own header says."""
    return ConversionError(
        f"{file}: {found}, expected {expected}; the file is damaged or was not made by a usual tool: download it again"
    )


def sizes(value: object) -> tuple[int, ...] | None:
    """`value` as a tensor's shape or strides; None where it cannot be one."""
    if not isinstance(value, (list, tuple)) or len(value) > MAX_DIMENSIONS:
        return None
    product = 1
    for n in value:
        if type(n) is not int or not 0 <= n < MAX_ELEMENTS:
            return None
        product *= n or 1
    return tuple(value) if product < MAX_ELEMENTS else None


class Mapped:
    """The bytes of an open file.

    The mapping is private: writing into a tensor changes neither the file nor other readers. A tensor keeps the
    mapping alive, the file may be closed, renamed or deleted; cutting it off while tensors are in use kills the
    process, as with every mapped file.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        _open[torch.frombuffer(self.bytes, dtype=torch.uint8).data_ptr()] = weakref.ref(self.bytes)
        self._stamp = self._now()

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self.file.fileno())
        return found.st_size, found.st_mtime_ns

    def tensor(
        self, dtype: torch.dtype, start: int, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> Tensor:
        """The tensor whose first element lies at byte `start`; strides count elements, none means contiguous.

        The caller has checked the sizes (`sizes`). Older files have payloads at odd addresses: like the reference
        reader of safetensors, this one maps them too, which processors in use read at full or nearly full speed.
        Raises ConversionError where the file is too short.
        """
        if math.prod(shape) == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        if stride is None:
            count = math.prod(shape)
        else:
            count = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if start + count * dtype.itemsize > self.size:
            end = start + count * dtype.itemsize
            raise damaged(self.path, f"tensor data up to byte {end}", f"at most {self.size} bytes")
        flat = torch.frombuffer(self.bytes, dtype=dtype, count=count, offset=start)
        return flat.view(tuple(shape)) if stride is None else flat.as_strided(tuple(shape), tuple(stride))

    def unchanged(self) -> None:
        """Raises ConversionError if the file was written since it was opened: what was read may be a mixture."""
        if self._now() != self._stamp:
            raise ConversionError(
                f"{self.path}: the file changed while it was read (a download still running?), expected it to stay as "
                "it is; wait until it is complete and start again"
            )


def release(tensors: Iterable[Tensor]) -> None:
    """Gives back the memory of mapped tensors, which are read from the file again when they are used.

    Others are left alone. A number that was written into a mapped tensor would be lost: nobody may have done that.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return  # Windows
    starts = sorted(start for start, mapping in list(_open.items()) if mapping() is not None)
    for start in _open.keys() - set(starts):
        del _open[start]
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            continue
        begin = tensor.data_ptr()
        place = bisect.bisect_right(starts, begin) - 1
        mapping = _open[starts[place]]() if place >= 0 else None
        span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
        end = begin + span * tensor.element_size()
        if mapping is None or begin >= starts[place] + len(mapping):
            continue
        first = -(-(begin - starts[place]) // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of this tensor alone
        last = min(end - starts[place], len(mapping)) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            mapping.madvise(mmap.MADV_DONTNEED, first, last - first)

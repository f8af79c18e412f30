"""What the system says of memory: how much is free and used, whether it ran out; and whether it is given back."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int | None:
    """What a process may still take; None where the system does not tell.

    On CUDA with what PyTorch has taken from the system and does not use: pieces that it kept of earlier videos.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    found = [limit for limit in (_meminfo(Path("/proc/meminfo")), *_cgroups(Path("/proc/self/cgroup"))) if limit]
    return min(found, default=None)


def _meminfo(path: Path) -> int | None:
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _cgroups(path: Path, root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What the limits of the container and of all groups around this process leave; both versions of cgroups."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    out = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        second = controllers == ""
        if not second and "memory" not in controllers.split(","):
            continue
        base = root if second else root / "memory"
        files = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        for folder in (base / own.strip("/"), *(base / own.strip("/")).parents):
            try:
                cache = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.M)
                left = int((folder / files[0]).read_text()) - int((folder / files[1]).read_text())
                out.append(max(left + (int(cache[1]) if cache else 0), 0))
            except (OSError, ValueError):  # no limit ("max"), or none for this group
                pass
            if folder == base:
                break
    return out


def used_bytes() -> int:
    """Of this process now, files in use included; 0 where the system does not tell."""
    try:
        match = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return 1024 * int(match[1]) if match else 0


def keep_freed_memory(keep: bool) -> None:
    """Whether glibc keeps freed pieces of 1 MB or more for what comes next, or returns each to the system at once.

    The system clears what it hands out anew: that can take a third of a denoising step. What is kept lies in pieces
    that do not always fit: up to a tenth more of memory.
    """
    if malloc := _glibc("mallopt"):
        malloc(-3, 2**30 if keep else 2**20)  # M_MMAP_THRESHOLD
        malloc(-1, 2**31 - 1 if keep else 2**20)  # M_TRIM_THRESHOLD


def give_back_freed_memory() -> None:
    """Returns to the system what glibc kept."""
    if trim := _glibc("malloc_trim"):
        trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """None where there is another C library, which has other ways."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Only CUDA has an error type of its own; on the CPU, on MPS and in cuBLAS and cuDNN the words tell."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)))

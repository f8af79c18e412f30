"""How long it takes and how much memory it costs to load full-size files: `python -m bench.load` (Linux).

Makes a file with the keys, shapes and layout of the published one in a temporary folder, filled with random numbers
(`--sparse`: zeros that take no room on the disk), and loads it in fresh processes. Loading means `files.read` and then
touching every page of every tensor, so that all of the file is in memory in its stored dtype. Beside it stands the
plain read of the same file, in pieces into one small buffer, which is the least that any reader has to do.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from weights_convert import files, safetensors_file

ROOT = Path(__file__).resolve().parents[1]
KEYS = {"sd15": "sd15_single_file_emaonly", "sdxl": "sdxl_base_single_file"}
PIECE = 1 << 20


def make(path: Path, name: str, dtype: torch.dtype | None, sparse: bool) -> None:
    """The published key list in the order of its keys, behind a header without padding; floats as `dtype` if given."""
    packed = ROOT / "tests/golden/data/manifests" / f"{KEYS[name]}.json.gz"
    entries = json.loads(gzip.decompress(packed.read_bytes()))["tensors"]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kinds: dict[str, torch.dtype] = {}
    end = 0
    for key in sorted(entries):
        shape, stored = entries[key]["shape"], getattr(torch, entries[key]["dtype"])
        kinds[key] = dtype if dtype is not None and stored.is_floating_point else stored
        size = torch.Size(shape).numel() * kinds[key].itemsize
        names = {"dtype": safetensors_file.DTYPES[kinds[key]], "shape": shape}
        header[key] = {**names, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, kind in kinds.items() if not sparse else ():
            values = torch.rand(entries[key]["shape"], generator=generator).to(kind)
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        file.truncate(8 + len(text) + end)


def memory(what: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM)."""
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def once(how: str, path: Path, cold: bool) -> dict[str, float]:
    """One load in this process: seconds, bytes of memory above those before it, bytes of tensors."""
    if cold:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    torch.ones(PIECE, dtype=torch.uint8)[::4096].sum().item()  # torch's own code is in memory
    before, began, payload = memory("VmRSS"), time.perf_counter(), 0
    if how == "plain":
        buffer = bytearray(PIECE)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                payload += count
    else:
        tensors, _ = files.read(path)
        for tensor in tensors.values():
            flat = tensor.reshape(-1).view(torch.uint8)
            flat[::4096].sum().item()
            payload += flat.numel()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": memory("VmHWM") - before, "payload": payload}


def fresh(how: str, path: Path, cold: bool) -> dict[str, float]:
    """`once` in a process of its own."""
    command = [sys.executable, "-m", "bench.load", "--once", how, "--file", str(path), *(["--cold"] if cold else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def table(path: Path, label: str, repeats: int, cold: bool) -> None:
    """One line: medians of runs in turn."""
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "load": []}
    for _ in range(repeats):
        for how, found in runs.items():
            found.append(fresh(how, path, cold))
    plain, load = (statistics.median(run["seconds"] for run in runs[how]) for how in ("plain", "load"))
    payload = runs["load"][0]["payload"]
    peak = max(run["bytes"] for run in runs["load"])
    print(
        f"| {label}{', from the disk' if cold else ''} | {payload / 1e9:.2f} GB | {plain:.2f} s | {load:.2f} s "
        f"| {load / plain:.2f} | {peak / 1e9:.2f} GB | {peak / payload:.2f} |",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(KEYS), default="sd15")
    parser.add_argument("--dtype", choices=["float32", "float16"], help="default: as published")
    parser.add_argument("--sparse", action="store_true", help="zeros that take no room on the disk")
    parser.add_argument("--ckpt", action="store_true", help="also as a torch archive")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the file from the system's cache before each run")
    parser.add_argument("--once", choices=["plain", "load"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.once, args.file, args.cold)))
        return
    folder = Path(tempfile.mkdtemp(prefix="bench_load_"))
    try:
        path = folder / f"{args.model}.safetensors"
        make(path, args.model, getattr(torch, args.dtype) if args.dtype else None, args.sparse)
        label = f"{args.model} {args.dtype or 'as published'}{' (sparse)' if args.sparse else ''}"
        print("| File | Tensors | Plain read | Load | Ratio | Peak memory | Ratio |\n|---|---|---|---|---|---|---|")
        table(path, label + " .safetensors", args.repeats, args.cold)
        if args.ckpt:
            tensors = files.read(path)[0]
            torch.save({"state_dict": tensors}, folder / "x.ckpt")
            table(folder / "x.ckpt", label + " .ckpt", args.repeats, args.cold)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

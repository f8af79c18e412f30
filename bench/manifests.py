"""Every published file whose key list is known, as a file of full size: recognised, and every key accounted for?

    python -m bench.manifests              (prints the table of docs/manifests.md)
    python -m bench.manifests lora_        (only those whose names begin so)

A stand-in has the published keys, shapes and number formats over a hole on the disk: gigabytes that take no room and
read as zeros. Only the tables of frame positions, whose values are checked, are written. The key lists are those of
tests/golden/data/manifests. Exit code 1 if a key is left over or a file is taken for what it is not.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import struct
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from i2v.models.motion import frame_positions
from weights_convert import check_file, inspect_file
from weights_convert.networks import FAMILIES, expected
from weights_convert.safetensors_file import DTYPES

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "golden" / "data" / "manifests"
NAMES = {str(kind).removeprefix("torch."): (name, kind.itemsize) for kind, name in DTYPES.items()}
EXTRAS, PLAIN = "sd15_single_file_community_extras", "sd15_single_file_emaonly"
MARKERS = ("cond_proj", "v_pred", "ztsnr")  # of other models, whose files are refused by name
HALVES = {"ip_adapter_plus_sd15_image_proj": "image_proj", "ip_adapter_plus_sd15_ip_adapter": "ip_adapter"}
NO_FILE = ("name_maps",)
Entries = Mapping[str, Mapping[str, Any]]


def manifests(start: str) -> dict[str, Entries]:
    """Name -> keys. The halves of one file are joined, the catalogue of extra keys gets a checkpoint around it."""
    read: dict[str, Any] = {}
    for path in sorted(FOLDER.glob("*.json.gz")):
        name = path.name.removesuffix(".json.gz")
        if name not in NO_FILE:
            read[name] = json.loads(gzip.decompress(path.read_bytes()))["tensors"]
    out: dict[str, Entries] = {}
    both: dict[str, Any] = {}
    for name, entries in read.items():
        if name in HALVES:
            both |= {f"{HALVES[name]}.{key}": value for key, value in entries.items()}
            name, entries = "ip_adapter_plus_sd15_bin", both
        elif name == EXTRAS:
            extras = {key: value for key, value in entries.items() if not any(word in key for word in MARKERS)}
            entries = read[PLAIN] | extras
        out[name] = entries
    return {name: value for name, value in out.items() if name.startswith(start)}


def write_sparse(path: Path, entries: Entries, metadata: Mapping[str, str] | None = None) -> None:
    """The header of the real file over a hole."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, entry in entries.items():
        kind, width = NAMES[entry["dtype"]]
        size = math.prod(entry["shape"]) * width
        header[key] = {"dtype": kind, "shape": entry["shape"], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, entry in entries.items():
            if key.endswith((".pos_encoder.pe", ".pos_embed.pe")):
                _, frames, width = entry["shape"]
                table = frame_positions(frames, width, torch.device("cpu")).to(getattr(torch, entry["dtype"]))
                file.seek(8 + len(text) + header[key]["data_offsets"][0])
                file.write(table.numpy().tobytes())
        file.truncate(8 + len(text) + end)


def memory(reset: bool = False) -> float:
    """Most memory that this process had since the last reset, in MB; nan where Linux does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        return math.nan
    return int(found[1]) / 1e3 if found else math.nan


def row(name: str, entries: Entries, folder: Path) -> tuple[list[str], bool]:
    """One line of the table, and whether all is well."""
    path = folder / f"{name}.safetensors"
    write_sparse(path, entries)
    before, start = memory(reset=True), time.perf_counter()
    facts = inspect_file.inspect(path)
    bases = [base for base in facts["fits"] if base in FAMILIES]
    checks = [check_file.check(path, base) for base in bases]
    seconds, peak = time.perf_counter() - start, memory() - before
    path.unlink()
    if facts["kind"] in ("not supported", "unknown"):
        claimed, why, well = "named", facts.get("note", facts["title"]), facts["kind"] == "not supported"
    else:
        rows = checks[0]["contents"][0] if checks else None
        count = rows["claimed"] if rows else facts["tensors"] - len(facts["problems"])
        claimed = f"{count:,}"
        why = "; ".join(f"{n:,} {'key' if n == 1 else 'keys'}: {reason}" for reason, n in facts["dropped"].items())
        problems = facts["problems"] + [
            text for check in checks for one in check["contents"] for text in one["problems"]
        ]
        why += "".join(f"; PROBLEM {text}" for text in problems[:3])
        well = not problems and count == len(entries)
    kind = facts.get("layout") or facts["title"]
    cells = [f"`{name}`", kind, f"{len(entries):,}", claimed, why, ", ".join(facts["fits"])]
    return [*cells, f"{facts['bytes'] / 1e6:,.0f}", f"{seconds:.2f}", f"{max(peak, 0):.0f}"], well


def main() -> int:
    """Prints the table as markdown."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    for base in FAMILIES.values():  # the networks that parts are compared with, made once
        expected("unet", base["unet"], base["unet"])
    chosen = manifests(sys.argv[1] if len(sys.argv) > 1 else "")
    head = ["key list", "recognised as", "keys", "claimed", "not kept, and why", "fits", "MB", "seconds", "memory, MB"]
    lines, good = [head, ["---"] * len(head)], True
    with tempfile.TemporaryDirectory() as folder:
        for name, entries in tqdm(chosen.items(), disable=None):
            cells, well = row(name, entries, Path(folder))
            lines.append(cells)
            good &= well
    print("\n".join("| " + " | ".join(cells) + " |" for cells in lines))
    print(f"\n{len(chosen)} files, {'every key claimed or explained' if good else 'PROBLEMS'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

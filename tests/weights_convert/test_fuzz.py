"""Spoilt files, by a seeded generator: nothing crashes, hangs, runs or is read wrongly.

A few hundred files by default; `I2V_FUZZ_SECONDS=600 pytest tests/weights_convert/test_fuzz.py` takes ten minutes. A
failure names the seed and leaves the file in the test's folder.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from weights_convert import files
from weights_convert.rules import ConversionError

SECONDS = float(os.environ.get("I2V_FUZZ_SECONDS", "2"))
LONGEST = 10.0  # seconds for one small file: a hang
Tensors = dict[str, torch.Tensor]

TENSORS: Tensors = {
    "model.a.weight": torch.arange(12.0).reshape(3, 4),
    "model.a.bias": torch.tensor([1.5, -2.0, 0.5], dtype=torch.float16),
    "position_ids": torch.arange(5)[None],
    "scale": torch.tensor(2.0, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "flag": torch.tensor([True, False]),
}
TORCH_GIVES_UP = (
    *(
        pickle.UnpicklingError,
        ConversionError,
        ValueError,
        RuntimeError,
        EOFError,
        LookupError,
        TypeError,
        struct.error,
    ),
    *(AttributeError, ImportError, OverflowError, AssertionError, MemoryError, OSError),
)
NUMBERS = (0, 1, 2, 4, 7, 8, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


class Evil:
    """Pickles as a call that makes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def seeds_safetensors(folder: Path, marker: Path) -> list[bytes]:
    files.write(folder / "seed", TENSORS, {"format": "pt", "name": "Übung"})
    return [(folder / "seed").read_bytes()]


def seeds_torch(folder: Path, marker: Path, zipped: bool) -> list[bytes]:
    state = OrderedDict(TENSORS)
    contents: list[Any] = [
        dict(TENSORS),
        {"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {0: torch.ones(3)}, "lr": 0.1}]},
        {"image_proj": state, "ip_adapter": {"1.to_k_ip.weight": torch.ones(2, 2)}},
        {"state_dict": state, "x": Evil(marker)},
    ]
    out = []
    for content in contents:
        for protocol in (2, 4):
            stream = io.BytesIO()
            torch.save(content, stream, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
            out.append(stream.getvalue())
    return out


def spoil_bytes(data: bytes, rng: random.Random, near: int) -> bytes:
    """Up to four faults: bits, numbers, cuts, copies; mostly in the first `near` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = max(1, len(out))
        at = rng.randrange(min(near, size)) if rng.random() < 0.8 else rng.randrange(size)
        kind = rng.randrange(6)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and out:
            out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            number = rng.choice(NUMBERS).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]
            out[at : at + len(number)] = number
        elif kind == 3:
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 4:
            other = rng.randrange(size)
            out[at:at] = out[other : other + rng.choice((1, 8, 60))]
        elif kind == 5 and rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def spoil_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else, in valid JSON."""
    (length,) = struct.unpack("<Q", data[:8])
    header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(list(header))
        entry = header[key]
        if key == "__metadata__" or rng.random() < 0.1:
            header[rng.choice([key, "model.a.bias", ""])] = rng.choice([None, 1, [], {}, "x", {"a": 1}, {"a": "b"}])
            continue
        if not isinstance(entry, dict) or not entry:
            continue
        name = rng.choice(list(entry))
        if name == "dtype":
            entry[name] = rng.choice(
                ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", 3, None]
            )
        elif isinstance(entry[name], list) and entry[name] and rng.random() < 0.8:
            place = rng.randrange(len(entry[name]))
            entry[name][place] = rng.choice([*NUMBERS, -1, -4, 48, 56, 1.5, "4", None, True])
        else:
            entry[name] = rng.choice([[], [0], [4, 4], [0, 48], [2**62, 4], [1] * 70, None, 5, "x"])
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode()
    return struct.pack("<Q", len(text) + rng.choice((0, 0, 0, 0, 1, -1, 8))) + text + payload


def spoil_pickle(data: bytes, rng: random.Random) -> bytes:
    """A torch archive whose pickle is spoilt, with a checksum that fits."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        warnings.simplefilter("ignore")
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("data.pkl"):
                content = spoil_bytes(content, rng, len(content))
            elif rng.random() < 0.05:
                content = spoil_bytes(content, rng, 64)
            method = zipfile.ZIP_DEFLATED if rng.random() < 0.01 else zipfile.ZIP_STORED
            new.writestr(info.filename, content, method)
            if rng.random() < 0.01:
                new.writestr(rng.choice([info.filename, "../x", "y/data.pkl"]), content)
    return stream.getvalue()


def reference_safetensors(path: Path) -> Tensors | None:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, ValueError, RuntimeError, AttributeError, KeyError, TypeError, OverflowError):
        return None


def reference_torch(path: Path) -> Tensors | None:
    try:
        return files.unwrap(torch.load(path, weights_only=True), "reference")[0]
    except TORCH_GIVES_UP:
        return None


def differing(ours: Tensors, theirs: Tensors) -> list[str]:
    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        if b.dtype in files.EIGHT_BIT_FLOATS:
            b = b.to(torch.float16)
        return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)

    return sorted(
        k for k in ours.keys() | theirs.keys() if k not in ours or k not in theirs or not same(ours[k], theirs[k])
    )


def bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


Spoil = Callable[[bytes, random.Random], bytes]
KINDS: dict[str, tuple[Callable[[Path, Path], list[bytes]], Spoil, Callable[[Path], Tensors | None]]] = {
    "safetensors bytes": (seeds_safetensors, lambda d, r: spoil_bytes(d, r, 700), reference_safetensors),
    "safetensors header": (seeds_safetensors, spoil_header, reference_safetensors),
    "zip bytes": (lambda f, m: seeds_torch(f, m, True), lambda d, r: spoil_bytes(d, r, len(d)), reference_torch),
    "zip table": (lambda f, m: seeds_torch(f, m, True), lambda d, r: spoil_table(d, r), reference_torch),
    "zip pickle": (lambda f, m: seeds_torch(f, m, True), spoil_pickle, reference_torch),
    "legacy": (lambda f, m: seeds_torch(f, m, False), lambda d, r: spoil_bytes(d, r, 1500), reference_torch),
}


def differing_bytes(a: bytes, b: bytes) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True)) if len(a) == len(b) else 0


def changed(ours: Tensors, whole: Tensors) -> int:
    """Bytes of tensors that differ; the structure must not."""
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in whole.items()}
    return sum(differing_bytes(bytes_of(ours[k]), bytes_of(whole[k])) for k in whole)


def spoil_table(data: bytes, rng: random.Random) -> bytes:
    """Faults in the archive's table of contents alone."""
    start = data.index(b"PK\x01\x02")
    return data[:start] + spoil_bytes(data[start:], rng, len(data) - start)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_spoilt_files(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Either a ConversionError that names the file, or the tensors that the reference reader finds too.

    An archive with faults in its table or members gives the tensors of the unspoilt one, but for the bytes that were
    changed in them (torch's own reader can give others). The older stream, and a changed pickle whose checksum fits,
    have nothing to be held against where the reference refuses them.
    """
    make, spoil, reference = KINDS[kind]
    marker, path = tmp_path / "ran", tmp_path / "spoilt.bin"
    originals = make(tmp_path, marker)
    rng = random.Random(f"{kind} 1")
    count = read = compared = 0
    end = time.monotonic() + SECONDS / len(KINDS)
    while time.monotonic() < end or count < 20:
        count += 1
        original = rng.choice(originals)
        spoilt = spoil(original, rng)
        path.write_bytes(spoilt)
        began = time.monotonic()
        try:
            ours: Tensors | None = files.read(path)[0]
        except ConversionError as error:
            ours = None
            assert str(path) in str(error)
        assert time.monotonic() - began < LONGEST, f"file {count} hangs"
        assert not marker.exists(), f"file {count} ran code"
        if ours is None:
            continue
        read += 1
        for tensor in ours.values():
            tensor.clone()  # every byte can be read
        if kind in ("zip bytes", "zip table"):
            whole = tmp_path / "whole.bin"
            whole.write_bytes(original)
            if changed(ours, files.read(whole)[0]) <= differing_bytes(spoilt, original):
                compared += 1
                continue
        theirs = reference(path)
        if theirs is not None:
            compared += 1
            assert not differing(ours, theirs), f"file {count}: {differing(ours, theirs)}"
        elif kind not in ("legacy", "zip pickle"):
            raise AssertionError(f"file {count} is read although the reference refuses it")
    with capsys.disabled():
        if SECONDS > 10:
            print(f"\n{kind}: {count} spoilt files, {count - read} refused, {compared} of {read} compared")


def test_a_wrong_load_would_be_seen() -> None:
    wrong = {**TENSORS, "scale": torch.tensor(3.0, dtype=torch.bfloat16)}
    assert differing(TENSORS, wrong) == ["scale"] and not differing(TENSORS, dict(TENSORS))
    assert differing(TENSORS, {k: v for k, v in TENSORS.items() if k != "empty"}) == ["empty"]

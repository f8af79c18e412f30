"""The safetensors header: what older and stranger writers make is read, what lies about the file is refused."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from weights_convert import files
from weights_convert.rules import ConversionError

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
F32_NEXT = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}


def raw(path: Path, header: Any, payload: bytes, length: int | None = None) -> Path:
    """A file with this header (an object or the bytes themselves), unpadded."""
    text = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + payload)
    return path


@pytest.mark.parametrize("odd", range(8))
def test_any_length_of_the_header_and_integers_between_floats(tmp_path: Path, odd: int) -> None:
    """v1-5-pruned-emaonly has a header of 156,444 bytes, no padding, and position_ids between its floats."""
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "I64", "shape": [1, 2], "data_offsets": [4, 20]},
        "c": {"dtype": "F16", "shape": [3], "data_offsets": [20, 26]},
        "d": {"dtype": "F32", "shape": [2], "data_offsets": [26, 34]},
    }
    text = json.dumps(header).encode()
    path = raw(tmp_path / "x", text + b" " * odd, struct.pack("<fqqeeeff", 2.5, 7, -8, 1, 2, 3, 4.25, -5))
    tensors, metadata = files.read(path)
    assert metadata == {} and tensors["a"].tolist() == [2.5] and tensors["b"].tolist() == [[7, -8]]
    assert tensors["c"].tolist() == [1, 2, 3] and tensors["d"].tolist() == [4.25, -5]


def test_header_of_the_published_length(tmp_path: Path, manifest: Callable[[str], dict[str, Any]]) -> None:
    """The whole key list of v1-5-pruned-emaonly in key order, over a sparse file: the published size to the byte."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    names = {"float32": "F32", "int64": "I64", "int32": "I32"}
    entries = manifest("sd15_single_file_emaonly")["tensors"]
    for key in sorted(entries):
        entry = entries[key]
        size = torch.Size(entry["shape"]).numel() * getattr(torch, entry["dtype"]).itemsize
        header[key] = {"dtype": names[entry["dtype"]], "shape": entry["shape"], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) == 156_444
    path = tmp_path / "v1-5-pruned-emaonly.safetensors"
    raw(path, text, b"")
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)
    assert path.stat().st_size == 4_265_146_304
    tensors, _ = files.read(path)
    assert {k: [list(t.shape), str(t.dtype)[6:]] for k, t in tensors.items()} == {
        k: [e["shape"], e["dtype"]] for k, e in entries.items()
    }


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert files.read(raw(path, {"a": F32}, bytes(4)))[1] == {}
    large = {"thumbnail": "ü" * 40_000, "名": "値"}
    tensors, metadata = files.read(raw(path, {"__metadata__": large, "a": F32}, bytes(4)))
    assert metadata == large and list(tensors) == ["a"]


def test_markers_without_elements(tmp_path: Path) -> None:
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}
    tensors, _ = files.read(raw(tmp_path / "x", {"v_pred": nothing, "a": F32, "z": nothing}, bytes(4)))
    assert tensors["v_pred"].shape == (0,) and tensors["a"].shape == (1,)


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "gap": ({"a": F32, "b": {**F32, "data_offsets": [8, 12]}}, bytes(12), "gap of 4"),
    "gap at the start": ({"a": F32_NEXT}, bytes(8), "gap of 4"),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, bytes(6), "overlaps"),
    "same place": ({"a": F32, "b": F32}, bytes(4), "overlaps"),
    "size is not shape times dtype": ({"a": {**F32, "shape": [2]}}, bytes(4), "8 bytes"),
    "negative offsets": ({"a": {**F32, "data_offsets": [-4, 0]}}, bytes(4), "offsets -4"),
    "reversed offsets": ({"a": {**F32, "data_offsets": [4, 0]}}, bytes(4), "offsets 4 to 0"),
    "offsets of text": ({"a": {**F32, "data_offsets": ["0", "4"]}}, bytes(4), "two integers"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 4, 4]}}, bytes(4), "two integers"),
    "unknown dtype": ({"a": {**F32, "dtype": "F4"}}, bytes(4), "stored as F4"),
    "dtype of a list": ({"a": {**F32, "dtype": ["F32"]}}, bytes(4), "stored as"),
    "huge product": ({"a": {**F32, "shape": [2**32, 2**32, 2**32]}}, bytes(4), "shape"),
    "product that overflows to the right size": ({"a": {**F32, "shape": [2**62, 4, 1]}}, bytes(4), "shape"),
    "huge size beside a zero": ({"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, b"", "shape"),
    "negative size": ({"a": {**F32, "shape": [-1]}}, bytes(4), "shape"),
    "size with a fraction": ({"a": {**F32, "shape": [1.0]}}, bytes(4), "shape"),
    "size of truth": ({"a": {**F32, "shape": [True]}}, bytes(4), "shape"),
    "hundred dimensions": ({"a": {**F32, "shape": [1] * 100}}, bytes(4), "shape"),
    "missing entry": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "broken header entry"),
    "entry of a list": ({"a": [1]}, bytes(4), "broken header entry"),
    "trailing bytes": ({"a": F32}, bytes(5), "as the header says"),
    "truncated": ({"a": F32}, bytes(3), "bytes"),
    "metadata of a list": ({"__metadata__": [], "a": F32}, bytes(4), "metadata"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": F32}, bytes(4), "metadata"),
    "duplicate key": (
        b'{"a":%s,"a":%s}' % (json.dumps(F32).encode(), json.dumps(F32_NEXT).encode()),
        bytes(8),
        "twice",
    ),
    "invalid UTF-8": (b'{"a\xff":%s}' % json.dumps(F32).encode(), bytes(4), "UTF-8"),
    "half a header": (b'{"a":{"dtype":"F32"', bytes(4), "JSON"),
    "not a number": (b'{"a":NaN}', bytes(4), "NaN"),
    "number without end": (b'{"a":' + b"9" * 6000 + b"}", bytes(4), "JSON"),
    "nested without end": (b'{"a":' + b"[" * 200_000, bytes(4), "JSON"),
    "no object": (b"{}[]", bytes(4), "JSON"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(tmp_path: Path, case: str) -> None:
    header, payload, says = HEADERS[case]
    path = raw(tmp_path / "lie.safetensors", header, payload)
    with pytest.raises(ConversionError) as caught:
        files.read(path)
    text = str(caught.value)
    assert says.lower() in text.lower() and str(path) in text and "expected" in text, text
    assert "download" in text or "use the" in text


@pytest.mark.parametrize("length", [2**40, 2**64 - 1, 99, 0])
def test_lengths_of_the_header_that_lie(tmp_path: Path, length: int) -> None:
    with pytest.raises(ConversionError, match="expected"):
        files.read(raw(tmp_path / "x", {"a": F32}, bytes(4), length))


@pytest.mark.parametrize("keep", [0, 7, 8, 9, 30, -1, -4, -1000])
def test_cut_files(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut ü.safetensors"
    files.write(path, {"a": torch.zeros(500), "b": torch.zeros(3)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConversionError, match="cut ü") as caught:
        files.read(path)
    assert "expected" in str(caught.value)


def test_no_header_but_an_object_of_the_right_length(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="JSON"):
        files.read(raw(tmp_path / "x", b'{"a":1} x', b""))


def test_nothing_but_nan_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.safetensors"
    files.write(
        path, {"bad": torch.full((2, 2), torch.nan), "some": torch.tensor([torch.nan, 1.0]), "e": torch.ones(0)}
    )
    with caplog.at_level(logging.WARNING):
        files.cast(files.read(path)[0], torch.float32, path)
    assert "NaN in 1 tensors, first bad" in caplog.text


def test_tensors_are_mapped_and_private(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write(path, {"a": torch.zeros(5000), "b": torch.ones(3)})
    before = path.read_bytes()
    first, second = files.read(path)[0], files.read(path)[0]
    first["a"].add_(1)
    assert second["a"].sum() == 0 and path.read_bytes() == before
    assert first["b"].untyped_storage().nbytes() == 12  # a tensor alone is copied alone
    path.unlink()
    assert second["b"].tolist() == [1, 1, 1]


def test_a_file_that_changes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    files.write(path, {"a": torch.zeros(5)})
    actual = files.safetensors_file.read

    def slow(mapped: Any) -> Any:
        found = actual(mapped)
        with path.open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(files.safetensors_file, "read", slow)
    with pytest.raises(ConversionError, match="changed while it was read"):
        files.read(path)

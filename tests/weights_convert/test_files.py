"""Weight files: every container is read, anything else is refused by what it is, and writing is all or nothing."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weights_convert import files
from weights_convert.rules import ConversionError

TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0),
    "flag": torch.tensor([True, False]),
}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def refused(path: Path, *says: str) -> None:
    with pytest.raises(ConversionError) as caught:
        files.read(path)
    for word in (path.name, *says):
        assert word in str(caught.value), str(caught.value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a b ü.safetensors"
    files.write(path, TENSORS, {"config": '{"x": 1}', "name": "Übung"})
    tensors, metadata = files.read(path)
    assert same(tensors, TENSORS) and metadata == {"config": '{"x": 1}', "name": "Übung"}
    assert same(load_file(path), TENSORS)
    first = path.read_bytes()
    files.write(path, dict(reversed(TENSORS.items())), {"name": "Übung", "config": '{"x": 1}'})
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_transposed_and_shared_tensors_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    files.write(tmp_path / "x.safetensors", {"t": base.T, "rows": base[1:], "again": base})
    tensors, _ = files.read(tmp_path / "x.safetensors")
    assert torch.equal(tensors["t"], base.T) and torch.equal(tensors["rows"], base[1:])
    files.write(tmp_path / "x.safetensors", tensors)  # over the file that the tensors are mapped from
    assert same(files.read(tmp_path / "x.safetensors")[0], tensors)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="complex64"):
        files.write(path, {"z": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(NotImplementedError):  # the data cannot be had: fails in the middle of the file
        files.write(path, {"a": torch.ones(4), "b": torch.zeros(1, device="meta")})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_headers_of_older_writers(tmp_path: Path) -> None:
    """No padding, no metadata, the payload at an odd offset, integers between floats."""
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "I64", "shape": [1], "data_offsets": [4, 12]},
    }
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)  # an odd length
    path = tmp_path / "old.ckpt"  # the content decides, not the name
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<fq", 2.5, 7))
    tensors, metadata = files.read(path)
    assert tensors["a"].item() == 2.5 and tensors["b"].item() == 7 and metadata == {}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrap, wrapper, ignored",
    [
        (lambda t: t, "", ""),
        (lambda t: OrderedDict(t), "", ""),
        (lambda t: {"state_dict": t, "epoch": 3, "global_step": 9}, "state_dict", "epoch, global_step"),
        (lambda t: {"state_dict": {"module." + k: v for k, v in t.items()}}, "state_dict/module.", ""),
        (lambda t: {"epoch": 1, "controlnet": t}, "controlnet", "epoch"),
        (lambda t: {**t, "state_dict": {}, "animatediff_config": {"a": 1}}, "", "state_dict, animatediff_config"),
        (lambda t: {"state_dict": t, "optimizer_states": [{"m": torch.ones(2)}]}, "state_dict", "optimizer_states"),
    ],
    ids=["flat", "ordered", "lightning", "ddp", "controlnet", "empty-inner", "optimizer"],
)
def test_wrappers(tmp_path: Path, wrap: Any, wrapper: str, ignored: str, zipped: bool) -> None:
    path = tmp_path / "x.pth"
    torch.save(wrap(dict(TENSORS)), path, _use_new_zipfile_serialization=zipped)
    tensors, metadata = files.read(path)
    assert same(tensors, TENSORS)
    assert metadata.get("wrapper", "") == wrapper and metadata.get("ignored", "") == ignored


def test_nested_parts_are_flattened(tmp_path: Path) -> None:
    path = tmp_path / "ip.bin"
    torch.save({"image_proj": {"p": torch.ones(1)}, "ip_adapter": {"1.k": torch.ones(2)}}, path)
    assert sorted(files.read(path)[0]) == ["image_proj.p", "ip_adapter.1.k"]


def test_a_prefix_of_some_keys_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, path)
    assert sorted(files.read(path)[0]) == ["b", "module.a"]


def test_folders_and_shards(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="no weights"):
        files.read(folder)
    save_file({"a": torch.ones(1)}, folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, folder / "diffusion_pytorch_model-00002-of-00002.safetensors")
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}}))
    assert sorted(files.read(folder)[0]) == ["a", "b"]
    index.write_text(json.dumps({"weight_map": {"a": shards[1], "b": shards[0]}}))
    assert same(files.read(folder)[0], {"a": torch.ones(1), "b": torch.ones(2)})  # each key is there once
    index.write_text(json.dumps({"weight_map": {"a": shards[0], "c": shards[1]}}))
    with pytest.raises(ConversionError, match="do not hold the keys"):
        files.read(folder)
    for leftover in (index, *(folder / name for name in shards)):
        leftover.unlink()
    save_file({"c": torch.ones(2)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert sorted(files.read(folder)[0]) == ["c"]


@pytest.mark.parametrize(
    "content, says",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"Entry not found", "server's error message"),
        (b"GGUF" + bytes(40), "GGUF"),
        (b"", "0 bytes"),
        (b"\x01" * 8, "8 bytes"),
        (struct.pack("<Q", 2**40) + b'{"a":1}', "cut off"),
        (b"\x80\x04}q\x00." + bytes(20), "plain pickle"),
        (os.urandom(64), ""),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, says)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write(path, TENSORS)
    whole = path.read_bytes()
    for content in (whole[:-4], whole + b"more", whole[:20]):
        path.write_bytes(content)
        refused(path)
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(path, "without a readable table")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"state_dict": dict(TENSORS), "x": Evil(marker)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "can run code", "safetensors")
    assert not marker.exists()


def test_files_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"epoch": 1}, path)
    refused(path, "no tensors", "epoch")
    torch.save([torch.ones(1)], path)
    refused(path, "holds a list")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        files.read(tmp_path / "nowhere.pth")

"""Weight files: every container is read, anything else is refused by what it is, and writing is all or nothing."""

from __future__ import annotations

import os
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from teaching import refused

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


@pytest.mark.parametrize(
    "content, says",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"Entry not found", "server's error message"),
        (b'{"error":"Invalid credentials in Authorization header"}', "server's error message"),
        (b"\x1f\x8b\x08" + bytes(40), "unpack"),
        (b"GGUF" + bytes(40), "GGUF"),
        (b"", "0 bytes"),
        (b"\x01" * 8, "8 bytes"),
        (struct.pack("<Q", 2**40) + b'{"a":1}', "cut off"),
        (b"\x80\x04}q\x00." + bytes(20), "plain pickle"),
        (np.random.default_rng(0).bytes(64), ""),
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
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for content in (whole[:-4], whole + b"more", whole[:300], whole[:20]):
        path.write_bytes(content)
        refused(path)


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


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    for name, zipped in (("zip.safetensors", True), ("old.safetensors", False)):
        torch.save(TENSORS, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert same(files.read(tmp_path / name)[0], TENSORS)
    files.write(tmp_path / "x y ü.ckpt", TENSORS)
    assert same(files.read(str(tmp_path / "x y ü.ckpt"))[0], TENSORS)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match="no weights"):
        files.read(tmp_path / "folder.safetensors")
    (tmp_path / "link.ckpt").symlink_to("blobs/gone")
    with pytest.raises(FileNotFoundError, match="a link to blobs/gone"):
        files.read(tmp_path / "link.ckpt")


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_eight_bit_floats_become_float16_exactly(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    path, tensors = tmp_path / f"x.{suffix}", {"w": every, "norm": torch.ones(2), "half": torch.ones(2).half()}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    found, metadata = files.read(path)
    assert found["w"].dtype == torch.float16 and found["norm"].dtype == torch.float32
    assert torch.equal(found["w"].float().nan_to_num(7e5), every.float().nan_to_num(7e5))
    assert metadata["stored"] == str(dtype)[6:]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
def test_eight_bit_floats_are_cast_when_they_are_used(
    tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder of downloads may hold many gigabytes of them, all of which a search looks at."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    save_file({"w": every, "broken": every[-1:].repeat(4)}, tmp_path / "x.safetensors")
    mapped, _ = files.read(tmp_path / "x.safetensors", widen=False)
    assert mapped["w"].dtype == dtype
    for wanted in (torch.float16, torch.bfloat16, torch.float32):
        cast = files.cast(mapped, wanted, "x")["w"]
        assert cast.dtype == wanted and torch.equal(cast.float().nan_to_num(7e5), every.float().nan_to_num(7e5))
    assert "nothing but NaN in 1 tensors, first broken" in caplog.text


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_eight_bit_floats_are_written_as_others_read_them(tmp_path: Path, dtype: torch.dtype | None) -> None:
    small = torch.arange(16, dtype=torch.uint8).view(torch.float8_e4m3fn)
    files.write(tmp_path / "x.safetensors", {"w": small, "n": torch.tensor(3)}, dtype=dtype)
    found = load_file(tmp_path / "x.safetensors")
    assert found["w"].dtype == (dtype or torch.float16) and torch.equal(found["w"].float(), small.float())
    assert found["n"].dtype == torch.int64


@pytest.mark.parametrize("name", ["scaled_fp8", "blocks.0.attn.scale_weight", "blocks.0.weight_scale"])
def test_scaled_eight_bit_floats_are_refused(tmp_path: Path, name: str) -> None:
    save_file({"w": torch.ones(2, 2).to(torch.float8_e4m3fn), name: torch.ones(1)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", name, "16- or 32-bit")


def test_integers_as_weights_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "w is quantised to int8")


def test_nested_parts_equal_flat_ones(tmp_path: Path) -> None:
    """IP-Adapter: the .bin keeps the projection in float32 (plus), the .safetensors has all in float16."""
    generator = torch.Generator().manual_seed(0)
    projection, attention = (torch.randn(5, 5, generator=generator) for _ in range(2))
    torch.save({"image_proj": {"p": projection}, "ip_adapter": {"1.k": attention.half()}}, tmp_path / "x.bin")
    save_file({"image_proj.p": projection.half(), "ip_adapter.1.k": attention.half()}, tmp_path / "x.safetensors")
    nested, flat = (files.cast(files.read(tmp_path / f"x.{s}")[0], torch.float16, s) for s in ("bin", "safetensors"))
    assert same(nested, flat)


def test_cast_names_what_overflows(tmp_path: Path) -> None:
    tensors = {"good": torch.ones(2), "big": torch.tensor([1.0, 70_000.0]), "ids": torch.tensor([2**40])}
    tensors |= {"inf": torch.tensor([torch.inf]), "num_updates": torch.tensor(840_000, dtype=torch.int32)}
    with pytest.raises(ConversionError) as caught:
        files.cast(tensors, torch.float16, "sd.ckpt")
    assert "sd.ckpt: 1 tensors hold numbers above 65504" in str(caught.value) and ": big;" in str(caught.value)
    cast = files.cast(tensors, torch.bfloat16, "sd.ckpt")
    assert {str(t.dtype)[6:] for t in cast.values()} == {"bfloat16", "int64", "int32"}
    assert files.cast(tensors, torch.float32, "x")["big"] is tensors["big"]
    with pytest.raises(ConversionError, match="hidden"):  # among what is not finite
        files.cast({"hidden": torch.tensor([torch.nan, -70_000.0, torch.inf])}, torch.float16, "sd.ckpt")
    with pytest.raises(ConversionError, match="edge"):  # finite in float32, nearer to infinity in bfloat16
        files.cast({"edge": torch.tensor([torch.finfo(torch.float32).max])}, torch.bfloat16, "sd.ckpt")


# --- writing that fails ---------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails in the middle."""
    resource = pytest.importorskip("resource", reason="a limit on the size of files needs a Unix")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="nothing was written") as caught:
            files.write(path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="nothing was written; choose a folder"):
        files.write(tmp_path / "file" / "x.safetensors", TENSORS)
    if os.geteuid():  # nothing is read-only for root
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError, match="nothing was written"):
            files.write(tmp_path / "x.safetensors", TENSORS)

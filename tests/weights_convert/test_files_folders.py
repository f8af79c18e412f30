"""Folders of diffusers and transformers: variants, shards with and without their index, indices that lie."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weights_convert import files
from weights_convert.rules import ConversionError

ONE, TWO = {"a": torch.ones(1)}, {"b": torch.ones(2)}
NAME = "diffusion_pytorch_model"


def folder(path: Path, variant: str = "", suffix: str = "safetensors", **index: Any) -> Path:
    """Two shards and their index; `index` replaces entries of it."""
    path.mkdir(exist_ok=True)
    names = [f"{NAME}{variant}-0000{n}-of-00002.{suffix}" for n in (1, 2)]
    for name, tensors in zip(names, (ONE, TWO), strict=True):
        save_file(tensors, path / name) if suffix == "safetensors" else torch.save(tensors, path / name)
    content = {"metadata": {"total_size": 12}, "weight_map": {"a": names[0], "b": names[1]}, **index}
    (path / f"{NAME}.{suffix}.index{variant}.json").write_text(json.dumps(content))
    return path


def both(path: Path) -> None:
    tensors, _ = files.read(path)
    assert tensors.keys() == {"a", "b"} and tensors["a"].shape == (1,) and tensors["b"].shape == (2,)


@pytest.mark.parametrize("variant", ["", ".fp16", ".non_ema"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path: Path, variant: str, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    path = folder(tmp_path / "unet", variant, suffix)
    both(path)
    both(path / f"{NAME}.{suffix}.index{variant}.json")
    assert not caplog.records


def test_shards_without_an_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder(tmp_path / "unet")
    (path / f"{NAME}.safetensors.index.json").unlink()
    both(path)
    assert "no index" in caplog.text
    (path / f"{NAME}-00001-of-00002.safetensors").unlink()
    with pytest.raises(ConversionError, match="all 2 of one set; download"):
        files.read(path)


def test_keys_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    names = [f"{NAME}-0000{n}-of-00002.safetensors" for n in (2, 1)]
    both(folder(tmp_path / "unet", weight_map={"a": names[0], "b": names[1]}))


def test_one_key_in_two_shards(tmp_path: Path) -> None:
    path = folder(tmp_path / "unet")
    save_file({**TWO, **ONE}, path / f"{NAME}-00002-of-00002.safetensors")
    with pytest.raises(ConversionError, match="a is in another shard too"):
        files.read(path)


def test_a_wrong_total_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        both(folder(tmp_path / "unet", metadata={"total_size": 13}))
    assert "says 13 bytes in all, found 12" in caplog.text


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "unet")
    (path / f"{NAME}-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002.safetensors: no such file"):
        files.read(path)


@pytest.mark.parametrize(
    "weights, says",
    [
        ({"a": "../outside.safetensors"}, "shards named"),
        ({"a": "/etc/passwd"}, "shards named"),
        ({"a": ".."}, "shards named"),
        ({}, "shards named"),
        ({"a": 1}, "no readable weight_map"),
        ([], "no readable weight_map"),
        (None, "no readable weight_map"),
        (
            {"a": f"{NAME}-00001-of-00002.safetensors", "c": f"{NAME}-00002-of-00002.safetensors"},
            "do not hold the keys",
        ),
        (
            {"a": f"{NAME}-00001-of-00002.safetensors", "c": f"{NAME}-00001-of-00002.safetensors"},
            "do not hold the keys",
        ),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weights: Any, says: str) -> None:
    path = folder(tmp_path / "unet", weight_map=weights)
    with pytest.raises(ConversionError, match=says) as caught:
        files.read(path)
    assert "index.json" in str(caught.value)


def test_an_index_that_is_no_json(tmp_path: Path) -> None:
    path = folder(tmp_path / "unet")
    (path / f"{NAME}.safetensors.index.json").write_text("<html>")
    with pytest.raises(ConversionError, match="no readable weight_map"):
        files.read(path)


def test_full_precision_before_half_and_safetensors_before_pickles(tmp_path: Path) -> None:
    path = folder(tmp_path / "unet")
    save_file({"c": torch.ones(1)}, path / f"{NAME}.fp16.safetensors")
    torch.save({"d": torch.ones(1)}, path / f"{NAME}.bin")
    both(path)
    for leftover in path.glob(f"{NAME}[-.][0s]*"):
        leftover.unlink()
    assert list(files.read(path)[0]) == ["c"]
    (path / f"{NAME}.fp16.safetensors").unlink()
    assert list(files.read(path)[0]) == ["d"]


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    said = "no weights, only .*config.json.* expected some called .*; give the file itself"
    with pytest.raises(FileNotFoundError, match=said):
        files.read(tmp_path)

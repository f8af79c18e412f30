"""Files that do not go together, or are not what their flag says: one line with the file, what was found, what was
expected and what to do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import random_miniature
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from teaching import teaches
from test_cli_full_size import Manifest, sparse

from i2v import assemble
from i2v.assemble import ModelFiles
from i2v.config import ConfigError
from i2v.load import header, save_part


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_miniature.write(tmp_path / "model")


def refusal(**files: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        assemble.plan(ModelFiles(**files)).refuse()
    return str(caught.value)


def with_config(folder: Path, name: str, **fields: Any) -> None:
    """The part again with other fields in its config, its tensors as they are."""
    part = header(folder / f"{name}.safetensors")
    facts = {k: v for k, v in part.metadata.items() if k not in ("part", "config")}
    save_part(part.path, part.tensors(), dataclasses.replace(part.config, **fields), **facts)


def with_metadata(folder: Path, name: str, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(header)
    save_file(tensors, path, header)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("text_encoder", {"hidden_size": 48}, "text of width 48, expected 32"),
        ("vae", {"latent_channels": 4}, "4 latent channels, expected 16"),
        ("image_encoder", {"projection_dim": 20}, "width 20, expected 24"),
        ("ip_adapter", {"context_dim": 40}, "image tokens of width 40, expected 32"),
    ],
)
def test_parts_that_do_not_belong_together(folder: Path, name: str, fields: dict[str, Any], words: str) -> None:
    with_config(folder, name, **fields)
    text = refusal(weights=folder)
    teaches(text, f"{name}.safetensors")
    assert words in text


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("unet", lambda header: header.pop("config"), "no config"),
        ("unet", lambda header: header.update(config="{"), "cannot be used"),
        ("unet", lambda header: header.update(config="[1]"), "cannot be used"),
        ("unet", lambda header: header.update(config=json.dumps({"later": 1})), "later"),
        ("motion", lambda header: header.update(config='{"max_frames": 3}'), "expected"),  # another network's
        ("motion", lambda header: header.pop("schedule"), "no schedule"),
        ("motion", lambda header: header.update(schedule='{"prediction": 3}'), "prediction"),
        ("motion", lambda header: header.update(part="moton"), "moton"),
    ],
)
def test_what_a_part_says_of_itself(folder: Path, name: str, change: Any, words: str) -> None:
    with_metadata(folder, name, change)
    text = refusal(weights=folder)
    teaches(text, f"{name}.safetensors")
    assert words in text


@pytest.mark.parametrize(
    ("flag", "name", "words"),
    [
        ("base", "motion", "expected text_encoder or text_encoder_2 or unet or vae; give it with --motion"),
        ("i2v", "unet", "expected i2v_adapter; give it with --base"),
        ("image_encoder", "ip_adapter", "it holds image_projection and ip_adapter, expected image_encoder; give it "
         "with --i"),
        ("motion", "i2v_adapter", "expected motion; give it with --i2v"),
    ],
)  # fmt: skip
def test_a_file_under_another_flag(folder: Path, flag: str, name: str, words: str) -> None:
    file = folder / f"{name}.safetensors"
    text = refusal(preset="i2v-sd15", **{flag: (file,) if flag == "base" else file})
    teaches(text, file.name)
    assert words in text


def test_a_file_that_is_not_there_and_a_folder_too_many(folder: Path) -> None:
    teaches(refusal(preset="i2v-sd15", motion=folder / "no.ckpt"), "no.ckpt")
    teaches(refusal(preset="i2v-sd15", models=folder / "no"), str(folder / "no"))
    teaches(refusal(weights=folder, models=folder), str(folder))
    teaches(refusal(weights=folder, controlnet=("canny",)), "canny")
    teaches(refusal(weights=folder / "no"), str(folder / "no"))
    teaches(refusal(weights=folder, tokenizer=folder / "no"), f"--tokenizer {folder / 'no'}")
    (folder / "odd.bin").write_bytes(b"<html>")
    teaches(refusal(preset="i2v-sd15", motion=folder / "odd.bin"), "odd.bin")
    save_file({"a": torch.ones(1)}, folder / "odd.safetensors")
    teaches(refusal(preset="i2v-sd15", motion=folder / "odd.safetensors"), "odd.safetensors")


def test_why_a_file_of_models_was_not_taken(tmp_path: Path, manifest: Manifest) -> None:
    """One that is not what its name says, and two that could both be it, are told beside what is missing."""
    (tmp_path / "v1-5-pruned-emaonly.safetensors").write_bytes(b"<html>")
    for name in "ab":
        sparse(tmp_path / f"{name}.safetensors", manifest("ip_adapter_plus_sd15")["tensors"])
    text = refusal(preset="i2v-sd15", models=tmp_path)
    teaches(text, "v1-5-pruned-emaonly.safetensors")
    assert "is not what its name says" in text and "with --models" not in text
    assert "could be any of" in text and "b.safetensors" in text and "choose with --ip-adapter" in text


def test_numbers_too_large_for_their_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        save_part(tmp_path / "unet.safetensors", {"weight": torch.full((2,), 1e6)})
    teaches(str(caught.value), "unet.safetensors")

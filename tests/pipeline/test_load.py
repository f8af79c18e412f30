"""Part files: written, described by themselves, loaded strictly, refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from i2v import presets
from i2v.config import ConfigError
from i2v.diffusion.schedule import Schedule
from i2v.hashes import sha256
from i2v.load import dtype_of, header, load, save_part
from i2v.models.vae import SD_VAE, SDXL_VAE
from weights_convert import files
from weights_convert.detect import files_of


@pytest.fixture
def copy(miniature: Path, tmp_path: Path) -> Path:
    """A copy of the miniature that a test may spoil."""
    return Path(shutil.copytree(miniature, tmp_path / "model"))


def test_a_part_carries_its_config(miniature: Path) -> None:
    motion, unet = (header(miniature / f"{name}.safetensors") for name in ("motion", "unet"))
    assert motion.config.max_frames == 24
    assert unet.config.channels == (32, 48)
    assert motion.metadata["schedule"]["prediction"] == "v"
    assert load(folder=miniature).schedule == Schedule(prediction="v")


def test_save_part_stores_half_precision_whole_or_not_at_all(tmp_path: Path) -> None:
    file = save_part(tmp_path / "new" / "unet.safetensors", nn.Linear(2, 2), note="kept", steps=7)
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("weight").dtype == torch.float16
        assert opened.metadata() == {"family": "tiny", "part": "unet", "note": "kept", "steps": "7"}
    before = file.read_bytes()
    bad = nn.Linear(2, 2)
    nn.init.constant_(bad.weight, 1e6)
    with pytest.raises(ValueError, match="infinities"):
        save_part(file, bad)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("name", ["unet.safetensors", "merges.txt"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ConfigError, match=name):
        load(folder=copy)


def test_a_truncated_file_is_named(copy: Path) -> None:
    file = copy / "vae.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="vae.safetensors.*damaged"):
        load(folder=copy)


def test_every_tensor_has_its_place(copy: Path) -> None:
    part = header(copy / "i2v_adapter.safetensors")
    tensors = part.tensors()
    for spoil, word in (
        (lambda t: t.pop(next(iter(t))), "missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.update({next(iter(t)): torch.zeros(3)}), r"\(3,\)"),
    ):
        changed = dict(tensors)
        spoil(changed)
        save_part(part.path, changed)
        with pytest.raises(ValueError, match=f"(?s)i2v_adapter.safetensors.*{word}"):
            load(folder=copy)
    save_part(part.path, tensors)
    load(folder=copy)


@pytest.mark.parametrize("name", ["i2v-sd15", "i2v-sdxl"])
def test_presets_without_weights_say_which_files_they_need(name: str) -> None:
    with pytest.raises(ConfigError, match="--models") as error:
        load(name)
    for wanted in presets.PRESETS[name].needs:
        assert all(fact in str(error.value) for fact in (wanted.file, wanted.where, wanted.licence))


def test_unknown_preset_device_and_dtype() -> None:
    for arguments, word in ((("small",), "tiny"), (("tiny", "abacus"), "abacus"), (("tiny", "cuda:99"), "CUDA")):
        with pytest.raises(ConfigError, match=word):
            load(*arguments)


def test_sdxl_s_vae_is_no_float16() -> None:
    """Its activations overflow there; everything else follows the pipeline, and the trained part is float32."""
    half = torch.float16
    for name, config, wanted in (("vae", SDXL_VAE, torch.float32), ("vae", SD_VAE, half), ("unet", None, half),
                                 ("i2v_adapter", None, torch.float32)):  # fmt: skip
        assert dtype_of(name, config, half) == wanted
    assert dtype_of("vae", SDXL_VAE, torch.bfloat16) == torch.bfloat16


def test_the_hash_of_a_diffusers_folder_is_of_the_files_that_are_read(tmp_path: Path) -> None:
    """Shards by their index, one file of several variants; pictures, other variants and settings have no part in it."""
    tensors = {"a.weight": torch.zeros(2), "b.weight": torch.ones(2)}
    (tmp_path / "unet").mkdir()
    (tmp_path / "vae").mkdir()
    for number, (key, tensor) in enumerate(tensors.items(), 1):
        save_file({key: tensor}, tmp_path / f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors")
    where = {key: f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n, key in enumerate(tensors, 1)}
    index = tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    save_file(tensors, tmp_path / "vae/diffusion_pytorch_model.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    before = sha256(tmp_path)
    unet = [tmp_path / "unet" / name for name in where.values()]
    assert sorted(files_of(tmp_path)) == [*unet, tmp_path / "vae/diffusion_pytorch_model.safetensors"]
    for name in ("picture.png", "vae/diffusion_pytorch_model.fp16.safetensors", "unet/config.json", "README.md"):
        (tmp_path / name).write_text("other")
    assert sha256(tmp_path) == before
    save_file({"b.weight": torch.zeros(2)}, unet[1])
    assert sha256(tmp_path) != before
    unet[1].unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        files.read(tmp_path / "unet")

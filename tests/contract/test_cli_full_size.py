"""`--check` on the published files at full size: their key lists over sparse files, told and compared, nothing read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from teaching import teaches

import sample
from i2v.assemble import ModelFiles, plan
from i2v.presets import PRESETS
from i2v.sources import Library
from weights_convert.files import DTYPES

Manifest = Callable[[str], dict[str, Any]]
NAMES = {str(kind).removeprefix("torch."): name for kind, name in DTYPES.items()}
FILES = {  # names that say nothing: the content tells
    "a.ckpt": "sd15_single_file_emaonly",
    "b.bin": "animatediff_v15_v1_ipplus",
    "c.pth": "i2v_module",
    "d.safetensors": "ip_adapter_plus_sd15",
    "e/f.safetensors": "clip_vision_vit_h14_hf",
}


def sparse(path: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """A safetensors file of the listed tensors that takes no room on the disk; every number in it is zero."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, end = {}, 0
    for key, entry in tensors.items():
        size = int(NAMES[entry["dtype"]][1:]) // 8
        for number in entry["shape"]:
            size *= number
        header[key] = {"dtype": NAMES[entry["dtype"]], "shape": entry["shape"], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def folder(manifest: Manifest, tmp_path: Path) -> Path:
    for name, published in FILES.items():
        tensors = manifest(published)["tensors"]
        sparse(tmp_path / name, {k: v for k, v in tensors.items() if "pos_encoder" not in k})  # they are not zero
    return tmp_path


def test_the_authors_release(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main(["--preset", "i2v-sd15", "--models", str(folder), "--check"]) == 0
    out = capsys.readouterr().out
    assert "complete, every shape fits" in out
    counts = {"unet": 859_520_964, "vae": 83_653_863, "i2v_adapter": 24_793_280, "image_encoder": 632_076_800}
    for part, count in counts.items():
        assert [line for line in out.splitlines() if line.split()[:1] == [part] and f"{count:,}" in line], part


def diffusers_folder(base: Path, manifest: Manifest) -> None:
    """Stable Diffusion 1.5 as diffusers publishes it, in shapes alone."""
    for part, published, name in (
        ("unet", "sd15_diffusers_unet", "diffusion_pytorch_model"),
        ("vae", "sd15_diffusers_vae_old_names", "diffusion_pytorch_model"),
        ("text_encoder", "sd15_diffusers_text_encoder", "model"),
    ):
        sparse(base / part / f"{name}.safetensors", manifest(published)["tensors"])
    (base / "model_index.json").write_text("{}")


def test_a_diffusers_folder_and_modules_of_one_s_own_choice(
    folder: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    base = folder / "stable-diffusion-v1-5"
    diffusers_folder(base, manifest)
    tensors = manifest("mm_sd_v15_v2")["tensors"]
    sparse(folder / "mm.ckpt", {k: v for k, v in tensors.items() if "pos_encoder" not in k})
    clip = str(folder / "e/f.safetensors")
    argv = ["--preset", "i2v-sd15", "--base", str(base), "--motion", str(folder / "mm.ckpt"), "--image-encoder", clip,
            "--ip-adapter", str(folder / "d.safetensors"), "--i2v", str(folder / "c.pth"), "--check"]  # fmt: skip
    assert sample.main(argv) == 0
    rows = {line.split()[0]: line.split()[3] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert rows["unet"] == rows["vae"] == rows["text_encoder"] == "sd15-diffusers-folder"
    assert rows["motion"] == "animatediff-v2" and rows["ip_adapter"] == "ip-adapter-plus-sd15"


def test_a_whole_diffusers_folder_counts_more_than_a_file_in_it(manifest: Manifest, tmp_path: Path) -> None:
    """As a clone of the published repository has both; a file elsewhere is another model."""
    base, wanted = tmp_path / "clone", PRESETS["i2v-sd15"].needs[0]
    diffusers_folder(base, manifest)
    single = manifest("sd15_single_file_emaonly")["tensors"]
    sparse(base / "v1-5-pruned.safetensors", single)
    found, _ = Library(tmp_path).find(wanted)
    assert found is not None and found.path == base
    sparse(tmp_path / "mine.safetensors", single)
    found, why = Library(tmp_path).find(wanted)
    assert found is None and "could be any of" in why and "v1-5-pruned.safetensors" not in why


def test_motion_modules_of_another_base_are_refused(
    folder: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = manifest("mm_sdxl_v10_beta")["tensors"]
    sparse(folder / "mm.ckpt", {k: v for k, v in tensors.items() if "pos_encoder" not in k})
    argv = ["--preset", "i2v-sd15", "--models", str(folder), "--motion", str(folder / "mm.ckpt"), "--check"]
    assert sample.main(argv) == 2
    assert "mm.ckpt (animatediff-sdxl): it goes with sdxl, expected sd15" in capsys.readouterr().out


def test_an_ip_adapter_without_patches_needs_its_encoder_too(
    folder: Path, manifest: Manifest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the picture's embedding, whose width is another than that of the patches."""
    monkeypatch.chdir(folder)
    sparse(Path("base.safetensors"), manifest("ip_adapter_sd15")["tensors"])
    sparse(Path("bigg.safetensors"), manifest("clip_vision_vit_bigg_hf")["tensors"])
    argv = ["--preset", "i2v-sd15", "--models", ".", "--ip-adapter", "base.safetensors", "--check"]
    base = ["--base", "a.ckpt", "--motion", "b.bin"]  # the release's attentions are those of the plus adapter
    files = {"models": Path("."), "base": (Path("a.ckpt"),), "motion": Path("b.bin")}
    made = [plan(ModelFiles("i2v-sd15", **files, **more)) for more in ({}, {"ip_adapter": Path("base.safetensors")})]
    assert [one.preset.unconditional_image for one in made] == ["zero-pixels", "zero-embedding"]  # as each was trained
    assert sample.main([*argv, *base, "--image-encoder", "bigg.safetensors"]) == 2
    assert "width 1280, expected 1024, which base.safetensors (ip-adapter-sd15) reads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "published", "words"),
    [
        ("--lora", "lora_kohya_sdxl", "--lora other.safetensors: this is a LoRA for sdxl, expected one for sd15"),
        ("--image-encoder", "clip_vision_vit_bigg_hf", "(clip-vision-bigg14): it gives image features of width "
         "1664, expected 1280, which d.safetensors (ip-adapter-plus-sd15) reads; give another --image-encoder, CLIP "
         "ViT-H/14"),
        ("--ip-adapter", "ip_adapter_plus_sdxl_vit_h", "goes with sdxl, expected sd15 for --preset i2v-sd15; take one"),
        ("--base", "sdxl_base_single_file", "expected that of Stable Diffusion 1.5; use --preset i2v-sdxl"),
    ],
)  # fmt: skip
def test_files_of_another_base_or_encoder_are_refused_by_name(
    folder: Path, manifest: Manifest, flag: str, published: str, words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    sparse(Path("other.safetensors"), manifest(published)["tensors"])
    assert sample.main(["--preset", "i2v-sd15", "--models", ".", flag, "other.safetensors", "--check"]) == 2
    out = capsys.readouterr().out
    assert words in out, out
    for problem in (line for line in out.splitlines() if line.startswith("problem: ")):
        teaches(problem, ".safetensors")

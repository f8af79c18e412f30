"""Whole diffusers folders of full size, as files with holes: every part is read, nothing else is."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from weights_convert.check_file import check, shown
from weights_convert.detect import read_parts, to_parts, to_published
from weights_convert.networks import misfits
from weights_convert.rules import ConversionError

Manifest = Callable[[str], dict[str, Any]]

KINDS = {"float32": ("F32", 4), "float16": ("F16", 2), "int64": ("I64", 8)}
FOLDERS = {
    "sd15": {
        "unet": "sd15_diffusers_unet",
        "vae": "sd15_diffusers_vae_old_names",
        "text_encoder": "sd15_diffusers_text_encoder",
    },
    "sdxl": {
        "unet": "sdxl_diffusers_unet",
        "vae": "sdxl_diffusers_vae",
        "text_encoder": "sdxl_diffusers_text_encoder",
        "text_encoder_2": "sdxl_diffusers_text_encoder_2",
    },
}


def sparse(path: Path, tensors: dict[str, Any]) -> None:
    """A safetensors file of that header over a hole: full size, no blocks on disk."""
    header, end = {}, 0
    for key, value in tensors.items():
        dtype, width = KINDS[value["dtype"]]
        size = math.prod(value["shape"]) * width
        header[key] = {"dtype": dtype, "shape": value["shape"], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def fill(folder: Path, base: str, manifest: Manifest, variant: str = "") -> Path:
    for part, name in FOLDERS[base].items():
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        sparse(folder / part / f"{stem}{variant}.safetensors", manifest(name)["tensors"])
    for other in ("tokenizer", "safety_checker", "scheduler"):
        (folder / other).mkdir(exist_ok=True)
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied afterwards: pytest keeps the last runs, and some tools count holes as bytes."""
    yield tmp_path
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("base", FOLDERS)
def test_a_whole_folder(base: str, variant: str, folder: Path, manifest: Manifest) -> None:
    parts = read_parts(fill(folder, base, manifest, variant))
    assert parts.layout.name == f"{base}-diffusers-folder" and set(parts.tensors) == set(FOLDERS[base])
    listed = {part: manifest(name)["tensors"] for part, name in FOLDERS[base].items()}
    assert sum(parts.report.values()) == sum(map(len, listed.values()))
    assert "safety_checker" in parts.metadata["ignored"] and set(parts.needs).isdisjoint(parts.tensors)
    for part, tensors in parts.tensors.items():
        assert not misfits(part, tensors, parts.layout.configs[part], parts.layout.configs["unet"])

    # and the same parts as from the single file of that base
    single = manifest(f"{base}_{'single_file_emaonly' if base == 'sd15' else 'base_single_file'}")["tensors"]
    other = to_parts({k: torch.empty(v["shape"], device="meta") for k, v in single.items()}, "x").tensors
    assert {p: set(t) for p, t in other.items()} == {p: set(t) for p, t in parts.tensors.items()}

    written = to_published({p: {k: torch.empty_like(t, device="meta") for k, t in ts.items()}
                            for p, ts in parts.tensors.items()}, parts.layout.name)  # fmt: skip
    new = {"sd15": "sd15_diffusers_vae_new_names"}.get(base, "sdxl_diffusers_vae")
    listed["vae"] = manifest(new)["tensors"]
    assert written.keys() == {f"{part}.{key}" for part, keys in listed.items() for key in keys}


def test_a_folder_of_a_part(folder: Path, manifest: Manifest) -> None:
    """SDXL's second text encoder is told from the first by its content, whatever its folder is called."""
    sparse(folder / "text_encoder" / "model.safetensors", manifest("sdxl_diffusers_text_encoder_2")["tensors"])
    assert set(read_parts(folder / "text_encoder").tensors) == {"text_encoder_2"}


def test_a_folder_without_a_part(folder: Path, manifest: Manifest) -> None:
    fill(folder, "sd15", manifest)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="vae: no weights"):
        read_parts(folder)
    (folder / "vae").rmdir()
    parts = read_parts(folder)
    assert "vae" in parts.needs and set(parts.tensors) == {"unet", "text_encoder"}
    told = shown(facts := check(folder, "sd15")).splitlines()[-1]
    assert facts["fits"] and f"{folder} fits Stable Diffusion 1.5; a video needs vae, " in told
    assert "text_encoder" not in told, "it is there"


@pytest.mark.parametrize("prediction, wanted", [("epsilon", True), ("v_prediction", False), ("sample", False)])
def test_what_the_scheduler_says_is_predicted(prediction: str, wanted: bool, folder: Path, manifest: Manifest) -> None:
    fill(folder, "sd15", manifest)
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({"prediction_type": prediction}))
    if wanted:
        assert read_parts(folder).layout.name == "sd15-diffusers-folder"
        return
    with pytest.raises(ConversionError) as caught:
        read_parts(folder)
    for words in (str(settings), prediction, "expected 'epsilon'", "use a model that predicts the noise"):
        assert words in str(caught.value)


@pytest.mark.parametrize("own", [{}, {"beta_schedule": "scaled_linear"}])
def test_a_schedule_of_another_kind(own: dict[str, str], folder: Path, manifest: Manifest) -> None:
    """Playground v2.5's is refused; ordinary models are saved with that class too, and keep their betas."""
    fill(folder, "sdxl", manifest)
    values = {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon", **own}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    if own:
        assert read_parts(folder).layout.name == "sdxl-diffusers-folder"
    else:
        with pytest.raises(ConversionError, match="its network predicts 'EDM', expected 'epsilon'"):
            read_parts(folder)


@pytest.mark.parametrize(
    "key, shape, says",
    [
        ("conv_in.weight", (320, 9, 3, 3), "an inpainting model"),
        ("time_embedding.cond_proj.weight", (320, 256), "LCM"),
        ("add_embedding.linear_1.weight", (1536, 2560), "the SDXL refiner"),
        ("strange.weight", (1,), "unet.strange.weight (1,): no rule claims it"),
    ],
)
def test_a_wrong_unet_in_a_folder(
    key: str, shape: tuple[int, ...], says: str, folder: Path, manifest: Manifest
) -> None:
    fill(folder, "sd15", manifest)
    unet = manifest("sd15_diffusers_unet")["tensors"] | {key: {"shape": shape, "dtype": "float32"}}
    sparse(folder / "unet" / "diffusion_pytorch_model.safetensors", unet)
    with pytest.raises(ConversionError) as caught:
        read_parts(folder)
    assert str(folder) in str(caught.value) and says in str(caught.value)


def test_an_old_name_beside_the_new_one(folder: Path, manifest: Manifest) -> None:
    """Both `query` and `to_q`: neither wins."""
    fill(folder, "sd15", manifest)
    both = manifest("sd15_diffusers_vae_old_names")["tensors"]
    query = "encoder.mid_block.attentions.0.query.weight"
    sparse(folder / "vae" / "diffusion_pytorch_model.safetensors", both | {query.replace("query", "to_q"): both[query]})
    with pytest.raises(ConversionError, match="to_q.weight .*: no rule claims it"):
        read_parts(folder)


def test_a_controlnet_with_its_base(manifest: Manifest) -> None:
    """The first releases hold the whole model: all parts come out, none is lost."""
    source = {
        key: torch.empty(value["shape"], device="meta")
        for name in ("controlnet_v11p_sd15_openpose_ldm", "sd15_single_file_emaonly")
        for key, value in manifest(name)["tensors"].items()
    }
    parts = to_parts(source, "x")
    assert parts.layout.name == "controlnet-sd15-whole"
    assert set(parts.tensors) == {"controlnet", "unet", "vae", "text_encoder"} == set(parts.layout.parts)
    assert len(parts.tensors["controlnet"]) == 340 and sum(parts.report.values()) == len(source)

"""Which layout a file is in: variants in the wild are read, known unwanted kinds are refused by name."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from i2v.models.motion import frame_positions
from weights_convert.detect import detect, named, read_parts, to_parts
from weights_convert.known import LAYOUTS
from weights_convert.layouts.single_file import ema_name
from weights_convert.rules import ConversionError

Manifest = Callable[[str], dict[str, Any]]
UNET = "model.diffusion_model."


def published(manifest: Manifest, name: str) -> dict[str, Tensor]:
    return {k: torch.empty(v["shape"], device="meta") for k, v in manifest(name)["tensors"].items()}


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def refused(tensors: dict[str, Tensor], *says: str) -> None:
    with pytest.raises(ConversionError) as caught:
        to_parts(tensors, "file-y.ckpt")
    for word in ("file-y.ckpt", *says):
        assert word in str(caught.value), str(caught.value)


def test_layout_names_are_unique() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    assert named("vae-ldm").name == "vae-ldm"
    with pytest.raises(ConversionError, match="vae-ldm"):
        named("vae")


@pytest.mark.parametrize(
    "name, says",
    [
        ("lora_kohya_sd15", "a LoRA"),
        ("v3_sd15_adapter", "a LoRA"),
        ("dynamicrafter_512", "DynamiCrafter"),
        ("ip_adapter_plus_sd15_ip_adapter", "no known layout"),
    ],
)
def test_published_files_of_other_kinds(name: str, says: str, manifest: Manifest) -> None:
    refused(published(manifest, name), says)


@pytest.mark.parametrize(
    "change, says",
    [
        ({f"{UNET}input_blocks.0.0.weight": meta(320, 9, 3, 3)}, "inpainting"),
        ({f"{UNET}input_blocks.0.0.weight": meta(320, 8, 3, 3)}, "pix2pix"),
        ({"v_pred": meta(0)}, "v-prediction"),
        ({f"{UNET}time_embed.cond_proj.weight": meta(320, 256)}, "LCM"),
        ({"cond_stage_model.model.ln_final.weight": meta(1024)}, "Stable Diffusion 2"),
        ({"double_blocks.0.img_attn.proj.weight": meta(1)}, "FLUX"),
        ({f"{UNET}out.2.scale_weight": meta(1)}, "8-bit"),
    ],
)
def test_other_bases(change: dict[str, Tensor], says: str, manifest: Manifest) -> None:
    refused(published(manifest, "sd15_single_file_emaonly") | change, says)


def test_the_refiner(manifest: Manifest) -> None:
    change = {f"{UNET}label_emb.0.0.weight": meta(1536, 2560)}
    refused(published(manifest, "sdxl_base_single_file") | change, "refiner", "use the SDXL base")


def test_near_misses_are_named(manifest: Manifest) -> None:
    """SDXL motion modules of another width, an IP-Adapter for another encoder."""
    source = published(manifest, "ip_adapter_sd15")
    refused(
        source | {"image_proj.proj.weight": meta(3072, 768)},
        "nearest",
        "ip-adapter-sd15, but image_proj.proj.weight is (3072, 768), expected (3072, 1024)",
    )
    refused({"a": meta(1)}, "no known layout", "known are", "animatediff-v3")


def test_motion_modules_without_their_table(manifest: Manifest) -> None:
    """v1 and v3 then have the same keys: the user has to say which."""
    tables = published(manifest, "mm_sd_v15")
    bare = {k: v for k, v in tables.items() if not k.endswith(".pe")}
    refused(bare, "animatediff-v1, but no", "animatediff-v3, but no")
    assert to_parts(bare, "x", "animatediff-v3").tensors["motion"].keys() == bare_names(tables, "animatediff-v1")


def bare_names(tensors: dict[str, Tensor], layout: str) -> set[str]:
    return set(to_parts(tensors, "x", layout).tensors["motion"])


def test_frame_tables_are_checked_by_value(manifest: Manifest) -> None:
    """A table of other positions means other attention: it must not be dropped in silence."""
    module = "down_blocks.0.motion_modules.0.temporal_transformer."
    start = f"{module}transformer_blocks.0.attention_blocks.0."
    table = frame_positions(24, 8, torch.device("cpu"))[None]
    source = {f"{start}to_q.weight": torch.zeros(8, 8), f"{start}pos_encoder.pe": table.half()}
    assert len(to_parts(source, "x", "animatediff-v1").tensors["motion"]) == 1
    with pytest.raises(ConversionError, match="pos_encoder.pe: its values"):
        to_parts(source | {f"{start}pos_encoder.pe": table.flip(1)}, "x", "animatediff-v1")
    with pytest.raises(ConversionError, match="pos_encoder.pe: shape"):
        to_parts(source, "x", "animatediff-v2")


# --- single files in the wild --------------------------------------------------------------------------------------


def small_average(manifest: Manifest) -> dict[str, Tensor]:
    """v1-5-pruned with one number for each tensor: plain UNet 1, its average 2, the rest 0."""
    values = {UNET: 1.0, "model_ema.diffusion_model": 2.0}
    return {
        k: torch.full((6, 1, 1, 1) if ".attn_1." in k and k.endswith("weight") and "norm" not in k else (6,), value)
        for k in manifest("sd15_single_file_pruned")["tensors"]
        for value in [next((v for start, v in values.items() if k.startswith(start)), 0.0)]
    }


@pytest.mark.parametrize("ema, expected", [(True, 2.0), (False, 1.0)])
def test_the_running_average(ema: bool, expected: float, manifest: Manifest) -> None:
    parts = to_parts(small_average(manifest), "x", "sd15-single-file", ema=ema).tensors
    assert len(parts["unet"]) == 686 and all(t[0].item() == expected for t in parts["unet"].values())


def test_an_incomplete_average_is_not_taken(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    source = small_average(manifest)
    del source[ema_name(f"{UNET}out.2.weight")]
    parts = to_parts(source, "x", "sd15-single-file").tensors
    assert all(t[0].item() == 1 for t in parts["unet"].values()) and "685 of 686 tensors only" in caplog.text


def test_an_average_alone_is_refused(manifest: Manifest) -> None:
    source = published(manifest, "sd15_single_file_pruned")
    refused({k: v for k, v in source.items() if not k.startswith(UNET)}, "running average of a UNet alone")


@pytest.mark.parametrize("extra", ["position_ids", "catalogue", "nothing", "no-level", "clip_l", "no-vae"])
def test_community_files(extra: str, manifest: Manifest) -> None:
    source = published(manifest, "sd15_single_file_emaonly")
    clip = "cond_stage_model.transformer."
    common = {k: v for k, v in source.items() if k.startswith((UNET, "first_stage", "cond_stage"))}
    ids = f"{clip}text_model.embeddings.position_ids"
    if extra == "position_ids":  # half precision, wrong values: they are never read
        source = common | {ids: torch.zeros(1, 77).half()}
    elif extra == "catalogue":  # every harmless key that public loaders know of
        refused_by_name = ("cond_proj", "v_pred", "ztsnr")
        source = common | {
            k: v
            for k, v in published(manifest, "sd15_single_file_community_extras").items()
            if not any(word in k for word in refused_by_name)
        }
    elif extra == "nothing":
        source = {k: v for k, v in common.items() if k != ids}
    elif extra == "no-level":
        source = {k.replace(f"{clip}text_model.", clip): v for k, v in common.items()}
    elif extra == "clip_l":
        source = {k.replace(clip, "cond_stage_model.clip_l.transformer."): v for k, v in common.items()}
    else:
        source = {k: v for k, v in common.items() if not k.startswith("first_stage")}
    parts = to_parts(source, "x").tensors
    reference = to_parts(published(manifest, "sd15_single_file_emaonly"), "x").tensors
    assert set(parts) == (set(reference) - {"vae"} if extra == "no-vae" else set(reference))
    assert all(parts[part].keys() == reference[part].keys() for part in parts)


def test_turned_and_unturned_projections() -> None:
    """OpenCLIP's matrix is applied from the right, `text_projection.weight` from the left; both are square."""
    matrix = torch.arange(9.0).reshape(3, 3)
    blocks = {
        f"transformer.resblocks.0.{leaf}": torch.zeros(3)
        for name in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for leaf in (f"{name}.weight", f"{name}.bias")
    }
    rest = {k: torch.zeros(3) for k in ("positional_embedding", "token_embedding.weight", "ln_final.weight")}
    rest |= {"ln_final.bias": torch.zeros(3)}
    rest |= {f"transformer.resblocks.0.attn.in_proj_{p}": torch.zeros(9) for p in ("weight", "bias")}
    for name, value in (("text_projection", matrix), ("text_projection.weight", matrix.T)):
        parts = to_parts({**blocks, **rest, name: value}, "x", "openclip-text-bigg").tensors
        assert torch.equal(parts["text_encoder_2"]["text_projection.weight"], matrix.T)


def test_exported_vae_with_other_attention_names(manifest: Manifest) -> None:
    source = published(manifest, "sd_vae_ft_mse_ldm")
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    odd = {}
    for key, tensor in source.items():
        for a, b in names.items():
            if f".attn_1.{a}." in key:
                key, tensor = (
                    key.replace(f".attn_1.{a}.", f".attn_1.{b}."),
                    tensor.flatten(1) if tensor.ndim == 4 else tensor,
                )
                break
        odd[key] = tensor
    ours = to_parts(odd, "x").tensors["vae"]
    want = to_parts(source, "x").tensors["vae"]
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in want.items()}


def test_detection_reads_shapes_only(manifest: Manifest) -> None:
    assert detect(published(manifest, "mm_sd_v15_v2"), "x").name == "animatediff-v2"


def test_a_file_of_full_size_is_mapped(tmp_path: Path, manifest: Manifest) -> None:
    """The real header of the 4 GB file over a hole on disk: nothing but the header is read."""
    resource = pytest.importorskip("resource")
    sizes = {"float32": ("F32", 4), "int64": ("I64", 8), "int32": ("I32", 4)}
    header, end = {}, 0
    for key, value in sorted(manifest("sd15_single_file_emaonly")["tensors"].items()):
        dtype, width = sizes[value["dtype"]]
        size = math.prod(value["shape"]) * width
        header[key] = {"dtype": dtype, "shape": value["shape"], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * ((4 - len(text)) % 8)  # the payload of the real file begins at 4 mod 8
    path = tmp_path / "v1-5-pruned-emaonly.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parts = read_parts(path)
    assert parts.layout.name == "sd15-single-file" and len(parts.tensors["unet"]) == 686
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB on Linux; the file has 4,265,146
    path.unlink()

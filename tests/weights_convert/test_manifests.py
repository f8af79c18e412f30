"""Every published file: each key claimed, our models fit exactly, the inverted rules give the published keys back."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i2v.models.clip_text import CLIPTextModel
from i2v.models.clip_vision import CLIPVisionModel
from i2v.models.controlnet import ControlNet
from i2v.models.i2v_adapter import add_i2v_adapter
from i2v.models.ip_adapter import add_ip_adapter, image_projection
from i2v.models.motion import MotionConfig, add_motion_modules
from i2v.models.unet import SD15, SDXL, UNet, UNetConfig
from i2v.models.vae import SD_VAE, VAE
from weights_convert.detect import Parts, detect, recognise, to_parts, to_published
from weights_convert.files import unwrap
from weights_convert.layouts.transformer_blocks import transformer_blocks
from weights_convert.refusals import Refusal
from weights_convert.rules import ConversionError, check_shapes

Manifest = Callable[[str], dict[str, Any]]

# name of the published file -> (layout, parts, keys that are dropped)
FILES: dict[str, tuple[str, set[str], int]] = {
    "animatediff_v15_v1_ipplus": ("i2v-adapter-base", {"unet", "motion", "ip_adapter"}, 0),
    "i2v_module": ("i2v-adapter-sd15", {"i2v_adapter"}, 0),
    "i2v_unet_sd15_full": ("i2v-adapter-full", {"unet", "motion", "ip_adapter", "i2v_adapter"}, 0),
    "mm_sd_v14": ("animatediff-v1", {"motion"}, 0),
    "mm_sd_v15": ("animatediff-v1", {"motion"}, 0),
    "mm_sd_v15_v2": ("animatediff-v2", {"motion"}, 0),
    "v3_sd15_mm": ("animatediff-v3", {"motion"}, 0),
    "mm_sdxl_v10_beta": ("animatediff-sdxl", {"motion"}, 0),
    "sd15_single_file_emaonly": ("sd15-single-file", {"unet", "vae", "text_encoder"}, 14),
    "sd15_single_file_pruned": ("sd15-single-file", {"unet", "vae", "text_encoder"}, 700),
    "sdxl_base_single_file": ("sdxl-single-file", {"unet", "vae", "text_encoder", "text_encoder_2"}, 1),
    "sd15_diffusers_unet": ("sd15-unet-diffusers", {"unet"}, 0),
    "sdxl_diffusers_unet": ("sdxl-unet-diffusers", {"unet"}, 0),
    "sd15_diffusers_vae_old_names": ("vae-diffusers-old", {"vae"}, 0),
    "sd15_diffusers_vae_new_names": ("vae-diffusers", {"vae"}, 0),
    "sdxl_diffusers_vae": ("vae-diffusers", {"vae"}, 0),
    "sdxl_vae_fp16_fix_diffusers": ("vae-diffusers", {"vae"}, 0),
    "sdxl_vae_fp16_fix_ldm": ("vae-ldm", {"vae"}, 2),
    "sd_vae_ft_mse_ldm": ("vae-ldm", {"vae"}, 2),
    "sd15_diffusers_text_encoder": ("clip-text-l", {"text_encoder"}, 1),
    "sdxl_diffusers_text_encoder": ("clip-text-l", {"text_encoder"}, 0),
    "clip_vit_l14_text_hf": ("clip-text-l", {"text_encoder"}, 0),
    "sdxl_diffusers_text_encoder_2": ("clip-text-bigg", {"text_encoder_2"}, 0),
    "openclip_bigg_text_hf_names": ("clip-text-bigg", {"text_encoder_2"}, 0),
    "openclip_bigg_text_openclip_names": ("openclip-text-bigg", {"text_encoder_2"}, 1),
    "clip_vision_vit_h14_hf": ("clip-vision-h14", {"image_encoder"}, 0),
    "clip_vision_vit_bigg_hf": ("clip-vision-bigg14", {"image_encoder"}, 0),
    "clip_vit_l14_full_hf": ("clip-l14", {"text_encoder", "image_encoder"}, 1),
    "clip_vit_b32_full_hf": ("clip-b32", {"text_encoder", "image_encoder"}, 1),
    "clip_vit_b32_hf": ("clip-b32", {"text_encoder", "image_encoder"}, 1),
    "clip_vit_b32_openai": ("openai-clip-b32", {"text_encoder", "image_encoder"}, 1),
    "openai_clip_vit_b32_torchscript": ("openai-clip-b32", {"text_encoder", "image_encoder"}, 4),
    "openai_clip_vit_l14_torchscript": ("openai-clip-l14", {"text_encoder", "image_encoder"}, 4),
    "ip_adapter_sd15": ("ip-adapter-sd15", {"ip_adapter"}, 0),
    "ip_adapter_plus_sd15": ("ip-adapter-plus-sd15", {"ip_adapter"}, 0),
    "ip_adapter_sdxl": ("ip-adapter-sdxl", {"ip_adapter"}, 0),
    "ip_adapter_sdxl_vit_h": ("ip-adapter-sdxl-vit-h", {"ip_adapter"}, 0),
    "ip_adapter_plus_sdxl_vit_h": ("ip-adapter-plus-sdxl-vit-h", {"ip_adapter"}, 0),
    "controlnet_v11p_sd15_openpose_ldm": ("controlnet-sd15-ldm", {"controlnet"}, 0),
    "controlnet_sd15_diffusers": ("controlnet-sd15-diffusers", {"controlnet"}, 0),
    "controlnet_sdxl_diffusers": ("controlnet-sdxl-diffusers", {"controlnet"}, 0),
    "v3_sd15_sparsectrl_rgb": ("sparsectrl-rgb", {"sparse_control"}, 0),
    "v3_sd15_sparsectrl_scribble": ("sparsectrl-scribble", {"sparse_control"}, 0),
    "taesd_encoder_pth": ("taesd-encoder", {"taesd"}, 0),
    "taesd_decoder_pth": ("taesd-decoder", {"taesd"}, 0),
    "taesd_diffusers": ("taesd-diffusers", {"taesd"}, 0),
}
UNSTORED = {"clip_vit_b32_hf": 2}  # position_ids, written again though this file lacks them

# name of the published file -> the kind that it is called, since it gives no part of a model
OTHERS = {
    "raft_things": "raft",
    "raft_small": "raft",
    "raft_large_torchvision": "raft",
    "raft_small_torchvision": "raft",
    "dover": "dover",
    "dover_mobile": "dover",
    "dynamicrafter_256": "dynamicrafter",
    "dynamicrafter_512": "dynamicrafter",
    "dynamicrafter_1024": "dynamicrafter",
    "v2_lora": "lora",
    "v3_sd15_adapter": "lora",
    "lora_kohya_sd15": "lora",
    "lora_kohya_sd15_locon": "lora",
    "lora_kohya_sdxl": "lora",
    "lora_kohya_sdxl_locon": "lora",
    "lcm_lora_sd15": "lora",
    "lcm_lora_sdxl": "lora",
    "lora_diffusers_sd15_lora_down_up": "lora",
    "lora_diffusers_old_attn_processor_sd15": "lora",
    "lora_peft_sd15_lora_A_B": "lora",
    "lora_peft_sdxl_lora_A_B": "lora",
}
# Lists that are no file of their own: tested by name further down, in test_single_files.py and test_folders.py.
NO_FILES = {
    "name_maps",
    "ip_adapter_plus_sd15_image_proj",
    "ip_adapter_plus_sd15_ip_adapter",
    "sd15_single_file_community_extras",
    "sd15_diffusers_folder",
    "sdxl_diffusers_folder",
}
SPARSE = {"temporal_transformer.": "", "attention_blocks.0": "attn1", "norms.0": "norm1", "ff_norm": "norm3"}


def published(manifest: Manifest, name: str) -> dict[str, Tensor]:
    """The file's tensors, without their values."""
    found = manifest(name)["tensors"]
    return {k: torch.empty(v["shape"], device="meta", dtype=getattr(torch, v["dtype"])) for k, v in found.items()}


def flat(modules: dict[str, nn.Module], prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{path}.{k}": v for path, module in modules.items() for k, v in module.state_dict().items()}


@cache
def base(config: UNetConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(UNet(config).state_dict())


@cache
def wanted(part: str, config: Any, unet_config: UNetConfig) -> dict[str, Tensor]:
    """Keys and shapes of our own part file."""
    if part == "unet":
        return base(config)
    with torch.device("meta"):
        if part == "vae":
            return dict(VAE(config or SD_VAE).state_dict())
        if part.startswith("text_encoder"):
            return dict(CLIPTextModel(config).state_dict())
        if part == "image_encoder":
            return dict(CLIPVisionModel(config).state_dict())
        if part == "controlnet":
            return dict(ControlNet(config).state_dict())
        unet = UNet(unet_config)
        if part == "motion":
            return flat(add_motion_modules(unet, config))
        if part == "i2v_adapter":
            return flat(add_i2v_adapter(unet))
        attentions = flat(add_ip_adapter(unet), "ip_adapter.")
        return attentions if config is None else flat({"image_proj": image_projection(config)}) | attentions


def in_diffusers(part: str, name: str, manifest: Manifest) -> dict[str, Tensor]:
    """What diffusers' network of that part holds, from a published list in its names: we have no such network yet."""
    if part == "taesd":
        half = name.split("_")[1] + "."
        both = published(manifest, "taesd_diffusers")
        return {k: v for k, v in both.items() if k.startswith(half) or half == "diffusers."}
    out = {}
    for key, tensor in published(manifest, name).items():
        for theirs, ours in SPARSE.items():
            key = key.replace(theirs, ours) if ".motion_modules." in key else key
        out[key] = tensor
    return {k: v for k, v in out.items() if not k.endswith(".pe")}  # a fixed table is not kept


def check_models(parts: Parts, name: str, manifest: Manifest) -> None:
    unet_config = SDXL if "sdxl" in name else SD15
    for part, tensors in parts.tensors.items():
        config = parts.layout.configs.get(part)
        assert isinstance(config, MotionConfig) or part != "motion"
        borrowed = part in ("sparse_control", "taesd")
        want = in_diffusers(part, name, manifest) if borrowed else wanted(part, config, unet_config)
        check_shapes(want, tensors, f"{name}: {part}")


@pytest.mark.parametrize("name", FILES)
def test_published_file(name: str, manifest: Manifest) -> None:
    source = published(manifest, name)
    layout, names, dropped = FILES[name]
    parts = to_parts(source, name)
    assert parts.layout.name == layout and set(parts.tensors) == names
    assert sum(n for rule, n in parts.report.items() if " dropped: " in rule) == dropped
    assert sum(parts.report.values()) == len(source)
    assert set(parts.layout.parts) == names and parts.layout.title and parts.layout.kind
    assert parts.needs == parts.layout.needs and not set(parts.needs) & names
    check_models(parts, name, manifest)

    back = to_published(parts.tensors, layout)
    assert len(source) - (len(back) - UNSTORED.get(name, 0)) == dropped
    assert len(back.keys() - source.keys()) == UNSTORED.get(name, 0)
    assert all(back[key].shape == source[key].shape for key in back.keys() & source.keys())


@pytest.mark.parametrize("name", OTHERS)
def test_published_file_of_another_kind(name: str, manifest: Manifest) -> None:
    """Each is called by its name, and the message says what to do."""
    source = published(manifest, name)
    found = recognise(source, name)
    assert isinstance(found, Refusal) and found.kind == OTHERS[name]
    with pytest.raises(ConversionError, match=f"{name}: this is .*: .{{20,}}"):
        to_parts(source, name)


def test_every_list_is_tested(root: Path) -> None:
    """A published file whose keys are known here is in one of the tables above."""
    shared = Path(os.environ.get("I2V_SHARED", root.parent / "shared"))
    folders = [root / "tests" / "golden" / "data" / "manifests", shared / "manifests"]
    names = {path.name.split(".")[0] for folder in folders if folder.is_dir() for path in folder.glob("*.json*")}
    assert names <= FILES.keys() | OTHERS.keys() | NO_FILES and FILES.keys() | OTHERS.keys() <= names


def test_our_parameter_counts_are_the_published_ones(manifest: Manifest) -> None:
    """The adapter's size as the paper gives it: 24 million for SD1.5."""
    parts = to_parts(published(manifest, "i2v_module"), "i2v_module")
    assert sum(t.numel() for t in parts.tensors["i2v_adapter"].values()) == 24_793_280


# --- the independent list of name pairs ---------------------------------------------------------------------------

PAIRS = {  # list of pairs -> (layout, part)
    "sd15_unet": ("sd15-unet-ldm", "unet"),
    "sdxl_unet": ("sdxl-unet-ldm", "unet"),
    "vae_new": ("vae-ldm", "vae"),
    "sdxl_vae_new": ("vae-ldm", "vae"),
    "sd15_clip_l": ("clip-text-l", "text_encoder"),
    "sdxl_clip_l": ("clip-text-l", "text_encoder"),
    "sdxl_clip_g": ("openclip-text-bigg", "text_encoder_2"),
    "controlnet_sd15": ("controlnet-sd15-ldm-bare", "controlnet"),
}


def tagged(pairs: list[list[str]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A small tensor for each source key, no two alike, and what each target should be by the list's operations."""
    source: dict[str, Tensor] = {}
    target: dict[str, Tensor] = {}
    for theirs, ours, op in pairs:
        if theirs not in source:
            width = (3, 1, 1) if ".attn_1." in theirs and theirs.endswith("weight") and "norm" not in theirs else (3,)
            source[theirs] = torch.full((6, *width), float(len(source))) + torch.arange(6.0).reshape(
                6, *[1] * len(width)
            )
            if op == "T":
                source[theirs] = source[theirs] + 100 * torch.arange(3.0)
        tensor = source[theirs]
        if op == "T":
            tensor = tensor.T
        elif op.startswith("rows"):
            start, stop = map(int, op.split()[1].split(":"))
            block = start // (stop - start)
            tensor = tensor[2 * block : 2 * block + 2]
        target[ours] = tensor.flatten(1) if tensor.ndim == 4 else tensor
    return source, target


@pytest.mark.parametrize("name", PAIRS)
def test_every_name_pair(name: str, manifest: Manifest) -> None:
    """Values arrive where an independently made list says: a swap between layers of equal shape would show."""
    layout, part = PAIRS[name]
    source, target = tagged(manifest("name_maps")["maps"][name])
    ours = to_parts(source, name, layout).tensors[part]
    assert ours.keys() == target.keys()
    assert all(torch.equal(ours[key], target[key]) for key in target)
    back = to_published({part: ours}, layout)
    assert back.keys() == source.keys() and all(torch.equal(back[key], source[key]) for key in source)


def test_old_vae_names(manifest: Manifest) -> None:
    """old name -> our name, through the original one that both lists share."""
    maps = manifest("name_maps")["maps"]
    new = {theirs: ours for theirs, ours, _ in maps["vae_new"]}
    source = {old: torch.full((1,), float(i)) for i, (_, old, _) in enumerate(maps["vae_old"])}
    ours = to_parts(source, "vae_old", "vae-diffusers-old").tensors["vae"]
    assert all(torch.equal(ours[new[theirs]], source[old]) for theirs, old, _ in maps["vae_old"])


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("ip_adapter")])
def test_numbered_attentions(name: str, manifest: Manifest) -> None:
    """Attention N of the file is the layer that the published numbering says, keys and values not swapped."""
    found = manifest(name)
    source = {k: torch.zeros(1) for k in found["tensors"]}
    for n in found["layer_index"]:
        source[f"ip_adapter.{n}.to_k_ip.weight"] += int(n)
        source[f"ip_adapter.{n}.to_v_ip.weight"] -= int(n)
    ours = to_parts(source, name, FILES[name][0]).tensors["ip_adapter"]
    for n, path in found["layer_index"].items():
        slot = f"ip_adapter.{path.removesuffix('.attn2')}.ip_adapter"
        assert ours[f"{slot}.to_k_ip.weight"].item() == int(n) and ours[f"{slot}.to_v_ip.weight"].item() == -int(n)


def test_two_sources_of_the_image_attentions_agree(manifest: Manifest) -> None:
    """The numbered IP-Adapter file and the released UNet name the same slots."""
    numbered = to_parts(published(manifest, "ip_adapter_plus_sd15"), "a").tensors["ip_adapter"]
    named = to_parts(published(manifest, "animatediff_v15_v1_ipplus"), "b").tensors["ip_adapter"]
    assert {k: v.shape for k, v in numbered.items() if "image_proj" not in k} == {k: v.shape for k, v in named.items()}


def test_the_nested_file_is_the_flat_one(manifest: Manifest) -> None:
    """The .bin holds two dicts; flattened, its keys are those of the safetensors file."""
    content = {
        part: dict.fromkeys(manifest(f"ip_adapter_plus_sd15_{part}")["tensors"], torch.zeros(1))
        for part in ("image_proj", "ip_adapter")
    }
    assert unwrap(content, "x")[0].keys() == manifest("ip_adapter_plus_sd15")["tensors"].keys()


def test_a_wrong_order_would_load(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two equally wide layers swapped every key and shape still fits: only values tell, so values are tested."""
    blocks = transformer_blocks(SD15)
    swapped = [*blocks[:4], blocks[5], blocks[4], *blocks[6:]]
    monkeypatch.setattr("weights_convert.layouts.ip_adapter.transformer_blocks", lambda cfg: swapped)
    test_published_file("ip_adapter_sd15", manifest)
    with pytest.raises(AssertionError):
        test_numbered_attentions("ip_adapter_sd15", manifest)


# --- mutations: a file that is not what it should be ---------------------------------------------------------------


def loads(tensors: dict[str, Tensor], file: str, name: str, manifest: Manifest) -> None:
    check_models(to_parts(tensors, file), name, manifest)


# Where a running average is taken, the plain tensors' shapes do not matter: test_detect.py has that file.
@pytest.mark.parametrize("name", [n for n in FILES if n != "sd15_single_file_pruned"])
def test_a_wrong_file_is_refused(name: str, manifest: Manifest) -> None:
    """A missing key, an unknown one, another shape: each is an error that names file, key and expectation."""
    source = published(manifest, name)
    optional = ("position_ids", "pos_encoder.pe", "logit_scale", "model_ema.", "alphas", "betas", "posterior")
    keys = [k for k in source if k.endswith("weight") and not any(word in k for word in optional)]
    signs = detect(source).has
    for key in (keys[len(keys) // 2], keys[-1], keys[0]):
        if key in signs:
            continue
        with pytest.raises(ConversionError) as caught:
            loads({k: v for k, v in source.items() if k != key}, "file-y", name, manifest)
        assert "file-y" in str(caught.value) or f"{name}: " in str(caught.value)

        longer = torch.empty((*source[key].shape, 2), device="meta")
        with pytest.raises(ConversionError) as caught:
            loads(source | {key: longer}, "file-y", name, manifest)
        assert str(tuple(longer.shape)[-1]) in str(caught.value)

    stray = "model.diffusion_model.stray.weight" if "single_file" in name else "stray.weight"
    with pytest.raises(ConversionError, match="stray.weight"):
        loads(source | {stray: torch.empty(1, device="meta")}, "file-y", name, manifest)


@pytest.mark.parametrize(
    "name, extra, collides",
    [
        ("sd_vae_ft_mse_ldm", "encoder.mid.attn_1.to_q.weight", "encoder.mid.attn_1.q.weight"),
        ("sd15_diffusers_text_encoder", "final_layer_norm.weight", "text_model.final_layer_norm.weight"),
        ("openclip_bigg_text_openclip_names", "text_projection.weight", "text_projection"),
    ],
)
def test_two_sources_of_one_tensor(name: str, extra: str, collides: str, manifest: Manifest) -> None:
    source = published(manifest, name)
    with pytest.raises(ConversionError, match=f"was already written from {collides}"):
        to_parts(source | {extra: source[collides]}, "file-y")

"""What is no LoRA, one of another kind or for another base is refused, and told by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import (
    FLAT,
    FLAT_TEXT,
    GRAMMARS,
    SMALL,
    peft_folder,
    saved,
    sparse,
    written,
)
from teaching import teaches
from torch import Tensor

from weights_convert import files
from weights_convert.layouts.lora import BASES, Base, table, width
from weights_convert.lora import read_lora
from weights_convert.rules import ConversionError


@pytest.mark.parametrize("name", ["lora_kohya_sdxl", "lora_peft_sd15_lora_A_B", "v2_lora"])
def test_half_a_pair(name: str, manifest: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """A missing up or down, an unknown key, a layer given twice: each is told by name."""
    tensors = manifest(name)["tensors"]
    for key in [k for k in tensors if not k.endswith("alpha")][-2:]:
        rest = {k: v for k, v in tensors.items() if k != key}
        with pytest.raises(ConversionError, match=r"x.safetensors: 1 problem:\n.*lacks (up|down)") as caught:
            read_lora(sparse(tmp_path / "x.safetensors", rest))
        assert str(caught.value).count("lacks") == 1
        teaches(str(caught.value), "x.safetensors")
    with pytest.raises(ConversionError, match=r"stray.weight \(4,\): belongs to no low-rank pair"):
        read_lora(sparse(tmp_path / "x.safetensors", {**tensors, "stray.weight": {"shape": [4], "dtype": "float32"}}))


TO_K = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
KINDS = {
    "lora_unet_x.hada_w1_a": "a LoHa",
    "lora_unet_x.lokr_w2_b": "a LoKr",
    "lora_unet_x.dora_scale": "a DoRA",
    "unet.x.to_q.lora_magnitude_vector": "a DoRA",
    "lora_unet_x.oft_blocks": "an OFT",
    "lora_unet_x.on_input": "an (IA)3",
    "lora_unet_x.diff_b": "full differences",
    "lora_unet_x.a1.weight": "a GLoRA",
    "lora_unet_x.w_norm": "a LoRA with norms",
    "bundle_emb.word.string_to_param.*": "embeddings inside",
    "base_model.model.x.lora_embedding_A": "changes embeddings",
    "base_model.model.x.lora_B.bias": "with biases",
    "lora_controlnet": "a Control-LoRA",
    "ip_adapter.1.to_q_lora.down.weight": "an IP-Adapter for faces",
    "emb_params": "a textual inversion",
    "clip_l": "a textual inversion",
    "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": "FLUX or SD3",
    "transformer.x.lora_A.weight": "FLUX or SD3",
}


@pytest.mark.parametrize("key", KINDS)
def test_other_kinds_are_named(key: str, tmp_path: Path) -> None:
    tensors, _ = files.read(written(tmp_path / "x.safetensors", *GRAMMARS["kohya"]))
    with pytest.raises(ConversionError) as caught:
        read_lora(saved(tmp_path / "y.safetensors", {**tensors, key: torch.zeros(2, 2)}), SMALL)
    teaches(str(caught.value), "y.safetensors")
    assert KINDS[key] in str(caught.value) and key in str(caught.value)


def pair(name: str, out: int, inputs: int) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.zeros(2, inputs), f"{name}.lora_up.weight": torch.zeros(out, 2)}


@pytest.mark.parametrize(
    "tensors, base, told",
    [
        (pair(f"lora_unet_{TO_K}", 640, 2048), BASES[0], "a LoRA for sdxl, expected one for sd15"),
        (pair(f"lora_unet_{TO_K}", 640, 768), BASES[1], "a LoRA for sd15, expected one for sdxl"),
        (pair(f"lora_unet_{TO_K}", 640, 1024), BASES[0], "Stable Diffusion 2 (its text is 1024 wide)"),
        (pair(f"lora_unet_{TO_K}", 640, 1024), None, "Stable Diffusion 2"),
        (pair(f"lora_te2_{FLAT_TEXT}v_proj", 1280, 1280), BASES[0], "a LoRA for sdxl"),
        (pair(f"lora_te_{FLAT_TEXT}v_proj", 1024, 1024), None, "Stable Diffusion 2"),
        (pair(f"lora_unet_{TO_K}", 640, 768), SMALL, "a LoRA for sd15, expected one for small"),
        (pair("lora_unet_down_blocks_9_resnets_0_conv1", 640, 2048), None, "this LoRA does not fit"),
    ],
)
def test_another_base(tensors: dict[str, Tensor], base: Base | None, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as caught:
        read_lora(saved(tmp_path / "x.safetensors", tensors), base)
    teaches(str(caught.value), "x.safetensors")
    assert told in str(caught.value) and "x.safetensors: this" in str(caught.value)


@pytest.mark.parametrize(
    "tensors, base",
    [
        (pair(f"lora_unet_{TO_K}", 640, 768), "sd15"),
        (pair(f"lora_unet_{TO_K}", 640, 2048), "sdxl"),
        (pair(f"lora_unet_{TO_K.replace('attn2_to_k', 'attn1_to_k')}", 640, 640), None),
        (pair("lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_k", 1280, 1280), "sdxl"),
        (pair(f"lora_te_{FLAT_TEXT}v_proj", 768, 768), "sd15"),
        (pair(f"lora_te1_{FLAT_TEXT}v_proj", 768, 768), "sdxl"),
        # as diffusers' exporter names an only text encoder
        (pair(f"lora_unet_{TO_K}", 640, 768) | pair(f"lora_te1_{FLAT_TEXT}v_proj", 768, 768), "sd15"),
        (pair(f"lora_unet_{TO_K}", 640, 2048) | pair(f"lora_te1_{FLAT_TEXT}v_proj", 768, 768), "sdxl"),
    ],
)
def test_the_base_is_told_from_the_content(tensors: dict[str, Tensor], base: str | None, tmp_path: Path) -> None:
    assert read_lora(saved(tmp_path / "x.safetensors", tensors)).base == base


def test_what_is_no_lora(tmp_path: Path, manifest: Callable[[str], dict[str, Any]]) -> None:
    adapter = manifest("i2v_module")["tensors"]
    with pytest.raises(ConversionError, match="x.safetensors: holds no LoRA, it is in the layout 'i2v-adapter-sd15'"):
        read_lora(sparse(tmp_path / "x.safetensors", adapter))
    with pytest.raises(ConversionError, match=r"y.safetensors: holds no LoRA: its 1 tensors \(a.weight"):
        read_lora(saved(tmp_path / "y.safetensors", {"a.weight": torch.zeros(1)}))
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        read_lora(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no LoRA, expected one of adapter_model.safetensors"):
        read_lora(tmp_path)
    with pytest.raises(ConversionError, match="peft_type LOHA; expected LORA"):
        read_lora(peft_folder(tmp_path / "loha", peft_type="LOHA"), SMALL)
    for n, settings in enumerate(({"lora_alpha": "x"}, {"alpha_pattern": {"(": 1}}, {"alpha_pattern": [1]})):
        with pytest.raises(ConversionError, match="PEFT's settings tell no alpha for base_model"):
            read_lora(peft_folder(tmp_path / str(n), **settings), SMALL)
    two = {f"{name}.alpha": torch.ones(2) for name in GRAMMARS["kohya"][0]}
    with pytest.raises(ConversionError, match=r"the alpha of lora_\w+ has shape \(2,\), expected a number"):
        read_lora(written(tmp_path / "two.safetensors", *GRAMMARS["kohya"], **two), SMALL)
    for start in ("pissa", "pissa_niter_16", "olora", "corda", "loftq"):
        with pytest.raises(ConversionError, match=f"init_lora_weights is '{start}'.*save it with"):
            read_lora(peft_folder(tmp_path / start, init_lora_weights=start), SMALL)
    assert read_lora(peft_folder(tmp_path / "gaussian", init_lora_weights="gaussian"), SMALL).parts
    broken = peft_folder(tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(ConversionError, match="adapter_config.json: no valid JSON"):
        read_lora(broken, SMALL)


def test_a_layer_that_is_changed_twice(tmp_path: Path) -> None:
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    twice = pair(name, 32, 32) | pair(f"{FLAT}attn1_to_q", 32, 32)
    with pytest.raises(
        ConversionError, match=rf"is changed by .*{FLAT}attn1_to_q already|is changed by {name} already"
    ):
        read_lora(saved(tmp_path / "x.safetensors", twice), SMALL)


@pytest.mark.parametrize("down, up", [((2, 32), (32, 3)), ((2, 32, 1), (32, 2)), ((2,), (32, 2)), ((0, 32), (32, 0))])
def test_shapes_that_make_no_pair(down: tuple[int, ...], up: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {f"{FLAT}attn1_to_q.lora_down.weight": torch.zeros(down)}
    tensors[f"{FLAT}attn1_to_q.lora_up.weight"] = torch.zeros(up)
    with pytest.raises(ConversionError, match="make no pair of one rank"):
        read_lora(saved(tmp_path / "x.safetensors", tensors), SMALL)


def test_a_few_unknown_layers_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trainers' tools leave some beside the others; many of them mean that the file is for something else."""
    base = BASES[0]
    names = {target: name for name, target in table(base).items() if name.startswith("lora_unet_down")}
    known = [(name, shape) for target, name in names.items() if (shape := width(*target, base)) is not None][:60]
    tensors = {key: value for name, (out, inputs) in known for key, value in pair(name, out, inputs).items()}
    strange = [f"lora_unet_strange_{number}" for number in range(4)]
    three = {key: value for name in strange[:3] for key, value in pair(name, 4, 4).items()}
    with caplog.at_level(logging.WARNING):
        found = read_lora(saved(tmp_path / "x.safetensors", {**tensors, **three}), base)
    assert sum(map(len, found.parts.values())) == len(known) == 60
    assert f"3 of {len(known) + 3} layers are unknown and left out: {', '.join(strange[:3])}" in caplog.text
    with pytest.raises(ConversionError, match="lora_unet_strange_3: sd15 has no such layer"):
        read_lora(saved(tmp_path / "y.safetensors", {**tensors, **three, **pair(strange[3], 4, 4)}), base)


def test_original_names_with_dots(tmp_path: Path) -> None:
    """OneTrainer's of 2025."""
    name = "unet.input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    found = read_lora(saved(tmp_path / "x.safetensors", pair(name, 640, 768)), BASES[0])
    assert list(found.parts["unet"]) == ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"]

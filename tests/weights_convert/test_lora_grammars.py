"""LoRA files: every grammar gives the same change, every published key list is claimed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import (
    CHANGED,
    GRAMMARS,
    SMALL,
    SMALL_XL,
    UNET,
    flat,
    peft_folder,
    sparse,
    toy,
    written,
)
from torch import Tensor

from i2v.models.lora import delta
from i2v.models.unet import SDXL
from weights_convert import files
from weights_convert.layouts.lora import BASES, Base, motion_layers, resolve, table, unet_layers, width
from weights_convert.lora import LoRAFile, read_lora

# published file -> (grammar, base, layers by part), from the counts of the originals
MANIFESTS: dict[str, tuple[str, str, dict[str, int]]] = {
    "lora_kohya_sd15": ("kohya", "sd15", {"text_encoder": 72, "unet": 192}),
    "lora_kohya_sd15_locon": ("kohya", "sd15", {"text_encoder": 72, "unet": 192 + 86}),
    "lora_kohya_sdxl": ("kohya", "sdxl", {"text_encoder": 72, "text_encoder_2": 192, "unet": 722}),
    "lora_kohya_sdxl_locon": ("kohya", "sdxl", {"text_encoder": 72, "text_encoder_2": 192, "unet": 722 + 66}),
    "lcm_lora_sd15": ("kohya", "sd15", {"unet": 278}),
    "lcm_lora_sdxl": ("kohya", "sdxl", {"unet": 788}),
    "lora_diffusers_old_attn_processor_sd15": ("attention-processors", "sd15", {"unet": 128}),
    "lora_diffusers_sd15_lora_down_up": ("diffusers", "sd15", {"unet": 128, "text_encoder": 48}),
    "lora_peft_sd15_lora_A_B": ("peft", "sd15", {"unet": 128}),
    "lora_peft_sdxl_lora_A_B": ("peft", "sdxl", {"unet": 560}),
    "v2_lora": ("animatediff", "motion v2", {"motion": 168}),
    "v3_sd15_adapter": ("attention-processors", "sd15", {"unet": 128}),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_published_file(name: str, manifest: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """Every key of a full-size file belongs to a pair of a layer of ours."""
    tensors = manifest(name)["tensors"]
    lora = read_lora(sparse(tmp_path / "x.safetensors", tensors))
    layout, base, counts = MANIFESTS[name]
    assert (lora.layout, lora.base) == (layout, base)
    assert {part: len(pairs) for part, pairs in lora.parts.items()} == counts
    alphas = sum(key.endswith(".alpha") for key in tensors)
    assert 2 * sum(counts.values()) + alphas == len(tensors)
    known = next(b for b in BASES if b.name == ("sdxl" if base == "sdxl" else "sd15"))
    for part, pairs in lora.parts.items():
        for path, pair in pairs.items():
            has = (pair.up.shape[0], pair.down.shape[1])
            assert width(part, path, known) in (None, has)
    assert f"{sum(counts.values())}" in lora.describe() or all(
        f"{n} layers" in lora.describe() for n in counts.values()
    )


def equal(lora: LoRAFile, factor: float = 1.0) -> None:
    found = flat(lora)
    assert found.keys() == CHANGED.keys()
    for target, pair in toy().items():
        want = factor * (pair.up @ pair.down)
        torch.testing.assert_close(delta(found[target], CHANGED[target]), want)


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_the_same_change(grammar: str, tmp_path: Path) -> None:
    lora = read_lora(written(tmp_path / "x.safetensors", *GRAMMARS[grammar]), SMALL)
    equal(lora)
    with pytest.raises(AssertionError):
        equal(lora, 1.01)


def test_a_pickle(tmp_path: Path) -> None:
    """Motion LoRAs are .ckpt files, some with a wrapper and a config beside the weights."""
    tensors, _ = files.read(written(tmp_path / "x.safetensors", *GRAMMARS["attention processors"]))
    torch.save({"state_dict": tensors, "animatediff_config": {"a": 1}}, tmp_path / "x.ckpt")
    equal(read_lora(tmp_path / "x.ckpt", SMALL))


# --- alpha ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored, factor",
    [
        (torch.tensor(1.0), 1.0),
        (torch.tensor([1.0]), 1.0),
        (torch.tensor(1, dtype=torch.int64), 1.0),
        (torch.tensor(1.0, dtype=torch.float16), 1.0),
        (torch.tensor(0.0), None),
        (None, None),
    ],
)
def test_alpha_of_kohya(stored: Tensor | None, factor: float | None, tmp_path: Path) -> None:
    """alpha / r with the r of that layer; 0 and none mean r."""
    names, ends = GRAMMARS["kohya"]
    extra = {} if stored is None else {f"{name}.alpha": stored for name in names}
    lora = read_lora(written(tmp_path / "x.safetensors", names, ends, **extra), SMALL)
    for target, pair in toy().items():
        want = pair.up @ pair.down * (1 if factor is None else factor / pair.rank)
        torch.testing.assert_close(delta(flat(lora)[target], CHANGED[target]), want)


def test_alpha_of_a_peft_folder(tmp_path: Path) -> None:
    """lora_alpha, where another alpha_pattern does not fit, over r or its root."""
    patterns = {"attn2.to_k": 6.0, r".*layers\.\d+\.self_attn\.v_proj": 7.0}
    for rs in (False, True):
        folder = peft_folder(tmp_path / str(rs), lora_alpha=5.0, alpha_pattern=patterns, use_rslora=rs)
        for where in (folder, folder / "adapter_model.safetensors"):
            found = flat(read_lora(where, SMALL))
            for target, pair in toy().items():
                alpha = 6.0 if target[1].endswith("attn2.to_k") else 7.0 if target[1].endswith("v_proj") else 5.0
                want = alpha / (pair.rank**0.5 if rs else pair.rank) * (pair.up @ pair.down)
                torch.testing.assert_close(delta(found[target], CHANGED[target]), want)


def test_alpha_in_the_metadata(tmp_path: Path) -> None:
    """Newer diffusers keeps PEFT's settings of each model in the metadata."""
    settings = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {f"{UNET}attn1.to_q": 3}}
    settings |= {"text_encoder.lora_alpha": 2}
    tensors, _ = files.read(written(tmp_path / "x.safetensors", *GRAMMARS["peft"]))
    files.write(tmp_path / "y.safetensors", tensors, {"lora_adapter_metadata": json.dumps(settings)})
    found = flat(read_lora(tmp_path / "y.safetensors", SMALL))
    wanted = dict.fromkeys(CHANGED, 8.0) | {("unet", f"{UNET}attn1.to_q"): 3.0}
    wanted |= {target: 2.0 for target in CHANGED if target[0] == "text_encoder"}
    assert {target: pair.alpha for target, pair in found.items()} == wanted


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [*BASES, SMALL, SMALL_XL], ids=lambda b: b.name)
def test_no_two_layers_share_a_name(base: Base) -> None:
    """Underscores for dots make no two names equal; the table would refuse to be built."""
    names = table(base)
    reached = set(names.values())
    layers = {("unet", path) for path in unet_layers(base.unet)} | {("motion", p) for p in motion_layers(base.unet)}
    assert layers <= reached and {part for part, _ in reached} == {"unet", "motion", *base.text_parts}


@pytest.mark.parametrize("name, base", [("sd15_unet", BASES[0]), ("sdxl_unet", BASES[1])])
def test_original_names(name: str, base: Base, manifest: Callable[[str], dict[str, Any]]) -> None:
    """Against an independently made list of name pairs."""
    layers = unet_layers(base.unet)
    count = 0
    for original, ours, _ in manifest("name_maps")["maps"][name]:
        layer = ours.removesuffix(".weight")
        if layer in layers:
            theirs = original.removesuffix(".weight").replace(".", "_")
            assert resolve(f"lora_unet_{theirs}", base) == ("unet", layer)
            assert resolve(f"lora_unet_{layer.replace('.', '_')}", base) == ("unet", layer)
            count += 1
    assert count == len(layers)


def test_sdxl_config_is_known() -> None:
    assert BASES[1].unet == SDXL and BASES[1].text_parts == {"text_encoder": 768, "text_encoder_2": 1280}

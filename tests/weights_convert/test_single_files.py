"""Checkpoints as users have them: averages, merges with leftovers, missing parts, wrong and lacking keys."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from teaching import teaches
from torch import Tensor

from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from weights_convert.detect import Parts, read_parts, to_parts
from weights_convert.layouts.single_file import MOST_STRANGE, ema_name
from weights_convert.networks import misfits
from weights_convert.rules import ConversionError

Manifest = Callable[[str], dict[str, Any]]
UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


def published(manifest: Manifest, name: str) -> dict[str, Tensor]:
    return {k: torch.empty(v["shape"], device="meta") for k, v in manifest(name)["tensors"].items()}


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def refused(tensors: dict[str, Tensor], *says: str, layout: str | None = None) -> None:
    with pytest.raises(ConversionError) as caught:
        to_parts(tensors, "file-y.ckpt", layout)
    teaches(str(caught.value), "file-y.ckpt")
    for word in says:
        assert word in str(caught.value), str(caught.value)


def dropped(parts: Parts) -> dict[str, int]:
    """Reason -> how many keys."""
    counts: Counter[str] = Counter()
    for rule, n in parts.report.items():
        if " dropped: " in rule:
            counts[rule.split(" dropped: ")[1]] += n
    return dict(counts)


def small_average(manifest: Manifest) -> dict[str, Tensor]:
    """v1-5-pruned with one number for each tensor: plain UNet 1, its average 2, the rest 0."""
    values = {UNET: 1.0, "model_ema.diffusion_model": 2.0}
    return {
        k: torch.full((6, 1, 1, 1) if ".attn_1." in k and k.endswith("weight") and "norm" not in k else (6,), value)
        for k in manifest("sd15_single_file_pruned")["tensors"]
        for value in [next((v for start, v in values.items() if k.startswith(start)), 0.0)]
    }


@pytest.mark.parametrize("ema, expected", [(True, 2.0), (False, 1.0)])
def test_the_running_average(ema: bool, expected: float, manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    """Taken for inference, the plain weights on request; the report says which of them was left out."""
    found = to_parts(small_average(manifest), "x", "sd15-single-file", ema=ema)
    unet = found.tensors["unet"]
    assert len(unet) == 686 and all(t[0].item() == expected for t in unet.values())
    left = "last training step; the running average is taken" if ema else "running average; the plain weights are taken"
    assert dropped(found)[left] == 686
    assert ("the running average is taken; merges may carry that of another" in caplog.text) == ema


def test_an_incomplete_average_is_not_taken(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    source = small_average(manifest)
    del source[ema_name(f"{UNET}out.2.weight")]
    parts = to_parts(source, "x", "sd15-single-file")
    assert all(t[0].item() == 1 for t in parts.tensors["unet"].values()) and "685 of 686 tensors only" in caplog.text
    assert dropped(parts)["running average of 685 of 686 tensors only; the plain weights are taken"] == 685


def test_an_average_alone_is_refused(manifest: Manifest) -> None:
    source = published(manifest, "sd15_single_file_pruned")
    refused(
        {k: v for k, v in source.items() if not k.startswith(UNET)},
        "the running average of a UNet alone",
        "use the whole checkpoint",
    )


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


# --- leftovers, and what is too much of them -------------------------------------------------------------------------


def test_known_leftovers_are_counted(manifest: Manifest) -> None:
    """The schedule's tables, counters and unused projections: all dropped, each for a reason that is reported."""
    source = published(manifest, "sd15_single_file_emaonly") | {
        f"{VAE}loss.discriminator.main.0.weight": meta(64, 3, 4, 4),
        f"{VAE}loss.logvar": meta(),
        f"{VAE}model_ema.decay": meta(),
        f"{VAE}model_ema.num_updates": meta(),
        "cond_stage_model.logit_scale": meta(),
        "logvar": meta(1000),
    }
    assert dropped(to_parts(source, "x")) == {
        "part of the noise schedule, which is a config here": 13,
        "counters of the averaging during training": 4,
        "the discriminator and perceptual loss of its training": 2,
        "not used by Stable Diffusion 1.5": 1,
    }
    assert sum(to_parts(source, "x").report.values()) == len(source)


def test_an_sdxl_merge_without_the_layer_that_sdxl_does_not_read(
    manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    """Zeros stand for CLIP-L's last layer, so that nothing that is read changes; another layer may not lack."""
    source = {k: v for k, v in published(manifest, "sdxl_base_single_file").items() if k.startswith("conditioner")}
    source |= {k: v for k, v in published(manifest, "sdxl_base_single_file").items() if k.startswith(UNET)}
    whole = to_parts(source, "x").tensors["text_encoder"]
    found = to_parts({k: v for k, v in source.items() if ".layers.11." not in k}, "x").tensors["text_encoder"]
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in whole.items()}
    assert "x: lacks the last layer" in caplog.text
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = CLIPTextModel(CLIPTextConfig(99, 16, 32, 12, 2, 20, eos_token_id=19))
    ids = torch.arange(20)[None]
    before = text(ids).penultimate
    for key, value in text.named_parameters():
        if ".layers.11." in key:
            value.data.zero_()
    assert torch.equal(text(ids).penultimate, before)
    other = to_parts({k: v for k, v in source.items() if ".layers.10." not in k}, "x").tensors["text_encoder"]
    assert len(other) < len(whole)


@pytest.mark.parametrize("name", ["sd15_single_file_emaonly", "sdxl_base_single_file"])
def test_a_few_strange_tensors(name: str, manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    """A few are left out, named and counted; many of them, or one among the known parts, are an error."""
    source = published(manifest, name)
    few = {f"merge.note{i}": meta(1) for i in range(MOST_STRANGE)}
    parts = to_parts(source | few, "x")
    assert dropped(parts)["no part of Stable Diffusion"] == MOST_STRANGE and "merge.note15" in caplog.text
    assert sum(parts.report.values()) == len(source) + len(few)
    more = source | few | {"merge.more": meta(1)}
    refused(more, "17 problems:", "merge.note0 (1,): no rule claims it", "take the whole file anew")
    for known in (UNET, VAE, "cond_stage_model.", "conditioner.", "model_ema."):
        refused(source | {f"{known}strange": meta(1)}, f"{known}strange (1,): no rule claims it")


@pytest.mark.parametrize("kept", [(UNET,), (UNET, VAE), (VAE,), (UNET, "cond_stage", "conditioner")])
@pytest.mark.parametrize("name", ["sd15_single_file_emaonly", "sdxl_base_single_file"])
def test_parts_may_be_absent(name: str, kept: tuple[str, ...], manifest: Manifest) -> None:
    """A file of the UNet alone, of the autoencoder alone, without it: what is there is read, what lacks is named."""
    source = published(manifest, name)
    parts = to_parts({k: v for k, v in source.items() if k.startswith(kept)}, "x")
    whole = to_parts(source, "x")
    texts = {"text_encoder", "text_encoder_2"} & set(whole.tensors)
    want = ({"unet"} if UNET in kept else set()) | ({"vae"} if VAE in kept else set())
    want |= texts if "conditioner" in kept else set()
    assert set(parts.tensors) == want and want.isdisjoint(parts.needs)
    assert {"motion", "i2v_adapter"} <= set(parts.needs) and ("vae" in parts.needs) == ("vae" not in want)
    assert all(parts.tensors[part].keys() == whole.tensors[part].keys() for part in want)


# --- what lacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15_single_file_emaonly", "sdxl_base_single_file"])
@pytest.mark.parametrize(
    "lacks", ["half of the UNet", "one layer only", "only biases", "a layer of CLIP", "half a VAE"]
)
def test_lacking_keys(name: str, lacks: str, manifest: Manifest) -> None:
    """By the rules, or by the network that has to be filled: a message that names keys."""
    source = published(manifest, name)
    unet = [k for k in source if k.startswith(UNET)]
    clip = CLIP if name.startswith("sd15") else "conditioner.embedders.0.transformer."
    gone = {
        "half of the UNet": set(unet[len(unet) // 2 :]),
        "one layer only": {k for k in source if "input_blocks.1." not in k and "input_blocks.0.0" not in k},
        "only biases": {k for k in source if not k.endswith("bias")},
        "a layer of CLIP": {k for k in source if k.startswith(f"{clip}text_model.encoder.layers.5.")},
        "half a VAE": {k for k in source if k.startswith(f"{VAE}decoder.")},
    }[lacks]
    assert gone
    rest = {k: v for k, v in source.items() if k not in gone}
    signs = lacks == "one layer only" and name.startswith("sd15")  # what tells SD1.5 is in that layer
    if lacks in ("half of the UNet", "half a VAE") or signs:
        refused(rest, "claimed 0 keys, expected 2", "take the whole file anew")
    elif lacks != "a layer of CLIP":
        refused(rest, "in no known layout", "expected one of these")
    if lacks != "a layer of CLIP":
        return
    parts = to_parts(rest, "x")
    config = parts.layout.configs["text_encoder"]
    wrong = misfits("text_encoder", parts.tensors["text_encoder"], config, parts.layout.configs["unet"])
    assert len(wrong) == 16 and all("encoder.layers.5." in line and "is missing" in line for line in wrong)


def test_a_shape_that_lies(manifest: Manifest) -> None:
    """One attention as wide as SDXL's in a file that looks like SD1.5 otherwise."""
    key = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    source = published(manifest, "sd15_single_file_emaonly") | {UNET + key: meta(1280, 2048)}
    parts = to_parts(source, "x")
    config = parts.layout.configs["unet"]
    (wrong,) = misfits("unet", parts.tensors["unet"], config, config)
    assert "(1280, 2048), expected (1280, 768)" in wrong


@pytest.mark.parametrize(
    "change, says",
    [
        ({"7": None}, "7.to_{kv:k|v}_ip.weight"),
        ({"7": "8"}, "8.to_k_ip.weight (640, 768): no rule claims it"),
        ({"7": "33"}, "33.to_k_ip.weight (640, 768): no rule claims it"),
    ],
)
def test_numbers_of_an_ip_adapter(change: dict[str, str | None], says: str, manifest: Manifest) -> None:
    """An index that is missing, even, or beyond the last."""
    source = {}
    for key, tensor in published(manifest, "ip_adapter_sd15").items():
        number = key.split(".")[1]
        new = change.get(number, number) if key.startswith("ip_adapter.") else number
        if new is not None:
            source[key.replace(f".{number}.", f".{new}.", 1) if new != number else key] = tensor
    refused(source, says, "claimed 0 keys, expected 2")

"""Which layout a file is in; kinds that are known and not wanted are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from teaching import teaches
from torch import Tensor

from i2v.models.motion import frame_positions
from weights_convert.detect import detect, named, recognise, to_parts
from weights_convert.known import LAYOUTS, Layout
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
    teaches(str(caught.value), "file-y.ckpt")
    for word in says:
        assert word in str(caught.value), str(caught.value)


def test_layout_names_are_unique() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    assert named("vae-ldm").name == "vae-ldm"
    with pytest.raises(ConversionError, match="vae-ldm"):
        named("vae")


SINGLE, XL, LDM = "sd15_single_file_emaonly", "sdxl_base_single_file", "sd_vae_ft_mse_ldm"
DIFFUSERS, CONTROL, TEXT = "sd15_diffusers_unet", "controlnet_v11p_sd15_openpose_ldm", "sd15_diffusers_text_encoder"
IDS = "text_model.embeddings"
CLIP = f"cond_stage_model.transformer.{IDS}"


@pytest.mark.parametrize(
    "name, change, says",
    [
        (SINGLE, {f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)}, "an inpainting model"),
        (SINGLE, {f"{UNET}input_blocks.0.0.weight": (320, 8, 3, 3)}, "an instruct-pix2pix model"),
        (SINGLE, {f"{UNET}input_blocks.0.0.weight": (320, 5, 3, 3)}, "a depth-guided model"),
        (DIFFUSERS, {"conv_in.weight": (320, 9, 3, 3)}, "an inpainting model"),
        (SINGLE, {"v_pred": (0,)}, "a v-prediction model"),
        (XL, {"ztsnr": (0,)}, "a v-prediction model"),
        (XL, {"edm_vpred.sigma_min": ()}, "a v-prediction model"),
        (XL, {"edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)}, "another noise schedule (EDM)"),
        (SINGLE, {f"{UNET}time_embed.cond_proj.weight": (320, 256)}, "LCM"),
        (SINGLE, {f"{UNET}time_embedding.cond_proj.weight": (320, 256)}, "LCM"),
        (SINGLE, {"cond_stage_model.model.ln_final.weight": (1024,)}, "Stable Diffusion 2"),
        (DIFFUSERS, {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}, "Diffusion 2"),
        (SINGLE, {"double_blocks.0.img_attn.proj.weight": (1,)}, "FLUX"),
        (SINGLE, {"model.diffusion_model.joint_blocks.0.x.weight": (1,)}, "Stable Diffusion 3"),
        (SINGLE, {f"{UNET}out.2.scale_weight": (1,)}, "8-bit"),
        (XL, {f"{UNET}label_emb.0.0.weight": (1536, 2560)}, "the SDXL refiner"),
        (XL, {f"{UNET}input_blocks.0.0.weight": (384, 4, 3, 3)}, "the SDXL refiner"),
        (CONTROL, {"difference": (1,)}, "a ControlNet stored as a difference"),
        (CONTROL, {"lora_controlnet": (0,)}, "a Control-LoRA"),
        ("controlnet_sdxl_diffusers", {"task_embedding": (8, 320)}, "a union of ControlNets"),
        ("controlnet_sdxl_diffusers", {"control_add_embedding.linear_1.weight": (1280, 2048)}, "a union"),
        ("", {"lllite_unet_input_blocks_4_1_x.down.0.weight": (1,)}, "a ControlLLLite"),
        ("", {"body.0.in_conv.weight": (1,), "conv_in.weight": (320, 64, 3, 3)}, "a T2I-Adapter"),
        ("", {"adapter.body.0.in_conv.weight": (1,)}, "a T2I-Adapter"),
        ("", {"emb_params": (1, 768)}, "a textual inversion"),
        ("", {"clip_l": (1, 768), "clip_g": (1, 1280)}, "a textual inversion"),
        ("", {"lora_unet_x.hada_w1_a": (1,)}, "LoHa"),
        ("ip_adapter_sd15", {"image_proj.proj.0.weight": (1024, 512)}, "an IP-Adapter for faces"),
        (TEXT, {f"{IDS}.position_embedding.weight": (248, 768)}, "a text encoder with 248 positions (LongCLIP)"),
        (SINGLE, {f"{CLIP}.position_embedding.weight": (248, 768)}, "a text encoder with 248 positions (LongCLIP)"),
        (TEXT, {f"{IDS}.token_embedding.weight": (49410, 768)}, "a text encoder with 2 added tokens"),
        (SINGLE, {f"{CLIP}.token_embedding.weight": (49409, 768)}, "a text encoder with 1 added tokens"),
    ],
)
def test_known_and_unwanted(name: str, change: dict[str, tuple[int, ...]], says: str, manifest: Manifest) -> None:
    """Each is called by its name, and the message says what to give instead."""
    source = published(manifest, name) if name else {}
    assert not name or isinstance(recognise(source), Layout)
    changed = source | {key: meta(*shape) for key, shape in change.items()}
    refused(changed, "this is ", says)
    message = str(recognise(changed))
    assert len(message.split(": ", 1)[1]) > 10 and "not supported" not in message


@pytest.mark.parametrize("name", ["modelspec.prediction_type", "modelspec.predict_key"])
@pytest.mark.parametrize("prediction, wanted", [("epsilon", True), ("v", False), ("V_PREDICTION", False)])
def test_what_the_metadata_says_is_predicted(prediction: str, wanted: bool, name: str, manifest: Manifest) -> None:
    """A v-prediction model without the marker: its picture would be wrong, not its keys."""
    source, metadata = published(manifest, SINGLE), {name: prediction}
    if wanted:
        assert detect(source, "x", metadata).name == "sd15-single-file"
        return
    with pytest.raises(ConversionError, match=f"x: this is a model that predicts '{prediction}'.*predicts the noise"):
        to_parts(source, "x", metadata=metadata)


def test_a_half_of_an_ip_adapter(manifest: Manifest) -> None:
    refused(published(manifest, "ip_adapter_plus_sd15_ip_adapter"), "no known layout")


def test_near_misses_are_named(manifest: Manifest) -> None:
    """SDXL motion modules of another width, an IP-Adapter for another encoder."""
    source = published(manifest, "ip_adapter_sd15")
    refused(
        source | {"image_proj.proj.weight": meta(3072, 768)},
        "nearest",
        "ip-adapter-sd15, but image_proj.proj.weight is (3072, 768), expected (3072, 1024)",
    )
    refused({"a": meta(1)}, "no known layout", "expected one of these", "animatediff-v3")


def test_half_of_a_checkpoint_is_no_autoencoder(manifest: Manifest) -> None:
    """A VAE alone is known by its keys, but not beside any tensor of a UNet."""
    whole = published(manifest, SINGLE)
    vae = {key: tensor for key, tensor in whole.items() if key.startswith("first_stage_model.")}
    assert detect(vae, "x").name == "vae-single-file"
    half = {key: whole[key] for i, key in enumerate(whole) if not key.startswith(UNET) or i % 2}
    assert f"{UNET}input_blocks.0.0.weight" not in half
    refused(half, "vae-single-file, but there is model.diffusion_model.")


def test_motion_modules_without_their_table(manifest: Manifest) -> None:
    """v1 and v3 then have the same keys: the user has to say which."""
    tables = published(manifest, "mm_sd_v15")
    bare = {k: v for k, v in tables.items() if not k.endswith(".pe")}
    refused(bare, "animatediff-v1, but no", "animatediff-v3, but no", "convert it with --layout")
    assert to_parts(bare, "x", "animatediff-v3").tensors["motion"].keys() == bare_names(tables, "animatediff-v1")


@pytest.mark.parametrize("version, motion", [("v1", "mm_sd_v15"), ("v2", "mm_sd_v15_v2"), ("v3", "v3_sd15_mm")])
def test_a_checkpoint_of_animatediff_s_training(version: str, motion: str, manifest: Manifest) -> None:
    """The whole UNet with the modules in it; as newer versions of that script save it too, without the tables."""
    modules, unet = published(manifest, motion), published(manifest, "sd15_diffusers_unet")
    name = f"animatediff-{version}-unet"
    parts = to_parts(modules | unet, "x")
    assert parts.layout.name == name and parts.layout.max_frames == (24 if version == "v1" else 32)
    assert parts.tensors["motion"].keys() == bare_names(modules, f"animatediff-{version}")
    assert parts.tensors["unet"].keys() == unet.keys()
    bare = {k: v for k, v in modules.items() if not k.endswith(".pe")} | unet
    assert to_parts(bare, "x", name).tensors["motion"].keys() == parts.tensors["motion"].keys()
    if version == "v2":
        assert to_parts(bare, "x").layout.name == name
    else:
        refused(bare, f"{name}, but no", "convert it with --layout")


def test_a_checkpoint_of_ip_adapter_s_training(manifest: Manifest) -> None:
    raw = {"image_proj_model.proj.weight": meta(3072, 1024), "adapter_modules.1.to_k_ip.weight": meta(320, 768)}
    refused(raw | {f"unet.{k}": v for k, v in published(manifest, "sd15_diffusers_unet").items()},
            "a checkpoint of IP-Adapter's training script", "as image_proj.*")  # fmt: skip
    face = {"image_proj.proj.0.weight": meta(1024, 512), "ip_adapter.0.to_q_lora.down.weight": meta(128, 320)}
    refused(face, "an IP-Adapter for faces")


def test_eight_bit_floats_stay_unread(manifest: Manifest) -> None:
    """Whoever fills a network casts them; a search through a folder must not."""
    tensors = published(manifest, "i2v_module")
    parts = to_parts({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, "x")
    assert {v.dtype for v in parts.tensors["i2v_adapter"].values()} == {torch.float8_e4m3fn}


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
    longer = frame_positions(64, 8, torch.device("cpu"))[None]  # LongAnimateDiff's
    to_parts(source | {f"{start}pos_encoder.pe": longer}, "x", "animatediff-v2")
    with pytest.raises(ConversionError, match="pos_encoder.pe: its values"):
        to_parts(source | {f"{start}pos_encoder.pe": longer.flip(1)}, "x", "animatediff-v2")
    with pytest.raises(ConversionError, match="pos_encoder.pe: shape"):
        to_parts(source, "x", "animatediff-v2")


def test_detection_reads_shapes_only(manifest: Manifest) -> None:
    assert detect(published(manifest, "mm_sd_v15_v2"), "x").name == "animatediff-v2"


def test_two_models_in_one_file(manifest: Manifest) -> None:
    """The same UNet with and without its prefix: which one is meant, no one can know."""
    source = published(manifest, SINGLE)
    twice = source | {k.removeprefix(UNET): v for k, v in source.items() if k.startswith(UNET)}
    refused(twice, "could be sd15-single-file or sd15-unet-ldm", "name the layout")


@pytest.mark.parametrize(
    "name, layout, needs",
    [
        (
            "mm_sd_v15_v2",
            "animatediff-v2",
            {"unet", "vae", "text_encoder", "image_encoder", "i2v_adapter", "ip_adapter"},
        ),
        (XL, "sdxl-single-file", {"image_encoder", "motion", "i2v_adapter", "ip_adapter"}),
        ("clip_vit_b32_full_hf", "clip-b32", set()),
    ],
)
def test_what_a_layout_settles(name: str, layout: str, needs: set[str], manifest: Manifest) -> None:
    found = detect(published(manifest, name), "x")
    assert found.name == layout and set(found.needs) == needs
    assert found.max_frames == (32 if layout == "animatediff-v2" else None)
    assert bool(found.schedule) == (layout != "clip-b32") and bool(found.fits) == (layout != "clip-b32")

"""VAE and CLIP built without memory: keys, shapes and counts of the published files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from i2v.models.clip_text import CLIP_L, OPENCLIP_BIGG, CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import VIT_B32, VIT_BIGG14, VIT_H14, VIT_L14, CLIPVisionConfig, CLIPVisionModel
from i2v.models.vae import SD_VAE, SDXL_VAE, VAE

Shapes = dict[str, tuple[int, ...]]
VISION, TEXT = ("vision_model.", "visual_projection."), ("text_model.", "text_projection.")

FILES: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {
    # manifest: network, parameters, the file's keys that are its business ((): all)
    "sd15_diffusers_vae_new_names": (lambda: VAE(SD_VAE), 83_653_863, ()),
    "sdxl_diffusers_vae": (lambda: VAE(SDXL_VAE), 83_653_863, ()),
    "clip_vit_l14_text_hf": (lambda: CLIPTextModel(CLIP_L), 123_060_480, ()),
    "sd15_diffusers_text_encoder": (lambda: CLIPTextModel(CLIP_L), 123_060_480, ()),
    "sdxl_diffusers_text_encoder": (lambda: CLIPTextModel(CLIP_L), 123_060_480, ()),
    "sdxl_diffusers_text_encoder_2": (lambda: CLIPTextModel(OPENCLIP_BIGG), 694_659_840, ()),
    "openclip_bigg_text_hf_names": (lambda: CLIPTextModel(OPENCLIP_BIGG), 694_659_840, ()),
    "clip_vision_vit_h14_hf": (lambda: CLIPVisionModel(VIT_H14), 632_076_800, ()),
    "clip_vision_vit_bigg_hf": (lambda: CLIPVisionModel(VIT_BIGG14), 1_844_907_264, ()),
    "clip_vit_l14_full_hf": (lambda: CLIPVisionModel(VIT_L14), 303_966_208, VISION),
    "clip_vit_b32_full_hf": (lambda: CLIPVisionModel(VIT_B32), 87_849_216, VISION),
}


def stored_shapes(manifest: dict[str, Any], parts: tuple[str, ...]) -> Shapes:
    """The file's weights; position ids are numbers that count up, no weights."""
    return {
        key: tuple(facts["shape"])
        for key, facts in manifest["tensors"].items()
        if not key.endswith("position_ids") and (not parts or key.startswith(parts))
    }


def own_shapes(build: Callable[[], nn.Module]) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build().state_dict().items()}


@pytest.mark.parametrize("name", FILES)
def test_keys_and_shapes(name: str, manifest: Callable[[str], dict[str, Any]]) -> None:
    build, parameters, parts = FILES[name]
    ours, stored = own_shapes(build), stored_shapes(manifest(name), parts)
    assert ours == stored
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == parameters


@pytest.mark.parametrize("name", ["clip_vit_l14_text_hf", "clip_vision_vit_h14_hf", "sdxl_diffusers_vae"])
def test_a_missing_tensor_is_seen(name: str, manifest: Callable[[str], dict[str, Any]]) -> None:
    stored = stored_shapes(manifest(name), ())
    stored.pop(sorted(stored)[7])
    assert own_shapes(FILES[name][0]) != stored


def test_nothing_is_filled_in_a_constructor() -> None:
    """No buffers: a network built on meta is complete once its parameters are assigned."""
    with torch.device("meta"):
        for build, _, _ in FILES.values():
            assert not list(build().buffers())


def test_text_errors() -> None:
    model = CLIPTextModel(CLIPTextConfig(20, 8, 16, 1, 2, 6, eos_token_id=19))
    with pytest.raises(ValueError, match=r"expected \(N, up to 6\), got \(1, 7\)"):
        model(torch.full((1, 7), 19))
    with pytest.raises(ValueError, match=r"no end token \(id 19\)"):
        model(torch.zeros(1, 6, dtype=torch.long))
    assert model(torch.full((2, 4), 19)).last_hidden_state.shape == (2, 4, 8)


def test_vision_errors() -> None:
    model = CLIPVisionModel(CLIPVisionConfig(8, 16, 1, 2, 4, 8, 6))
    with pytest.raises(ValueError, match=r"expected \(N, 3, 8, 8\), got \(1, 3, 12, 8\)"):
        model(torch.zeros(1, 3, 12, 8))
    with pytest.raises(ValueError, match="8 channels do not split into 3 heads"):
        CLIPVisionModel(CLIPVisionConfig(8, 16, 1, 3, 4, 8, 6))
    with pytest.raises(ValueError, match='got "relu"'):
        CLIPVisionModel(CLIPVisionConfig(8, 16, 1, 2, 4, 8, 6, "relu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weights(dtype: torch.dtype) -> None:
    text = CLIPTextModel(CLIPTextConfig(20, 8, 16, 1, 2, 6, eos_token_id=19, projection_dim=4)).to(dtype)
    assert text(torch.full((1, 6), 19)).pooled.dtype == dtype
    vision = CLIPVisionModel(CLIPVisionConfig(8, 16, 1, 2, 4, 8, 6)).to(dtype)
    assert vision(torch.zeros(1, 3, 8, 8)).image_embeds.dtype == dtype

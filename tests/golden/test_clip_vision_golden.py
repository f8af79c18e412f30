"""OpenAI's image encoder, its weights under transformers' names."""

from __future__ import annotations

import pytest
import torch

from i2v.models.clip_vision import CLIPVisionConfig, CLIPVisionModel

TOLERANCE = 2e-6


@torch.no_grad()
def error(data, activation: str = "quick_gelu", heads: int = 4) -> float:
    cfg = data.meta["config"]
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=cfg["width"],
            intermediate_size=4 * cfg["width"],
            num_layers=cfg["layers"],
            num_heads=heads,
            patch_size=cfg["patch_size"],
            image_size=cfg["input_resolution"],
            projection_dim=cfg["output_dim"],
            activation=activation,
        )
    )
    model.load_state_dict(data.weights())
    return float((model(data.inputs["pixel_values"]).image_embeds - data.outputs["image_embeds"]).abs().max())


def test_image_embeds(golden) -> None:
    assert error(golden("clip_vision_hf")) < TOLERANCE


@pytest.mark.parametrize("fault", [{"activation": "gelu"}, {"heads": 2}])
def test_a_fault_is_seen(golden, fault) -> None:
    assert error(golden("clip_vision_hf"), **fault) > 20 * TOLERANCE

"""CLIP's encoders against transformers: same keys, same states, same embeddings."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import CLIPVisionConfig, CLIPVisionModel

transformers: ModuleType = pytest.importorskip("transformers")

TOLERANCE = 1e-5
END = 97
TEXT = {
    "like_clip_l": CLIPTextConfig(99, 48, 80, 3, 4, 20, eos_token_id=END),
    "like_bigg": CLIPTextConfig(99, 48, 80, 3, 4, 20, "gelu", END, projection_dim=24),
    "old_config": CLIPTextConfig(99, 48, 80, 2, 4, 20, eos_token_id=2, projection_dim=24),
}
VISION = {
    "like_vit_h": CLIPVisionConfig(48, 80, 3, 4, 8, 32, 24),
    "like_openai": CLIPVisionConfig(48, 80, 3, 4, 7, 21, 12, "quick_gelu"),
}


def shaken(module: nn.Module) -> nn.Module:
    """Weights far from their small initial values, so that each layer shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def sizes(cfg: CLIPTextConfig | CLIPVisionConfig) -> dict[str, Any]:
    return {
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "hidden_act": cfg.activation,
        "projection_dim": cfg.projection_dim or 16,
    }


def text_models(cfg: CLIPTextConfig) -> tuple[CLIPTextModel, Any]:
    config = transformers.CLIPTextConfig(
        vocab_size=cfg.vocab_size, max_position_embeddings=cfg.max_length, bos_token_id=0, pad_token_id=1,
        eos_token_id=cfg.eos_token_id, **sizes(cfg),
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if cfg.projection_dim else transformers.CLIPTextModel
    theirs = shaken(kind(config))
    tensors = theirs.state_dict()
    if not any(key.startswith("text_model.") for key in tensors):  # a newer transformers leaves this level out
        tensors = {f"text_model.{key}": value for key, value in tensors.items()}
    ours = CLIPTextModel(cfg)
    ours.load_state_dict({k: v for k, v in tensors.items() if not k.endswith("position_ids")})
    return ours.eval(), theirs


def texts() -> Tensor:
    """Three texts that end at different places and are padded with the end token, with 0, and with another id."""
    ids = torch.randint(2, END, (3, 20), generator=torch.Generator().manual_seed(1))
    for row, (end, pad) in enumerate([(5, END), (19, 0), (9, 0)]):
        ids[row, end], ids[row, end + 1 :] = END, pad
    return ids


@torch.no_grad()
def text_errors(ours: CLIPTextModel, theirs: Any, ids: Tensor) -> dict[str, float]:
    found, expected = ours(ids), theirs(ids, output_hidden_states=True)
    pooled = expected.text_embeds if ours.cfg.projection_dim else expected.pooler_output
    pairs = {"last": (found.last_hidden_state, expected.last_hidden_state), "pooled": (found.pooled, pooled)}
    pairs["penultimate"] = (found.penultimate, expected.hidden_states[-2])
    for i, (a, b) in enumerate(zip(found.hidden_states, expected.hidden_states, strict=True)):
        pairs[f"state {i}"] = (a, b)
    return {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("name", TEXT)
def test_text(name: str) -> None:
    found = text_errors(*text_models(TEXT[name]), texts())
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("fault", ["activation", "mask", "padding", "norm"])
def test_a_text_fault_is_seen(fault: str) -> None:
    ours, theirs = text_models(TEXT["like_bigg"])
    ids = texts()
    layer: Any
    for layer in ours.text_model.encoder.layers:
        if fault == "activation":
            layer.mlp.activation = "quick_gelu"
        elif fault == "mask":
            layer.self_attn.causal = False
    if fault == "padding":  # pooled at the last place of the row
        ours.ends = lambda ids: torch.full((len(ids),), 19)  # type: ignore[method-assign]
    elif fault == "norm":
        ours.text_model.final_layer_norm.weight.data += 0.01
    assert max(text_errors(ours, theirs, ids).values()) > 20 * TOLERANCE


def test_added_tokens_move_the_old_pooling() -> None:
    """An id above the end token's: configs of either kind do as transformers does, and disagree with each other."""
    ids = texts()
    ids[:, 2] = END + 1
    places = {}
    for name in ("like_bigg", "old_config"):
        ours, theirs = text_models(TEXT[name])
        assert max(text_errors(ours, theirs, ids).values()) < TOLERANCE
        places[name] = ours.ends(ids).tolist()
    assert places == {"like_bigg": [5, 19, 9], "old_config": [2, 2, 2]}


def vision_models(cfg: CLIPVisionConfig) -> tuple[CLIPVisionModel, Any]:
    config = transformers.CLIPVisionConfig(image_size=cfg.image_size, patch_size=cfg.patch_size, **sizes(cfg))
    theirs = shaken(transformers.CLIPVisionModelWithProjection(config))
    ours = CLIPVisionModel(cfg)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")})
    return ours.eval(), theirs


@torch.no_grad()
def vision_errors(ours: CLIPVisionModel, theirs: Any) -> dict[str, float]:
    side = ours.cfg.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    found, expected = ours(pixels), theirs(pixels, output_hidden_states=True)
    pairs = {"embeds": (found.image_embeds, expected.image_embeds)}
    pairs["last"] = (found.last_hidden_state, expected.last_hidden_state)
    for i, (a, b) in enumerate(zip(found.hidden_states, expected.hidden_states, strict=True)):
        pairs[f"state {i}"] = (a, b)
    return {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("name", VISION)
def test_vision(name: str) -> None:
    found = vision_errors(*vision_models(VISION[name]))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("fault", ["activation", "heads", "pre_layrnorm", "post_layernorm"])
def test_a_vision_fault_is_seen(fault: str) -> None:
    ours, theirs = vision_models(VISION["like_vit_h"])
    layer: Any
    for layer in ours.vision_model.encoder.layers:
        if fault == "activation":
            layer.mlp.activation = "quick_gelu"
        elif fault == "heads":
            layer.self_attn.heads = 2
    if fault.endswith("norm"):
        setattr(ours.vision_model, fault, nn.Identity())
    assert max(vision_errors(ours, theirs).values()) > 20 * TOLERANCE

"""CLIP in every published arrangement: both towers or one, in transformers', OpenCLIP's and OpenAI's names.

The key lists are those of transformers' own classes, and OpenCLIP's naming written out; nothing has values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from torch import Tensor

from i2v.models.clip_text import CLIP_L, OPENCLIP_BIGG, CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import VIT_BIGG14, VIT_H14, VIT_L14, CLIPVisionConfig, CLIPVisionModel
from weights_convert.detect import detect, recognise, split_parts, to_published
from weights_convert.rules import convert

TEXT_H = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, projection_dim=1024)
TEXT_L = replace(CLIP_L, projection_dim=768)
SIZES = {"h14": (TEXT_H, VIT_H14), "bigg14": (OPENCLIP_BIGG, VIT_BIGG14), "l14": (TEXT_L, VIT_L14)}
Tensors = dict[str, Tensor]


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@cache
def of_transformers(size: str) -> Tensors:
    text, vision = SIZES[size]
    config = transformers.CLIPConfig(
        text_config={"hidden_size": text.hidden_size, "intermediate_size": text.intermediate_size,
                     "num_hidden_layers": text.num_layers, "num_attention_heads": text.num_heads},
        vision_config={"hidden_size": vision.hidden_size, "intermediate_size": vision.intermediate_size,
                       "num_hidden_layers": vision.num_layers, "num_attention_heads": vision.num_heads,
                       "patch_size": vision.patch_size},
        projection_dim=vision.projection_dim,
    )  # fmt: skip
    with torch.device("meta"):
        return dict(transformers.CLIPModel(config).state_dict())


@cache
def of_openclip(size: str) -> Tensors:
    """Names as in OpenCLIP's and OpenAI's code."""
    text, vision = SIZES[size]
    wide, out = vision.hidden_size, vision.projection_dim
    found = {"visual.class_embedding": meta(wide), "visual.positional_embedding": meta(vision.tokens, wide),
             "visual.proj": meta(wide, out), "visual.conv1.weight": meta(wide, 3, vision.patch_size, vision.patch_size),
             "positional_embedding": meta(77, text.hidden_size), "text_projection": meta(text.hidden_size, out),
             "token_embedding.weight": meta(49408, text.hidden_size), "logit_scale": meta()}  # fmt: skip
    norms = {"visual.ln_pre": wide, "visual.ln_post": wide, "ln_final": text.hidden_size}
    for tower, cfg in (("visual.", vision), ("", text)):
        width, inner = cfg.hidden_size, cfg.intermediate_size
        for n in range(cfg.num_layers):
            block = f"{tower}transformer.resblocks.{n}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            for name, rows, columns in (("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width),
                                        ("mlp.c_fc.", inner, width), ("mlp.c_proj.", width, inner)):  # fmt: skip
                found |= {f"{block}.{name}weight": meta(rows, columns), f"{block}.{name}bias": meta(rows)}
    return found | {f"{name}.{p}": meta(width) for name, width in norms.items() for p in ("weight", "bias")}


def without(tensors: Mapping[str, Tensor], *starts: str) -> Tensors:
    return {key: value for key, value in tensors.items() if not key.startswith(starts)}


def kept(tensors: Mapping[str, Tensor], *starts: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key.startswith(starts)}


def flat(tensors: Mapping[str, Tensor]) -> Tensors:
    return {key.removeprefix("vision_model."): value for key, value in tensors.items()}


TEXT = ("text_model", "text_projection", "logit_scale")
FILES = {
    **{f"clip-{size}": lambda size=size: of_transformers(size) for size in SIZES},
    **{f"clip-vision-{size}": lambda size=size: without(of_transformers(size), *TEXT) for size in SIZES},
    **{f"clip-vision-{size}-flat": lambda size=size: flat(without(of_transformers(size), *TEXT)) for size in SIZES},
    "openclip-h14": lambda: of_openclip("h14"),
    "openclip-bigg14": lambda: of_openclip("bigg14"),
    "openai-clip-l14": lambda: of_openclip("l14"),
    **{f"openclip-vision-{size}": lambda size=size: kept(of_openclip(size), "visual.") for size in SIZES},
    "openclip-text-l": lambda: without(of_openclip("l14"), "visual."),
    "openclip-text-bigg": lambda: without(of_openclip("bigg14"), "visual."),
}


@pytest.mark.parametrize("name", FILES)
def test_every_arrangement_gives_whole_networks(name: str) -> None:
    tensors = FILES[name]()
    layout = detect(tensors)
    assert layout.name == name
    found, _ = convert(tensors, layout.build(tensors.keys(), False), layout.name)
    assert {key.partition(".")[0] for key in found} == set(layout.parts) == set(layout.configs)
    for part, config in layout.configs.items():
        network = CLIPVisionModel if isinstance(config, CLIPVisionConfig) else CLIPTextModel
        with torch.device("meta"):
            wanted = {key: tuple(value.shape) for key, value in network(config).state_dict().items()}
        ours = {key.removeprefix(f"{part}."): tuple(v.shape) for key, v in found.items() if key.startswith(f"{part}.")}
        assert ours == wanted


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_is_known_again(name: str) -> None:
    """Without the temperature of the loss, which is not kept, and without a text tower that serves no base."""
    tensors = FILES[name]()
    parts = split_parts(convert(tensors, detect(tensors).build(tensors.keys(), False), name)[0])
    written = to_published(parts, name)
    alone = {"clip-h14": "clip-vision-h14", "openclip-h14": "openclip-vision-h14"}
    assert detect(written).name == alone.get(name, name)


def test_which_text_tower_is_read() -> None:
    """ViT-H/14's serves no base; bigG's is SDXL's second one."""
    assert detect(of_openclip("h14")).parts == ("image_encoder",)
    assert detect(of_openclip("bigg14")).parts == ("text_encoder_2", "image_encoder")


@pytest.mark.parametrize("change", [flat, dict])
def test_an_image_encoder_without_its_projection_is_named(change: type) -> None:
    told = str(recognise(without(change(FILES["clip-vision-h14"]()), "visual_projection")))
    assert "CLIP's image encoder without its projection" in told and "CLIPVisionModelWithProjection" in told

"""CLIP's text and vision towers in transformers' naming, which is ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from i2v.models.clip_text import CLIP_L, OPENCLIP_BIGG, CLIPTextConfig
from i2v.models.clip_vision import VIT_B32, VIT_BIGG14, VIT_H14, VIT_L14, CLIPVisionConfig
from weights_convert.layout import Layout, Shape, always
from weights_convert.rules import Drop, Rebuild, Rename, Rule

NO_TEXT = "no base here reads this text encoder"
UNUSED = "not used by Stable Diffusion"


def _position_ids(embedding: Tensor) -> Tensor:
    return torch.arange(embedding.shape[0], device=embedding.device)[None]


def _ids(tower: str, written: bool) -> Rule:
    """`position_ids` count 0, 1, 2...; merged models hold wrong ones, so they are never read."""
    embeddings = f"{tower}.embeddings" if tower else "embeddings"
    if not written:
        return Drop(f"{embeddings}.position_ids", "they count 0, 1, 2...")
    beside = f"{embeddings}.position_embedding.weight"
    return Rebuild(f"{embeddings}.position_ids", beside, _position_ids, why="they count 0, 1, 2...", check=False)


def clip_text(position_ids: bool = False, projection: bool = False) -> list[Rule]:
    """transformers' CLIPTextModel, or with `projection` CLIPTextModelWithProjection.

    Some files lack the `text_model.` level; it is read with and without, and written with it. `position_ids` says
    whether they are written.
    """
    roots = "{root:embeddings|encoder|final_layer_norm}"
    rules: list[Rule] = [
        _ids("text_model", position_ids),
        _ids("", written=False),
        Rename(f"text_model.{roots}.{{p*}}", f"text_model.{roots}.{{p*}}", optional=True),
        Rename(f"{roots}.{{p*}}", f"text_model.{roots}.{{p*}}", optional=True),
    ]
    if projection:
        return [*rules, Rename("text_projection.weight", "text_projection.weight", expect=1)]
    return [*rules, Drop("{p:text_projection|text_projection.weight|logit_scale}", UNUSED)]


def clip_text_flat() -> list[Rule]:
    """CLIPTextModel as transformers 5 saves it, without the `text_model.` level."""
    roots = "{root:embeddings|encoder|final_layer_norm}"
    return [_ids("", written=False), Rename(f"{roots}.{{p*}}", f"text_model.{roots}.{{p*}}")]


def clip_vision(position_ids: bool = True) -> list[Rule]:
    """transformers' CLIPVisionModelWithProjection."""
    return [
        _ids("vision_model", position_ids),
        Rename("vision_model.{p*}", "vision_model.{p*}"),
        Rename("visual_projection.weight", "visual_projection.weight", expect=1),
    ]


def clip_vision_flat() -> list[Rule]:
    """The same without the `vision_model.` level."""
    roots = "{root:embeddings|encoder|pre_layrnorm|post_layernorm}"
    return [
        _ids("", written=False),
        Rename(f"{roots}.{{p*}}", f"vision_model.{roots}.{{p*}}"),
        Rename("visual_projection.weight", "visual_projection.weight", expect=1),
    ]


def clip_both(text: str = "text_encoder.", vision: str = "image_encoder.") -> list[Rule]:
    """transformers' CLIPModel: both towers, each towards its own prefix; text "": its text tower is dropped."""
    if not text:
        towers: list[Rule] = [Drop("{p:text_model|text_projection}.{q*}", NO_TEXT)]
    else:
        towers = [
            _ids("text_model", written=True),
            Rename("text_model.{p*}", text + "text_model.{p*}"),
            Rename("text_projection.weight", text + "text_projection.weight", expect=1),
        ]
    return [
        *towers,
        _ids("vision_model", written=True),
        Drop("logit_scale", "the temperature of the contrastive loss"),
        Rename("vision_model.{p*}", vision + "vision_model.{p*}"),
        Rename("visual_projection.weight", vision + "visual_projection.weight", expect=1),
    ]


CLIP_B32 = CLIPTextConfig(hidden_size=512, intermediate_size=2048, num_heads=8, projection_dim=512)
BIGG = "OpenCLIP ViT-bigG/14, SDXL's second text encoder"


def _vision(name: str, title: str, bases: tuple[str, ...], config: CLIPVisionConfig, flat: bool = False) -> Layout:
    width = config.hidden_size
    return Layout(
        name + "-flat" * flat,
        title + ", without a level of its names" * flat,
        kind="image encoder",
        fits=bases,
        parts=("image_encoder",),
        has={
            "vision_model." * (not flat) + "embeddings.class_embedding": (width,),
            "visual_projection.weight": (config.projection_dim, width),
        },
        build=always(clip_vision_flat if flat else clip_vision, "image_encoder."),
        lacks=("text_model.embeddings.token_embedding.weight",),
        configs={"image_encoder": config},
    )


def towers(text: CLIPTextConfig | None, vision: CLIPVisionConfig) -> dict[str, Any]:
    """What a file of both towers gives, as arguments of its layout: of SDXL's second text encoder that part, of one
    that no base reads (None) the image encoder alone."""
    name = "text_encoder_2" if text == OPENCLIP_BIGG else "text_encoder"
    texts = {} if text is None else {name: text}
    return {
        "kind": "text and image encoder",
        "parts": (*texts, "image_encoder"),
        "configs": {**texts, "image_encoder": vision},
    }


def _both(
    name: str, title: str, bases: tuple[str, ...], width: int, text: CLIPTextConfig | None, vision: CLIPVisionConfig
) -> Layout:
    """width: of the text tower, which is told by it where it is dropped too."""
    has: dict[str, Shape | None] = {
        "text_projection.weight": (vision.projection_dim, width),
        "visual_projection.weight": (vision.projection_dim, vision.hidden_size),
        "text_model.embeddings.token_embedding.weight": (None, width),
    }
    given = towers(text, vision)
    start = "" if text is None else f"{given['parts'][0]}."
    return Layout(name, title, fits=bases, has=has, build=always(lambda: clip_both(start)), **given)


VISION: tuple[tuple[str, str, tuple[str, ...], CLIPVisionConfig], ...] = (
    ("clip-vision-h14", "CLIP ViT-H/14's image encoder, IP-Adapter's", ("sd15", "sdxl"), VIT_H14),
    ("clip-vision-bigg14", "CLIP ViT-bigG/14's image encoder, ip-adapter_sdxl's", ("sdxl",), VIT_BIGG14),
    ("clip-vision-l14", "CLIP ViT-L/14's image encoder", (), VIT_L14),
)

LAYOUTS = (
    Layout(
        "clip-text-l",
        "CLIP ViT-L/14's text encoder",
        kind="text encoder",
        fits=("sd15", "sdxl"),
        parts=("text_encoder",),
        has={"text_model.embeddings.token_embedding.weight": (None, 768)},
        build=always(clip_text, "text_encoder."),
        lacks=("vision_model.embeddings.class_embedding",),
        configs={"text_encoder": CLIP_L},
    ),
    Layout(
        "clip-text-l-flat",
        "CLIP ViT-L/14's text encoder as transformers 5 saves it",
        kind="text encoder",
        fits=("sd15", "sdxl"),
        parts=("text_encoder",),
        has={"embeddings.token_embedding.weight": (None, 768)},
        build=always(clip_text_flat, "text_encoder."),
        configs={"text_encoder": CLIP_L},
    ),
    Layout(
        "clip-text-bigg",
        BIGG,
        kind="text encoder",
        fits=("sdxl",),
        parts=("text_encoder_2",),
        has={"text_model.embeddings.token_embedding.weight": (None, 1280), "text_projection.weight": None},
        build=always(lambda: clip_text(projection=True), "text_encoder_2."),
        lacks=("vision_model.embeddings.class_embedding",),
        configs={"text_encoder_2": OPENCLIP_BIGG},
    ),
    _both("clip-l14", "CLIP ViT-L/14", ("sd15", "sdxl"), 768, replace(CLIP_L, projection_dim=768), VIT_L14),
    _both("clip-b32", "CLIP ViT-B/32", (), 512, CLIP_B32, VIT_B32),
    _both("clip-h14", "CLIP ViT-H/14", ("sd15", "sdxl"), 1024, None, VIT_H14),
    _both("clip-bigg14", "CLIP ViT-bigG/14", ("sdxl",), 1280, OPENCLIP_BIGG, VIT_BIGG14),
    *(_vision(*given, flat=flat) for given in VISION for flat in (False, True)),
)

"""OpenAI's and OpenCLIP's naming of CLIP, towards transformers' (ours): fused q, k, v, projections from the right."""

from __future__ import annotations

from dataclasses import replace

from i2v.models.clip_text import CLIP_L, OPENCLIP_BIGG, CLIPTextConfig
from i2v.models.clip_vision import VIT_B32, VIT_BIGG14, VIT_H14, VIT_L14, CLIPVisionConfig
from weights_convert.layout import Layout, Shape, always
from weights_convert.layouts.clip import BIGG, CLIP_B32, NO_TEXT, UNUSED, VISION, towers
from weights_convert.rules import TRANSPOSE, Drop, Rename, Rule, Split, prefixed

LEAVES = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _blocks(tower: str) -> list[Rule]:
    """The transformer of either tower."""
    block, layer = r"transformer.resblocks.{n:\d+}", tower + r".encoder.layers.{n:\d+}"
    rules: list[Rule] = [
        Split(f"{block}.attn.in_proj_{p}", tuple(f"{layer}.self_attn.{x}_proj.{p}" for x in "qkv"))
        for p in ("weight", "bias")
    ]
    return rules + [Rename(f"{block}.{a}.{{p:weight|bias}}", f"{layer}.{b}.{{p}}") for a, b in LEAVES.items()]


def openclip_text(projection: bool = True) -> list[Rule]:
    """The text tower alone, as in SDXL's single file; without its projection, as Stable Diffusion 1.5 reads ViT-L/14.

    A projection named `text_projection.weight` is already turned; the matrix is square, only the name can tell.
    """
    ending: list[Rule] = [
        Rename("text_projection", "text_projection.weight", op=TRANSPOSE, optional=True),
        Rename("text_projection.weight", "text_projection.weight", optional=True),
    ]
    return [
        Drop("logit_scale", "the temperature of the contrastive loss"),
        Rename("positional_embedding", "text_model.embeddings.position_embedding.weight", expect=1),
        Rename("token_embedding.weight", "text_model.embeddings.token_embedding.weight", expect=1),
        Rename("ln_final.{p:weight|bias}", "text_model.final_layer_norm.{p}", expect=2),
        *(ending if projection else [Drop("{p:text_projection|text_projection.weight}", UNUSED)]),
        *_blocks("text_model"),
    ]


def openclip_vision() -> list[Rule]:
    """The image tower; in a file of both towers its keys begin with `visual.`."""
    embeddings = "vision_model.embeddings"
    return [
        Rename("class_embedding", f"{embeddings}.class_embedding", expect=1),
        Rename("positional_embedding", f"{embeddings}.position_embedding.weight", expect=1),
        Rename("conv1.weight", f"{embeddings}.patch_embedding.weight", expect=1),
        Rename("ln_pre.{p:weight|bias}", "vision_model.pre_layrnorm.{p}", expect=2),
        Rename("ln_post.{p:weight|bias}", "vision_model.post_layernorm.{p}", expect=2),
        Rename("proj", "visual_projection.weight", op=TRANSPOSE, expect=1),
        *_blocks("vision_model"),
    ]


def openclip_both(text: str = "text_encoder.", vision: str = "image_encoder.") -> list[Rule]:
    """A file of both towers, each towards its own prefix; text "": its text tower is dropped. OpenAI's TorchScript
    files hold three numbers beside them."""
    texts = openclip_text()
    if not text:
        names = "logit_scale|positional_embedding|text_projection"
        texts = [Drop(f"{{p:{names}}}", NO_TEXT),
                 Drop("{p:token_embedding|ln_final|transformer|text_projection}.{q*}", NO_TEXT)]  # fmt: skip
    return [
        Drop("{p:input_resolution|context_length|vocab_size}", "a size, which is a config here"),
        *prefixed(openclip_vision(), "visual.", vision),
        *prefixed(texts, "", text),
    ]


def _image(config: CLIPVisionConfig) -> dict[str, Shape | None]:
    return {
        "visual.proj": (config.hidden_size, config.projection_dim),
        "visual.conv1.weight": (config.hidden_size, 3, config.patch_size, config.patch_size),
    }


def _openai(
    name: str, title: str, bases: tuple[str, ...], width: int, text: CLIPTextConfig | None, vision: CLIPVisionConfig
) -> Layout:
    given = towers(text, vision)
    start = "" if text is None else f"{given['parts'][0]}."
    has = {"positional_embedding": (77, width), **_image(vision)}
    return Layout(name, title, fits=bases, has=has, build=always(lambda: openclip_both(start)), **given)


def _vision(name: str, title: str, bases: tuple[str, ...], config: CLIPVisionConfig) -> Layout:
    return Layout(
        name.replace("clip-", "openclip-", 1),
        f"{title}, in OpenCLIP's and OpenAI's names",
        kind="image encoder",
        fits=bases,
        parts=("image_encoder",),
        has=_image(config),
        build=always(lambda: prefixed(openclip_vision(), "visual.", "image_encoder.")),
        lacks=("positional_embedding",),
        configs={"image_encoder": config},
    )


LAYOUTS = (
    Layout(
        "openclip-text-bigg",
        f"{BIGG}, in OpenCLIP's names",
        kind="text encoder",
        fits=("sdxl",),
        parts=("text_encoder_2",),
        has={"positional_embedding": (77, 1280), "transformer.resblocks.0.attn.in_proj_weight": (3840, 1280)},
        build=always(openclip_text, "text_encoder_2."),
        lacks=("visual.proj",),
        configs={"text_encoder_2": OPENCLIP_BIGG},
    ),
    Layout(
        "openclip-text-l",
        "CLIP ViT-L/14's text encoder, in OpenCLIP's and OpenAI's names",
        kind="text encoder",
        fits=("sd15", "sdxl"),
        parts=("text_encoder",),
        has={"positional_embedding": (77, 768), "transformer.resblocks.0.attn.in_proj_weight": (2304, 768)},
        build=always(lambda: openclip_text(projection=False), "text_encoder."),
        lacks=("visual.proj",),
        configs={"text_encoder": CLIP_L},
    ),
    _openai("openai-clip-l14", "CLIP ViT-L/14 in OpenAI's names", ("sd15", "sdxl"), 768,
            replace(CLIP_L, projection_dim=768), VIT_L14),
    _openai("openai-clip-b32", "CLIP ViT-B/32 in OpenAI's names", (), 512, CLIP_B32, VIT_B32),
    _openai("openclip-h14", "CLIP ViT-H/14 in OpenCLIP's names", ("sd15", "sdxl"), 1024, None, VIT_H14),
    _openai("openclip-bigg14", "CLIP ViT-bigG/14 in OpenCLIP's names", ("sdxl",), 1280, OPENCLIP_BIGG, VIT_BIGG14),
    *(_vision(*given) for given in VISION),
)  # fmt: skip

"""Our config dataclasses <-> the config.json of diffusers' and transformers' model folders.

diffusers calls the number of heads `attention_head_dim`; that slip of its early days is kept in every published file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from i2v.models.clip_text import CLIPTextConfig
from i2v.models.clip_vision import CLIPVisionConfig
from i2v.models.motion import MotionConfig
from i2v.models.unet import UNetConfig
from i2v.models.vae import VAEConfig
from weights_convert.rules import ConversionError

Json = dict[str, Any]
FOLDERS = {  # part: (folder, file name without ending)
    "unet": ("unet", "diffusion_pytorch_model"),
    "vae": ("vae", "diffusion_pytorch_model"),
    "text_encoder": ("text_encoder", "model"),
    "text_encoder_2": ("text_encoder_2", "model"),
    "image_encoder": ("image_encoder", "model"),
    "motion": ("motion_adapter", "diffusion_pytorch_model"),
}
START = {True: "CrossAttn", False: ""}


class NoSetting(ConversionError):
    """A network that diffusers cannot describe; the text has no file name, which the caller knows."""


def to_json(config: Any, unet: UNetConfig | None = None) -> Json:
    """The config.json of a part's network; `unet` is the base that a motion set belongs to.

    Raises NoSetting for a network that diffusers has no setting for.
    """
    if isinstance(config, UNetConfig):
        return _unet(config)
    if isinstance(config, VAEConfig):
        return _vae(config)
    if isinstance(config, CLIPTextConfig):
        return _text(config)
    if isinstance(config, CLIPVisionConfig):
        return _vision(config)
    if isinstance(config, MotionConfig) and unet is not None:
        return _motion(config, unet)
    raise TypeError(f"no config.json for a {type(config).__name__}")


def from_json(values: Mapping[str, Any], where: str) -> Any:
    """Our config for a config.json, or None for another kind of network.

    None, too, for a MotionAdapter (its settings do not say which group norms pool over frames, its weights tell the
    version) and a ControlNet, whose weights tell its sizes.
    Raises ConversionError where a setting that decides the network is missing or is none that we have.
    """
    kind = values.get("_class_name") or (values.get("architectures") or [""])[0]
    readers = {
        "UNet2DConditionModel": _unet_from,
        "AutoencoderKL": _vae_from,
        "CLIPTextModel": _text_from,
        "CLIPTextModelWithProjection": _text_from,
        "CLIPVisionModelWithProjection": _vision_from,
        "ControlNetModel": _controlnet_from,
    }
    if kind not in readers:
        return None
    try:
        return readers[kind](values)
    except KeyError as error:
        raise ConversionError(f"{where}: a {kind}, expected its setting {error}; take the config.json again") from error
    except (TypeError, ValueError) as error:
        raise ConversionError(
            f"{where}: not a {kind} that is supported ({error}), expected one of Stable Diffusion's; use another file"
        ) from error


def check_controlnet(path: Path) -> None:
    """Raises ConversionError where a config.json in or beside a ControlNet's folder names a setting that is not
    supported: it computes something else, and the weights do not show it."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{file}: no json ({error}), expected it; take it again with the weights") from error
    if isinstance(values, dict) and values.get("_class_name") == "ControlNetModel":
        from_json(values, str(file))


def _unet(cfg: UNetConfig) -> Json:
    depths = [max(depth, 1) for depth in cfg.depths]  # a level without attention has a number too, unread
    if cfg.depths[-1] and cfg.depths[-1] != cfg.mid_depth:
        raise NoSetting(
            f"diffusers' UNet has as many transformer blocks in the middle as in the coarsest level, this one "
            f"{cfg.mid_depth} and {cfg.depths[-1]}, expected one number; keep it in our own format, --to own"
        )
    depths[-1] = cfg.mid_depth
    values: Json = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.20.0",
        "act_fn": "silu",
        "attention_head_dim": list(cfg.heads),
        "block_out_channels": list(cfg.channels),
        "center_input_sample": False,
        "cross_attention_dim": cfg.context_dim,
        "down_block_types": [f"{START[depth > 0]}DownBlock2D" for depth in cfg.depths],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": cfg.latent_channels,
        "layers_per_block": cfg.layers,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": cfg.groups,
        "out_channels": cfg.latent_channels,
        "sample_size": 128 if cfg.pooled_dim else 64,
        "transformer_layers_per_block": depths,
        "up_block_types": [f"{START[depth > 0]}UpBlock2D" for depth in reversed(cfg.depths)],
        "use_linear_projection": cfg.linear_proj,
    }
    if cfg.pooled_dim:
        values |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": cfg.size_dim,
            "projection_class_embeddings_input_dim": cfg.pooled_dim + cfg.size_numbers * cfg.size_dim,
        }
    return values


def _per_level(value: Any, levels: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels


def _unet_from(values: Mapping[str, Any]) -> UNetConfig:
    channels = tuple(values["block_out_channels"])
    if values["in_channels"] != values["out_channels"]:
        raise ValueError(f"{values['in_channels']} channels in and {values['out_channels']} out")
    depths = _per_level(values.get("transformer_layers_per_block", 1), len(channels))
    crossed = ["CrossAttn" in name for name in values["down_block_types"]]
    heads = values.get("num_attention_heads") or values["attention_head_dim"]
    cfg = UNetConfig(
        channels=channels,
        depths=tuple(depth if there else 0 for depth, there in zip(depths, crossed, strict=True)),
        heads=_per_level(heads, len(channels)),
        context_dim=values["cross_attention_dim"],
        mid_depth=depths[-1],
        layers=values["layers_per_block"],
        linear_proj=bool(values.get("use_linear_projection")),
        latent_channels=values["in_channels"],
        groups=values.get("norm_num_groups", 32),
    )
    if values.get("addition_embed_type") != "text_time":
        return cfg
    size_dim = values["addition_time_embed_dim"]
    pooled = values["projection_class_embeddings_input_dim"] - cfg.size_numbers * size_dim
    return replace(cfg, pooled_dim=pooled, size_dim=size_dim)


def _vae(cfg: VAEConfig) -> Json:
    if cfg.patch != 1:
        raise NoSetting(
            f"diffusers' autoencoder does not fold pixels into channels, this one does (patch {cfg.patch}), "
            "expected none; leave it out with --parts"
        )
    levels = len(cfg.channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.20.0",
        "act_fn": "silu",
        "block_out_channels": list(cfg.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": not cfg.float16_safe,
        "in_channels": cfg.pixel_channels,
        "latent_channels": cfg.latent_channels,
        "layers_per_block": cfg.layers,
        "mid_block_add_attention": cfg.mid_attention,
        "norm_num_groups": cfg.groups,
        "out_channels": cfg.pixel_channels,
        "sample_size": 512,
        "scaling_factor": cfg.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": cfg.quant_conv,
        "use_quant_conv": cfg.quant_conv,
    }


def _vae_from(values: Mapping[str, Any]) -> VAEConfig:
    return VAEConfig(
        channels=tuple(values["block_out_channels"]),
        layers=values["layers_per_block"],
        latent_channels=values["latent_channels"],
        scaling_factor=values.get("scaling_factor", 0.18215),  # Stable Diffusion 1.5 names none
        pixel_channels=values["in_channels"],
        groups=values.get("norm_num_groups", 32),
        mid_attention=values.get("mid_block_add_attention", True),
        quant_conv=values.get("use_quant_conv", True),
        float16_safe=not values.get("force_upcast", False),
    )


def _clip(cfg: CLIPTextConfig | CLIPVisionConfig) -> Json:
    return {
        "attention_dropout": 0.0,
        "hidden_act": cfg.activation,
        "hidden_size": cfg.hidden_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": cfg.intermediate_size,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "projection_dim": cfg.projection_dim or cfg.hidden_size,
    }


def _text(cfg: CLIPTextConfig) -> Json:
    return _clip(cfg) | {
        "architectures": ["CLIPTextModelWithProjection" if cfg.projection_dim else "CLIPTextModel"],
        "bos_token_id": 0 if cfg.eos_token_id == 2 else cfg.eos_token_id - 1,
        "eos_token_id": cfg.eos_token_id,
        "max_position_embeddings": cfg.max_length,
        "model_type": "clip_text_model",
        "pad_token_id": 1,
        "vocab_size": cfg.vocab_size,
    }


def _sizes(values: Mapping[str, Any]) -> Json:
    return {
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "activation": values["hidden_act"],
    }


def _text_from(values: Mapping[str, Any]) -> CLIPTextConfig:
    projected = values["architectures"] == ["CLIPTextModelWithProjection"]
    end, words = values["eos_token_id"], values["vocab_size"]
    return CLIPTextConfig(
        vocab_size=words,
        max_length=values["max_position_embeddings"],
        # 2 is a slip of early configs; CLIP's own vocabulary ends with the end token
        eos_token_id=words - 1 if end == 2 and words == CLIPTextConfig.vocab_size else end,
        projection_dim=values["projection_dim"] if projected else 0,
        **_sizes(values),
    )


def _vision(cfg: CLIPVisionConfig) -> Json:
    return _clip(cfg) | {
        "architectures": ["CLIPVisionModelWithProjection"],
        "image_size": cfg.image_size,
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "patch_size": cfg.patch_size,
    }


def _vision_from(values: Mapping[str, Any]) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        projection_dim=values["projection_dim"],
        **_sizes(values),
    )


def _controlnet_from(values: Mapping[str, Any]) -> None:
    if values.get("global_pool_conditions"):
        raise ValueError("global_pool_conditions is true, which averages what it says over the picture")
    order = values.get("controlnet_conditioning_channel_order", "rgb")
    if order != "rgb":
        raise ValueError(f"controlnet_conditioning_channel_order is {order}, not rgb")


def _motion(cfg: MotionConfig, unet: UNetConfig) -> Json:
    return {
        "_class_name": "MotionAdapter",
        "_diffusers_version": "0.22.0",
        "block_out_channels": list(unet.channels),
        "motion_layers_per_block": unet.layers,
        "motion_max_seq_length": cfg.max_frames,
        "motion_mid_block_layers_per_block": 1,
        "motion_norm_num_groups": unet.groups,
        "motion_num_attention_heads": cfg.heads,
        "use_motion_mid_block": cfg.mid_block,
    }

"""Files that are known and give no part of a model: each is called by its name, with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from weights_convert.layout import Shape, fits


@dataclass(frozen=True)
class Refusal:
    """A kind of file, told by a key that matches `pattern` (searched) and, if given, has this shape.

    `kind` is a word for programs, `what` for people; `advice` says what to do, or what the project uses the file for.
    """

    pattern: str
    what: str
    advice: str
    shape: Shape | None = None
    kind: str = "unsupported"
    lacks: str = ""  # a key of another kind, which is read

    def holds(self, tensors: Mapping[str, Tensor]) -> bool:
        search = re.compile(self.pattern).search
        there = any(search(key) and fits(tensor.shape, self.shape) for key, tensor in tensors.items())
        return there and self.lacks not in tensors

    def __str__(self) -> str:
        return f"this is {self.what}, expected a format of docs/weights.md: {self.advice}"


UNET_START = r"^(model\.diffusion_model\.|unet\.)?"


def _conv_in(channels: int, what: str) -> Refusal:
    pattern = UNET_START + r"(input_blocks\.0\.0|conv_in)\.weight$"
    return Refusal(pattern, what, "use the base model with 4 latent channels", (None, channels, 3, 3))


BASE = "it is no base model; give a Stable Diffusion 1.5 or SDXL base"
CONTROL = "use a ControlNet in original or in diffusers' names"
SD2 = ("Stable Diffusion 2", "use Stable Diffusion 1.5 or SDXL")
RAFT = "it is no part of a video model; FlowScore and WarpingError read it, see docs/eval.md"
DOVER = "it is no part of a video model; DoverVQA reads it, see docs/eval.md"

REFUSALS = (
    Refusal(r"^(module\.)?adapter_modules\.\d+\.to_k_ip\.weight$", "a checkpoint of IP-Adapter's training script",
            "save its image_proj_model.* as image_proj.* and its adapter_modules.* as ip_adapter.*, without the UNet"),
    Refusal(r"image_proj_model\.|framestride_embed", "DynamiCrafter",
            "another video model; nothing in this project runs it, use the weights of an I2V-Adapter",
            kind="dynamicrafter"),
    Refusal(r"^(module\.)?(fnet|cnet)\.conv1\.weight$|^feature_encoder\.convnormrelu\.",
            "RAFT, an optical flow network", RAFT, kind="raft"),
    Refusal(r"^technical_backbone\.downsample_layers\.", "DOVER-Mobile, a small network that rates videos",
            "it is no part of a video model, and its ratings are not DOVER's; DoverVQA reads DOVER.pth", kind="dover"),
    Refusal(r"^(technical|aesthetic)_(backbone|head)\.", "DOVER, a network that rates videos", DOVER, kind="dover"),
    Refusal(r"^lora_controlnet$", "a Control-LoRA", CONTROL),
    Refusal(r"^lllite_", "a ControlLLLite", CONTROL),
    Refusal(r"task_embedding|control_add_embedding", "a union of ControlNets", CONTROL),
    Refusal(r"^difference$", "a ControlNet stored as a difference to its base model", CONTROL),
    Refusal(r"^(adapter\.)?body\.\d+\.", "a T2I-Adapter", CONTROL),
    Refusal(r"\.hada_w1|\.lokr_w|\.oft_|\.glora|\.dora_scale|lora_magnitude_vector", "a LoHa, LoKr, OFT or DoRA",
            f"{BASE}, or a plain LoRA as one"),
    Refusal(r"^image_proj\.proj\.[0-3]\.weight$|^ip_adapter\..*_lora\.", "an IP-Adapter for faces",
            "use a base or plus one"),
    Refusal(r"lora_down|lora_up|_lora\.|\.lora\.|lora_A|lora_B|lora_linear_layer", "a LoRA",
            f"{BASE}, and this one as a LoRA", kind="lora"),
    Refusal(r"double_blocks\.|joint_blocks\.", "a FLUX or Stable Diffusion 3 transformer", BASE),
    Refusal(r"^(emb_params|string_to_param.*|clip_[lg])$", "a textual inversion", BASE),
    Refusal(UNET_START + r"(label_emb\.0\.0|add_embedding\.linear_1)\.weight$", "the SDXL refiner",
            "use the SDXL base", (1536, None)),
    Refusal(UNET_START + r"(input_blocks\.0\.0|conv_in)\.weight$", "the SDXL refiner", "use the SDXL base",
            (384, None, None, None)),
    Refusal(r"^cond_stage_model\.model\.", *SD2),
    Refusal(r"attn2\.to_k\.weight$", *SD2, (320, 1024)),
    _conv_in(9, "an inpainting model"),
    _conv_in(8, "an instruct-pix2pix model"),
    _conv_in(5, "a depth-guided model"),
    Refusal(r"time_embed(ding)?\.cond_proj\.", "a model distilled with an embedded guidance scale (LCM)",
            "use a plain model, with an LCM LoRA if you like"),
    Refusal(r"^edm_(mean|std)$", "a model of another noise schedule (EDM), such as Playground v2.5",
            "use one that predicts the noise"),
    Refusal(r"^(v_pred|ztsnr|edm_vpred\.sigma_m(ax|in))$", "a v-prediction model", "use one that predicts the noise"),
    Refusal(r"scaled_fp8|\.scale_weight$", "a file of scaled 8-bit weights", "use the 16- or 32-bit version"),
    Refusal(r"^(vision_model\.)?embeddings\.class_embedding$", "CLIP's image encoder without its projection",
            "save it as transformers' CLIPVisionModelWithProjection", lacks="visual_projection.weight"),
)  # fmt: skip

TOKENS, POSITIONS = 49408, 77
NOISE = ("epsilon", "eps", "")


def refused(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Refusal | None:
    """Which of the known unwanted kinds this file is of, if any."""
    found = next((r for r in REFUSALS if r.holds(tensors)), None)
    if found is not None:
        return found
    for name in ("modelspec.prediction_type", "modelspec.predict_key"):  # of kohya, of ComfyUI
        prediction = (metadata or {}).get(name, "")
        if prediction.lower() not in NOISE:
            what = f"a model that predicts {prediction!r} by its metadata ({name})"
            return Refusal("", what, "use one that predicts the noise")
    averaged = any(key.startswith("model_ema.diffusion_model") for key in tensors)
    if averaged and not any(key.startswith("model.diffusion_model.") for key in tensors):
        what = "the running average of a UNet alone, without the plain names that tell where each tensor belongs"
        return Refusal("", what, "use the whole checkpoint")
    return _other_text_encoder(tensors)


def refusal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str | None:
    """`refused` in words."""
    found = refused(tensors, metadata)
    return None if found is None else str(found)


def _other_text_encoder(tensors: Mapping[str, Tensor]) -> Refusal | None:
    """Text encoders with more positions or tokens than Stable Diffusion's."""
    for key, tensor in tensors.items():
        flat = key.startswith("embeddings.") and "embeddings.class_embedding" in tensors  # an image encoder's
        if "vision_model" in key or flat or tensor.ndim != 2:
            continue
        rows = tensor.shape[0]
        if key.endswith("position_embedding.weight") and rows > POSITIONS:
            what = f"a text encoder with {rows} positions (LongCLIP): {key} is {tuple(tensor.shape)}"
            return Refusal("", what, f"use one with {POSITIONS}")
        if key.endswith("token_embedding.weight") and rows > TOKENS:
            what = f"a text encoder with {rows - TOKENS} added tokens: {key} is {tuple(tensor.shape)}"
            return Refusal("", what, f"use one with {TOKENS} tokens")
    return None

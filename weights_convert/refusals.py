"""Files that are known and not wanted here: each is refused by its name, with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from weights_convert.layout import fits

CONV_IN = ("model.diffusion_model.input_blocks.0.0.weight", "conv_in.weight")
LABEL = ("model.diffusion_model.label_emb.0.0.weight", "add_embedding.linear_1.weight")


@dataclass(frozen=True)
class Refusal:
    """A kind of file, told by a key that matches `pattern` (searched) and, if given, has this shape."""

    pattern: str
    what: str
    advice: str = "it is not supported"
    shape: tuple[int | None, ...] | None = None

    def holds(self, tensors: Mapping[str, Tensor]) -> bool:
        search = re.compile(self.pattern).search
        return any(search(key) and fits(tensor.shape, self.shape) for key, tensor in tensors.items())


def _conv_in(channels: int, what: str) -> Refusal:
    pattern = "^(" + "|".join(map(re.escape, CONV_IN)) + ")$"
    return Refusal(pattern, what, "use the base model with 4 latent channels", (None, channels, 3, 3))


_LABEL = "^(" + "|".join(map(re.escape, LABEL)) + ")$"
BASE = "it is no base model; give a Stable Diffusion 1.5 or SDXL base"

REFUSALS = (
    Refusal(r"image_proj_model\.|framestride_embed", "DynamiCrafter"),
    Refusal(r"\.hada_w1|\.lokr_w|\.oft_|\.glora|\.dora_scale|lora_magnitude_vector", "a LoHa, LoKr, OFT or DoRA", BASE),
    Refusal(r"lora_down|lora_up|_lora\.|\.lora\.|lora_A|lora_B|lora_linear_layer", "a LoRA", BASE),
    Refusal(r"lllite_|lora_controlnet|task_embedding|control_add_embedding", "a special kind of ControlNet"),
    Refusal(r"control_model\.|input_hint_block\.|controlnet_cond_embedding\.", "a ControlNet", BASE),
    Refusal(r"double_blocks\.|joint_blocks\.", "a FLUX or Stable Diffusion 3 transformer", BASE),
    Refusal(r"emb_params|string_to_param", "a textual inversion", BASE),
    Refusal(_LABEL, "the SDXL refiner", "use the SDXL base", (1536, None)),
    Refusal(r"^cond_stage_model\.model\.", "Stable Diffusion 2", "use Stable Diffusion 1.5 or SDXL"),
    Refusal(r"attn2\.to_k\.weight$", "Stable Diffusion 2", "use Stable Diffusion 1.5 or SDXL", (320, 1024)),
    _conv_in(9, "an inpainting model"),
    _conv_in(8, "an instruct-pix2pix model"),
    _conv_in(5, "a depth-guided model"),
    Refusal(r"time_embed(ding)?\.cond_proj\.", "a model distilled with an embedded guidance scale (LCM)"),
    Refusal(r"^(v_pred|ztsnr|edm_vpred\.sigma_max)$", "a v-prediction model", "use one that predicts the noise"),
    Refusal(r"scaled_fp8|\.scale_weight$", "a file of scaled 8-bit weights", "use the 16- or 32-bit version"),
    Refusal(r"^image_proj\.proj\.[0-3]\.weight$", "an IP-Adapter for faces", "use a base or plus one"),
)


def refusal(tensors: Mapping[str, Tensor]) -> str | None:
    """What this file is and what to do instead, if it is one of the known unwanted kinds."""
    found = next((r for r in REFUSALS if r.holds(tensors)), None)
    if found is not None:
        return f"this is {found.what}: {found.advice}"
    averaged = any(key.startswith("model_ema.diffusion_model") for key in tensors)
    if averaged and not any(key.startswith("model.diffusion_model.") for key in tensors):
        return "this file holds the running average of a UNet alone, without the plain names that tell where it belongs"
    return None

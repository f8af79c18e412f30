"""CLIP as the metrics use it: pictures and texts -> directions in one space."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eval.missing import MissingNetwork
from i2v.models.clip_text import CLIPTextModel
from i2v.models.clip_vision import CLIPVisionModel
from i2v.models.tokenizer import Tokenizer
from i2v.picture import clip_pixels
from weights_convert.detect import read_parts
from weights_convert.rules import ConversionError, load_strict

Preprocess = Literal["clip", "evalcrafter"]
NAMES = {
    "clip-b32": "CLIP ViT-B/32",
    "openai-clip-b32": "CLIP ViT-B/32",
    "clip-l14": "CLIP ViT-L/14",
    "openai-clip-l14": "CLIP ViT-L/14",
}


@dataclass(frozen=True)
class CLIP:
    """Both encoders of one CLIP; `name` stands in every result."""

    image: CLIPVisionModel
    text: CLIPTextModel
    name: str
    tokenizer: Tokenizer = field(default_factory=Tokenizer.clip)

    @torch.inference_mode()
    def pictures(self, frames: NDArray[np.uint8], preprocess: Preprocess = "clip") -> Tensor:
        """uint8 (N, H, W, 3) -> (N, C) of length 1, one picture at a time."""
        weight = self.image.visual_projection.weight
        rows = [self.image(pixels(frame, self.image.cfg.image_size, preprocess).to(weight)) for frame in frames]
        return F.normalize(torch.cat([row.image_embeds for row in rows]).float().cpu(), dim=-1)

    @torch.inference_mode()
    def prompt(self, text: str) -> Tensor:
        """(1, C) of length 1. What is beyond CLIP's 75 symbols is not read."""
        device = next(self.text.parameters()).device
        return F.normalize(self.text(self.tokenizer.encode([text]).to(device)).pooled.float().cpu(), dim=-1)


def pixels(frame: NDArray[np.uint8], size: int, preprocess: Preprocess) -> Tensor:
    """A picture (H, W, 3) as the encoder's input (1, 3, size, size).

    "clip": as CLIP was trained, see `clip_pixels`. "evalcrafter": squeezed to a square without antialiasing and left in
    0..255, neither scaled nor normalised, as its published code does.
    """
    if preprocess == "clip":
        return clip_pixels(frame, size)
    raw = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    return F.interpolate(raw, (size, size), mode="bilinear", align_corners=False)


def load_clip(path: str | Path) -> CLIP:
    """CLIP ViT-B/32 or L/14 from a file or folder of both encoders, in OpenAI's or transformers' names, float32.

    Raises OSError where there is nothing and ConversionError for what holds something else.
    """
    found = read_parts(path)
    layout = found.layout
    if layout.name not in NAMES:
        raise ConversionError(
            f"{path}: this is {layout.title}, expected text and image encoder of CLIP ViT-B/32 or ViT-L/14; give "
            "OpenAI's ViT-B-32.pt or transformers' openai/clip-vit-base-patch32"
        )
    with torch.device("meta"):
        image, text = (CLIPVisionModel(layout.configs["image_encoder"]), CLIPTextModel(layout.configs["text_encoder"]))
    for part, model in (("image_encoder", image), ("text_encoder", text)):
        load_strict(model, {key: value.float() for key, value in found.tensors[part].items()}, f"{path}, {part}")
        model.eval().requires_grad_(False)
    return CLIP(image, text, NAMES[layout.name])


def given(clip: CLIP | None, metric: str) -> CLIP:
    """The network itself; raises MissingNetwork, in words for a table, if there is none."""
    if clip is None:
        raise MissingNetwork(
            f"{metric} needs CLIP ViT-B/32 (OpenAI's ViT-B-32.pt or transformers' openai/clip-vit-base-patch32): none "
            "was given; nothing without weights measures the same"
        )
    return clip


def checked(frames: NDArray[np.uint8], metric: str, least: int) -> NDArray[np.uint8]:
    """The frames themselves; raises ValueError unless they are uint8 (F, H, W, 3) with F >= least."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < least:
        raise ValueError(f"{metric}: frames are {frames.dtype} {frames.shape}; expected uint8 (F, H, W, 3), "
                         f"F >= {least}")  # fmt: skip
    return frames

"""Text alignment against transformers' CLIPModel: its logits without their temperature; files in both namings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from eval.clip_network import CLIP, pixels
from eval.metrics.text_alignment import text_alignment
from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from weights_convert.detect import split_parts
from weights_convert.layouts.clip import clip_both
from weights_convert.rules import Rebuild, convert, load_strict


def test_mean_cosine() -> None:
    text = CLIPTextConfig(49408, 16, 32, 2, 2, projection_dim=24)
    vision = CLIPVisionConfig(32, 64, 2, 2, 32, 64, 24, "quick_gelu")
    sizes = {"patch_size": 32, "image_size": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = CLIPModel(
            CLIPConfig(
                text_config={"hidden_size": 16, "intermediate_size": 32, **layers, "eos_token_id": 49407},
                vision_config={"hidden_size": 32, "intermediate_size": 64, **layers, **sizes},
                projection_dim=24,
            )
        ).eval()
    weights = {key: value for key, value in theirs.state_dict().items() if not key.endswith("position_ids")}
    rules = [rule for rule in clip_both() if not isinstance(rule, Rebuild)]
    parts = split_parts(convert(weights, rules, "CLIP")[0])
    ours = CLIP(CLIPVisionModel(vision), CLIPTextModel(text), "small CLIP")
    load_strict(ours.image, parts["image_encoder"], "image")
    load_strict(ours.text, parts["text_encoder"], "text")
    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    found = text_alignment(frames, ours, "a red ball moves left")
    with torch.inference_mode():
        shown = torch.cat([pixels(frame, 64, "clip") for frame in frames])
        ids = ours.tokenizer.encode(["a red ball moves left"])
        logits = theirs(input_ids=ids, pixel_values=shown).logits_per_image[:, 0] / theirs.logit_scale.exp()
    assert found.cosines == pytest.approx(logits.numpy(), abs=2e-6)
    other = text_alignment(frames, ours, "a red ball moves right")
    assert other.cosines != pytest.approx(logits.numpy(), abs=1e-4)

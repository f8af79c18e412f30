"""CLIPTemp in all its variants against the formulas that the references run, on OpenAI's image encoder."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from eval import clip_network
from eval.clip_network import CLIP, pixels
from eval.metrics.clip_temp import clip_temp
from i2v.models.clip_text import CLIPTextConfig, CLIPTextModel
from i2v.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from weights_convert.layouts.openclip import openclip_vision
from weights_convert.rules import convert, prefixed

TOLERANCE = 2e-6


def loaded(data, activation="quick_gelu") -> CLIP:
    cfg = data.meta["config"]
    width = cfg["width"]
    model = CLIPVisionModel(
        CLIPVisionConfig(
            width, 4 * width, cfg["layers"], cfg["heads"], cfg["patch_size"], cfg["input_resolution"],
            cfg["output_dim"], activation,
        )
    )  # fmt: skip
    model.load_state_dict(convert(data.weights(), prefixed(openclip_vision(), "visual."), "CLIP")[0])
    text = CLIPTextModel(CLIPTextConfig(99, 8, 8, 1, 1, projection_dim=32))
    return CLIP(model, text, "small CLIP")


def clip_of(data) -> np.ndarray:
    return data.inputs["frames"].permute(0, 2, 3, 1).numpy()


def test_every_variant(golden) -> None:
    data = golden("clip_vision")
    network, frames = loaded(data), clip_of(data)
    image = data.inputs["ref_image"][0].permute(1, 2, 0).numpy()
    run = partial(clip_temp, frames, network)
    found = {
        "clip_sim_ref_to_all": run(image),
        "clip_sim_first_to_rest": run(reference="first"),
        "clip_temp_consecutive": run(reference="consecutive"),
        "clip_temp_consecutive_raw255": run(reference="consecutive", preprocess="evalcrafter"),
    }
    for key, value in found.items():
        assert value.value == pytest.approx(float(data.outputs[key]), abs=TOLERANCE), key
        assert value.network == "small CLIP"
    assert run(image).cosines == pytest.approx(data.outputs["clip_sim_ref_to_each"].numpy(), abs=TOLERANCE)
    rest = float(data.outputs["clip_sim_ref_to_each"][1:].mean())
    assert run(image, skip_first=True).value == pytest.approx(rest, abs=TOLERANCE)
    assert len({round(value.value, 5) for value in found.values()}) == 4


def test_pixels(golden) -> None:
    data = golden("clip_vision")
    given, want = data.inputs, data.outputs
    assert torch.allclose(pixels(clip_of(data)[0], 64, "clip")[0], given["pixel_values"][0], atol=1e-5)
    photo = given["preprocess_image"].permute(1, 2, 0).numpy()
    # Torch's bicubic and PIL's differ by one level of 255 at most, which is 0.015 after the division by 0.26.
    assert (pixels(photo, 64, "clip")[0] - want["preprocess_pixels"]).abs().max() < 0.016
    squeezed = pixels(photo, 64, "evalcrafter")[0]
    assert (squeezed - want["evalcrafter_resize_noantialias"]).abs().max() < 1e-2
    assert (squeezed - want["evalcrafter_resize_antialias"]).abs().max() > 1


@pytest.mark.parametrize("fault", ["activation", "not normalised"])
def test_a_fault_is_seen(golden, monkeypatch, fault) -> None:
    data = golden("clip_vision")
    network = loaded(data, "gelu" if fault == "activation" else "quick_gelu")
    if fault == "not normalised":
        monkeypatch.setattr(clip_network, "clip_pixels", lambda frame, size: pixels(frame, size, "evalcrafter") / 255)
    found = clip_temp(clip_of(data), network, reference="consecutive")
    want = float(data.outputs["clip_temp_consecutive"])
    assert abs(found.value - want) > 20 * TOLERANCE

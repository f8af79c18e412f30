"""The released I2V-Adapter UNet: adapter, image tokens, motion modules v1, norms over frames."""

from __future__ import annotations

import pytest
import torch
from clips import activations, fold, unfold, worst

from i2v.models.i2v_adapter import add_i2v_adapter, remove_i2v_adapter
from i2v.models.ip_adapter import add_ip_adapter
from i2v.models.motion import MOTION_V1, add_motion_modules
from i2v.models.unet import UNet, UNetConfig
from weights_convert.layouts.official_i2v import full_unet
from weights_convert.rules import convert, load_strict

SMALL = UNetConfig(channels=(32, 64, 64, 64), depths=(1, 1, 1, 0), heads=(8, 8, 8, 8), context_dim=64)
IMAGE_TOKENS = 16  # the released context ends with them
TOLERANCE = 2e-4  # stated by the golden
RUNS = {"t961": 961, "t41": 41, "tbatch": None, "odd": 481}


@pytest.fixture
def released(golden, device):
    """The golden and our UNet with its weights."""
    data = golden("i2v_unet_sd15")
    with torch.device("meta"):
        unet = UNet(SMALL)
        add_motion_modules(unet, MOTION_V1)
        add_ip_adapter(unet)
        add_i2v_adapter(unet)
    weights, _ = convert(data.weights(), full_unet(SMALL, MOTION_V1), "official_i2v", str(data.path))
    load_strict(unet, weights, str(data.path))
    return data, unet.to(device)


@torch.no_grad()
def run(data, unet, name: str, device, anchor: int = 0):
    odd = "_odd" if name == "odd" else ""
    sample, context = data.inputs[f"sample{odd}"], data.inputs[f"encoder_hidden_states{odd}"].to(device)
    clips, _, frames, _, _ = sample.shape
    t = data.inputs["timesteps_per_sample"] if RUNS[name] is None else torch.full((clips,), RUNS[name])
    text, image = context[:, :-IMAGE_TOKENS], context[:, -IMAGE_TOKENS:]
    latents = fold(sample).to(device)
    out = unet(latents, t.to(device), text, num_frames=frames, image_tokens=image, anchor=anchor)
    return unfold(out, clips)


@pytest.mark.parametrize("name", RUNS)
def test_output(released, device, name):
    data, unet = released
    assert worst(run(data, unet, name, device), data.outputs[f"{name}/sample"]) < TOLERANCE


def test_norms_per_frame(released, device):
    """The setting that the release does not use has its own golden; either one fails the other's."""
    data, unet = released
    for norm in (m for m in unet.modules() if getattr(m, "over_frames", False)):
        norm.over_frames = False
    out = run(data, unet, "t961", device)
    assert worst(out, data.outputs["inflated_groupnorm_t961/sample"]) < TOLERANCE
    assert worst(out, data.outputs["t961/sample"]) > 100 * TOLERANCE


@pytest.mark.parametrize("way", ["removed", "scale 0"])
def test_without_the_adapter(released, device, way):
    data, unet = released
    if way == "removed":
        remove_i2v_adapter(unet)
    else:
        for module in unet.modules():
            if hasattr(module, "i2v_adapter") and module.i2v_adapter is not None:
                module.i2v_adapter.scale = 0.0
    out = run(data, unet, "t961", device)
    assert worst(out, data.outputs["no_cross_frame_t961/sample"]) < TOLERANCE
    assert worst(out, data.outputs["t961/sample"]) > 10 * TOLERANCE


def test_activations(released, golden, device):
    """Each module's own output, so that a fault is found where it is."""
    data, unet = released
    start = "t961/act/"
    want = {k[len(start) :]: v for k, v in golden("i2v_unet_sd15_acts").outputs.items()}
    # Both attentions' sums are inner steps here and have goldens of their own (i2v_attention).
    names = [k for k in want if not k.endswith(("attn1", "attn2"))]
    assert len(names) == len(want) - 2
    with activations(unet, names) as seen:
        run(data, unet, "t961", device)
    for name in names:
        got = seen[name] if want[name].ndim == 2 else unfold(seen[name], 2)
        assert worst(got, want[name]) < TOLERANCE, name


@pytest.mark.parametrize("fault", ["anchor", "image scale", "adapter weight", "motion position", "last norm"])
def test_a_fault_is_seen(released, device, fault, monkeypatch):
    data, unet = released
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    if fault == "image scale":
        block.ip_adapter.scale = 0.9
    elif fault == "adapter weight":
        block.i2v_adapter.to_q.weight.data *= 1.2
    elif fault == "motion position":
        from i2v.models import motion

        true = motion.frame_positions
        monkeypatch.setattr(motion, "frame_positions", lambda f, d, device: true(f, d, device).roll(1, 0))
    elif fault == "last norm":
        unet.conv_norm_out.over_frames = False
    out = run(data, unet, "t961", device, anchor=int(fault == "anchor"))
    assert worst(out, data.outputs["t961/sample"]) > 3 * TOLERANCE

"""AnimateDiff's UNets: v1, v2, v3 (with residuals of a control network) and the SDXL beta."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from clips import activations, fold, nudged, unfold, worst

from i2v.models.motion import MOTION_SDXL, MOTION_V1, MOTION_V2, MOTION_V3, MotionConfig, add_motion_modules
from i2v.models.unet import UNet, UNetConfig
from weights_convert.layouts.animatediff import animatediff
from weights_convert.layouts.diffusers_unet import diffusers_unet
from weights_convert.rules import convert, load_strict

TOLERANCE = 2e-4  # stated by both goldens
SMALL = UNetConfig(channels=(32, 64, 64, 64), depths=(1, 1, 1, 0), heads=(8, 8, 8, 8), context_dim=64)
SMALL_XL = UNetConfig(
    channels=(32, 64, 64),
    depths=(0, 1, 2),
    heads=(4, 8, 8),
    context_dim=64,
    mid_depth=2,
    linear_proj=True,
    pooled_dim=32,
    size_dim=16,
)
MOTION = {"v1": MOTION_V1, "v2": MOTION_V2, "v3": MOTION_V3}
MID = "mid_block.motion_modules."


def loaded(data, cfg: UNetConfig, motion: MotionConfig, device) -> UNet:
    with torch.device("meta"):
        unet = UNet(cfg)
        add_motion_modules(unet, motion)
    stored = {k: v for k, v in data.weights().items() if motion.mid_block or not k.startswith(MID)}
    # The table of positions is stored in some goldens only, so the rule that checks it is optional.
    weights, _ = convert(stored, [*animatediff(motion), *diffusers_unet(cfg)], "animatediff", str(data.path))
    load_strict(unet, weights, str(data.path))
    return unet.to(device)


@torch.no_grad()
def run(data, unet: UNet, t: int, device, control=None) -> torch.Tensor:
    sample = data.inputs["sample"]
    clips, _, frames, _, _ = sample.shape
    extra = {}
    if unet.cfg.pooled_dim:
        extra = {"pooled": data.inputs["text_embeds"].to(device), "size_ids": data.inputs["time_ids"].to(device)}
    context = data.inputs["encoder_hidden_states"].to(device)
    timesteps = torch.full((clips,), t, device=device)
    out = unet(fold(sample).to(device), timesteps, context, num_frames=frames, control=control and [*control], **extra)
    return unfold(out, clips)


def residuals(data, device) -> list[torch.Tensor]:
    """Twelve for the skip connections and one for the middle; 4-d ones hold for all frames of a clip."""
    found = [data.inputs[f"down_residual.{i}"] for i in range(12)] + [data.inputs["mid_residual"]]
    assert {r.ndim for r in found} == {4, 5}
    return [(fold(r) if r.ndim == 5 else r).to(device) for r in found]


@pytest.mark.parametrize("version", MOTION)
@pytest.mark.parametrize("t", [961, 121])
def test_output(golden, device, version, t):
    data = golden("animatediff_unet")
    out = run(data, loaded(data, SMALL, MOTION[version], device), t, device)
    assert worst(out, data.outputs[f"{version}/t{t}"]) < TOLERANCE


def test_versions_are_told_apart(golden, device):
    """Each version's configuration fails the goldens of the other two."""
    data = golden("animatediff_unet")
    for ours, cfg in MOTION.items():
        out = run(data, loaded(data, SMALL, cfg, device), 961, device)
        for theirs in MOTION.keys() - {ours}:
            assert worst(out, data.outputs[f"{theirs}/t961"]) > 10 * TOLERANCE, (ours, theirs)


def test_activations(golden, device):
    data = golden("animatediff_unet")
    check_activations(data, loaded(data, SMALL, MOTION_V2, device), "v2/t961_act/", device)


def check_activations(data, unet: UNet, start: str, device) -> None:
    want = {k[len(start) :]: v for k, v in data.outputs.items() if k.startswith(start)}
    assert want
    with activations(unet, want) as seen:
        run(data, unet, 961, device)
    for name, tensor in want.items():
        if tensor.ndim == 2:  # an embedding: theirs is repeated per frame
            got = seen[name].repeat_interleave(len(tensor) // len(seen[name]), 0)
        else:
            got = unfold(seen[name], len(tensor))
        assert worst(got, tensor) < TOLERANCE, name


def test_control_residuals(golden, device):
    data = golden("animatediff_unet")
    unet, control = loaded(data, SMALL, MOTION_V3, device), residuals(data, device)
    want = data.outputs["v3/t961_residuals"]
    assert worst(run(data, unet, 961, device, control), want) < TOLERANCE
    for i in (0, 5, 11, 12):
        wrong = [r * 0.9 if j == i else r for j, r in enumerate(control)]
        assert worst(run(data, unet, 961, device, wrong), want) > 2 * TOLERANCE, i
    with pytest.raises(ValueError, match="12 tensors, expected 12 for the skips, 1 for mid"):
        run(data, unet, 961, device, control[:-1])


@pytest.mark.parametrize("t", [961, 121])
def test_sdxl(golden, device, t):
    data = golden("animatediff_sdxl")
    out = run(data, loaded(data, SMALL_XL, MOTION_SDXL, device), t, device)
    assert worst(out, data.outputs[f"unet/t{t}"]) < TOLERANCE


def test_sdxl_activations(golden, device):
    data = golden("animatediff_sdxl")
    check_activations(data, loaded(data, SMALL_XL, MOTION_SDXL, device), "unet/t961_act/", device)


@pytest.mark.parametrize("fault", ["motion norm", "resnet norm", "added embedding", "one weight"])
def test_a_fault_of_sdxl_is_seen(golden, device, fault):
    data = golden("animatediff_sdxl")
    cfg = dataclasses.replace(
        MOTION_SDXL,
        motion_norm_over_frames=fault != "motion norm",
        resnet_norm_over_frames=fault == "resnet norm",
    )
    unet = loaded(data, SMALL_XL, cfg, device)
    if fault == "added embedding":
        nudged(unet.add_embedding, 0.9)
    elif fault == "one weight":
        nudged(unet.mid_block.attentions[0].transformer_blocks[1].attn2.to_v, 1.1)
    assert worst(run(data, unet, 961, device), data.outputs["unet/t961"]) > 3 * TOLERANCE

"""AnimateDiff's motion LoRA and domain adapter, merged by its own loader: weights and what the UNet then computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clips import fold, unfold, worst

from i2v.lora import merge
from i2v.models.motion import MOTION_V2, add_motion_modules
from i2v.models.unet import UNet, UNetConfig
from weights_convert import files
from weights_convert.layouts.animatediff import animatediff
from weights_convert.layouts.diffusers_unet import diffusers_unet
from weights_convert.rules import convert, load_strict

pytestmark = pytest.mark.usefixtures("plain_cpu")

# The golden states 2e-4. Without the domain adapter this network's float32 result is itself 2e-4 away from that in
# float64, theirs as ours; the merged matrices are compared far more closely.
TOLERANCE, MATRIX = 5e-4, 1e-6
SMALL = UNetConfig(channels=(32,) * 4, depths=(1, 1, 1, 0), heads=(8,) * 4, context_dim=64, layers=1)
RUNS = {
    "base": [],
    "motion_alpha0.7": [("motion_lora", 0.7)],
    "adapter_alpha1_motion_alpha0.7": [("domain_adapter", 1.0), ("motion_lora", 0.7)],
}


@pytest.fixture(scope="module")
def setup(golden, device, tmp_path_factory):
    """(golden, UNet, folder with the two LoRA files in their published names)."""
    data = golden("animatediff_lora")
    with torch.device("meta"):
        unet = UNet(SMALL)
        add_motion_modules(unet, MOTION_V2)
    weights, _ = convert(data.weights(), [*animatediff(MOTION_V2), *diffusers_unet(SMALL)], "animatediff", "golden")
    load_strict(unet, weights, "golden")
    folder = tmp_path_factory.mktemp("lora")
    for name in ("motion_lora", "domain_adapter"):
        files.write(folder / f"{name}.safetensors", data.weights(f"weight_{name}"))
    return data, unet.to(device), folder


def merged(unet: UNet, folder: Path, run: str, factor: float = 1.0, ignore_alpha: bool = False):
    modules = {"unet": unet, "motion": unet}
    return [merge(modules, folder / f"{name}.safetensors", factor * by, ignore_alpha) for name, by in RUNS[run]]


@torch.no_grad()
def distance(data, unet: UNet, device, run: str) -> float:
    sample = data.inputs["sample"]
    timesteps = torch.full((len(sample),), data.meta["timestep"], device=device)
    context = data.inputs["encoder_hidden_states"].to(device)
    out = unet(fold(sample).to(device), timesteps, context, num_frames=sample.shape[2])
    return worst(unfold(out, len(sample)), data.outputs[f"{run}/sample"])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("ignore_alpha", [False, True])
def test_output(setup, run: str, ignore_alpha: bool, device) -> None:
    """These files hold no alpha, so leaving it out changes nothing."""
    data, unet, folder = setup
    loras = merged(unet, folder, run, ignore_alpha=ignore_alpha)
    assert distance(data, unet, device, run) < TOLERANCE
    counts = {"motion_lora": {"motion": 104}, "domain_adapter": {"unet": 80}}
    assert [lora.count for lora in loras] == [counts[name] for name, _ in RUNS[run]]
    for lora in loras:
        lora.remove()
    assert distance(data, unet, device, "base") < TOLERANCE


def test_merged_matrices(setup) -> None:
    data, unet, folder = setup
    stored = {k.removeprefix("merged/"): v for k, v in data.outputs.items() if k.startswith("merged/")}
    assert len(stored) == 2

    def furthest() -> float:
        now = unet.state_dict()
        return max(worst(now[k.replace("temporal_transformer.", "")], v) for k, v in stored.items())

    loras = merged(unet, folder, "adapter_alpha1_motion_alpha0.7")
    assert furthest() < MATRIX
    for lora in loras:
        lora.remove()
    assert furthest() > 1000 * MATRIX


def test_a_fault_is_seen(setup, device) -> None:
    """A scale two percent off, or the domain adapter left out, is further off than the tolerance."""
    data, unet, folder = setup
    run = "adapter_alpha1_motion_alpha0.7"
    for other, factor in ((run, 1.02), ("motion_alpha0.7", 1.0)):
        loras = merged(unet, folder, other, factor)
        assert distance(data, unet, device, run) > 2 * TOLERANCE
        for lora in loras:
            lora.remove()

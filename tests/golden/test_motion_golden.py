"""AnimateDiff's motion modules alone: v1, v2 and v3 of SD1.5, SparseCtrl's, and the SDXL beta."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from clips import activations, fold, nudged, unfold, worst
from einops import rearrange

from i2v.models.conditioning import Conditioning, ContextKV
from i2v.models.motion import MOTION_SDXL, MOTION_V1, MOTION_V2, MotionConfig, MotionModule, frame_positions

TOLERANCE = 2e-5  # stated by the golden
SPARSE_CONTROL = dataclasses.replace(MOTION_V2, attentions=1)
RUNS = [
    ("v1", MOTION_V1, 5),
    ("v1", MOTION_V1, 24),
    ("v2", MOTION_V2, 5),
    ("v2", MOTION_V2, 24),
    ("v2", MOTION_V2, 32),
    ("sparsectrl", SPARSE_CONTROL, 5),
]
TEMPORAL = "temporal_transformer."


def loaded(weights: dict[str, torch.Tensor], cfg: MotionConfig) -> MotionModule:
    module = MotionModule(64, cfg, groups=32)
    module.load_state_dict(
        {k.removeprefix(TEMPORAL): v for k, v in weights.items() if not k.endswith("pos_encoder.pe")}
    )
    return module


def clips_of(frames: int) -> Conditioning:
    return Conditioning(torch.empty(0), ContextKV({}, {}, 1), frames, anchor=0, rows=frames)


def weights(data, name: str) -> dict[str, torch.Tensor]:
    return data.weights("weight/sparsectrl" if name == "sparsectrl" else "weight/v1")  # one set serves v1, v2 and v3


@torch.no_grad()
def result(module: MotionModule, x: torch.Tensor) -> torch.Tensor:
    return unfold(module(fold(x), clips_of(x.shape[2])), len(x))


@pytest.mark.parametrize(("name", "cfg", "frames"), RUNS)
def test_output(golden, name, cfg, frames):
    data = golden("animatediff_motion_module")
    out = result(loaded(weights(data, name), cfg), data.inputs[f"x_f{frames}"])
    assert worst(out, data.outputs[f"{name}/f{frames}"]) < TOLERANCE


def test_activations(golden):
    data = golden("animatediff_motion_module")
    module, x = loaded(weights(data, "v2"), MOTION_V2), data.inputs["x_f5"]
    start = f"v2/f5_act/{TEMPORAL}"
    want = {k[len(start) :]: v for k, v in data.outputs.items() if k.startswith(start)}
    with activations(module, want) as seen:
        result(module, x)
    for name, tensor in want.items():
        # Our tokens are (b*h*w, f, c), theirs (b*f, h*w, c).
        got = seen[name] if name == "norm" else rearrange(seen[name], "(b p) f c -> (b f) p c", b=len(x))
        assert worst(got, tensor) < TOLERANCE, name


def test_positions(golden):
    """To the last bit: the table of the published files is what the formula gives."""
    data = golden("animatediff_motion_module")
    for name, cfg in (("v1", MOTION_V1), ("v2", MOTION_V2)):
        want = data.group("weight_pe")[name]
        assert worst(frame_positions(cfg.max_frames, 64, torch.device("cpu"))[None], want) < 1e-6


def test_too_many_frames():
    module = MotionModule(64, MOTION_V1, groups=32)
    with pytest.raises(ValueError, match="at most 24 frames, got 25"):
        module(torch.zeros(25, 64, 2, 2), clips_of(25))


def test_sdxl(golden):
    data = golden("animatediff_sdxl")
    module, x = loaded(data.weights("weight_mm"), MOTION_SDXL), data.inputs["mm_x"]
    with activations(module, ["norm"]) as seen:
        out = result(module, x)
    assert worst(unfold(seen["norm"], len(x)), data.outputs["mm/act/norm"]) < TOLERANCE
    assert worst(out, data.outputs["mm/out"]) < TOLERANCE
    module.norm.over_frames = False
    assert worst(result(module, x), data.outputs["mm/out"]) > 100 * TOLERANCE


@pytest.mark.parametrize("fault", ["norm over frames", "position", "feed-forward", "frames mixed up"])
def test_a_fault_is_seen(golden, fault, monkeypatch):
    data = golden("animatediff_motion_module")
    module, x = loaded(weights(data, "v2"), MOTION_V2), data.inputs["x_f5"]
    if fault == "norm over frames":
        module.norm.over_frames = True
    elif fault == "position":
        monkeypatch.setattr("i2v.models.motion.frame_positions", lambda f, d, device: torch.zeros(f, d))
    elif fault == "feed-forward":
        nudged(module.transformer_blocks[0].ff)
    else:
        x = x.roll(1, dims=2)
    assert worst(result(module, x), data.outputs["v2/f5"]) > 10 * TOLERANCE

"""The Resampler of IP-Adapter-plus."""

from __future__ import annotations

import pytest
import torch
from clips import activations, nudged, worst

from i2v.models.ip_adapter import IPAdapterConfig, Resampler

TOLERANCE = 2e-5  # stated by the golden
CONFIG = IPAdapterConfig("plus", image_dim=40, context_dim=64, tokens=16, dim=48, depth=4, heads=6, head_dim=8)


@pytest.fixture
def resampler(golden):
    data = golden("ip_resampler")
    module = Resampler(CONFIG)
    module.load_state_dict(data.weights("weight/ipplus"))
    return data, module


@torch.no_grad()
def test_output(resampler):
    data, module = resampler
    start = "ipplus/cond_act/"
    want = {k[len(start) :]: v for k, v in data.outputs.items() if k.startswith(start)}
    with activations(module, want) as seen:
        out = module(data.inputs["image_states"])
    assert worst(out, data.outputs["ipplus/cond"]) < TOLERANCE
    for name, tensor in want.items():
        assert worst(seen[name], tensor) < TOLERANCE, name
    assert worst(module(torch.zeros(1, 31, 40)), data.outputs["ipplus/zero"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("part", ["proj_in", "layers.0.0.norm1", "layers.0.0.norm2", "layers.2.0.to_kv", "layers.3.1"])
def test_a_fault_is_seen(resampler, part):
    data, module = resampler
    nudged(module.get_submodule(part), 1.05)
    assert worst(module(data.inputs["image_states"]), data.outputs["ipplus/cond"]) > 10 * TOLERANCE

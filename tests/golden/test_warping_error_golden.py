"""WarpingError against EvalCrafter's: masks, warped frames, every pair, and end to end with RAFT in both ranges."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from flow_by_list import FlowByList, calm_raft

from eval.metrics import warping_error as module
from eval.metrics.warping_error import excluded, half, warp, warping_error

TOLERANCE = 1e-4


def there_and_back(data) -> FlowByList:
    return FlowByList(chain.from_iterable(zip(data.inputs["fw_flows"], data.inputs["bw_flows"])))


def test_given_flows(golden) -> None:
    data, frames = golden("warping_error"), golden("warping_error").inputs["frames"].numpy()
    network = there_and_back(data)
    found = warping_error(frames, network)
    assert found.value == pytest.approx(float(data.outputs["warping_error"]), rel=TOLERANCE)
    assert found.per_pair == pytest.approx(data.outputs["per_pair"].numpy(), rel=TOLERANCE)
    assert found.kept == pytest.approx(1 - data.outputs["occlusion"].double().mean((1, 2)).numpy())
    assert found.empty == [3] and found.per_pair[3] == 0
    assert found.times_10_000 == 10_000 * found.value
    shown = torch.stack([first for first, _ in network.seen[::2]])
    assert torch.allclose(shown / 255, data.outputs["half_padded_frames"][:-1], atol=1e-6)
    still = warping_error(frames, FlowByList(torch.zeros(8, 2, 24, 32)))
    assert still.value == pytest.approx(float(data.outputs["warping_error_zero_flow"]), rel=TOLERANCE)
    assert list(still.kept) == [1] * 4


def test_steps(golden) -> None:
    data = golden("warping_error")
    clip = half(data.inputs["frames"].permute(0, 3, 1, 2).float() / 255)
    assert (clip - data.outputs["half_padded_frames"]).abs().max() < 1e-6
    warped = warp(clip[1:], data.inputs["fw_flows"])
    assert (warped - data.outputs["warped_next"]).abs().max() < 1e-5
    assert torch.equal(excluded(data.inputs["fw_flows"], data.inputs["bw_flows"]), data.outputs["occlusion"].bool())
    assert not torch.equal(excluded(data.inputs["bw_flows"], data.inputs["fw_flows"]), data.outputs["occlusion"].bool())


def test_end_to_end_in_both_ranges(golden) -> None:
    data, network = golden("warping_error"), calm_raft(golden)
    frames = data.inputs["e2e_frames"].numpy()
    want = {"fixed": "e2e_warping_error_fixed_range", "evalcrafter": "e2e_warping_error_evalcrafter"}
    found = {variant: warping_error(frames, network, variant).value for variant in want}
    for variant, key in want.items():
        assert found[variant] == pytest.approx(float(data.outputs[key]), rel=TOLERANCE)
    assert found["fixed"] != pytest.approx(found["evalcrafter"], rel=20 * TOLERANCE)


@pytest.mark.parametrize("fault", ["mean over channels", "no mask", "zeros outside", "order of flows"])
def test_a_fault_is_seen(golden, monkeypatch, fault) -> None:
    data, network = golden("warping_error"), there_and_back(golden("warping_error"))
    if fault == "mean over channels":
        monkeypatch.setattr(module, "warp", lambda x, flow: warp(x, flow) if x.shape[1] == 2 else warp(x, flow) / 3)
    if fault == "no mask":
        monkeypatch.setattr(module, "excluded", lambda forth, back: torch.zeros(1, 24, 32, dtype=torch.bool))
    if fault == "zeros outside":
        plain = module.sample
        monkeypatch.setattr(module, "sample", lambda x, points, padding: plain(x, points, "zeros"))
    if fault == "order of flows":
        network = FlowByList(chain.from_iterable(zip(data.inputs["bw_flows"], data.inputs["fw_flows"])))
    found = warping_error(data.inputs["frames"].numpy(), network).value
    assert found != pytest.approx(float(data.outputs["warping_error"]), rel=20 * TOLERANCE)

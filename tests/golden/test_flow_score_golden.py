"""FlowScore against EvalCrafter's, with given flows and end to end with RAFT."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flow_by_list import FlowByList, calm_raft

from eval.metrics.flow_score import flow_score

TOLERANCE = 1e-4


def score(data, flows, **settings) -> float:
    return flow_score(data.inputs["frames"].numpy(), FlowByList(flows), **settings).value


def test_given_flows(golden) -> None:
    data = golden("flow_score")
    found = flow_score(data.inputs["frames"].numpy(), FlowByList(data.inputs["flows"]), padded=True)
    assert found.value == pytest.approx(float(data.outputs["flow_score"]), rel=TOLERANCE)
    assert found.per_pair == pytest.approx(data.outputs["per_pair"].numpy(), rel=TOLERANCE)
    constant = torch.tensor([3.0, 4.0])[:, None, None].expand(4, 2, 48, 64)
    assert score(data, constant) == score(data, constant, padded=True) == 5
    assert float(data.outputs["flow_score_constant_3_4"]) == 5


def test_end_to_end(golden) -> None:
    data, frames = golden("flow_score"), golden("flow_score").inputs["e2e_frames"].numpy()
    network, want = calm_raft(golden), float(golden("flow_score").outputs["e2e_flow_score"])
    assert flow_score(frames, network, padded=True).value == pytest.approx(want, rel=TOLERANCE)
    assert flow_score(frames, network).value != pytest.approx(want, rel=20 * TOLERANCE), "without its padding"
    fewer = dataclasses.replace(network, iterations=19)
    assert flow_score(frames, fewer, padded=True).value != pytest.approx(want, rel=20 * TOLERANCE)
    assert data.outputs["e2e_flow_score"] > 0


@pytest.mark.parametrize("fault", ["padding left out", "sum of components"])
def test_a_fault_is_seen(golden, fault) -> None:
    data = golden("flow_score")
    flows, want = data.inputs["flows"], float(data.outputs["flow_score"])
    if fault == "padding left out":
        assert score(data, flows, padded=False) != pytest.approx(want, rel=20 * TOLERANCE)
    else:
        wrong = flows.abs().sum(dim=1, keepdim=True).expand(-1, 2, -1, -1) / 2
        assert score(data, wrong, padded=True) != pytest.approx(want, rel=20 * TOLERANCE)

"""Flow networks for tests: one that returns given flows, and the one of the goldens that run end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from eval.flow_networks import Raft
from eval.raft.load import build


class FlowByList:
    """Stands for RAFT, returns the given flows one after the other and keeps what it was shown."""

    name, beside_paper, smallest = "RAFT", True, 1

    def __init__(self, flows: Iterable[torch.Tensor]):
        self.flows = list(flows)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        self.seen.append((first, second))
        return self.flows.pop(0)


def calm_raft(golden: Callable[[str], Any]) -> Raft:
    """raft_small with its last layer times 0.002, so that flows are small."""
    weights = golden("raft_small").weights()
    for part in ("weight", "bias"):
        weights[f"update_block.flow_head.conv2.{part}"] *= 0.002
    return Raft(build(weights, "raft_small"))

"""Muon: momentum whose matrices are made orthogonal before each step (Keller Jordan and others, 2024).

At equal processor time it halves AdamW's error at the cleaner timesteps of the miniature (docs/training.md). PyTorch
has one from 2.9 on, for matrices alone; this one knows convolutions and works with every supported version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # drives singular values to between about 0.7 and 1.2 in five rounds


def precision(device: torch.device) -> torch.dtype:
    """bfloat16 is enough for the rounds; a CPU takes float32, since many compute bfloat16 a hundred times as slowly."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """(m, n) -> (m, n) with the same singular vectors and singular values near 1, by Newton-Schulz rounds."""
    a, b, c = QUINTIC
    x = matrix.to(precision(matrix.device))
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for every weight with two or more dimensions, kernels flattened to (out, in*k*k); AdamW for the others.

    Embeddings (names with "embedding") and vectors go to AdamW. A step of Muon has the root mean square of one of
    AdamW, so that one learning rate serves both.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        self.matrices = [p for name, p in named.items() if p.ndim > 1 and "embedding" not in name]
        chosen = {id(p) for p in self.matrices}
        rest = [p for p in named.values() if id(p) not in chosen]
        super().__init__([{"params": list(named.values())}], {"lr": lr, "weight_decay": weight_decay})
        self.momentum = momentum
        self.adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, fused=True) if rest else None
        if self.adamw is not None:
            self.adamw.state = self.state  # one state, that of `optimizer_tensors`

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure: call backward first, then step()")
        lr, decay = (self.param_groups[0][k] for k in ("lr", "weight_decay"))
        for weight in self.matrices:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            average = state["momentum_buffer"].lerp_(weight.grad, 1 - self.momentum)
            update = orthogonalised(weight.grad.lerp(average, self.momentum).flatten(1))
            weight.mul_(1 - lr * decay)
            weight.add_(update.view_as(weight), alpha=-lr * 0.2 * math.sqrt(max(update.shape)))
        if self.adamw is not None:
            self.adamw.param_groups[0]["lr"] = lr
            self.adamw.step()

"""Exponential moving average of the trained tensors, kept in float32 beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class EMA:
    """shadow <- decay * shadow + (1 - decay) * value, with decay warmed up as min(decay, (1 + n) / (10 + n)).

    values: the trained tensors by name; read at every `update`, never written.
    """

    def __init__(self, values: Mapping[str, Tensor], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must be in [0, 1), got {decay}")
        self.values, self.decay, self.updates = dict(values), decay, 0
        self.shadow = {k: v.detach().float().clone() for k, v in values.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = [v.detach().float() for v in self.values.values()]
        torch._foreach_lerp_([self.shadow[k] for k in self.values], now, 1 - decay)

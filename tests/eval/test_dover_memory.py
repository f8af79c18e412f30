"""DOVER's attention at full size never holds the biases of all windows."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eval.dover import swin
from eval.dover.swin import SwinBlock
from eval.dover.windows import gate

ALL = 128 * 3 * 392**2  # biases of the first level: windows, heads, pairs of tokens


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@torch.inference_mode()
def largest() -> int:
    block = SwinBlock(96, 3, (8, 7, 7), shifted=True, gated=True)
    x = torch.zeros(1, 16, 56, 56, 96)
    with Largest() as seen:
        block.attention(x)
    return seen.bytes


def test_biases_are_made_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    assert largest() <= 4 * swin.ROOM < 4 * ALL / 3
    monkeypatch.setattr(swin, "ROOM", 2 * ALL)
    assert largest() >= 4 * ALL, "the check would see them all"


def test_the_gate_is_kept_for_space_alone() -> None:
    assert gate((16, 56, 56), (8, 7, 7), (4, 3, 3), (7, 7)).shape == (64, 49, 49)

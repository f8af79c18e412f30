"""The footprint of a computation: what lives and what is computed, counted on the meta device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from i2v.footprint import footprint

KB = 1024


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_what_is_freed_weighs_nothing() -> None:
    x = meta(256)  # 1 KB, there before

    def chain() -> torch.Tensor:
        y = x + 1
        y = y + 1  # two live at once, whatever follows
        return y + 1

    assert footprint(chain).bytes == 2 * KB
    assert footprint(lambda: [x + i for i in range(5)]).bytes == 5 * KB
    assert footprint(lambda: x.add_(1)).bytes == 0


def test_views_share_and_keep_their_storage() -> None:
    x = meta(4, 256)

    def views() -> torch.Tensor:
        kept = (x + 1)[:1]  # a view of 4 KB
        return kept + 1

    assert footprint(views).bytes == 5 * KB


def test_operations() -> None:
    linear, conv = nn.Linear(8, 16, device="meta"), nn.Conv2d(4, 8, 3, padding=1, device="meta")
    assert footprint(lambda: linear(meta(5, 7, 8))).flops == 2 * 35 * 8 * 16
    assert footprint(lambda: conv(meta(2, 4, 6, 6))).flops == 2 * 2 * 36 * 8 * 4 * 9
    q, k = meta(2, 4, 1000, 8), meta(2, 4, 2000, 8)
    found = footprint(lambda: F.scaled_dot_product_attention(q, k, k))
    assert found.flops == 2 * 2 * 2 * 4 * 1000 * 2000 * 8
    assert found.bytes == 2 * 4 * 1000 * 8 * 4  # no matrix of 1000 x 2000

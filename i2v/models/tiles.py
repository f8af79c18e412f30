"""A picture in overlapping tiles whose results fade into each other: for what is too large to be computed whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def starts(size: int, tile: int, overlap: int, multiple: int) -> list[int]:
    """Where tiles begin, evenly spread from 0 to size - tile in steps of `multiple`, overlapping by at least that."""
    if tile >= size:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    last = (size - tile) / multiple
    return [math.floor(i * last / (count - 1)) * multiple for i in range(count)]


def ramp(place: int, places: Sequence[int], tile: int) -> Tensor:
    """(tile,) the weight of a tile along one side: over what it shares with a neighbour it falls from 1 to 0.

    It does so in the middle half of that: next to its edge, where a tile sees least, it counts for nothing.
    """
    at, number = torch.arange(tile) + 0.5, places.index(place)
    out = torch.ones(tile)
    if number > 0:
        shared = places[number - 1] + tile - place
        out = out * (2 * at / shared - 0.5).clamp(0, 1)
    if number < len(places) - 1:
        shared = place + tile - places[number + 1]
        out = out * (2 * (tile - at) / shared - 0.5).clamp(0, 1)
    return out


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, multiple: int = 1) -> Tensor:
    """function(x) for (N, C, h, w), from tiles of `tile` x `tile` that share at least `overlap` with each neighbour.

    `function` changes height and width by one factor, for inputs that are multiples of `multiple` (which `x`, `tile`
    and `overlap` have to be, too). Where tiles overlap, the result fades from one into the other. It is that of the
    whole if `function` sees no further than a quarter of the overlap; norms and attentions see the whole tile.
    """
    height, width = x.shape[-2:]
    if tile >= max(height, width):
        return function(x)
    rows, columns = (starts(side, min(tile, side), overlap, multiple) for side in (height, width))
    tall, wide = min(tile, height), min(tile, width)
    total = weights = torch.empty(0)
    for row in rows:
        for column in columns:
            part = function(x[..., row : row + tall, column : column + wide])
            scale = part.shape[-1] / wide
            if row == column == 0:
                total = part.new_zeros((*part.shape[:2], round(height * scale), round(width * scale)))
                weights = part.new_zeros(total.shape[-2:], dtype=torch.float32)
            top, left, *sides = (round(n * scale) for n in (row, column, tall, wide))
            scaled = [[round(n * scale) for n in places] for places in (rows, columns)]
            weight = ramp(top, scaled[0], sides[0])[:, None] * ramp(left, scaled[1], sides[1])
            weight = weight.to(part.device)
            total[..., top : top + sides[0], left : left + sides[1]] += part * weight.to(part.dtype)
            weights[top : top + sides[0], left : left + sides[1]] += weight
    return total.div_(weights.to(total.dtype))

"""Less memory, the same results: what treats every row alone is computed for a few rows at once.

The rows of a block are frames. A budget counts the bytes of its input that are worked on at once; 0 means all of it,
which is the plain path, and the only one that gradients flow through.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rows_at_once(budget: int, *inputs: Tensor) -> int:
    """How many rows of all inputs together stay below `budget` bytes, at least one; all of them where it is 0."""
    count = len(inputs[0])
    size = sum(x.numel() * x.element_size() for x in inputs)
    return count if size <= budget or not budget else max(1, budget * count // size)


def empty_rows(x: Tensor, count: int) -> Tensor:
    """Of `x`'s kind, with `count` rows; pictures that are channels-last stay so."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty((count, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=order)


def by_rows(function: Callable[..., Tensor], budget: int, *inputs: Tensor, into: Tensor | None = None) -> Tensor:
    """function(*inputs), a few rows at once: it must treat each row alone and return one row for each.

    into: where the result is put. It may be one of the inputs: a row is written when it has been read.
    """
    count, rows = len(inputs[0]), rows_at_once(budget, *inputs)
    if rows >= count:
        return function(*inputs) if into is None else into.copy_(function(*inputs))
    first = function(*(x[:rows] for x in inputs))
    out = empty_rows(first, count) if into is None else into
    out[:rows] = first
    for start in range(rows, count, rows):
        out[start : start + rows] = function(*(x[start : start + rows] for x in inputs))
    return out

"""Windows of space and time: how DOVER's technical branch cuts its tokens, and the biases between those of a window."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

Size = tuple[int, int, int]  # (time, rows, columns)


def fitted(size: Size, window: Size, shift: Size) -> tuple[Size, Size]:
    """Window and shift for tokens of this size: where the window covers an axis, it shrinks and does not shift."""
    covers = [n <= w for n, w in zip(size, window)]
    shrunk = [n if c else w for n, w, c in zip(size, window, covers)]
    moved = [0 if c else s for s, c in zip(shift, covers)]
    return (shrunk[0], shrunk[1], shrunk[2]), (moved[0], moved[1], moved[2])


def cut(x: Tensor, window: Size) -> Tensor:
    """(B, D, H, W, C) -> (B, windows, tokens, C); time is slowest in both."""
    d, h, w = window
    return rearrange(x, "b (n d) (m h) (k w) c -> b (n m k) (d h w) c", d=d, h=h, w=w)


def joined(x: Tensor, window: Size, size: Size) -> Tensor:
    """The inverse of `cut`, for tokens of the given size."""
    counts = {axis: n // w for axis, n, w in zip("nmk", size, window)}
    return rearrange(x, "b (n m k) (d h w) c -> b (n d) (m h) (k w) c",
                     **counts, **dict(zip("dhw", window)))  # fmt: skip


def relative_index(window: Size) -> Tensor:
    """(N, N): the row of a bias table for each pair of tokens, by their offset in time, rows and columns."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in window))
    offsets = places[:, None] - places[None] + torch.tensor(window) - 1
    d, h, w = offsets.unbind(-1)
    return (d * (2 * window[1] - 1) + h) * (2 * window[2] - 1) + w


def gate(size: Size, window: Size, shift: Size, fragments: tuple[int, int]) -> Tensor:
    """(windows in space, h*w, h*w): how many fragments lie between two tokens, rows plus columns, 0 or more.

    The picture is a mosaic of `fragments` pieces; the distance is used as it is and not cut off at 1. It is the same at
    all times, so it is kept for space alone: 50 times less than for all pairs of a window of eight times.
    """
    rows, columns = (
        (torch.arange(n) * count // n).roll(-s).reshape(-1, w)
        for n, count, s, w in zip(size[1:], fragments, shift[1:], window[1:])
    )
    down = (rows[:, :, None] - rows[:, None]).abs()  # (m, h, h)
    across = (columns[:, :, None] - columns[:, None]).abs()  # (k, w, w)
    both = down[:, None, :, None, :, None] + across[None, :, None, :, None, :]  # (m, k, h, w, h, w)
    return rearrange(both, "m k h w g v -> (m k) (h w) (g v)")


def regions(size: Size, window: Size, shift: Size) -> Tensor:
    """(windows, tokens): a number for each token; after the shift, only tokens of equal numbers are true neighbours."""
    number = torch.zeros(1, *size, 1, dtype=torch.long)
    for axis, (n, w, s) in enumerate(zip(size, window, shift)):
        place = torch.arange(n)
        region = ((place >= n - w).long() + (place >= n - s).long()) if s else torch.zeros_like(place)
        shape = [1] * 5
        shape[axis + 1] = n
        number = 3 * number + region.reshape(shape)
    return cut(number, window)[0, :, :, 0]

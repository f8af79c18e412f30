"""How alike each place of one picture is to every place of another, looked up around where the flow points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 4


def pyramid(first: Tensor, second: Tensor) -> list[Tensor]:
    """Features (N, C, h, w) of two pictures -> LEVELS tensors (N*h*w, 1, h/2^l, w/2^l): products over sqrt(C).

    The second picture's side is halved from level to level by averaging.
    """
    n, channels, h, w = first.shape
    product = first.flatten(2).transpose(1, 2) @ second.flatten(2)
    product /= channels**0.5  # in place: 4 GB of a picture of 1920x1080
    levels = [product.reshape(n * h * w, 1, h, w)]
    for _ in range(LEVELS - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


def look_up(levels: list[Tensor], centres: Tensor, radius: int) -> Tensor:
    """The windows around `centres` (N, 2, h, w), pixels (x, y) of level 0 -> (N, LEVELS * (2 radius + 1)^2, h, w).

    Channels run over levels, then k = i * (2 radius + 1) + j with the offset i - radius in *x* and j - radius in *y*:
    the window lies transposed, as the weights were trained. Outside the picture is zero.
    """
    n, _, h, w = centres.shape
    side = torch.arange(-radius, radius + 1, dtype=centres.dtype, device=centres.device)
    window = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1)  # (i, j) -> (x, y) = (side[i], side[j])
    middle = centres.permute(0, 2, 3, 1).reshape(n * h * w, 1, 1, 2)
    found = []
    for number, level in enumerate(levels):
        points = sample(level, middle / 2**number + window)
        found.append(points.reshape(n, h, w, -1))
    return torch.cat(found, dim=-1).permute(0, 3, 1, 2).contiguous()


def sample(image: Tensor, points: Tensor, padding: str = "zeros") -> Tensor:
    """Values of (N, C, H, W), H and W > 1, at points (N, h, w, 2) in pixels (x, y), bilinear -> (N, C, h, w)."""
    h, w = image.shape[-2:]
    size = torch.tensor([w - 1, h - 1], dtype=points.dtype, device=points.device)
    return F.grid_sample(image, 2 * points / size - 1, padding_mode=padding, align_corners=True)


def places(like: Tensor) -> Tensor:
    """The pixels' own coordinates (N, 2, h, w), (x, y), for a tensor (N, C, h, w)."""
    n, _, h, w = like.shape
    y, x = torch.meshgrid(
        torch.arange(h, dtype=like.dtype, device=like.device),
        torch.arange(w, dtype=like.dtype, device=like.device),
        indexing="ij",
    )
    return torch.stack([x, y])[None].expand(n, -1, -1, -1)

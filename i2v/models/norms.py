"""Norms: of tokens and of pictures, of each frame or of a whole clip."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from einops import rearrange
from torch import Tensor, nn

from i2v.models import cpu
from i2v.models.chunks import by_rows


def not_widened(x: Tensor, weight: Tensor) -> AbstractContextManager[object]:
    """Autocast on CUDA makes input and result of every norm float32; its kernels add up in float32 anyway, so where
    input and weight have one format, the result has it too, as on a CPU."""
    kind, same = x.device.type, x.dtype == weight.dtype and not x.is_meta
    return torch.autocast(kind, enabled=False) if same and torch.is_autocast_enabled(kind) else nullcontext()


class LayerNorm(nn.LayerNorm):
    """LayerNorm in its input's format."""

    def forward(self, x: Tensor) -> Tensor:
        with not_widened(x, self.weight):
            return super().forward(x)


class GroupNorm(nn.GroupNorm):
    """GroupNorm that gives channels-last input, as its plain twin does, back in that order and as exactly."""

    def forward(self, x: Tensor) -> Tensor:
        order = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        if x.ndim < 4 or x.is_contiguous() or not x.is_contiguous(memory_format=order):
            return self.plain(x)
        if cpu.applies(x) and x.shape[-2:] != (1, 1):  # of single pixels PyTorch's kernel takes the order for another
            return cpu.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.plain(x.contiguous()).contiguous(memory_format=order)

    def plain(self, x: Tensor) -> Tensor:
        with not_widened(x, self.weight):
            return super().forward(x)


class FrameGroupNorm(GroupNorm):
    """GroupNorm whose statistics are those of each frame, or those of the whole clip.

    Which of the two belongs to the motion set: see `MotionConfig`. Clips never mix.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, over_frames: bool = False):
        super().__init__(groups, channels, eps=eps)
        self.over_frames = over_frames

    def forward(self, x: Tensor, num_frames: int = 1) -> Tensor:
        if not self.over_frames or num_frames == 1:
            return super().forward(x)
        x = super().forward(rearrange(x, "(b f) c h w -> b c f h w", f=num_frames))
        return rearrange(x, "b c f h w -> (b f) c h w")

    def by_frames(self, num_frames: int, budget: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `normed` takes beside a few frames of a chunked input; nothing where each frame is its own clip.

        Of norms over the whole clip: the mean and the standard deviation's inverse, (N, groups) each. They are made
        frame by frame, so that no frame is normed by a part of its clip. inputs: side by side in channels.
        """
        if not self.over_frames or num_frames == 1:
            return ()

        def moments(*some: Tensor) -> Tensor:
            x = torch.cat(some, dim=1) if len(some) > 1 else some[0]
            if cpu.applies(x) and not x.is_contiguous():
                return torch.stack(cpu.moments(x, self.num_groups), 2)
            return torch.stack(torch.var_mean(x.float().reshape(len(x), self.num_groups, -1), 2, correction=0), 2)

        var, mean = by_rows(moments, budget, *inputs).unflatten(0, (-1, num_frames)).unbind(-1)  # (B, F, groups)
        var = var.mean(1) + mean.var(1, correction=0)
        mean = mean.mean(1)
        return tuple(x.repeat_interleave(num_frames, 0) for x in (mean, torch.rsqrt(var + self.eps)))

    def normed(self, x: Tensor, *clip: Tensor) -> Tensor:
        """Frames (n, C, h, w), with their rows of what `by_frames` returned."""
        if not clip:
            return super().forward(x)
        mean, inverse = (c.repeat_interleave(self.num_channels // self.num_groups, 1) for c in clip)  # (n, C)
        scale = inverse * self.weight.float()
        shift = self.bias.float() - mean * scale
        return torch.addcmul(shift[:, :, None, None].to(x.dtype), x, scale[:, :, None, None].to(x.dtype))

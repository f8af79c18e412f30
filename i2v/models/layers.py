"""Building blocks of the UNet. Frames are folded into the batch, frame fastest: (B*F, C, h, w) or (B*F, h*w, C).

Letters in shapes: B clips, F frames, N = B*F, L tokens (of a picture or of a text), C channels, R rows: B or N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from i2v.models import cpu, frozen
from i2v.models.chunks import by_rows, empty_rows, rows_at_once
from i2v.models.conditioning import Conditioning, KeysValues, per_condition, per_frame
from i2v.models.norms import FrameGroupNorm, GroupNorm, LayerNorm

FEW_KEYS = 1024  # a text's and a picture's, and the first frame's at the coarser levels
MOST_ROWS = 65_535  # of one call on CUDA, whose kernels count them along a side of their grid


def wants_rows(q: Tensor, k: Tensor) -> bool:
    """Whether few keys are better repeated for each frame: in its backward pass CUDA's flash attention works side by
    side on blocks of keys, heads and rows alone, so that a clip's text leaves most of the device idle."""
    return q.is_cuda and torch.is_grad_enabled() and q.requires_grad and k.shape[1] < FEW_KEYS


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention, softmax(Q K^T / sqrt(d)) V in each head. Implements Eq. (3).

    q (N, L, C); k, v (R, M, C) with R dividing N -> (N, L, C). N/R consecutive rows of q (the frames of a clip) share
    one row of k and v: they are folded into the query length, so that neither keys nor values are repeated (but for
    `wants_rows`).
    """
    rows, n = len(k), len(q)
    if cpu.applies(q):
        queries = q.numel() // q.shape[-1] // rows
        if cpu.ZEN5 and queries * k.shape[1] >= cpu.SMALL:
            return cpu.attend(q, k, v, heads).view(q.shape)
        if q.dtype == torch.bfloat16 and not (cpu.AMX and queries > 8):  # AMX is slower for a short clip's few frames
            return cpu.attend_in_float32(q, k, v, heads).view(q.shape)
    if rows < n and wants_rows(q, k):
        k, v = (x.repeat_interleave(n // rows, 0) for x in (k, v))
        rows = n
    q = rearrange(q, "(r f) l (h d) -> r h (f l) d", r=rows, h=heads)
    k, v = (rearrange(x, "r m (h d) -> r h m d", h=heads) for x in (k, v))
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and not cpu.applies(q):
        # PyTorch's bfloat16 kernel is up to six times as slow as its float32 one in the backward pass (torch 2.13)
        with torch.autocast("cpu", enabled=False):
            if frozen.applies(q):
                out = frozen.attend_in_float32(q, k, v)
            else:
                out = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    elif rows > MOST_ROWS:
        parts = zip(*(x.split(MOST_ROWS) for x in (q, k, v)))
        out = torch.cat([F.scaled_dot_product_attention(*part) for part in parts])
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "r h (f l) d -> (r f) l (h d)", f=n // rows)


def scaled(x: Tensor, scale: float) -> Tensor:
    """scale * x; nothing is done where the scale is 1."""
    return x if scale == 1 else scale * x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b over the last dimension."""
    if x.ndim > 2 and not cpu.applies(x):
        x = x.contiguous()  # else PyTorch multiplies each row by itself, in bfloat16 by its own copy of the weight
    if frozen.applies(x, weight, bias):
        return frozen.linear(x, weight, bias)
    return cpu.linear(x, weight, bias) if cpu.applies(x) else F.linear(x, weight, bias)


def conv2d(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What `conv` does."""
    if frozen.applies(x, conv.weight, conv.bias):
        return frozen.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, *modules: nn.Module) -> Tensor:
    """function(x); what it makes on the way is not kept for the gradient where the modules that it uses are frozen."""
    used = [p for m in modules for p in m.parameters()]
    # what torch.func.functional_call puts in their place is no Parameter, and gone when the gradient is computed
    own = all(isinstance(p, nn.Parameter) for p in used)
    return frozen.again(function, x) if own and frozen.applies(x, *used) else function(x)


class Linear(nn.Linear):
    """A linear layer by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def unwatched(layer: nn.Module) -> bool:
    """Whether a plain layer may be computed past its own call: no hook and no wrapper (PEFT's LoRA) would notice."""
    return type(layer) is Linear and not (layer._forward_hooks or layer._forward_pre_hooks)


class CastLinear(Linear):
    """A linear layer that is kept in float32 for training and computes in the dtype of its input."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> CastLinear:
        """That begins with copies of these, on their device; no random number is drawn for it."""
        new = cls(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        new.weight = nn.Parameter(weight.detach().to(torch.float32, copy=True))
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().to(torch.float32, copy=True))
        return new

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv1x1(nn.Conv2d):
    """A linear layer over the channels of a picture; (N, C, h, w) -> (N, C', h, w)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not cpu.applies(x):
            return conv2d(x, self)
        return cpu.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class Conv3x3(nn.Conv2d):
    """A convolution that keeps height and width; (N, C, h, w) -> (N, C', h, w)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if cpu.applies(x) and len(x) * x.shape[2:].numel() < self.out_channels:
            return cpu.conv3x3(x, self.weight, self.bias)
        return conv2d(x, self)


class Attention(nn.Module):
    """Projections of one attention; `context_dim` is the width that keys and values are made from, by default `dim`."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels do not split into {heads} heads")
        self.heads = heads
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(context_dim or dim, dim, bias=False)
        self.to_v = Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def kv(self, context: Tensor) -> KeysValues:
        """(R, M, context_dim) -> keys and values (R, M, C)."""
        return self.to_k(context), self.to_v(context)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q = X W_Q, K = X W_K, V = X W_V of self-attention, (N, L, C) each. Implements Eq. (4)."""
        return self.to_q(x), *self.kv(x)

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention over the tokens of each row; (N, L, C) -> (N, L, C)."""
        return self.to_out[0](attend(*self.qkv(x), self.heads))


class GEGLU(nn.Module):
    """Linear(x) * GELU(Linear(x))."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = Linear(dim, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        if cpu.applies(x) and unwatched(self.proj):
            return cpu.geglu(x, self.proj.weight, self.proj.bias)
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, dim: int):
        super().__init__()
        # the middle entry stands where published files count a dropout
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)])

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """norm: in front of it, applied here; in training neither its output nor the halves of the GEGLU are kept."""
        widen, narrow = self.net[0], self.net[2]
        return narrow(recomputed(lambda x: widen(norm(x)), x, norm, widen))


class TransformerBlock(nn.Module):
    """Self-attention, text cross-attention, feed-forward; (N, L, C) -> (N, L, C).

    Slots, empty by default: `i2v_adapter` (i2v_adapter.py) and `ip_adapter` (ip_adapter.py).
    """

    i2v_adapter: nn.Module | None  # annotations only: a class attribute `= None` would hide the module put in the slot
    ip_adapter: nn.Module | None

    def __init__(self, dim: int, heads: int, context_dim: int):
        super().__init__()
        self.register_module("i2v_adapter", None)
        self.register_module("ip_adapter", None)
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim)

    def self_attention(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Each frame attends to itself, W_O, plus to the anchor frame, W_O' (the adapter). Implements Eq. (6)."""
        q, k, v = self.attn1.qkv(x)
        out = self.attn1.to_out[0](attend(q, k, v, self.attn1.heads))
        return out if self.i2v_adapter is None else out + self.i2v_adapter(x, k, v, cond)

    def cross_attention(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Attends to the text and, with an IP-Adapter, to the image tokens: one query, one W_O, two sums."""
        q = self.attn2.to_q(x)
        k, v = map(cond.mine, cond.context.text[self.attn2])
        out = attend(q, k, v, self.attn2.heads)
        if self.ip_adapter is not None:
            out = out + self.ip_adapter(q, *map(cond.mine, cond.context.image[self.ip_adapter]))
        return self.attn2.to_out[0](out)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        x = per_condition(x + self.self_attention(self.norm1(x), cond), cond)
        x = x + self.cross_attention(self.norm2(x), cond)
        return x + self.ff(x, self.norm3)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the h*w tokens of each frame, with a residual; (N, C, h, w) -> (N, C, h, w).

    `linear_proj`: projections are linear layers (SDXL), otherwise 1x1 convolutions (SD1.5). The sum is the same.
    """

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int, linear_proj: bool, groups: int):
        super().__init__()
        self.linear_proj = linear_proj
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels) if linear_proj else Conv1x1(channels, channels)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = Linear(channels, channels) if linear_proj else Conv1x1(channels, channels)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        rows = rows_at_once(cond.budget, x)
        if rows >= len(x):
            return self.frames(x, cond)
        out = empty_rows(x, cond.rows)
        for some, own in cond.parts(len(x), rows):
            for whole, part in zip(out.split(len(x)), self.frames(x[some], own).split(some.stop - some.start)):
                whole[some] = part  # of each condition
        return out

    def frames(self, x: Tensor, cond: Conditioning) -> Tensor:
        """All given frames at once."""
        residual, height = x, x.shape[-2]
        x = self.norm(x)
        if not self.linear_proj:
            x = self.proj_in(x)
        x = rearrange(x, "n c h w -> n (h w) c")
        if self.linear_proj:
            x = self.proj_in(x)
        for block in self.transformer_blocks:
            x = block(x, cond)
        if self.linear_proj:
            x = self.proj_out(x)
        x = rearrange(x, "n (h w) c -> n c h w", h=height)
        if not self.linear_proj:
            x = self.proj_out(x)
        return x + per_condition(residual, cond)


class ResBlock(nn.Module):
    """Two convolutions with the timestep added in between, and a residual; (N, C, h, w) -> (N, C', h, w)."""

    def __init__(self, in_channels: int, out_channels: int, temb_dim: int, groups: int):
        super().__init__()
        self.norm1 = FrameGroupNorm(groups, in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = Linear(temb_dim, out_channels)
        self.norm2 = FrameGroupNorm(groups, out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = Conv1x1(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor, cond: Conditioning, skip: Tensor | None = None) -> Tensor:
        """`skip` (N, C'', h, w): a skip connection, more channels of the input."""
        temb = per_frame(self.time_emb_proj(F.silu(cond.temb)), cond.rows)[: len(x)]
        inputs = (x,) if skip is None else (x, skip)
        if rows_at_once(cond.budget, *inputs) < len(x):
            return self.by_frames(inputs, temb, cond)
        x = x if skip is None else torch.cat(inputs, dim=1)
        h = self.first_half(x, temb, lambda x: self.norm1(x, cond.num_frames))
        return self.second_half(h, x, lambda h: self.norm2(h, cond.num_frames))

    def first_half(self, x: Tensor, temb: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Norm, SiLU, convolution, timestep. norm: `norm1` of whole clips, or with statistics that were made before."""
        h = self.conv1(recomputed(lambda x: F.silu(norm(x)), x, self.norm1))
        return h + temb[:, :, None, None]

    def second_half(self, h: Tensor, x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Norm, SiLU and convolution of what `first_half` made, plus the block's input `x`."""
        h = self.conv2(recomputed(lambda h: F.silu(norm(h)), h, self.norm2))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    def by_frames(self, inputs: tuple[Tensor, ...], temb: Tensor, cond: Conditioning) -> Tensor:
        """The same for a few frames at once: up to the second norm, whose statistics may be the clip's, and then on."""
        count, frames, budget = len(inputs), cond.num_frames, cond.budget

        def first(temb: Tensor, *rest: Tensor) -> Tensor:
            return self.first_half(torch.cat(rest[:count], dim=1), temb, lambda x: self.norm1.normed(x, *rest[count:]))

        def second(h: Tensor, *rest: Tensor) -> Tensor:
            return self.second_half(h, torch.cat(rest[:count], dim=1), lambda h: self.norm2.normed(h, *rest[count:]))

        h = by_rows(first, budget, temb, *inputs, *self.norm1.by_frames(frames, budget, *inputs))
        return by_rows(second, budget, h, *inputs, *self.norm2.by_frames(frames, budget, h), into=h)


class Downsample(nn.Module):
    """Halves height and width, rounded up."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.conv)


class Upsample(nn.Module):
    """Grows to `size` (h, w), that of the waiting skip connection: twice the input, or one less where that was odd."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int], budget: int = 0) -> Tensor:
        return by_rows(lambda some: self.conv(F.interpolate(some, size=size, mode="nearest")), budget // 4, x)

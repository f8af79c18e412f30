"""The heavy operations on a CPU, for inference: the same sums as their plain twins in `layers.py`, sooner.

PyTorch gives float32 matrix products to MKL, which does without AVX-512 on processors that are not Intel's; its oneDNN,
which does the convolutions, uses it everywhere. What `torch.compile` calls for that is called here directly. There is
no backward pass: with gradients on, on another device or under autocast, `applies` says no and the plain twin runs.
"""

from __future__ import annotations

import math
import platform
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

BLOCK = 2**17  # scores of a thread that are made at once: half a megabyte, which stays in its cache
NORMED = 2**16  # numbers of a frame that a norm works on at once, for the same reason
LARGE = 2**22  # numbers of a convolution's weight from which sorting it at each call costs more than it is worth
FAR = 5  # deviations of a group that its mean may be from 0 for PyTorch's kernel in bfloat16
SMALL = 2**14  # scores of one head below which PyTorch's own attention is as fast
WIDENED = 2**18  # queries' numbers that are made float32 at once: a megabyte, which stays in the cache


def processor() -> str:
    """Who made it and its family, as the system writes them; "" where it does not tell."""
    try:
        return Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()


def is_zen5(text: str) -> bool:
    """Whether `text` of `processor` names AMD's Zen 5 or later: there alone (measured on an EPYC) `attend`, whose
    products are oneDNN's, is faster than PyTorch's own attention, whose products are MKL's and half as wide."""
    family = re.search(r"family\s*:?\s*(\d+)", text, re.IGNORECASE)
    return "AuthenticAMD" in text and family is not None and int(family[1]) >= 26


ZEN5, AMX = is_zen5(processor()), getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def applies(x: Tensor) -> bool:
    """Whether the functions below may be used for this input."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()  # its compiler takes these calls with constant weights alone
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and not isinstance(x, FakeTensor)  # memory is being counted, nothing computed
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """F.linear. `then="gelu"`: with an exact GELU, applied while the result is still in the cache."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "none")


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(..., C) -> (..., D): the product with the weight's first half, times the GELU of that with the other half."""
    (value, gate), (value_bias, gate_bias) = weight.chunk(2), bias.chunk(2)
    gates = linear(x, gate, gate_bias, then="gelu")
    return torch.ops.mkldnn._linear_pointwise.binary(x, gates, value, value_bias, "mul")


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`layers.attend`: q (N, L, C); k, v (R, M, C) -> (N, L, C).

    Head by head, so many queries at once that their scores stay in the cache. For bfloat16 the scores and their softmax
    are float32, as in PyTorch's own; the products with V are bfloat16.
    """
    rows, size = len(k), q.shape[-1] // heads
    q = q.reshape(rows, -1, heads, size)
    out = torch.empty(q.shape, dtype=q.dtype)
    block = max(1, BLOCK * torch.get_num_threads() // k.shape[1])
    k = k.unflatten(-1, (heads, size)).float() / math.sqrt(size)
    v = v.unflatten(-1, (heads, size)).movedim(1, -1).contiguous()  # (R, heads, size, M)
    for row in range(rows):
        for head in range(heads):
            keys, values = k[row, :, head].contiguous(), v[row, head]
            for first in range(0, q.shape[1], block):
                some = slice(first, first + block)
                weights = linear(q[row, some, head].float(), keys).softmax(-1).to(q.dtype)
                out[row, some, head] = linear(weights, values)
    return out


def attend_in_float32(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`layers.attend` of bfloat16 by PyTorch's float32 kernel, a few rows of k at once, which stay in the cache.

    Without AMX its bfloat16 kernel is slower than that one, and errs more (torch 2.13).
    """
    q = q.reshape(len(k), -1, q.shape[-1])
    out = torch.empty(q.shape, dtype=q.dtype)
    rows = max(1, WIDENED // q[0].numel())
    for into, *some in zip(*(x.split(rows) for x in (out, q, k, v))):
        per_head = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in some)
        into.unflatten(-1, (heads, -1)).copy_(F.scaled_dot_product_attention(*per_head).transpose(1, 2))
    return out


def moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Variance and mean of each group of channels of (N, C, ...), (N, groups) float32.

    For pictures or clips whose channels are last in memory: sums over all else, channel by channel, are quick. Numbers
    and their squares are added up in one go, a few lines at once, which stay in the cache, and less the mean of
    every eighth line (or frame): what is taken off in the end is then at most eight variances, so little is lost.
    """

    def of_groups(per_channel: Tensor) -> Tensor:
        return per_channel.unflatten(1, (groups, -1)).mean(2)

    others, pixels = tuple(range(2, x.ndim)), x[0, 0].numel()
    near = of_groups(x[:, :, ::8].mean(others, dtype=torch.float32))
    middle = spread(near, x)
    sums, squares = [], []
    for some in x.split(lines(x), 2):
        apart = some - middle
        sums.append(apart.sum(others))
        squares.append(apart.square_().sum(others))
    mean, square = (of_groups(torch.stack(found).sum(0) / pixels) for found in (sums, squares))
    return (square - mean.square()).clamp(min=0), mean + near


def lines(x: Tensor) -> int:
    """How many lines of (N, C, lines, ...) are worked on at once; whatever N is, so that a frame's sums keep their bits
    among others."""
    return max(1, NORMED * x.shape[2] // x[0].numel())


def spread(per_group: Tensor, x: Tensor) -> Tensor:
    """(N, groups) -> (N, C, 1, ...): a number for every channel of x."""
    return per_group.repeat_interleave(x.shape[1] // per_group.shape[1], 1).reshape(*x.shape[:2], *[1] * (x.ndim - 2))


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm of (N, C, ...) with channels last in memory, where the result has them too.

    PyTorch's own kernel for that order takes variances from sums of squares: with means far from 0 it errs by 1e-2. In
    bfloat16 that is less than the rounding of the result unless a mean is really far, `FAR` deviations.
    """
    if x.dtype == torch.bfloat16:
        rows, pixels = len(x), x[0, 0].numel()
        out, mean, inverse = torch.native_group_norm(x, weight, bias, rows, x.shape[1], pixels, groups, eps)
        if float((mean * inverse).abs().max()) < FAR:
            return out
    variance, mean = moments(x, groups)
    own = [p.float().reshape(-1, *[1] * (x.ndim - 2)) for p in (weight, bias)]
    scale = spread(torch.rsqrt(variance + eps), x) * own[0]
    return torch.addcmul(own[1] - spread(mean, x) * scale, x, scale).to(x.dtype)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1) as one product of matrices; (N, C, h, w) -> (N, C', h, w), channels last.

    For small pictures under large weights, which a convolution sorts anew at each call; this does so where the weight's
    channels are not last in memory.
    """
    padded = F.pad(x.movedim(1, -1), (0, 0, 1, 1, 1, 1))
    patches = padded.unfold(1, 3, 1).unfold(2, 3, 1).movedim(3, -1)  # (N, h, w, 3, 3, C)
    return linear(patches.flatten(3), weight.movedim(1, -1).flatten(1), bias).movedim(-1, 1)


def sorted_weight(weight: Tensor) -> Tensor:
    """The weight with its channels last in memory if it is one that `conv3x3` may be called with, else itself."""
    if weight.ndim < 4 or weight.shape[2:] != (3, 3) or weight.numel() < LARGE:
        return weight
    return weight.contiguous(memory_format=torch.channels_last)

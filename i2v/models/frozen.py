"""What a training step need not keep: layers whose weights are frozen, through which a gradient passes.

PyTorch keeps a convolution's input for the gradient of its weight, and under autocast a copy of each weight in the
compute dtype, whether the weight is trained or not. These functions keep what the gradient of the input needs. Where a
weight is trained, or no gradient is asked for, `applies` says no and the plain operation runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from i2v.models import cpu


def applies(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a gradient passes x and none is wanted for the weights."""
    return torch.is_grad_enabled() and x.requires_grad and not any(w is not None and w.requires_grad for w in weights)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return cpu.linear(x, weight, bias) if cpu.applies(x) else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = ctx.saved_tensors[0].to(grad.dtype).t()
        grad = cpu.linear(grad, weight) if cpu.applies(grad) else F.linear(grad.contiguous(), weight)  # as forwards
        return grad.to(ctx.dtype), None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.about = x.shape, x.dtype, stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        shape, dtype, stride, padding = ctx.about
        weight = ctx.saved_tensors[0].to(grad.dtype)
        channels_last = grad.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if channels_last else torch.contiguous_format
        never_read = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=order)
        grad, _, _ = torch.ops.aten.convolution_backward(
            grad.contiguous(memory_format=order), never_read, weight, None, stride, padding, (1, 1), False, (0, 0), 1,
            (True, False, False),
        )  # fmt: skip
        return grad.to(dtype), None, None, None, None


class _WideAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q.float(), k.float(), v.float())
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        *kept, sums = ctx.saved_tensors
        q, k, v, out = (x.float() for x in kept)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), q, k, v, out, sums, 0.0, False
        )
        return tuple(x.to(grad.dtype) for x in grads)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        kind = x.device.type
        ctx.function, ctx.autocast = function, (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return function(x)

    @staticmethod
    @once_differentiable  # the gradient's own gradient would be wrong: an error instead
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        kind, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled=enabled):
            out = ctx.function(x)
        return torch.autograd.grad(out, x, grad)[0], None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear that keeps nothing but the weight itself."""
    return _Linear.apply(x, weight, bias)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    """F.conv2d that keeps nothing but the weight itself."""
    return _Conv2d.apply(x, weight, bias, stride, padding)


def attend_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of bfloat16 heads (R, H, L, D) on a CPU in float32, which keeps bfloat16 alone."""
    return _WideAttention.apply(q, k, v)


def again(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), of frozen weights; x alone is kept, all else is computed again when the gradient comes."""
    return _Again.apply(x, function)

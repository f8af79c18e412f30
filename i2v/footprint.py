"""What a computation will hold in memory and how much it computes, found by running it on the meta device.

Nothing is allocated and nothing computed: every operation only tells the shape of its result. So the code that runs is
its own model: a change of a network changes the prediction with it.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count

from i2v.models.int8 import Int8Weight

GROWTH = 150e6  # bytes allowed for libraries once they compute: kernels, threads, buffers
RETAINED = 0.15  # allowed for, of what is worked with: what the allocator keeps in pieces too small to use
aten = torch.ops.aten
# At its first use einops sets itself up for torch; with PyTorch before 2.8 that imports its compiler, which computes
# something and fails where nothing is computed. So here, before.
rearrange(torch.empty(1), "one -> one")
MATRIX = {aten.mm: 0, aten.addmm: 1, aten.bmm: 0, aten.baddbmm: 1}  # position of the first factor


@dataclass(frozen=True)
class Footprint:
    """bytes: the most that it held at once of its own making; flops: of convolutions, products and attention."""

    bytes: int
    flops: int


class Tracker(TorchDispatchMode):
    """Counts what lives: a storage is freed when Python lets go of its last tensor, on the meta device as elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.seen: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be kept from the compiler, for which PyTorch would import it: more than a second of every video."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if Int8Weight in types:
            return NotImplemented  # it makes plain ones, which are counted
        for x in tree_leaves((args, kwargs)):
            self.known(x, 0)
        out = result(func, args, kwargs or {})
        for x in tree_leaves(out):
            self.known(x, 1)
        self.count(func, args, out)
        return out

    def known(self, x: Any, new: int) -> None:
        """Takes a tensor's storage into account; what existed before the computation (`new` 0) weighs nothing."""
        if not isinstance(x, Tensor):
            return
        storage = x.untyped_storage()
        key = id(storage)
        if key in self.seen and self.seen[key]() is storage:
            return
        size = new * storage.nbytes()

        def freed(_: Any) -> None:
            self.live -= size
            self.seen.pop(key, None)

        self.seen[key] = weakref.ref(storage, freed)
        self.held(size)
        self.live += size

    def held(self, more: int) -> None:
        """`more` bytes beside what lives, for the length of one operation."""
        self.peak = max(self.peak, self.live + more)

    def count(self, func: Any, args: Sequence[Any], out: Any) -> None:
        """Operations; and what oneDNN holds while it convolves: input, weight and result in a layout of its own."""
        packet = func.overloadpacket
        if packet in MATRIX:
            self.flops += 2 * args[MATRIX[packet]].shape[-1] * out.numel()
        elif packet is aten.convolution:
            self.flops += conv_flop_count(list(args[0].shape), list(args[1].shape), list(out.shape), bool(args[6]))
            self.held(sum(x.numel() * x.element_size() for x in (args[0], args[1], out)))
        elif packet is aten.convolution_backward:  # of the result's gradient, the input and the weight
            self.held(sum(x.numel() * x.element_size() for x in args[:3]))


def result(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation returns on the meta device.

    For the usual operations PyTorch's kernels there are written in Python: they take up to a millisecond each, and the
    first ones import its compiler and sympy, which takes two seconds of every video. So their results are made by rule.
    """
    rule = RULES.get(func.overloadpacket) if func._overloadname in OVERLOADS else None
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.is_meta for x in tensors)  # not fake, not int8
    found = rule(*args, **kwargs) if rule is not None and plain else None
    return func(*args, **kwargs) if found is None else found


def like_first(x: Tensor, *others: Any, **kwargs: Any) -> Tensor | None:
    """Of an elementwise operation."""
    tensors = [other for other in others if isinstance(other, Tensor)]
    other = others[0] if others and isinstance(others[0], (Tensor, int, float)) else x
    dtype, shape = torch.result_type(x, other), np.broadcast_shapes(x.shape, *(t.shape for t in tensors))
    if not dtype.is_floating_point:  # which may become fractions
        return None
    return like(x, dtype) if shape == x.shape else x.new_empty(shape, dtype=dtype)


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """torch.empty_like, whose kernel here is one of those, too."""
    dense = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) == x.numel()
    strides = x.stride() if dense else torch.empty(x.shape, device="meta").stride()
    return torch.empty_strided(x.shape, strides, dtype=dtype or x.dtype, device="meta")


def in_order_of(tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Channels last where they all are; in the number format that holds them all."""
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
    last = len(shape) == 4 and all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors)
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=order)


def joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    return in_order_of(tensors, shape)


def stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return joined([x.unsqueeze(dim) for x in tensors], dim)


def counted(
    *bounds: float, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
) -> Tensor | None:
    """Of torch.arange."""
    if dtype is None or device is None or torch.device(device).type != "meta":
        return None
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]
    return torch.empty(math.ceil((end - start) / step), dtype=dtype, device="meta")


def layer_normed(x: Tensor, shape: Sequence[int], *_: Any) -> tuple[Tensor, ...]:
    rows = x.shape[: x.ndim - len(shape)]
    return like(x), x.new_empty(rows), x.new_empty(rows)


def group_normed(x: Tensor, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, *_: Any
                 ) -> tuple[Tensor, ...]:  # fmt: skip
    return like(x), x.new_empty(n, groups), x.new_empty(n, groups)


def convolved(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *_: Any
) -> Tensor | None:
    if transposed:
        return None
    places = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sizes = [(n + 2 * around - apart * (side - 1) - 1) // step + 1 for n, side, step, around, apart in places]
    return x.new_empty(len(x), len(weight), *sizes)


def repeated(x: Tensor, times: Sequence[int]) -> Tensor:
    shape = (1,) * (len(times) - x.ndim) + x.shape
    return x.new_empty([n * many for n, many in zip(shape, times, strict=True)])


def enlarged(x: Tensor, size: Sequence[int] | None, *_: Any) -> Tensor | None:
    return None if size is None else in_order_of([x], [*x.shape[:2], *size])


def reshuffled(x: Tensor, channels: float, size: float) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty(n, round(c * channels), round(h * size), round(w * size))


OVERLOADS = ("default", "Tensor", "Scalar", "vec", "start", "start_step")  # not those with `out`
RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.addcmul, aten.clamp, aten.exp, aten.sin,
                     aten.cos, aten.rsqrt, aten.sigmoid, aten.silu, aten.gelu), like_first),
    **dict.fromkeys((aten.add_, aten.mul_, aten.div_, aten.silu_), lambda x, *_, **__: x),
    aten.addmm: lambda bias, a, b, **_: a.new_empty(a.shape[0], b.shape[1]),
    aten.pixel_shuffle: lambda x, patch: reshuffled(x, 1 / patch**2, patch),
    aten.pixel_unshuffle: lambda x, patch: reshuffled(x, patch**2, 1 / patch),
    aten.mm: lambda a, b: a.new_empty(a.shape[0], b.shape[1]),
    aten.convolution: convolved,
    aten.native_layer_norm: layer_normed,
    aten.native_group_norm: group_normed,
    aten.cat: joined,
    aten.stack: stacked,
    aten.upsample_nearest2d: enlarged,
    aten.repeat: repeated,
    aten.arange: counted,
}  # fmt: skip


class Attention(TorchFunctionMode):
    """Fused attention never holds its matrix of weights; the meta device would make it."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.tracker = tracker

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        self.tracker.flops += 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return q.new_empty(*q.shape[:-1], v.shape[-1])


def footprint(run: Callable[[], Any]) -> Footprint:
    """Of `run`, whose networks and tensors are on the meta device."""
    tracker = Tracker()
    with torch.no_grad(), tracker, Attention(tracker):
        run()
    return Footprint(tracker.peak, tracker.flops)

"""Weights held as int8, an approximation: half the memory of bfloat16, a quarter of float32's.

Any operation sees such a weight as a tensor of the model's number format, which is made for it and let go of after it:
no layer knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

LARGEST = 127
BLOCK = 2**18  # numbers that are rounded at once: a megabyte, which stays in the cache


class Int8Weight(Tensor):
    """`rounded` (out, ...), int8, times `steps` (out, 1, ...), whose number format is the one that is seen."""

    rounded: Tensor
    steps: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @staticmethod
    def __new__(cls, rounded: Tensor, steps: Tensor) -> Int8Weight:
        with torch.inference_mode():  # else views of it, which are plain tensors, are refused in inference mode
            made: Int8Weight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, rounded.shape, strides=rounded.stride(), dtype=steps.dtype, device=rounded.device
            )
        made.rounded, made.steps = rounded, steps
        return made

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """What is held."""
        return self.rounded.nbytes + self.steps.nbytes

    def plain(self) -> Tensor:
        """The tensor that operations see, in the same order of memory."""
        return self.rounded.to(self.steps.dtype).mul_(self.steps)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # as nn.Parameter and state_dict do
            return cls(args[0].rounded, args[0].steps)
        args, kwargs = tree_map_only(cls, cls.plain, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


@torch.no_grad()
def quantised(weight: Tensor) -> Int8Weight:
    """The nearest multiples of 1/127 of the largest number of each output channel; weight: (out, ...), 2-d or more.

    Off by half such a step at most, and by the rounding of the weight's number format; in float16 steps are multiples
    of 6e-8.
    """
    others = tuple(range(1, weight.ndim))
    rounded = torch.empty_like(weight, dtype=torch.int8)
    steps = weight.new_empty(len(weight), *[1] * len(others))
    rows = max(1, BLOCK * len(weight) // max(weight.numel(), 1))
    for some, into, step in zip(weight.split(rows), rounded.split(rows), steps.split(rows)):
        some = some.float()
        step.copy_(some.abs().amax(others, keepdim=True) / LARGEST)
        step.masked_fill_(step == 0, 1)  # a channel of zeros
        into.copy_((some / step.float()).round_().clamp_(-LARGEST, LARGEST))
    return Int8Weight(rounded, steps)

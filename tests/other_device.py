"""A stand-in for a GPU: a device whose tensors are computed on the CPU, but are not the CPU's.

As on CUDA an operation on tensors of both devices fails, `numpy()` is refused, and what the code does where the device
is not the CPU is what runs. Kernels, number formats and memory of a real one it does not show. It is registered for the
whole process, so `test_other_device.py` runs programs of their own with it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

torch.inference_mode = torch.no_grad  # type: ignore[assignment, misc]  # tensors like these cannot be made under it
sys.path.insert(0, str(Path(__file__).parents[1]))

from i2v.models.int8 import Int8Weight  # noqa: E402

aten = torch.ops.aten
COPIES = {
    aten._to_copy.default, aten.copy_.default, aten._copy_from.default, aten.to.device, aten.to.dtype_layout,
    aten.to.other,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Backend(backend_registration._DummyBackendModule):
    """What PyTorch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def current_device(self) -> int:
        return 0


backend_registration._setup_privateuseone_for_python_backend("other", backend_module=Backend())
DEVICE = torch.device("other", 0)


class OtherTensor(torch.Tensor):
    """A tensor of the other device; `inner` holds its numbers on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OtherTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OtherTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert other:0 device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return computed(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """While it is entered, `to(DEVICE)` and `torch.empty(..., device=DEVICE)` make tensors of the other device."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operation's result, on the device that is asked for, or else on that of its tensors."""
    leaves = tree_leaves((args, dict(kwargs)))
    if any(isinstance(x, Int8Weight) for x in leaves):
        return NotImplemented  # it makes plain ones
    others = [x for x in leaves if isinstance(x, OtherTensor)]
    bound = leaves
    if func in INDEXING and isinstance(args[0], OtherTensor):
        bound = [args[0], *args[2:]]  # indices may lie on the CPU, not the other way round
    on_cpu = [x for x in bound if isinstance(x, Tensor) and x.ndim and not isinstance(x, OtherTensor)]
    if others and on_cpu and func not in COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} was given {on_cpu[0].shape} on cpu")
    if others and func is aten._fused_sdp_choice.default:
        return 0  # the plain way

    def plain(x: Any) -> Any:
        if isinstance(x, OtherTensor):
            return x.inner
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == "other" else x

    given, named = tree_map(plain, (tuple(args), dict(kwargs)))
    out = func(*given, **named)
    written = [
        kwargs.get(a.name) if i >= len(args) else args[i]
        for i, a in enumerate(func._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    returns = func._schema.returns
    if written and len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write:
        return written[0]
    target = next((x for x in leaves if isinstance(x, torch.device)), None)
    if target is not None and target.type != "other":  # a copy, also of what lies on the CPU already
        return out.clone() if any(out is x.inner for x in others) else out
    if target is None and (not others or (func in COPIES and not isinstance(args[0], OtherTensor))):
        return out
    return tree_map(lambda x: OtherTensor(x) if isinstance(x, Tensor) else x, out)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> OtherTensor:
    return OtherTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(x: Tensor, into: Tensor, non_blocking: bool = False) -> Tensor:
    source, target = (t.inner if isinstance(t, OtherTensor) else t for t in (x, into))
    target.copy_(source)
    return into


# indexing moves its indices below the reach of the mode; autocast is off, but is entered
library, fallbacks = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
library.impl("empty_strided", _empty_strided, "PrivateUse1")
library.impl("_copy_from", _copy_from, "PrivateUse1")
fallbacks.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")

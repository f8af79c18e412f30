"""What the names in a checkpoint's pickle stand for: a closed table, and placeholders for what training tools leave.

Three answers to a name:

- It makes tensors or dicts (KNOWN): one of the functions below is used in its place, never the one that is named.
- It is data of a training tool (INERT, INERT_PACKAGES): a placeholder, which has no value and cannot be called. It is
  fine beside the weights (a Lightning callback, a learning-rate schedule, a numpy number) and is never a weight.
- Anything else, any name with a dot in it too: the file is refused by that name, before anything is built from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from weights_convert.mapped import sizes


class PickleError(ValueError):
    """A pickle that is damaged, or wants more than to be read; the text says what was found and expected."""


@dataclass(frozen=True, eq=False)
class Name:
    """A name that stands for nothing."""

    full: str

    def __str__(self) -> str:
        return self.full


@dataclass(frozen=True, eq=False)
class Known:
    """A name that is replaced by a function of this file."""

    build: Callable[[tuple[Any, ...]], Any]


@dataclass(eq=False)
class Placeholder:
    """An object of a type that is not wanted. Modules of a TorchScript archive keep their attributes."""

    name: str
    attributes: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.name

    def take_state(self, state: Any) -> None:
        if self.is_script and isinstance(state, dict):
            self.attributes = state

    @property
    def is_script(self) -> bool:
        """A module of a TorchScript archive."""
        return self.name.startswith("__torch__.")


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file; without a dtype, of bytes."""

    key: str
    dtype: torch.dtype | None
    length: int

    @property
    def nbytes(self) -> int:
        return self.length * (self.dtype.itemsize if self.dtype else 1)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still on the disk; `offset` and `stride` count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(args: tuple[Any, ...], dtype: torch.dtype | None = None) -> StoredTensor:
    """From (storage, offset, shape, stride, ...); what follows are gradients' settings, and marks of lazy views."""
    if len(args) < 4 or not isinstance(args[0], Storage) or (len(args) > 6 and args[6]):
        raise PickleError("a tensor without its storage, or a conjugated view, expected a plain tensor")
    storage, (offset,), shape, stride = args[0], sizes([args[1]]) or (None,), sizes(args[2]), sizes(args[3])
    if offset is None or shape is None or stride is None or len(shape) != len(stride):
        raise PickleError(f"a tensor of shape {str(args[2])[:80]}, strides {str(args[3])[:80]}, expected sizes")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise PickleError("a tensor without a dtype, expected one")
    numel, last = 1, offset
    for n, step in zip(shape, stride, strict=True):
        numel, last = numel * n, last + (n - 1) * step
    if numel and (last + 1) * dtype.itemsize > storage.nbytes:
        raise PickleError(f"a tensor that reaches element {last} of a storage of {storage.nbytes} bytes, expected less")
    if numel * dtype.itemsize > storage.nbytes:
        raise PickleError(f"a tensor of {numel} elements that repeats its {storage.nbytes} bytes, expected each once")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _tensor_v3(args: tuple[Any, ...]) -> StoredTensor:
    if len(args) < 7 or not isinstance(args[6], torch.dtype):
        raise PickleError("a tensor without a dtype, expected one")
    return _tensor((*args[:6], *args[7:]), args[6])


def _parameter(args: tuple[Any, ...]) -> StoredTensor:
    if not args or not isinstance(args[0], StoredTensor):
        raise PickleError("a parameter without its tensor, expected one")
    return args[0]


def _of_type(args: tuple[Any, ...]) -> StoredTensor:
    """From (function, type, its arguments, state): a tensor with attributes, which are left."""
    if len(args) < 3 or args[0] not in TENSOR_MAKERS or not isinstance(args[2], tuple):
        raise PickleError("a tensor of an own type, expected a plain one")
    made: StoredTensor = args[0].build(args[2])
    return made


def _dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    """OrderedDict(), or Python 2's OrderedDict([[key, value], ...]); defaultdict's first argument is left."""
    pairs = args[-1] if args and isinstance(args[-1], list) else []
    if not all(isinstance(p, (list, tuple)) and len(p) == 2 and isinstance(p[0], str) for p in pairs):
        raise PickleError("a dict of something else than pairs, expected keys with values")
    return dict(pairs)


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    found = sizes(args[0]) if args else None
    if found is None:
        raise PickleError("a torch.Size that is none, expected sizes")
    return found


STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = (*STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class StorageType:
    """A class of storages; without a dtype, the one of bytes."""

    dtype: torch.dtype | None


TENSOR_MAKERS = (Known(_tensor), Known(_tensor_v3), Known(_parameter))
KNOWN: dict[str, Any] = {
    "torch._utils._rebuild_tensor": TENSOR_MAKERS[0],
    "torch._utils._rebuild_tensor_v2": TENSOR_MAKERS[0],
    "torch._utils._rebuild_tensor_v3": TENSOR_MAKERS[1],
    "torch._utils._rebuild_parameter": TENSOR_MAKERS[2],
    "torch._utils._rebuild_parameter_with_state": TENSOR_MAKERS[2],
    "torch._tensor._rebuild_from_type_v2": Known(_of_type),
    "torch.Size": Known(_size),
    "collections.OrderedDict": Known(_dict),
    "collections.defaultdict": Known(_dict),
    "torch.storage.UntypedStorage": StorageType(None),
    **{f"torch.{name}": StorageType(dtype) for name, dtype in STORAGES.items()},
    **{str(dtype): dtype for dtype in DTYPES},
}

# Every name inside of these is a placeholder; `__main__` holds the classes of the script that saved the file.
_PACKAGES = """
    __main__ __torch__ addict diffusers easydict ldm lightning lightning_fabric lightning_utilities ml_collections
    omegaconf pytorch_lightning sgm torchmetrics transformers yacs
"""
_TYPES = """
    _codecs.encode argparse.Namespace collections.Counter collections.deque copy_reg._reconstructor
    copyreg._reconstructor decimal.Decimal enum.Enum enum.IntEnum uuid.UUID
    builtins.bool builtins.bytearray builtins.bytes builtins.complex builtins.dict builtins.float builtins.frozenset
    builtins.int builtins.list builtins.long builtins.object builtins.range builtins.set builtins.slice builtins.str
    builtins.tuple builtins.unicode builtins.xrange
    datetime.date datetime.datetime datetime.timedelta datetime.timezone
    pathlib.Path pathlib.PosixPath pathlib.PurePosixPath pathlib.PureWindowsPath pathlib.WindowsPath
    pathlib._local.PosixPath pathlib._local.WindowsPath
    typing.Any typing.Dict typing.List typing.Optional typing.Tuple typing.Union
    numpy.core.multiarray._reconstruct numpy.core.multiarray.scalar numpy.core.numeric._frombuffer
    numpy._core.multiarray._reconstruct numpy._core.multiarray.scalar numpy._core.numeric._frombuffer
    numpy.bool_ numpy.dtype numpy.float32 numpy.float64 numpy.int32 numpy.int64 numpy.ndarray
    numpy.dtypes.BoolDType numpy.dtypes.Float32DType numpy.dtypes.Float64DType numpy.dtypes.Int32DType
    numpy.dtypes.Int64DType numpy.random._pickle.__bit_generator_ctor numpy.random._pickle.__generator_ctor
    numpy.random._pickle.__randomstate_ctor
    torch.Generator torch.Tensor torch._tensor.Tensor torch.device torch.nn.parameter.Buffer
    torch.nn.parameter.Parameter torch.jit._pickle.build_boollist torch.jit._pickle.build_doublelist
    torch.jit._pickle.build_intlist torch.jit._pickle.build_tensorlist torch.jit._pickle.restore_type_tag
"""
INERT_PACKAGES = frozenset(_PACKAGES.split())
INERT = frozenset(_TYPES.split())


def lookup(module: str, name: str) -> Any:
    """What `module.name` stands for. Raises PickleError for a name in none of the tables."""
    full = f"{module.replace('__builtin__', 'builtins')}.{name}"
    if "." not in name:
        if full in KNOWN:
            return KNOWN[full]
        root = module.split(".")[0]
        if full in INERT or root in INERT_PACKAGES:
            return Name(full)
    raise PickleError(
        f"the name {full[:120]!r}, which is no part of a checkpoint and can run code (nothing was run), expected "
        "tensors, dicts and plain values; use the .safetensors version of this file, or let whoever made it save the "
        "state dict alone"
    )

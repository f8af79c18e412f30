"""The one place that chooses a device and a number format."""

from __future__ import annotations

import functools
import logging
import os
import platform
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from i2v.config import ConfigError

log = logging.getLogger(__name__)
LARGE = 128 * 2**20  # parameters; a smaller model, as the miniature, is quick in float32, the same on every CPU
Number = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """This process among those that torchrun started: its number, how many there are, its number on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0


def launched() -> bool:
    """Whether torchrun started this process. Some builds of torch (Windows, Jetson) come without its package."""
    return dist.is_available() and dist.is_torchelastic_launched()


def place() -> Place:
    """Where torchrun put this process; alone without it."""
    if not launched():
        return Place()
    return Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def own_device(name: str | torch.device, here: Place) -> torch.device:
    """As `pick_device`; with "auto" and "cuda" each of several processes takes a GPU of its own."""
    if str(name) in ("auto", "cuda") and here.count > 1 and torch.cuda.is_available():
        return pick_device(f"cuda:{here.local_rank}")
    return pick_device(name)


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """ "auto" takes CUDA, then Apple's MPS, then the CPU; any other name is checked to exist here.

    Raises ConfigError for a device that torch does not know or that this machine lacks.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: torch knows no such device; use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device {name}: this machine or this build of torch has no MPS; use --device cpu")
    return device


def computes_bfloat16() -> bool:
    """Whether this CPU has instructions for it; others compute in float32 what is stored in bfloat16, and slower."""
    known = (getattr(torch.cpu, f"_is_{name}_supported", lambda: False) for name in ("avx512_bf16", "amx_tile"))
    return any(supported() for supported in known) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computes_float16() -> bool:
    """Whether this CPU has instructions for that."""
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported") and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def tell_if_slow(name: str, device: torch.device) -> None:
    """A number format that this CPU has no instructions for is allowed, since it saves memory, and warned of.

    Asked of x86 alone, whose instructions are known.
    """
    if device.type != "cpu" or name == "float32" or platform.machine().lower() not in ("x86_64", "amd64"):
        return
    if not (computes_bfloat16() if name == "bfloat16" else computes_float16()):
        _warn_once(f"--dtype {name}: this CPU has no instructions for it; in float32 it is 10 to 100 times as fast")


@functools.cache
def _warn_once(line: str) -> None:
    log.warning("%s", line)


def training_dtype(name: Number, device: torch.device) -> Number:
    """What a training computes in: "auto" is bfloat16 where the device has instructions for it, otherwise float32.

    Not float16, which must scale its loss. On a CPU without these instructions bfloat16 takes ten times as long.
    """
    if name != "auto":
        tell_if_slow(name, device)
        return name
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = device.type == "cpu" and computes_bfloat16()
    return "bfloat16" if able else "float32"


def autocast(name: Number, device: torch.device) -> torch.autocast:
    """A training's forward pass in `training_dtype`."""
    dtype = DTYPES[training_dtype(name, device)]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def pick_dtype(name: str | torch.dtype, device: torch.device, parameters: int = 0) -> torch.dtype:
    """ "auto" is float16 on a GPU; on a CPU bfloat16 for `LARGE` models where it computes in that, otherwise float32.

    parameters: of the model. Schedule, noise and sampler state are float32 in any case.
    """
    if isinstance(name, torch.dtype):
        return name
    if name == "auto" and device.type == "cpu":
        return torch.bfloat16 if parameters >= LARGE and computes_bfloat16() else torch.float32
    if name == "auto":
        return torch.float16
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
    tell_if_slow(name, device)
    return DTYPES[name]


class Overflow(ValueError):
    """Numbers that a format could not hold."""


def finite(x: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """x. Raises Overflow where there are infinities in it or what comes of them, which would be a black video."""
    if not bool(x.isfinite().all()):
        name = str(dtype).removeprefix("torch.")
        instead = "lower --guidance-scale and the scales of LoRAs" if dtype == torch.float32 else "use --dtype float32"
        raise Overflow(f"{what} are not finite any more, a number became too large for {name}; {instead}")
    return x


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; CUDA goes on with its work meanwhile."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

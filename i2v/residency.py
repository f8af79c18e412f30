"""Which parts of a model are in memory, and when: read from their files for a stage, let go of after it.

The files stay open and mapped, so that letting go costs nothing and nothing is ever held twice. On a GPU the same moves
a part onto the device for its stage. A part that is not here is on the meta device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from weights_convert.mapped import release

R = TypeVar("R")

LEVELS = ("down_blocks.", "mid_block.", "up_blocks.")
# keys and values of a run's text and picture are made once, of all levels at the same time
ALWAYS = (".attn2.to_k.", ".attn2.to_v.", ".ip_adapter.")


class Residency:
    """Fills the parts of a stage when it begins; those of stages that do not stay are emptied when it ends.

    stages: name -> its parts. fill: reads a part into its modules. empty: the opposite. keep: stages that stay in
    memory once they are there.
    """

    def __init__(
        self,
        stages: Mapping[str, Sequence[str]],
        fill: Callable[[str], None],
        empty: Callable[[str], None],
        keep: Collection[str],
    ):
        self.stages, self.fill, self.empty, self.keep = stages, fill, empty, frozenset(keep)
        self.here: set[str] = set()

    def load(self, stage: str) -> None:
        """Unless it is here already."""
        if stage not in self.here:
            for part in self.stages[stage]:
                self.fill(part)
            self.here.add(stage)

    @contextmanager
    def __call__(self, *stages: str) -> Iterator[None]:
        """With the parts of these stages in memory."""
        mine = [stage for stage in stages if stage not in self.here]
        try:
            for stage in mine:
                self.load(stage)
            yield
        finally:
            for stage in mine:
                if stage in self.here - self.keep:
                    self.here.remove(stage)
                    for part in self.stages[stage]:
                        self.empty(part)


class HasResidency(Protocol):
    """A pipeline; None: all of it is in memory."""

    residency: Residency | None


def needed(pipe: HasResidency, *stages: str) -> AbstractContextManager[None]:
    """A block that needs the parts of these stages."""
    return nullcontext() if pipe.residency is None else pipe.residency(*stages)


def during(*stages: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """A method of a pipeline that needs the parts of these stages."""

    def wrap(method: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(method)
        def inside(self: HasResidency, *arguments: Any, **settings: Any) -> R:
            with needed(self, *stages):
                return method(self, *arguments, **settings)

        return inside

    return wrap


def put(network: nn.Module, key: str, tensor: Tensor) -> None:
    """`tensor` in place of the frozen parameter or buffer of that name."""
    path, _, name = key.rpartition(".")
    owner = network.get_submodule(path)
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def take(network: nn.Module, key: str) -> None:
    """Leaves a tensor on the meta device in the place of that parameter or buffer."""
    path, _, name = key.rpartition(".")
    owner = network.get_submodule(path)
    old = owner._parameters.get(name, owner._buffers.get(name))
    if old is not None:
        put(network, key, torch.empty(old.shape, dtype=old.dtype, device="meta"))


class Streamed:
    """A UNet whose levels are in memory one at a time: each is filled before it runs and emptied after it.

    stored: every tensor by its path in the UNet. read: makes of it what the UNet takes, or leaves it as it is.
    """

    def __init__(self, unet: nn.Module, stored: Mapping[str, Tensor], read: Callable[[str, Tensor], Tensor]):
        self.unet, self.stored, self.read = unet, stored, read
        self.units: dict[str, list[str]] = {}
        self.resident: list[str] = []
        for key in stored:
            unit = streamed_unit(key)
            (self.units.setdefault(unit, []) if unit else self.resident).append(key)
        for name, keys in self.units.items():
            block = unet.get_submodule(name)
            block.register_forward_pre_hook(functools.partial(self._before, keys))
            block.register_forward_hook(functools.partial(self._after, keys))

    def fill(self, keys: Sequence[str]) -> None:
        for key in keys:
            tensor = self.stored[key]
            used = self.read(key, tensor)
            put(self.unet, key, used)
            if used is not tensor:
                release([tensor])

    def empty(self, keys: Sequence[str]) -> None:
        for key in keys:
            take(self.unet, key)
        release([self.stored[key] for key in keys])

    def _before(self, keys: Sequence[str], *_: Any) -> None:
        self.fill(keys)

    def _after(self, keys: Sequence[str], *_: Any) -> None:
        self.empty(keys)


def streamed_unit(key: str) -> str:
    """The level of a UNet whose parameter has this name; "" for what stays in memory."""
    if not key.startswith(LEVELS) or any(word in key for word in ALWAYS):
        return ""
    return "mid_block" if key.startswith("mid_block.") else ".".join(key.split(".")[:2])

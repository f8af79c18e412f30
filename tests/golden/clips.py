"""What the tests of original UNets share: their 5-d layout, and reading activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor, nn


def fold(x: Tensor) -> Tensor:
    """(B, C, F, h, w) of the original code -> (B*F, C, h, w)."""
    return rearrange(x, "b c f h w -> (b f) c h w")


def unfold(x: Tensor, clips: int) -> Tensor:
    """(B*F, C, h, w) -> (B, C, F, h, w)."""
    return rearrange(x, "(b f) c h w -> b c f h w", b=clips)


def worst(got: Tensor, want: Tensor) -> float:
    """Largest absolute difference; the shapes have to be the same."""
    assert got.shape == want.shape
    return float((got.cpu() - want).abs().max())


@contextmanager
def activations(root: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the named modules of `root`, filled while it runs; of a list (a level's states), the last one."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def keep(module: nn.Module, args: object, out: Tensor | list[Tensor], name: str = name) -> None:
            seen[name] = out[-1] if isinstance(out, list) else out

        handles.append(root.get_submodule(name).register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def nudged(module: nn.Module, factor: float = 1.01) -> nn.Module:
    """The deliberate fault: every second number of `module` one percent off (a norm would swallow a common factor)."""
    for p in module.parameters():
        p.view(-1)[::2].mul_(factor)
    return module

"""Gradient checkpointing: a block keeps its input alone and is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from i2v.models.layers import ResBlock, SpatialTransformer
from i2v.models.motion import MotionModule
from i2v.models.unet import UNet

BLOCKS = (ResBlock, SpatialTransformer, MotionModule)
Places = list[tuple[dict[str, Any], str, Tensor]]  # a layer's parameters, the name of one, what is there


def recompute_blocks(unet: UNet) -> int:
    """From now on the UNet's residual, transformer and motion blocks are computed again; how many there are.

    Same values and gradients. Nothing random happens inside a block, so no generator's state is kept.
    """
    blocks = [module for module in unet.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        again: Any = partial(_twice, block, block.forward)
        nn.Module.__setattr__(block, "forward", again)
    return len(blocks)


def _twice(block: nn.Module, forward: Callable[..., Tensor], *args: Any) -> Any:
    places = _places(block)  # a trained LoRA puts its changed weights there for one forward pass
    return checkpoint(_with, places, block, forward, *args, use_reentrant=False, preserve_rng_state=False)


def _with(places: Places, block: nn.Module, forward: Callable[..., Tensor], *args: Any) -> Tensor:
    """The block's result with the weights of its first run, wherever they are now."""
    now = _places(block)
    _put(places)
    try:
        return forward(*args)
    finally:
        _put(now)


def _places(block: nn.Module) -> Places:
    layers = [module._parameters for module in block.modules()]
    return [(layer, name, value) for layer in layers for name, value in layer.items() if value is not None]


def _put(places: Places) -> None:
    for layer, name, value in places:
        layer[name] = value

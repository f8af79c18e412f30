"""Gradient checkpointing: a block keeps its input alone and is computed again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from i2v.models.layers import ResBlock, SpatialTransformer
from i2v.models.motion import MotionModule
from i2v.models.unet import UNet

BLOCKS = (ResBlock, SpatialTransformer, MotionModule)


def recompute_blocks(unet: UNet) -> int:
    """From now on the UNet's residual, transformer and motion blocks are computed again; how many there are.

    Same values and gradients. Nothing random happens inside a block, so no generator's state is kept.
    """
    blocks = [module for module in unet.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        again: Any = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        nn.Module.__setattr__(block, "forward", again)
    return len(blocks)

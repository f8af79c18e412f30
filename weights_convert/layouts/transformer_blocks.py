"""Where the spatial transformer blocks of a UNet are, in the order that published adapters number them by."""

from __future__ import annotations

from i2v.models.unet import UNetConfig

# The first spatial transformer block of each base, and the size of its cross-attention's keys, which tell them apart.
FIRST = {
    "sd15": "down_blocks.0.attentions.0.transformer_blocks.0",
    "sdxl": "down_blocks.1.attentions.0.transformer_blocks.0",
}
TO_K = {"sd15": (320, 768), "sdxl": (640, 2048)}


def transformer_blocks(cfg: UNetConfig) -> list[str]:
    """Paths of all blocks: the way down, the way up, and the middle last.

    IP-Adapter files number attentions in this order (self- and cross-attention of each block in turn).
    """
    last = len(cfg.channels) - 1
    places = [(f"down_blocks.{i}.attentions.{j}", d) for i, d in enumerate(cfg.depths) for j in range(cfg.layers)]
    places += [
        (f"up_blocks.{i}.attentions.{j}", cfg.depths[last - i]) for i in range(last + 1) for j in range(cfg.layers + 1)
    ]
    places.append(("mid_block.attentions.0", cfg.mid_depth))
    return [f"{path}.transformer_blocks.{n}" for path, depth in places for n in range(depth)]

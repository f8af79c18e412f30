"""The I2V-Adapter (Sec. 3.2): the paper's one idea, and its only trained parameters."""

from __future__ import annotations

from torch import Tensor, nn

from i2v.models.conditioning import Conditioning
from i2v.models.layers import Attention, CastLinear, TransformerBlock, attend, scaled
from i2v.models.unet import UNet


class FirstFrameAttention(nn.Module):
    """Every frame queries the anchor frame (the first one); the result is the second term of Eq. (6).

    to_q is W_Q', a copy of the frozen W_Q at the start. to_out is W_O', weight and bias zero at the start: a fresh
    adapter changes nothing. There is no W_K, no W_V: keys and values are those that the frozen self-attention made.
    `scale` multiplies the result; 1 is the paper, 0 its ablation (Table 3).
    """

    def __init__(self, base: Attention):
        super().__init__()
        weight = base.to_q.weight.detach()
        self.heads = base.heads
        self.scale = 1.0
        self.to_q = CastLinear.of(weight)
        self.to_out = CastLinear.of(weight.new_zeros(weight.shape), weight.new_zeros(len(weight)))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, cond: Conditioning) -> Tensor:
        """Q' = X W_Q' attends to K and V of the anchor frame, for every frame. Implements Eq. (5).

        x, k, v (B*F, L, C): normed input, keys and values of the frozen self-attention -> (B*F, L, C), after W_O'.
        Under a memory budget these may be some of a clip's frames: of the others, `cond.of_anchor` alone can tell.
        """
        k, v = cond.of_anchor(self, k, v)
        return scaled(self.to_out(attend(self.to_q(x), k, v, self.heads)), self.scale)


def add_i2v_adapter(unet: UNet) -> dict[str, FirstFrameAttention]:
    """Fill the `i2v_adapter` slot of every transformer block; what is returned is all that the paper trains.

    Returns the modules by their path in the UNet: float32, on the UNet's device. Add them after the UNet's weights are
    loaded, since W_Q' is copied from them. Raises ValueError where an adapter is there already.
    """
    blocks = {name: m for name, m in unet.named_modules() if isinstance(m, TransformerBlock)}
    if any(block.i2v_adapter is not None for block in blocks.values()):
        raise ValueError("this UNet has an I2V-Adapter: call remove_i2v_adapter before another is added")
    added = {}
    for name, block in blocks.items():
        block.i2v_adapter = added[f"{name}.i2v_adapter"] = FirstFrameAttention(block.attn1)
    return added


def remove_i2v_adapter(unet: UNet) -> None:
    """Empty the slots; the UNet computes what it did before."""
    for module in unet.modules():
        if isinstance(module, TransformerBlock):
            module.i2v_adapter = None

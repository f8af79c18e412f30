"""What a training step of the I2V-Adapter keeps for its gradients, at SD1.5's size: `python -m bench.kept`.

Nothing is computed and no memory is needed: the networks are on the meta device, and the sizes of the tensors that
autograd keeps, weights left out, are added up. "Plainly" is the same network without `i2v/models/frozen.py`. One clip,
float32, no checkpointing.
"""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from i2v.models import frozen
from i2v.models.unet import SD15


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The CPU's kernel: the meta device would take the one that keeps all weights."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


def kept(frames: int, size: int, plainly: bool) -> float:
    """GB that the graph of one forward pass holds."""
    net = peers.unet(SD15, adapter=True)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("i2v_adapter" in name)
    found = {p.untyped_storage()._cdata: p.untyped_storage() for p in net.parameters()}
    weights = set(found)

    def keep(x: Tensor) -> Tensor:
        found.setdefault(x.untyped_storage()._cdata, x.untyped_storage())
        return x

    given = peers.inputs(frames, size, torch.float32, "meta")
    context, image_tokens = given["context"][:1], given["image_tokens"][:1]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        patch.object(F, "scaled_dot_product_attention", attention),
        patch.object(torch, "is_autocast_enabled", lambda kind: False),  # the meta device knows no autocast
        patch.object(torch, "get_autocast_dtype", lambda kind: torch.float32),
        patch.object(frozen, "applies", (lambda *tensors: False) if plainly else frozen.applies),
    ):
        timesteps = torch.zeros(1, device="meta")
        out = net(given["latents"], timesteps, context, image_tokens=image_tokens, num_frames=frames)
    total = sum(storage.nbytes() for key, storage in found.items() if key not in weights)
    if not out.requires_grad:
        raise RuntimeError("the output needs no gradient: nothing was kept for a backward pass")
    return total / 1e9


def main() -> None:
    """Prints the table."""
    print("| clip | written plainly | ours | ratio |\n|---|---|---|---|")
    for frames, size in ((4, 256), (16, 256), (16, 512)):
        plain, mine = (kept(frames, size, plainly) for plainly in (True, False))
        print(f"| {frames} x {size}x{size} | {plain:.2f} GB | {mine:.2f} GB | {mine / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()

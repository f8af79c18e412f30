"""A training step of the adapter at Stable Diffusion 1.5's size, ours and written plainly: rows of `bench.speed`.

One clip, random weights, no checkpointing: forward, backward, AdamW of the adapter's 24.8 million parameters. Under
bfloat16 the frozen weights are bfloat16 and the adapter's float32, with autocast, as in train.py. "Plainly" is the same
network without `i2v/models/frozen.py`: what PyTorch makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import peers
from i2v.models import frozen
from i2v.models.unet import SD15


def stepper(frames: int, size: int, dtype: torch.dtype) -> Callable[[bool], float]:
    """A function that makes one step, plainly or not, and returns the loss; the adapter's weights move on."""
    net = peers.randomize(peers.unet(SD15, adapter=True), dtype).train()
    for name, parameter in net.named_parameters():
        if "i2v_adapter" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-5)
    given = peers.inputs(frames, size, dtype)
    context = net.context_kv(given["context"][:1], given["image_tokens"][:1])
    target = torch.randn(given["latents"].shape, generator=torch.Generator().manual_seed(2))

    def predicted() -> Tensor:
        return net(given["latents"], torch.tensor([500]), context, num_frames=frames)

    def step(plainly: bool) -> float:
        plain = patch.object(frozen, "applies", lambda *tensors: False) if plainly else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), plain:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = predicted()
            loss = (out.float() - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(frames: int, size: int, dtype: torch.dtype, in_turn: Callable[[Any], dict[str, float]]) -> dict[str, Any]:
    """Medians of both, in turn, in one process."""
    with torch.inference_mode(False):
        step = stepper(frames, size, dtype)
        times = in_turn({"plainly": lambda: step(True), "ours": lambda: step(False)})
    return {"seconds": times, "ratio": times["plainly"] / times["ours"]}

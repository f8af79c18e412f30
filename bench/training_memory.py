"""The memory of one training step at full size, measured beside what `train.py --dry-run` says of it.

    python -m bench.training_memory --preset i2v-sd15 --num-frames 8 --height 256 --width 256

Weights are random, the step is the loop's own: forward, backward, AdamW, moving average. Measured is the largest
resident memory of this process (Linux), less what it held before the networks were built.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import nn

from i2v.free_memory import keep_freed_memory
from i2v.networks import networks
from i2v.presets import PRESETS
from i2v.training.ema import EMA
from i2v.training.memory import USUAL, estimate
from i2v.training.recompute import recompute_blocks
from i2v.training.settings import Training


def resident() -> int:
    """The largest so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step(cfg: Training) -> float:
    """One step of the adapter's training on random weights and zero latents; seconds."""
    preset, (motion, content) = PRESETS[cfg.preset], USUAL[cfg.preset]
    if preset.networks is None:
        raise ValueError(f"{cfg.preset} has no published base")
    configs = {"unet": preset.networks.unet, "motion": motion, "image_projection": content, "ip_adapter": None}
    built = networks({**configs, "i2v_adapter": None})
    projection = built.slots["image_projection"][""]
    generator = torch.Generator().manual_seed(0)
    for module in (*built.unet.modules(), *projection.modules()):
        for key, old in module._parameters.items():
            if old is not None and old.is_meta:
                new = torch.empty(old.shape).uniform_(-0.02, 0.02, generator=generator)
                module._parameters[key] = nn.Parameter(new, requires_grad=False)
    trained = {f"{path}{name}": p for path, m in built.slots["i2v_adapter"].items() for name, p in m.named_parameters()}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    if cfg.checkpointing:
        recompute_blocks(built.unet)
        keep_freed_memory(False)
    optimizer, ema = torch.optim.AdamW(trained.values(), lr=1e-4, fused=True), EMA(trained, 0.999)
    unet, factor = preset.networks.unet, preset.networks.vae.factor
    clips, frames = cfg.micro_batch or cfg.batch, cfg.num_frames
    latents = torch.zeros(clips * frames, unet.latent_channels, cfg.height // factor, cfg.width // factor)
    told = {"image_tokens": projection(torch.zeros(clips, 257, content.image_dim))}
    if unet.pooled_dim:
        told |= {"pooled": torch.zeros(clips, unet.pooled_dim), "size_ids": torch.zeros(clips, unet.size_numbers)}
    began = time.monotonic()
    out = built.unet(latents, torch.full((clips,), 500), torch.zeros(clips, 77, unet.context_dim),
                     num_frames=frames, **told)  # fmt: skip
    out.square().mean().backward()
    optimizer.step()
    ema.update()
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training_memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=sorted(USUAL), default="i2v-sd15")
    parser.add_argument("--num-frames", type=int, default=8)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    cfg = Training(preset=given.preset, num_frames=given.num_frames, height=given.height, width=given.width, batch=1,
                   dtype="float32", checkpointing=given.checkpointing, dry_run=True)  # fmt: skip
    said = sum(estimate(cfg).values())
    before = resident()
    seconds = step(cfg)
    measured = resident() - before
    print(f"{given.preset}, {given.num_frames} frames {given.width}x{given.height}, float32"
          f"{', checkpointing' if given.checkpointing else ''}: said {said / 1e9:.2f} GB, measured "
          f"{measured / 1e9:.2f} GB ({said / measured - 1:+.1%}), {seconds:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()

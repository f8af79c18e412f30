"""Trains the miniature's VAE: `python -m i2v.training.vae --out runs/tiny/vae`.

It learns from frames of the procedural worlds and from pictures with the statistics of photographs
(i2v/data/natural.py), so that it also carries pictures that the world does not draw.

Loss: L1 + 0.5 L2 + 0.5 L1 of the picture's gradients (edges are what a small autoencoder loses first) + a light KL.
At the end each latent channel is brought to mean 0 and standard deviation 1 by folding the affine map into the 1x1
convolutions around the latent, so that the stored scaling factor is 1.

`--init FILE` begins with a finished VAE. `--polish FILE` goes on with the decoder of a finished VAE. Its encoder stays
as it is, and so do all latents: a network that was trained on them needs nothing new.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from i2v import config, load
from i2v.config import flag
from i2v.data.natural import natural_picture
from i2v.data.world import WORLDS, make_clip
from i2v.device import autocast, pick_device
from i2v.models.vae import VAE, VAEConfig
from i2v.parts import save_part
from i2v.training import checkpoint
from i2v.training.ema import EMA
from i2v.training.optim import learning_rate, optimizer_tensors, restore_optimizer
from i2v.training.settings import refuse_changes

TINY_VAE = VAEConfig(
    channels=(48, 80), layers=1, latent_channels=16, patch=4, groups=16, mid_attention=False, scaling_factor=1.0
)


@dataclass(frozen=True)
class VAETraining:
    """Train the miniature's VAE on frames of the procedural world."""

    out: Path = flag(Path("runs/tiny/vae"), "folder for checkpoints, log and the finished vae.safetensors")
    init: Path | None = flag(None, "a finished vae.safetensors to begin with; not given: random weights")
    polish: Path | None = flag(None, "a finished vae.safetensors whose decoder is trained further")
    worlds: tuple[str, ...] = flag(("level_1",), "levels of the procedural world, in equal shares", "--world")
    natural: float = flag(0.4, "share of the frames that are pictures with the statistics of photographs, 0 to 1")
    size: int = flag(64, "side of the frames in pixels")
    frames: int = flag(12000, "how many frames are drawn beforehand")
    steps: int = flag(3200, "optimizer steps")
    batch: int = flag(32, "frames per step")
    lr: float = flag(2e-3, "peak learning rate")
    kl: float = flag(1e-5, "weight of the KL term (mean per latent element)")
    device: str = flag("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1")
    seed: int = flag(0, "seed of the weights, the draws and the order")
    save_every: int = flag(500, "steps between checkpoints")


def draw_frames(world: str, split: str, count: int, size: int, per_clip: int = 2) -> Tensor:
    """(count, 3, size, size) uint8: `per_clip` frames spread over each clip of the split."""
    out = np.empty((-(-count // per_clip) * per_clip, size, size, 3), np.uint8)
    for i in tqdm(range(0, count, per_clip), desc=f"drawing {split} frames of {world}", mininterval=2):
        out[i : i + per_clip] = make_clip(WORLDS[world], split, i // per_clip, num_frames=per_clip, size=size).frames
    return torch.from_numpy(out[:count]).permute(0, 3, 1, 2)


def draw_natural(split: str, count: int, size: int) -> Tensor:
    """(count, 3, size, size) uint8."""
    out = np.empty((count, size, size, 3), np.uint8)
    for i in tqdm(range(count), desc=f"drawing natural pictures of {split}", mininterval=2):
        out[i] = natural_picture(split, i, size)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def draw_mixture(cfg: VAETraining, split: str, count: int) -> dict[str, Tensor]:
    """Frames by source: each world's name, and "natural"; sources without a share are left out."""
    natural = round(count * cfg.natural)
    each = (count - natural) // len(cfg.worlds)
    out = {world: draw_frames(world, split, each, cfg.size) for world in cfg.worlds if each}
    return out | ({"natural": draw_natural(split, natural, cfg.size)} if natural else {})


def to_float(frames: Tensor) -> Tensor:
    """uint8 -> [-1, 1]."""
    return frames.float() / 127.5 - 1


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(out: Tensor, target: Tensor) -> Tensor:
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(out), gradients(target), strict=True))
    return F.l1_loss(out, target) + 0.5 * F.mse_loss(out, target) + 0.5 * edges


@torch.no_grad()
def psnr(vae: VAE, frames: Tensor) -> float:
    """Mean PSNR in dB of the round trip through the latent mean; peak 2 because pixels span [-1, 1]."""
    x = to_float(frames.to(next(vae.parameters()).device))
    out = vae.decode(vae.encode(x).mode()).clamp(-1, 1)
    return float((10 * torch.log10(4 / (out - x).square().mean((1, 2, 3)))).mean())


@torch.no_grad()
def standardise(vae: VAE, frames: Tensor) -> list[float]:
    """Fold mean 0 and deviation 1 per latent channel into the two 1x1 convolutions; returns the old deviations."""
    device = next(vae.parameters()).device
    z = torch.cat([vae.encode(to_float(part.to(device))).mode() for part in frames.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    if quant is None or post is None or quant.bias is None or post.bias is None:
        raise ValueError("this VAE has no 1x1 convolutions around its latent to fold the statistics into")
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the second half is the log variance
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
    return [round(s, 3) for s in std.tolist()]


def main(argv: list[str] | None = None) -> None:
    cfg = config.from_command_line(VAETraining, argv)
    device = pick_device(cfg.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        vae = VAE(TINY_VAE)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae.to(device)
    named = dict(vae.named_parameters())
    begin = cfg.polish or cfg.init
    if begin is not None:
        vae.load_state_dict({k: v.float() for k, v in load.header(begin).tensors().items()})
    if cfg.polish is not None:
        vae.encoder.requires_grad_(False)
        named = {k: v for k, v in named.items() if k.startswith(("decoder.", "post_quant_conv."))}
    optimizer = torch.optim.AdamW(named.values(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    ema, start, spent = EMA(named, 0.998), 0, 0.0
    lock = checkpoint.hold(cfg.out)
    if (found := checkpoint.latest(cfg.out)) is not None:
        tensors, facts = checkpoint.load(found)
        refuse_changes(cfg, facts.get("config", {}), found)
        vae.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        ema.shadow = {k: tensors[f"ema.{k}"].to(device) for k in named}
        restore_optimizer(optimizer, named, {k[6:]: v for k, v in tensors.items() if k.startswith("optim.")})
        start, spent, ema.updates = facts["step"], facts["seconds"], facts["step"]
        print(f"going on from {found}")

    mixture = draw_mixture(cfg, "train", cfg.frames)
    frames = torch.cat(list(mixture.values()))
    held_out = draw_mixture(cfg, "val", 256)
    path = cfg.out / "log.jsonl"
    checkpoint.cut_log(path, start)
    log, began = path.open("a"), time.monotonic() - spent
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="vae", mininterval=5)
    for step in bar:
        draw = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        x = to_float(frames[torch.randint(len(frames), (cfg.batch,), generator=draw)].to(device))
        x = x.to(memory_format=torch.channels_last)
        with autocast("auto", device):
            posterior = vae.encode(x)
            noise = torch.randn(posterior.mean.shape, generator=draw)
            out = vae.decode(posterior.sample(noise.to(device)))
        mean, std = posterior.mean.float(), posterior.std.float()
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.clamp_min(1e-6).log()).mean()
        loss = reconstruction_loss(out.float(), x) + cfg.kl * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        rate = learning_rate(step, peak=cfg.lr, warmup=200, steps=cfg.steps, decay="cosine")
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        if (step + 1) % 100 == 0:  # looking at the loss makes a GPU wait
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower --lr")
            bar.set_postfix(loss=f"{loss.item():.4f}")
            row = {
                "step": step + 1,
                "loss": loss.item(),
                "kl": kl.item(),
                "lr": rate,
                "seconds": time.monotonic() - began,
            }
            if (step + 1) % 500 == 0:
                row |= {f"psnr_{source}": psnr(vae, pictures) for source, pictures in held_out.items()}
            log.write(json.dumps(row) + "\n")
            log.flush()
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            state = {f"model.{k}": v for k, v in vae.state_dict().items()} | {
                f"ema.{k}": v for k, v in ema.shadow.items()
            }
            state |= {f"optim.{k}": v for k, v in optimizer_tensors(optimizer, named).items()}
            told = {"seconds": time.monotonic() - began, "config": config.to_dict(cfg)}
            checkpoint.save(cfg.out, step + 1, state, told)

    vae.load_state_dict(vae.state_dict() | ema.shadow)
    numbers: dict[str, object] = {}
    if cfg.polish is None:
        drawn = [part[:2048] for source, part in mixture.items() if source != "natural"]  # what the diffusion sees
        numbers["channel_std_before"] = standardise(vae, torch.cat(drawn or list(mixture.values())))
    numbers |= {f"psnr_{source}": round(psnr(vae, pictures), 2) for source, pictures in held_out.items()}
    print(numbers)
    save_part(
        cfg.out / "vae.safetensors", vae, TINY_VAE, numbers=json.dumps(numbers), recipe=json.dumps(config.to_dict(cfg))
    )
    lock.close()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"i2v.training.vae: error: {error}")

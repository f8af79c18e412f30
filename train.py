"""Training, read top to bottom: the paper's loop (Sec. 3.2, 4.1) and, by other settings, every stage of the miniature.

    python train.py --config configs/tiny-i2v.json

What is trained is a choice of name patterns (`--train`); everything else stays frozen. The paper's case trains
`i2v_adapter.*` (W_Q' and W_O') on clips whose first frame is clean, with the loss on the other frames. The same command
again goes on from the newest checkpoint in `--out`.
"""

from __future__ import annotations

import fnmatch
import json
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from i2v import config, noise
from i2v.config import ConfigError, flag
from i2v.data.latents import WorldLatents
from i2v.data.world import WORLDS, WorldConfig
from i2v.diffusion.losses import denoising_loss
from i2v.training import checkpoint
from i2v.training.ema import EMA
from i2v.training.networks import Networks
from i2v.training.optim import learning_rate, optimizer_tensors, restore_optimizer


@dataclass(frozen=True)
class Training:
    """Train a part of the model. Every setting can stand in --config FILE.json and be overridden by its flag."""

    out: Path = flag(Path("runs/train"), "folder of the run: config, log, checkpoints, finished weights")
    init: Path = flag(Path("weights/tiny"), "folder of parts to start from; one that is not there starts at random")
    parts: tuple[str, ...] = flag(("motion", "ip_adapter", "i2v_adapter"), "what is added to the image UNet")
    train: tuple[str, ...] = flag(("i2v_adapter.*",), "name patterns of the trained tensors; each must match something")
    world: str = flag("level_1", "level of the procedural world")
    clips: int = flag(16000, "clips drawn and encoded once, then reused")
    cache: Path = flag(Path("runs/tiny/latents"), "folder of the encoded clips")
    num_frames: int = flag(16, "frames per training clip; 1 trains on single pictures")
    clean_first: bool = flag(True, "keep the first frame free of noise and out of the loss (the paper's training)")
    batch: int = flag(8, "clips per step")
    steps: int = flag(2000, "optimizer steps")
    lr: float = flag(1e-4, "peak learning rate (paper: 1e-4)")
    warmup: int = flag(0, "steps of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = flag("constant", "learning rate after the warm-up")
    weight_decay: float = flag(1e-2, "AdamW's weight decay")
    clip_norm: float = flag(1.0, "largest norm of the gradient")
    ema: float = flag(0.999, "decay of the moving average that is exported")
    drop_text: float = flag(0.1, "probability that a caption becomes empty (a choice; the paper gives none)")
    drop_image: float = flag(0.1, "probability that the picture becomes zero pixels, a grey one (likewise)")
    dtype: Literal["float32", "bfloat16"] = flag("bfloat16", "compute type of the forward pass; weights stay float32")
    threads: int = flag(0, "CPU threads, 0 = PyTorch's choice")
    seed: int = flag(0, "seed of initial weights, noise, timesteps and clip order")
    log_every: int = flag(20, "steps between log lines")
    validate_every: int = flag(250, "steps between validations")
    save_every: int = flag(250, "steps between checkpoints")


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # (B, F, C, h, w) clean, scaled
    noise: Tensor  # the same shape
    timesteps: Tensor  # (B,) in [0, T)
    captions: list[str]
    pictures: Tensor | None  # (B, 3, S, S) CLIP's normalised input: what the Content-Adapter sees


def draw(cfg: Training, data: WorldLatents, networks: Networks, first: int, count: int) -> Batch:
    """Samples `first` ... `first + count - 1` of the run, each a function of (seed, sample index) alone: neither batch
    size nor restarts change what is seen. Timesteps follow the golden-ratio sequence: uniform, and even in a batch."""
    clips, draws, steps, captions, pictures = [], [], [], [], []
    for sample in range(first, first + count):
        pick, start, keep_text, keep_image = noise.uniform(cfg.seed, "clip", [sample], 0, (4,))[0].tolist()
        index = int(pick * len(data))
        if cfg.num_frames == 1:
            frames = [int(start * data.num_frames)]
        else:  # the whole motion, whatever the number of frames
            frames = [round(f * (data.num_frames - 1) / (cfg.num_frames - 1)) for f in range(cfg.num_frames)]
        clip = data.clip(index, frames)
        clips.append(clip)
        draws.append(noise.normal(cfg.seed, "train", [sample], 0, tuple(clip.shape))[0])
        golden = (0.6180339887498949 * sample + cfg.seed * 0.7548776662466927) % 1
        steps.append(int(golden * networks.schedule.num_train_timesteps))
        captions.append(data.captions[index] if keep_text >= cfg.drop_text else "")
        if "ip_adapter" in cfg.parts:
            picture = data.picture(index)
            pictures.append(picture if keep_image >= cfg.drop_image else torch.zeros_like(picture))
    return Batch(
        torch.stack(clips),
        torch.stack(draws),
        torch.tensor(steps),
        captions,
        torch.stack(pictures) if pictures else None,
    )


def loss_of(cfg: Training, networks: Networks, batch: Batch) -> Tensor:
    """(B,) loss of each clip, Sec. 3.2: noise every frame but the known one, predict, compare on the others."""
    frames = batch.latents.shape[1]
    known = torch.zeros(frames, dtype=torch.bool)
    known[0] = cfg.clean_first and frames > 1
    noisy = networks.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    noisy[:, known] = batch.latents[:, known]  # the first frame stays clean, at the same timestep as the others
    with torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
        context, image_tokens = networks.condition(batch.captions, batch.pictures)
        prediction = networks.unet(
            noisy.flatten(0, 1), batch.timesteps, context, num_frames=frames, image_tokens=image_tokens
        )
    target = networks.schedule.target(batch.latents, batch.noise, batch.timesteps)
    return denoising_loss(prediction.float().unflatten(0, (-1, frames)), target, known)


def other_motion(world: WorldConfig, caption: str, turn: int) -> str:
    """The caption with another motion of the world in its place; `turn` picks which."""
    (now,) = (m for m in world.motions if m in caption)
    others = [m for m in world.motions if m != now]
    return caption.replace(now, others[turn % len(others)])


@torch.no_grad()
def validate(cfg: Training, networks: Networks, data: WorldLatents) -> dict[str, float]:
    """Loss on held-out clips at fixed timesteps and noise, and `gap`: how much worse it is under a caption that asks
    for another motion, the first sign that words move the picture (0 = the caption's motion is ignored)."""
    row: dict[str, float] = {}
    full = Training(**{**cfg.__dict__, "drop_text": 0.0, "drop_image": 0.0, "seed": 1})
    batch = draw(full, data, networks, 0, min(32, len(data)))
    others = [other_motion(WORLDS[cfg.world], caption, k) for k, caption in enumerate(batch.captions)]
    for t in (200, 400, 600, 800, 950):
        at = torch.full_like(batch.timesteps, t)
        right = loss_of(full, networks, Batch(batch.latents, batch.noise, at, batch.captions, batch.pictures))
        row[f"val_{t}"] = float(right.mean())
        if cfg.num_frames > 1:
            wrong = loss_of(full, networks, Batch(batch.latents, batch.noise, at, others, batch.pictures))
            row[f"gap_{t}"] = float((wrong / right).mean() - 1)
    return row


def trained_tensors(cfg: Training, networks: Networks) -> dict[str, torch.nn.Parameter]:
    """The tensors that `--train` names; all others are frozen. A pattern that matches nothing is an error."""
    named = networks.named_parameters()
    for pattern in cfg.train:
        if not fnmatch.filter(named, pattern):
            raise ConfigError(f"--train {pattern!r} matches no tensor; names are like {next(iter(named))}")
    chosen = {k: p for k, p in named.items() if any(fnmatch.fnmatch(k, pattern) for pattern in cfg.train)}
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    return chosen


def main(argv: list[str] | None = None) -> None:
    cfg = config.from_command_line(Training, argv)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    networks = Networks.build(cfg.init, cfg.parts, cfg.seed)
    trained = trained_tensors(cfg, networks)  # before the clips: a wrong pattern is told at once
    data = networks.encoded_world(cfg.cache, cfg.world, "train", cfg.clips)
    held_out = networks.encoded_world(cfg.cache, cfg.world, "val", 64)
    for part, count in networks.summary(trained).items():
        print(f"{part:14} {count['trained']:>12,} trained of {count['all']:>12,}")
    optimizer = torch.optim.AdamW(trained.values(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    ema, step, seconds = EMA(trained, cfg.ema), 0, 0.0

    cfg.out.mkdir(parents=True, exist_ok=True)
    if (found := checkpoint.latest(cfg.out)) is not None:
        tensors, facts = checkpoint.load(found)
        if facts["config"] != config.to_dict(cfg):
            changed = {
                k: (facts["config"].get(k), v) for k, v in config.to_dict(cfg).items() if facts["config"].get(k) != v
            }
            print(f"note: settings differ from those of {found} (old, new): {changed}")
        if {k[6:] for k in tensors if k.startswith("model.")} != trained.keys():
            raise ConfigError(f"{found} trained other tensors than --train names now; take another --out")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[f"model.{name}"])
        ema.shadow = {name: tensors[f"ema.{name}"].clone() for name in trained}
        restore_optimizer(optimizer, trained, {k[6:]: v for k, v in tensors.items() if k.startswith("optim.")})
        step, seconds, ema.updates = facts["step"], facts["seconds"], facts["step"]
        print(f"going on from {found}")
    config.save(cfg, cfg.out / "config.json")
    path = cfg.out / "log.jsonl"  # lines after the checkpoint, of steps that are now run again, are dropped
    lines = path.read_text().splitlines() if path.is_file() else []
    config.write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
    log = path.open("a")

    def save() -> None:
        state = {f"model.{k}": v for k, v in trained.items()} | {f"ema.{k}": v for k, v in ema.shadow.items()}
        state |= {f"optim.{k}": v for k, v in optimizer_tensors(optimizer, trained).items()}
        checkpoint.save(cfg.out, step, state, {"seconds": seconds, "config": config.to_dict(cfg)})

    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    bar = tqdm(total=cfg.steps, initial=step, desc=cfg.out.name, mininterval=5)
    since: list[float] = []  # losses since the last line of the log
    while step < cfg.steps and not stop:
        began = time.monotonic()
        optimizer.param_groups[0]["lr"] = rate = learning_rate(
            step, peak=cfg.lr, warmup=cfg.warmup, steps=cfg.steps, decay=cfg.decay
        )
        loss = loss_of(cfg, networks, draw(cfg, data, networks, step * cfg.batch, cfg.batch)).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}; lower --lr or use --dtype float32")
        step, seconds = step + 1, seconds + time.monotonic() - began
        since.append(value)
        bar.update()
        if step % cfg.log_every == 0 or step % cfg.validate_every == 0:
            row = {"step": step, "loss": sum(since) / len(since), "norm": norm.item(), "lr": rate}
            row["seconds"] = round(seconds, 1)
            bar.set_postfix(loss=f"{row['loss']:.4f}")
            since.clear()
            if step % cfg.validate_every == 0:
                row |= validate(cfg, networks, held_out)
            log.write(json.dumps(row) + "\n")
            log.flush()
        if step % cfg.save_every == 0 or step == cfg.steps:
            save()
    if stop:
        save()
        print(f"stopped by a signal at step {step}; the same command goes on from here")
        return
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(ema.shadow[name])
    networks.export(cfg.out / "weights", trained, recipe=config.to_dict(cfg), steps=step, seconds=seconds)
    print(f"finished: {cfg.out / 'weights'}")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)

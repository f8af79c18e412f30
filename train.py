"""Training, read top to bottom: the paper's loop (Sec. 3.2, 4.1) and, by other settings, every stage of the miniature.

    python train.py --config configs/tiny/4-i2v.json      one stage
    python train.py --recipe configs/tiny                 all stages of a model, one after the other

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from i2v import config
from i2v.config import ConfigError
from i2v.data.world import WORLDS, WorldConfig
from i2v.device import pick_device
from i2v.diffusion.losses import denoising_loss, min_snr_weight
from i2v.training import recipe
from i2v.training.batches import Batch, Batches
from i2v.training.ema import EMA
from i2v.training.muon import Muon
from i2v.training.networks import Networks
from i2v.training.optim import learning_rate
from i2v.training.settings import Training
from i2v.training.state import Silent, State


def loss_of(cfg: Training, networks: Networks, batch: Batch) -> Tensor:
    """(B,) loss of each clip, Sec. 3.2: noise every frame but the known one, predict, compare on the others."""
    frames = batch.latents.shape[1]
    known = torch.zeros(frames, dtype=torch.bool, device=batch.latents.device)
    known[0] = cfg.clean_first and frames > 1
    noisy = networks.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    # the first frame stays clean, at the same timestep as the others
    noisy = torch.where(known[:, None, None, None], batch.latents, noisy)
    with torch.autocast(batch.latents.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
        context, image_tokens = networks.condition(batch.captions, batch.image_embeds)
        prediction = networks.predict(
            noisy.flatten(0, 1),
            batch.timesteps,
            context,
            num_frames=frames,
            image_tokens=image_tokens,
            edges=batch.edges,
        )
    target = networks.schedule.target(batch.latents, batch.noise, batch.timesteps)
    return denoising_loss(prediction.float().unflatten(0, (-1, frames)), target, known)


def other_motion(world: WorldConfig, caption: str, turn: int) -> str:
    """The caption with another motion of the world in its place; `turn` picks which."""
    (now,) = (m for m in world.motions if m in caption)
    others = [m for m in world.motions if m != now]
    return caption.replace(now, others[turn % len(others)])


@torch.no_grad()
def validate(cfg: Training, networks: Networks, data: Batches) -> dict[str, float]:
    """Loss on held-out clips at fixed timesteps and noise, and `gap`: how much worse it is under a caption that asks
    for another motion, the first sign that words move the picture (0 = the caption's motion is ignored)."""
    row: dict[str, float] = {}
    batch = data.draw(0, min(32, len(data.data)))
    others = [other_motion(WORLDS[cfg.world], caption, k) for k, caption in enumerate(batch.captions)]
    for t in (200, 400, 600, 800, 950):
        at = replace(batch, timesteps=torch.full_like(batch.timesteps, t))
        right = loss_of(cfg, networks, at)
        row[f"val_{t}"] = float(right.mean())
        if cfg.num_frames > 1:
            wrong = loss_of(cfg, networks, replace(at, captions=others))
            row[f"gap_{t}"] = float((wrong / right).mean() - 1)
    return row


def held_out(cfg: Training, networks: Networks) -> Batches:
    """What `validate` measures on: the same for every run of a world, nothing dropped."""
    fixed = replace(cfg, drop_text=0.0, drop_image=0.0, seed=1)
    return Batches(fixed, networks.encoded_world(cfg.cache, cfg.world, "val", 64, cfg.style), networks)


def trained_tensors(cfg: Training, networks: Networks) -> dict[str, torch.nn.Parameter]:
    """The tensors that `--train` names; all others are frozen. A pattern that matches nothing is an error."""
    if cfg.lora:
        return networks.add_lora(cfg.train, cfg.lora, cfg.seed)
    named = networks.named_parameters()
    for pattern in cfg.train:
        if not fnmatch.filter(named, pattern):
            raise ConfigError(f"--train {pattern!r} matches no tensor; names are like {next(iter(named))}")
    chosen = {k: p for k, p in named.items() if any(fnmatch.fnmatch(k, pattern) for pattern in cfg.train)}
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    return chosen


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM or Ctrl-C puts its number into; a second one of them ends the process as usual."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def catch(number: int, _: object) -> None:
        caught.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(cfg: Training) -> int:
    """One run to its end, from where it stopped; 0, or 128 + the number of the signal that stopped it."""
    device = pick_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    networks = Networks.build(cfg.init, cfg.parts, cfg.seed, cfg.prediction).to(device)
    trained = trained_tensors(cfg, networks)  # before the clips: a wrong pattern is told at once
    optimizer: torch.optim.Optimizer
    if cfg.optimizer == "muon":
        optimizer = Muon(trained, cfg.lr, cfg.weight_decay)
    else:
        optimizer = torch.optim.AdamW(trained.values(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    cfg.out.mkdir(parents=True, exist_ok=True)
    state = State(cfg, trained, optimizer, EMA(trained, cfg.ema))
    if (found := state.resume()) is not None:
        print(f"going on from {found}")
    config.save(cfg, cfg.out / "config.json")
    clips = networks.encoded_world(cfg.cache, cfg.world, "train", cfg.clips, cfg.style)
    data, fixed = Batches(cfg, clips, networks), held_out(cfg, networks)
    for part, count in networks.summary(trained).items():
        print(f"{part:14} {count['trained']:>12,} trained of {count['all']:>12,}")

    log = (cfg.out / "log.jsonl").open("a")
    bar = tqdm(total=cfg.steps, initial=state.step, desc=cfg.out.name, mininterval=5)
    silent = Silent(trained)
    since: list[Tensor] = []  # losses since the last line of the log; on a GPU reading one would wait for it
    with log, bar, stop_signals() as stopped:
        batches = data.of_steps(state.step, cfg.steps)
        while state.step < cfg.steps and not stopped:
            began, step = time.monotonic(), state.step
            rate = learning_rate(step, peak=cfg.lr, warmup=cfg.warmup, steps=cfg.steps, decay=cfg.decay)
            optimizer.param_groups[0]["lr"] = rate
            batch = next(batches)
            losses = loss_of(cfg, networks, batch)
            if cfg.min_snr:
                losses = losses * min_snr_weight(networks.schedule, batch.timesteps, cfg.min_snr)
            loss = losses.mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.clip_norm)
            for name in silent.check():
                tqdm.write(f"note: no gradient has reached {name}; it is trained in name only")
            optimizer.step()
            optimizer.zero_grad()
            state.ema.update()
            since.append(loss.detach())
            step += 1
            logs, saves = (step % n == 0 for n in (cfg.log_every, cfg.save_every))
            validates = step % cfg.validate_every == 0
            if logs or saves or validates or stopped or step == cfg.steps or device.type == "cpu":
                mean = float(torch.stack(since).mean())
                if not math.isfinite(mean):
                    raise FloatingPointError(
                        f"the loss is {mean} at step {step - 1}; lower --lr or use --dtype float32"
                    )
            state.step, state.seconds = step, state.seconds + time.monotonic() - began
            bar.update()
            if logs or validates:
                row = {"step": step, "loss": mean, "norm": norm.item(), "lr": rate}
                row["seconds"] = round(state.seconds, 1)
                bar.set_postfix(loss=f"{mean:.4f}")
                since.clear()
                if validates:
                    row |= validate(cfg, networks, fixed)
                log.write(json.dumps(row) + "\n")
                log.flush()
            if saves or step == cfg.steps or stopped:
                state.save()
        batches.close()
    if state.step < cfg.steps:
        print(f"stopped by a signal at step {state.step}; the same command goes on from here")
        return 128 + stopped[0]
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state.ema.shadow[name])
    facts = {"recipe": config.to_dict(cfg), "steps": state.step, "seconds": state.seconds}
    networks.export(cfg.out / "weights", trained, **facts)
    print(f"finished: {cfg.out / 'weights'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 128 + the number of the signal that stopped a run after it was saved."""
    argv = sys.argv[1:] if argv is None else argv
    if any(flag.split("=")[0] == "--recipe" for flag in argv):
        return recipe.main(argv, train_main=main)
    return train(config.from_command_line(Training, argv, prog="train.py"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("train.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (ConfigError, FloatingPointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except (ValueError, OSError) as error:  # the errors that this project raises for what users gave
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

"""Training, read top to bottom: the paper's loop (Sec. 3.2, 4.1) and, by other settings, every stage of the miniature.

    python train.py --data my_clips --out runs/mine          the miniature's adapter on your clips
    python train.py --config configs/tiny/4-i2v.json         one stage
    python train.py --recipe configs/tiny                    all stages of a model, one after the other
    torchrun --nproc-per-node 8 train.py ...                 on several GPUs

What is trained is a choice of name patterns (`--train`); everything else stays frozen. The paper's case trains
`i2v_adapter.*` (W_Q' and W_O') on clips whose first frame is clean, with the loss on the other frames. The same command
again goes on from the newest checkpoint in `--out`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from i2v import config
from i2v.config import ConfigError
from i2v.data.dataset import Dataset
from i2v.data.folders import DataError
from i2v.device import autocast, own_device, pick_device, training_dtype
from i2v.diffusion.losses import denoising_loss, min_snr_weight
from i2v.free_memory import keep_freed_memory
from i2v.training import memory, recipe
from i2v.training.batches import Batch, Batches, Samples
from i2v.training.clips import RunClips, open_clips
from i2v.training.distributed import Processes, in_parallel, leave, processes
from i2v.training.ema import EMA
from i2v.training.miniature import build_miniature
from i2v.training.muon import Muon
from i2v.training.networks import Networks
from i2v.training.optim import learning_rate
from i2v.training.published import build_published
from i2v.training.recompute import recompute_blocks
from i2v.training.report import Report, check_installed
from i2v.training.settings import Training
from i2v.training.signals import stop_signals
from i2v.training.state import State
from i2v.training.streamed import StreamedBatches
from i2v.training.trained import Silent, table, trained_tensors
from i2v.training.validation import held_out, make_videos, mean_loss, validate


def loss_of(cfg: Training, networks: Networks, batch: Batch) -> Tensor:
    """(B,) loss of each clip, Sec. 3.2: noise every frame but the known one, predict, compare on the others."""
    frames = batch.latents.shape[1]
    known = torch.zeros(frames, dtype=torch.bool, device=batch.latents.device)
    known[0] = cfg.clean_first and frames > 1
    noisy = networks.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    # the first frame stays clean (but for --known-noise), at the same timestep as the others
    clean = batch.latents + cfg.known_noise * batch.noise
    noisy = torch.where(known[:, None, None, None], clean, noisy)
    with autocast(cfg.dtype, batch.latents.device):
        told = networks.condition(batch.captions, batch.image_features)
        prediction = networks.predict(noisy.flatten(0, 1), batch.timesteps, told, frames, batch.edges)
    target = networks.schedule.target(batch.latents, batch.noise, batch.timesteps)
    return denoising_loss(prediction.float().unflatten(0, (-1, frames)), target, known)


def build(cfg: Training) -> Networks:
    """The frozen networks and what is added to them."""
    if cfg.preset != "tiny":
        return build_published(cfg)
    return build_miniature(cfg.init, cfg.parts, cfg.seed, cfg.prediction, cfg.zero_snr, cfg.new)


def samples_of(cfg: Training, networks: Networks, clips: RunClips) -> Samples:
    """What the run learns from, from its cache or read meanwhile."""
    if isinstance(clips.train, Dataset):
        return StreamedBatches(cfg, clips.train, networks)
    return Batches(cfg, clips.train, networks)


def passed_over(clips: RunClips) -> str:
    """What was found to be bad on the way, in words; "" where all files were read before."""
    if not isinstance(clips.train, Dataset) or not clips.bad:
        return ""
    return f"bad files that were passed over so far: {len(clips.bad):,} (`{clips.train.check}` says why)"


def make_optimizer(cfg: Training, trained: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as in Sec. 4.1, or Muon."""
    if cfg.optimizer == "muon":
        return Muon(trained, cfg.lr, cfg.weight_decay)
    return torch.optim.AdamW(trained.values(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def finite_mean(losses: list[Tensor], parts: int, step: int) -> float:
    """Mean loss of the steps up to `step`, `parts` losses each; raises FloatingPointError where it is no number."""
    mean = float(torch.stack(losses).sum()) / (len(losses) / parts)
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss is {mean} at step {step - 1}; lower --lr or use --dtype float32")
    return mean


def finite_gradient(norm: Tensor, scaler: torch.amp.GradScaler, step: int) -> None:
    """Raises FloatingPointError before weights that it spoilt are saved; float16's scaler leaves such a step out."""
    if not scaler.is_enabled() and not math.isfinite(norm):
        raise FloatingPointError(f"the gradient is {norm.item()} at step {step - 1}; lower --lr or use --dtype float32")


def train(cfg: Training, run: Processes) -> int:
    """One run to its end, from where it stopped; 0, or 128 + the number of the signal that stopped it."""
    device = own_device(cfg.device, run)
    cfg = replace(cfg, dtype=training_dtype(cfg.dtype, device))
    run.share(cfg.batch)  # errors before the work
    check_installed(cfg.report)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    networks = build(cfg).to(device)
    trained = trained_tensors(cfg, networks)  # before the clips: a wrong pattern is told at once
    if cfg.checkpointing:
        recompute_blocks(networks.unet)
        keep_freed_memory(False)  # the pieces that blocks leave would lie idle: a fifth of what is held
    optimizer = make_optimizer(cfg, trained)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")  # float16 alone can underflow
    cfg.out.mkdir(parents=True, exist_ok=True)
    state = State(cfg, trained, optimizer, EMA(trained, cfg.ema), scaler, run.count)
    with run.first_one_first():
        say(run, state.resume(writes=run.first))
        state.note_files(networks.frozen_files(trained))
        clips = open_clips(cfg, networks, state.clips.get("quarantine", ()))
        state.note_clips(clips)
        if not isinstance(clips.train, Dataset):
            networks.read_captions(cfg.cache, [*clips.train.captions, *clips.held_out.captions])
        data, fixed = samples_of(cfg, networks, clips), held_out(cfg, networks, clips)
    run.agree(step=state.step, clips=clips.identity)
    if not cfg.stream:
        networks.rest()  # encoders have made their part
    if run.first:
        config.save(cfg, cfg.out / "config.json")
    say(run, clips.words, table(networks, trained))

    step_loss, averaging = in_parallel(loss_of, list(trained.values()), run)
    silent = Silent(trained)
    saved = state.step  # the newest checkpoint's
    since: list[Tensor] = []  # losses since the last line of the log; on a GPU reading one would wait for it
    bar = tqdm(total=cfg.steps, initial=state.step, desc=cfg.out.name, mininterval=5, disable=not run.first)
    with Report(cfg, run.first) as report, bar, stop_signals() as stopped:
        if run.first and state.step == 0:
            if cfg.validate_every <= cfg.steps:  # what the untrained network does
                report.row({"step": 0, **validate(cfg, networks, fixed, loss_of)})
        elif run.first and state.logged < state.step and state.step % cfg.validate_every == 0:  # stopped before it
            try:
                row = validate(cfg, networks, fixed, loss_of)
                row |= make_videos(cfg, networks, fixed, state.ema.shadow, trained, state.step)
                report.row({"step": state.step, **row})
            except (RuntimeError, OSError) as error:  # again: the training itself goes on
                tqdm.write(f"no validation of step {state.step}: {error}; see --validate-every, --clips-made 0")

        def keep() -> None:
            """Saves what the newest checkpoint lacks, unless it is spoilt."""
            if run.first and saved < state.step:
                if since:
                    finite_mean(since, len(parts), state.step)
                finite_gradient(norm, scaler, state.step)
                state.save()

        if isinstance(clips.train, Dataset):
            clips.train.stop = stopped
        batches = data.of_steps(state.step, cfg.steps, run.rank, run.count, state.samples)
        lost: DataError | None = None
        while state.step < cfg.steps:
            began, step = time.monotonic(), state.step
            rate = learning_rate(step, peak=cfg.lr, warmup=cfg.warmup, steps=cfg.steps, decay=cfg.decay)
            optimizer.param_groups[0]["lr"] = rate
            batch: Batch | None = None
            try:
                batch = None if stopped else next(batches)
            except DataError as error:  # no clip can be read any more: what was learnt is kept
                lost = error
            if run.any(batch is None) or batch is None:  # all stop together, before a step for which one has no clips
                break
            parts = batch.parts(cfg.micro_batch or len(batch))
            for number, part in enumerate(parts, 1):  # their gradients add up to that of the whole batch
                with averaging(number == len(parts)):
                    losses = step_loss(cfg, networks, part)
                    if cfg.min_snr:
                        losses = losses * min_snr_weight(networks.schedule, part.timesteps, cfg.min_snr)
                    loss = losses.sum() / len(batch)
                    scaler.scale(loss).backward()
                since.append(loss.detach())
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.clip_norm)
            for name in silent.check() if run.first else ():
                tqdm.write(f"note: no gradient has reached {name}; it is trained in name only")
            scaler.step(optimizer)  # in float16 a step whose gradient overflowed is left out
            scaler.update()
            optimizer.zero_grad()
            state.ema.update()
            step += 1
            logs, saves, validates = (step % n == 0 for n in (cfg.log_every, cfg.save_every, cfg.validate_every))
            if logs or saves or validates or step == cfg.steps or device.type == "cpu":
                mean = finite_mean(since, len(parts), step)
                finite_gradient(norm, scaler, step)
            state.step, state.seconds = step, state.seconds + time.monotonic() - began
            state.samples += cfg.batch
            bar.update()
            if run.first and (saves or step == cfg.steps):  # first of all: what follows may fail
                state.save()
                saved = step
            if logs or validates:
                mean = float(run.mean(torch.tensor(mean, device=device)))
                row = {"step": step, "loss": mean, "norm": norm.item(), "lr": rate}
                row["seconds"] = round(state.seconds, 1)
                bar.set_postfix(loss=f"{mean:.4f}")
                since.clear()
                if validates and run.first:
                    row |= validate(cfg, networks, fixed, loss_of)
                    row |= make_videos(cfg, networks, fixed, state.ema.shadow, trained, step)
                    tqdm.write(f"step {step}: {report.compared(mean_loss(row))}")
                report.row(row)
                if validates:
                    report.draw()
        if state.step < cfg.steps:  # stopped, by what may have reached another process alone
            with run.first_one_first():  # the others wait: where one has ended, torchrun ends the rest
                keep()
        batches.close()
    if lost is not None and not stopped:
        raise lost
    if state.step < cfg.steps:
        say(run, f"stopped by a signal at step {state.step}; the same command goes on from here")
        return 128 + (stopped[0] if stopped else 0)
    if run.first:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state.ema.shadow[name])
        facts = {"recipe": config.to_dict(cfg), "steps": state.step, "seconds": state.seconds}
        networks.export(cfg.out / "weights", trained, **facts)
        say(run, passed_over(clips), f"finished: {cfg.out / 'weights'}")
    return 0


def say(run: Processes, *lines: str) -> None:
    """Printed once, whatever the number of processes."""
    if run.first and any(lines):
        print(*(line for line in lines if line), sep="\n", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 128 + the number of the signal that stopped a run after it was saved."""
    argv = sys.argv[1:] if argv is None else argv
    if any(flag.split("=")[0] == "--recipe" for flag in argv):
        return recipe.main(argv, train_main=main)
    cfg = config.from_command_line(Training, argv, prog="train.py")
    if cfg.dry_run:
        print(memory.table(replace(cfg, dtype=training_dtype(cfg.dtype, pick_device(cfg.device)))))
        return 0
    with processes(cfg.device) as run:
        return train(cfg, run)


if __name__ == "__main__":
    try:
        leave(main())
    except KeyboardInterrupt:
        print("train.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except (ConfigError, FloatingPointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except (ValueError, OSError) as error:  # the errors that this project raises for what users gave
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

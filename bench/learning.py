"""What buys most per CPU hour: small trainings of equal CPU time, one choice changed in each.

    python -m bench.learning --out outputs/learning          (trains; the same command again goes on)
    python -m bench.learning --out outputs/learning --table  (prints what is there of this --budget)

Every arm learns level 1 of the world from random weights by train.py's own draws and loss, with the shipped VAE, and
stops when its process has used `--budget` seconds of the processor (a busy machine changes the wait, not the result's
meaning). Then all are measured alike: squared error of x_0 in the latents (variance 1) at fixed timesteps and noise on
unseen clips, over the frames 2..l, whatever the network predicts; and `gap_800`, by how much that error grows at
timestep 800 when the caption asks for another motion. Arms that end with a clean first frame see one in the measure
too, and are to be compared among themselves.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

import train
from i2v import config
from i2v.config import flag
from i2v.data.latents import WorldLatents
from i2v.data.world import WORLDS
from i2v.device import autocast
from i2v.diffusion.losses import min_snr_weight
from i2v.training.batches import Batch, Batches
from i2v.training.miniature import build_miniature
from i2v.training.muon import Muon
from i2v.training.networks import Networks
from i2v.training.optim import learning_rate
from i2v.training.settings import Training
from i2v.training.validation import other_motion

BUCKETS = (200, 400, 600, 800, 950)


@dataclass(frozen=True)
class Benchmark:
    """Compare choices of the training at equal CPU time."""

    out: Path = flag(Path("outputs/learning"), "folder of results.jsonl")
    init: Path = flag(Path("weights/tiny"), "folder of the VAE and the vocabulary; nothing else is taken from it")
    cache: Path = flag(Path("runs/tiny/latents"), "folder of the encoded clips, as train.py's")
    clips: int = flag(4000, "clips to learn from")
    budget: float = flag(180.0, "seconds of the processor for each arm")
    arms: tuple[str, ...] = flag((), "which arms; not given: all")
    seeds: tuple[int, ...] = flag((0,), "each arm is trained once with each")
    table: bool = flag(False, "print the results that are there, as markdown, and train nothing")


@dataclass(frozen=True)
class Stage:
    share: float  # of the budget
    train: tuple[str, ...]
    num_frames: int = 16
    clean_first: bool = False
    batch: int = 6


BASE = ("unet.*", "text_encoder.*", "motion.*")
CLIPS = (Stage(1.0, BASE),)
JOINT = (Stage(1.0, (*BASE, "i2v_adapter.*"), clean_first=True),)
STAGED = (
    Stage(0.2, BASE[:2], num_frames=1, batch=64),
    Stage(0.5, BASE),
    Stage(0.3, ("i2v_adapter.*",), clean_first=True),
)


@dataclass(frozen=True)
class Arm:
    prediction: Literal["v", "epsilon"] = "v"
    min_snr: float = 0.0
    muon: bool = False
    width: int = 96
    lr: float = 1.2e-3
    stages: tuple[Stage, ...] = CLIPS


ARMS = {
    "v": Arm(),
    "epsilon": Arm("epsilon"),
    "epsilon, min-SNR 5": Arm("epsilon", min_snr=5.0),
    "v, min-SNR 5": Arm(min_snr=5.0),
    "v, Muon for matrices": Arm(muon=True),
    "v, lr 2.4e-3": Arm(lr=2.4e-3),
    "Muon, 64 channels": Arm(muon=True, width=64),
    "Muon, 128 channels": Arm(muon=True, width=128),
    "Muon, joint, clean first frame": Arm(muon=True, stages=JOINT),
    "Muon, staged, adapter last": Arm(muon=True, stages=STAGED),
}


def settings(bench: Benchmark, arm: Arm, stage: Stage, seed: int) -> Training:
    parts = ("motion",) if not any("i2v_adapter.*" in s.train for s in arm.stages) else ("motion", "i2v_adapter")
    return Training(
        init=bench.init, cache=bench.cache, clips=bench.clips, parts=parts, train=stage.train, seed=seed,
        num_frames=stage.num_frames, clean_first=stage.clean_first, batch=stage.batch,
    )  # fmt: skip


def bare(bench: Benchmark) -> Path:
    """A folder that holds only what no arm trains."""
    folder = bench.out / "bare"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vae.safetensors", "vocab.json", "merges.txt"):
        (folder / name).write_bytes((bench.init / name).read_bytes())
    return folder


def run(bench: Benchmark, name: str, seed: int, data: WorldLatents, held_out: WorldLatents) -> dict[str, Any]:
    """Train one arm; its row of the results."""
    arm = ARMS[name]
    cfg = settings(bench, arm, arm.stages[-1], seed)
    networks = build_miniature(bare(bench), cfg.parts, seed, arm.prediction, width=arm.width)
    steps, frames, sample = 0, 0, 0
    since: list[float] = []
    for stage in arm.stages:
        cfg = settings(bench, arm, stage, seed)
        trained, batches = train.trained_tensors(cfg, networks), Batches(cfg, data, networks)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained.values(), weight_decay=1e-2, fused=True)
        if arm.muon:
            optimizer = Muon(trained, arm.lr, weight_decay=1e-2)
        began, budget = time.process_time(), bench.budget * stage.share
        in_stage, spent, since = 0, 0.0, []
        with tqdm(total=round(budget), desc=f"{name}, seed {seed}", unit="s", mininterval=5) as bar:
            while spent < budget:
                decay = learning_rate(round(1000 * spent / budget), peak=arm.lr, warmup=0, steps=1000, decay="linear")
                batch = batches.draw(sample, stage.batch)
                losses = train.loss_of(cfg, networks, batch)
                if arm.min_snr:
                    losses = losses * min_snr_weight(networks.schedule, batch.timesteps, arm.min_snr)
                losses.mean().backward()
                nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.param_groups[0]["lr"] = decay * min(1, (in_stage + 1) / 20)
                optimizer.step()
                optimizer.zero_grad()
                in_stage, sample = in_stage + 1, sample + stage.batch
                since = [*since[-19:], float(losses.detach().mean())]
                spent = time.process_time() - began
                bar.update(round(min(spent, budget)) - bar.n)
        steps, frames = steps + in_stage, frames + in_stage * stage.batch * stage.num_frames
    parameters = sum(p.numel() for p in networks.named_parameters().values())
    row = {"arm": name, "seed": seed, "budget": bench.budget, "steps": steps, "frames": frames}
    row |= {"parameters": parameters, "clean_first": cfg.clean_first, "loss": statistics.fmean(since)}
    return row | measure(cfg, networks, held_out)


@torch.no_grad()
def measure(cfg: Training, networks: Networks, held_out: WorldLatents) -> dict[str, float]:
    """Errors of x_0 by timestep and the caption's share in it, on 32 unseen clips."""
    fixed = replace(cfg, drop_text=0.0, drop_image=0.0, seed=1)
    batch = Batches(fixed, held_out, networks).draw(0, 32)
    others = [other_motion(WORLDS[cfg.world], caption, k) for k, caption in enumerate(batch.captions)]

    def error(captions: list[str], t: int) -> Tensor:
        at = torch.full_like(batch.timesteps, t)
        losses = []
        for part in range(0, 32, 8):  # little memory
            cut = slice(part, part + 8)
            one = Batch(batch.latents[cut], batch.noise[cut], at[cut], captions[cut], None)
            # train.loss_of leaves the first frame out only where it is clean; here it is left out everywhere
            losses.append(x0_error(cfg, networks, one))
        return torch.cat(losses)

    row = {f"x0_{t}": float(error(batch.captions, t).mean()) for t in BUCKETS}
    right, wrong = error(batch.captions, 800), error(others, 800)
    return row | {"gap_800": float((wrong / right).mean() - 1)}


def x0_error(cfg: Training, networks: Networks, batch: Batch) -> Tensor:
    """(B,) mean squared error of the clean latents that the prediction stands for, over the frames 2..l."""
    frames = batch.latents.shape[1]
    noisy = networks.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    if cfg.clean_first:
        noisy[:, 0] = batch.latents[:, 0]
    with autocast(cfg.dtype, batch.latents.device):
        context = networks.condition(batch.captions, None).context
        prediction = networks.unet(noisy.flatten(0, 1), batch.timesteps, context, num_frames=frames)
    x0 = networks.schedule.to_x0(prediction.float().unflatten(0, (-1, frames)), noisy, batch.timesteps)
    return (x0 - batch.latents)[:, 1:].square().flatten(1).mean(1)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; several seeds of an arm stand as mean ± half the range."""

    def cell(found: list[dict[str, Any]], key: str, digits: int) -> str:
        values = [row[key] for row in found]
        spread = (max(values) - min(values)) / 2
        return f"{statistics.fmean(values):.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")

    head = [
        "arm",
        "seeds",
        "steps",
        "parameters (M)",
        *(f"x_0 error, t = {t}" for t in BUCKETS),
        "caption gap, t = 800",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(row["arm"] for row in rows):
        found = [row for row in rows if row["arm"] == name]
        cells = [name, str(len(found)), f"{statistics.fmean(r['steps'] for r in found):.0f}"]
        cells += [f"{found[0]['parameters'] / 1e6:.1f}", *(cell(found, f"x0_{t}", 3) for t in BUCKETS)]
        lines.append("| " + " | ".join([*cells, cell(found, "gap_800", 2)]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    bench = config.from_command_line(Benchmark, argv, prog="python -m bench.learning")
    if unknown := [name for name in bench.arms if name not in ARMS]:
        raise config.ConfigError(f"--arms {unknown[0]!r}: expected some of {', '.join(map(repr, ARMS))}")
    results = bench.out / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    if not bench.table:
        bench.out.mkdir(parents=True, exist_ok=True)
        first = build_miniature(bare(bench), (), 0)
        data = first.encoded_world(bench.cache, "level_1", "train", bench.clips)
        held_out = first.encoded_world(bench.cache, "level_1", "val", 64)
        for seed in bench.seeds:
            for name in bench.arms or ARMS:
                if any((r["arm"], r["seed"], r["budget"]) == (name, seed, bench.budget) for r in rows):
                    continue
                rows.append(run(bench, name, seed, data, held_out))
                with results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
    print(table([row for row in rows if row["budget"] == bench.budget]))


if __name__ == "__main__":
    main()

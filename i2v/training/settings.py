"""The settings of train.py: every field is a flag and can stand in `--config FILE.json`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from i2v import config, presets
from i2v.config import ConfigError, flag
from i2v.data.filters import FILTERS
from i2v.data.styles import STYLES
from i2v.data.world import WORLDS

# what may differ when a run is gone on with: it is of no effect on the weights, or only through the machine
FREE = {"out", "cache", "device", "threads", "workers", "log_every", "validate_every", "save_every",
        "keep_checkpoints", "clips_made", "guidance_scale", "report", "dry_run",
        "allow_change"}  # fmt: skip
REPORTS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Training:
    """Train a part of the model. Settings stand in --config FILE.json, flags override them.
    `--recipe FOLDER` instead of all these runs the stages of a whole model (see `--recipe FOLDER --help`)."""

    out: Path = flag(Path("runs/train"), "folder of the run: config, log, checkpoints, finished weights",
                     "--output-dir")  # fmt: skip
    init: Path = flag(Path("weights/tiny"), "folder of parts to start from; one that is not there starts at random",
                      group="what the networks are")  # fmt: skip
    preset: str = flag("tiny", "the model: tiny, built from --init; i2v-sd15 or i2v-sdxl, from the files below")
    models: Path | None = flag(None, "a folder in which the preset's published files are looked for", "--models-dir")
    base: tuple[Path, ...] = flag((), "base model: UNet, VAE, text encoder, as sample.py's")
    motion: Path | None = flag(None, "motion modules, likewise")
    i2v: Path | None = flag(None, "an I2V-Adapter to go on with; not given: a new one, as in the paper")
    ip_adapter: Path | None = flag(None, "the Content-Adapter (IP-Adapter)")
    image_encoder: Path | None = flag(None, "the Content-Adapter's CLIP image encoder")
    vae: Path | None = flag(None, "the autoencoder")
    tokenizer: Path | None = flag(None, "a folder with vocab.json and merges.txt")
    parts: tuple[str, ...] = flag(("motion", "ip_adapter", "i2v_adapter"), "what is added to the UNet; controlnet: one "
                                  "for canny edges; none: nothing")  # fmt: skip
    new: tuple[str, ...] = flag((), "parts that are begun anew although --init has them")
    train: tuple[str, ...] = flag(("i2v_adapter.*",), "name patterns of the trained tensors; each must match something")
    lora: int = flag(0, "rank; > 0 trains low-rank changes (LoRA) of the layers that --train names instead", "--rank")
    data: Path | None = flag(None, "your clips: a folder, a clip, a csv, tsv or jsonl table; not given: the world",
                             "--train-data-dir", group="what they learn from")  # fmt: skip
    fps: float | None = flag(None, "frames a second of --data; not given: the clips' own")
    stride: int = flag(1, "take every N-th of these frames")
    height: int = flag(64, "of --data's frames in pixels")
    width: int = flag(64, "likewise")
    keep: tuple[str, ...] = flag((), f"filters that are switched off for --data: {', '.join(FILTERS)}")
    draws: int = flag(1, "clips from each file of --data, with starts of their own")
    stream: bool = flag(False, "read and encode --data while training and keep none of it: more than a disk holds")
    hold_out: float = flag(0.05, "share of --data's files that is kept for validation; 0: it measures on all")
    world: str = flag("level_1", "level of the procedural world")
    style: str = flag("", "draw the world in a style: pastel, night; empty: as it is")
    clips: int = flag(16000, "clips drawn and encoded once, then reused")
    cache: Path = flag(Path("runs/tiny/latents"), "folder of the encoded clips")
    num_frames: int = flag(16, "frames per training clip; 1 trains on single pictures")
    clean_first: bool = flag(True, "keep the first frame free of noise and out of the loss (the paper's training)")
    known_noise: float = flag(0.0, "standard deviation of noise added to that first frame (a choice; paper: 0)")
    drop_text: float = flag(0.1, "probability that a caption becomes empty (a choice; the paper gives none)")
    drop_image: float = flag(0.1, "probability that the picture becomes what the unguided half sees (likewise)")
    drop_both: float = flag(0.0, "probability that both are dropped together, beside that: the unguided half's case")
    batch: int = flag(8, "clips per step, of all processes together", group="how")
    micro_batch: int = flag(0, "clips that go through the network at once, gradients add up; 0: all of a process")
    steps: int = flag(2000, "optimizer steps", "--max-train-steps")
    lr: float = flag(1e-4, "peak learning rate (paper: 1e-4)", "--learning-rate")
    warmup: int = flag(0, "steps of linear warm-up", "--lr-warmup-steps")
    decay: Literal["constant", "linear", "cosine"] = flag("constant", "learning rate after the warm-up",
                                                           "--lr-scheduler")  # fmt: skip
    optimizer: Literal["adamw", "muon"] = flag("adamw", "adamw (the paper's); muon: for matrices, AdamW for the rest")
    weight_decay: float = flag(1e-2, "the optimizer's weight decay")
    clip_norm: float = flag(1.0, "largest norm of the gradient", "--max-grad-norm")
    ema: float = flag(0.999, "decay of the moving average that is exported")
    prediction: Literal["v", "epsilon", "sample"] | None = flag(
        None, "what the network predicts; not given: what --init was trained for, v for a new one"
    )
    zero_snr: bool = flag(False, "noise schedule whose last step is noise alone (2305.08891); not with epsilon")
    min_snr: float = flag(0.0, "gamma of the min-SNR weight (2303.09556; 5 is usual); 0: no weight", "--snr-gamma")
    device: str = flag("auto", "auto (CUDA if there is one, else MPS, else the CPU), cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto",
        "compute type of the forward pass; trained weights stay float32; auto: bfloat16 where the device computes in "
        "it, otherwise float32",
        "--mixed-precision",
    )
    checkpointing: bool = flag(False, "compute activations again in the backward pass: less memory, more time",
                               "--gradient-checkpointing")  # fmt: skip
    threads: int = flag(0, "CPU threads, 0 = PyTorch's choice")
    workers: int | None = flag(None, "threads that prepare batches ahead; not given: 8 on a GPU, none on a CPU")
    seed: int = flag(0, "seed of initial weights, noise, timesteps and clip order")
    log_every: int = flag(20, "steps between log lines", group="what is seen of it, and kept")
    validate_every: int = flag(250, "steps between validations")
    clips_made: int = flag(2, "videos made at each validation, from fixed pictures and seeds; 0: none")
    guidance_scale: float | None = flag(None, "of these videos; not given: the preset's")
    report: tuple[str, ...] = flag((), f"also log there, if it is installed: {', '.join(REPORTS)}")
    save_every: int = flag(250, "steps between checkpoints")
    keep_checkpoints: int = flag(2, "how many checkpoints are kept")
    dry_run: bool = flag(False, "tell how much memory the run needs, load and train nothing")
    allow_change: tuple[str, ...] = flag((), "settings that may differ from those of the run that is gone on with")

    def __post_init__(self) -> None:
        if self.world not in WORLDS:
            raise ConfigError(f"--world {self.world!r} is not one of {', '.join(WORLDS)}")
        if self.style and self.style not in STYLES:
            raise ConfigError(f"--style {self.style!r} is not one of {', '.join(STYLES)}")
        for name in ("clips", "num_frames", "batch", "steps", "log_every", "validate_every", "save_every",
                     "keep_checkpoints", "stride", "draws", "height", "width"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        for name in ("lora", "min_snr", "known_noise", "micro_batch", "clips_made"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 or more")
        for name in ("lr", "warmup", "weight_decay", "threads", "workers", "guidance_scale"):
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected 0 or more")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ConfigError(f"--fps {self.fps}: expected more than 0")
        if not self.clip_norm > 0:
            raise ConfigError(f"--clip-norm {self.clip_norm}: expected more than 0; 1e9 clips nothing")
        if unknown := sorted(set(self.report) - set(REPORTS)):
            raise ConfigError(f"--report {unknown[0]}: expected {' or '.join(REPORTS)}")
        for name in ("drop_text", "drop_image", "drop_both", "hold_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 to 1")
        presets.find(self.preset)
        if self.preset != "tiny" and self.data is None and not self.dry_run:
            raise ConfigError(f"--preset {self.preset} learns from your clips: give --data PATH")
        if unknown := sorted(set(self.new) - set(self.parts)):
            raise ConfigError(f"--new {unknown[0]}: expected some of --parts, {', '.join(self.parts)}")
        if self.stream and (self.data is None or self.draws > 1):
            raise ConfigError("--stream reads --data, every sample from a start of its own: give --data, leave out "
                              "--draws")  # fmt: skip
        if self.data is not None and "controlnet" in self.parts:
            raise ConfigError("--parts controlnet learns from the world's edges; --data is not supported for it")


def allowed_changes(cfg: Training) -> set[str]:
    """The settings that `--allow-change` names. Raises ConfigError for one that does not exist."""
    known = [f.name for f in fields(Training)]
    allowed = {name.replace("-", "_") for value in cfg.allow_change for name in value.split(",")}
    if unknown := sorted(allowed - set(known)):
        raise ConfigError(f"--allow-change {unknown[0]}: there is no such setting; they are {', '.join(known)}")
    return allowed


def refuse_changes(cfg: Any, before: Mapping[str, Any], where: Path) -> None:
    """A run goes on with the settings that it began with. `before`: those in the checkpoint `where`.

    Raises ConfigError with a line for each setting that differs and that `--allow-change`, which `Training` alone has,
    does not name.
    """
    allowed = allowed_changes(cfg) if isinstance(cfg, Training) else set()
    now, fresh = config.to_dict(cfg), config.to_dict(type(cfg)())
    changed = {k: (before.get(k, fresh[k]), v) for k, v in now.items() if before.get(k, fresh[k]) != v}
    if "init" in changed and _from_out(before) == _from_out(now):  # a folder that both lie in was moved
        del changed["init"]
    refused = {k: pair for k, pair in changed.items() if k not in FREE | allowed}
    if refused:
        lines = "".join(f"\n  {k}: {old!r} -> {new!r}" for k, (old, new) in refused.items())
        go_on = f", or go on with --allow-change {' '.join(refused)}" if isinstance(cfg, Training) else ""
        raise ConfigError(f"settings differ from those of {where}:{lines}\ntake another --out for a new run{go_on}")


def _from_out(settings: Mapping[str, Any]) -> str:
    """Where `init` lies, seen from the run's own folder."""
    init, out = str(settings.get("init")), str(settings.get("out"))
    try:
        return os.path.relpath(init, out)
    except ValueError:  # on another drive of Windows
        return init

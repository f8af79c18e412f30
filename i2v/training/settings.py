"""The settings of train.py: every field is a flag and can stand in `--config FILE.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from i2v import config
from i2v.config import ConfigError, flag
from i2v.data.styles import STYLES
from i2v.data.world import WORLDS

FREE = {"out", "cache", "device", "threads", "log_every", "validate_every", "save_every", "allow_change"}


@dataclass(frozen=True)
class Training:
    """Train a part of the model. Settings stand in --config FILE.json, flags override them.
    `--recipe FOLDER` instead of all these runs the stages of a whole model (see `--recipe FOLDER --help`)."""

    out: Path = flag(Path("runs/train"), "folder of the run: config, log, checkpoints, finished weights")
    init: Path = flag(Path("weights/tiny"), "folder of parts to start from; one that is not there starts at random")
    parts: tuple[str, ...] = flag(("motion", "ip_adapter", "i2v_adapter"), "what is added to the UNet; controlnet: one "
                                  "for canny edges; none: nothing")  # fmt: skip
    train: tuple[str, ...] = flag(("i2v_adapter.*",), "name patterns of the trained tensors; each must match something")
    lora: int = flag(0, "rank; > 0 trains low-rank changes (LoRA) of the UNet's layers that --train names instead")
    world: str = flag("level_1", "level of the procedural world")
    style: str = flag("", "draw the world in a style: pastel, night; empty: as it is")
    clips: int = flag(16000, "clips drawn and encoded once, then reused")
    cache: Path = flag(Path("runs/tiny/latents"), "folder of the encoded clips")
    num_frames: int = flag(16, "frames per training clip; 1 trains on single pictures")
    clean_first: bool = flag(True, "keep the first frame free of noise and out of the loss (the paper's training)")
    batch: int = flag(8, "clips per step")
    steps: int = flag(2000, "optimizer steps")
    lr: float = flag(1e-4, "peak learning rate (paper: 1e-4)")
    warmup: int = flag(0, "steps of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = flag("constant", "learning rate after the warm-up")
    optimizer: Literal["adamw", "muon"] = flag("adamw", "adamw (the paper's); muon: for matrices, AdamW for the rest")
    weight_decay: float = flag(1e-2, "the optimizer's weight decay")
    clip_norm: float = flag(1.0, "largest norm of the gradient")
    ema: float = flag(0.999, "decay of the moving average that is exported")
    prediction: Literal["v", "epsilon", "sample"] | None = flag(
        None, "what the network predicts; not given: what --init was trained for, v for a new one"
    )
    min_snr: float = flag(0.0, "gamma of the min-SNR weight (2303.09556; 5 is usual); 0: no weight")
    drop_text: float = flag(0.1, "probability that a caption becomes empty (a choice; the paper gives none)")
    drop_image: float = flag(0.1, "probability that the picture becomes zero pixels, a grey one (likewise)")
    device: str = flag("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1")
    dtype: Literal["float32", "bfloat16"] = flag("bfloat16", "compute type of the forward pass; weights stay float32")
    threads: int = flag(0, "CPU threads, 0 = PyTorch's choice")
    seed: int = flag(0, "seed of initial weights, noise, timesteps and clip order")
    log_every: int = flag(20, "steps between log lines")
    validate_every: int = flag(250, "steps between validations")
    save_every: int = flag(250, "steps between checkpoints")
    allow_change: tuple[str, ...] = flag((), "settings that may differ from those of the run that is gone on with")

    def __post_init__(self) -> None:
        if self.world not in WORLDS:
            raise ConfigError(f"--world {self.world!r} is not one of {', '.join(WORLDS)}")
        if self.style and self.style not in STYLES:
            raise ConfigError(f"--style {self.style!r} is not one of {', '.join(STYLES)}")
        for name in ("clips", "num_frames", "batch", "steps", "log_every", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if self.lora < 0 or self.min_snr < 0:
            raise ConfigError(f"--lora {self.lora} and --min-snr {self.min_snr}: expected 0 or more")


def refuse_changes(cfg: Training, before: Mapping[str, Any], where: Path) -> None:
    """A run goes on with the settings that it began with. `before`: those in the checkpoint `where`.

    Raises ConfigError with a line for each setting that differs and that `--allow-change` does not name.
    """
    known = [f.name for f in fields(Training)]
    allowed = {name.replace("-", "_") for value in cfg.allow_change for name in value.split(",")}
    if unknown := sorted(allowed - set(known)):
        raise ConfigError(f"--allow-change {unknown[0]}: there is no such setting; they are {', '.join(known)}")
    now, fresh = config.to_dict(cfg), config.to_dict(Training())
    changed = {k: (before.get(k, fresh[k]), v) for k, v in now.items() if before.get(k, fresh[k]) != v}
    refused = {k: pair for k, pair in changed.items() if k not in FREE | allowed}
    if refused:
        lines = "".join(f"\n  {k}: {old!r} -> {new!r}" for k, (old, new) in refused.items())
        raise ConfigError(
            f"settings differ from those of {where}:{lines}\n"
            f"take another --out for a new run, or go on with --allow-change {' '.join(refused)}"
        )

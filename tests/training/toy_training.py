"""A training run of a second or two: the miniature's networks made smaller, with weights from our own noise.

As a program, `python toy_training.py FLAGS...` is train.py with these networks; `--pause-in-checkpoint STEP` makes it
stand still in the middle of writing that checkpoint, so that a test can kill it there; `--stop-at-sample N` sends
SIGTERM to the process that draws the batch beginning with that sample.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from random_miniature import write_vocabulary
from safetensors.torch import load_file
from torch import Tensor, nn

import train
from i2v import noise
from i2v.data.world import WORLDS, all_words
from i2v.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from i2v.models.motion import MotionConfig
from i2v.models.unet import UNetConfig
from i2v.models.vae import VAE, VAEConfig
from i2v.parts import save_part
from i2v.training import miniature, validation
from i2v.training.batches import Batch, Batches
from i2v.training.distributed import leave
from i2v.training.networks import Networks

UNET = UNetConfig(channels=(16, 16), depths=(1, 1), heads=(2, 2), context_dim=16, layers=1, latent_channels=4, groups=8)
MOTION = MotionConfig(16, mid_block=False, resnet_norm_over_frames=False, motion_norm_over_frames=False, heads=2)
SMALL_VAE = VAEConfig(
    channels=(16, 16), layers=1, latent_channels=4, patch=8, groups=8, mid_attention=False, scaling_factor=2.0
)
VISION = CLIPVisionConfig(
    hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, image_size=64, patch_size=16, projection_dim=16
)
PAUSED = "in the middle of the checkpoint"


@contextmanager
def small_networks() -> Iterator[None]:
    """Sizes of a toy in place of the miniature's, and few clips to measure on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "MOST", 4)
        patch.setattr(miniature, "TINY_UNET", UNET)
        patch.setattr(miniature, "TINY_MOTION", MOTION)
        yield


def fill(module: nn.Module | Mapping[str, Tensor], name: str) -> None:
    """Random weights that are the same under every version of torch: its generator has no part in them."""
    tensors = dict(module.named_parameters()) if isinstance(module, nn.Module) else module
    with torch.no_grad():
        for key, value in tensors.items():
            drawn = noise.normal(0, f"{name}.{key}", [0], 0, tuple(value.shape))[0]
            if value.ndim > 1:
                value.copy_(drawn / value[0].numel() ** 0.5)
            else:
                value.copy_(drawn * 0.1 + (1 if key.endswith("weight") else 0))


def write_start(folder: Path) -> Path:
    """Every part but the I2V-Adapter, which the run adds: what the paper's training starts from."""
    bare, start = folder / "bare", folder / "start"
    write_vocabulary(bare, all_words(WORLDS["level_1"]))
    vae, image_encoder = VAE(SMALL_VAE), CLIPVisionModel(VISION)
    fill(vae, "vae")
    fill(image_encoder, "image_encoder")
    save_part(bare / "vae.safetensors", vae, SMALL_VAE)
    save_part(bare / "image_encoder.safetensors", image_encoder, VISION)
    with small_networks():
        built = miniature.build_miniature(bare, ("motion", "ip_adapter"), 0)
        named = built.named_parameters()
        fill(named, "start")
        built.export(start, named)
    return start


class Toy:
    """The toy's files, and runs on them."""

    def __init__(self, folder: Path) -> None:
        self.init, self.cache = write_start(folder), folder / "latents"

    def settings(self, out: Path, **changed: Any) -> dict[str, Any]:
        """The paper's case in small."""
        return {
            "out": out, "init": self.init, "cache": self.cache, "clips": 6, "num_frames": 3, "batch": 2, "steps": 6,
            "lr": 0.01, "warmup": 2, "decay": "linear", "ema": 0.5, "dtype": "float32", "threads": 1, "log_every": 1,
            "validate_every": 1000, "save_every": 2, "clips_made": 1, **changed,
        }  # fmt: skip

    def config(self, out: Path = Path("unused"), **changed: Any) -> train.Training:
        return train.Training(**self.settings(out, **changed))

    def flags(self, out: Path, **changed: Any) -> list[str]:
        """The same as a command line."""
        argv: list[str] = []
        for name, value in self.settings(out, **changed).items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                argv.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                argv += [f"--{flag}", *(value if isinstance(value, tuple) else (str(value),))]
        return argv

    def run(self, out: Path, **changed: Any) -> Path:
        """train.py, from its command line to its end; returns the folder of finished weights."""
        handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
        try:
            with small_networks():
                self.code = train.main(self.flags(out, **changed))
        finally:  # what a run sets for its process
            signal.signal(signal.SIGTERM, handler)
            torch.set_num_threads(threads)
        return out / "weights"

    def build(self, cfg: train.Training) -> Networks:
        with small_networks():
            return miniature.build_miniature(cfg.init, cfg.parts, cfg.seed)


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder of parts, or of a checkpoint."""
    return {f"{file.stem}.{k}": v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Equal to the bit."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def pause_in_checkpoint(step: int) -> None:
    """From now on, the checkpoint of `step` is never finished: its files are there, its name is not."""
    rename = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == f"step-{step:06d}":
            print(PAUSED, flush=True)
            time.sleep(60)
        rename(source, target)

    os.replace = replace  # type: ignore[assignment]


def stop_at(monkeypatch: pytest.MonkeyPatch, sample: int, number: int = signal.SIGTERM) -> None:
    """The signal arrives while the batch that starts with `sample` is drawn, at the process that draws it."""
    draw = Batches.draw

    def interrupted(self: Batches, first: int, count: int) -> Batch:
        if first == sample:
            os.kill(os.getpid(), number)
        return draw(self, first, count)

    monkeypatch.setattr(Batches, "draw", interrupted)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    with small_networks(), pytest.MonkeyPatch.context() as monkeypatch:
        for flag in ("--pause-in-checkpoint", "--stop-at-sample"):
            if flag in arguments:
                at = arguments.index(flag)
                value = int(arguments[at + 1])
                del arguments[at : at + 2]
                pause_in_checkpoint(value) if flag == "--pause-in-checkpoint" else stop_at(monkeypatch, value)
        code = train.main(arguments)
    leave(code)

"""All of a run that a checkpoint holds, and the way back: the same command goes on as if nothing had been."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from i2v import config
from i2v.config import ConfigError
from i2v.training import checkpoint
from i2v.training.ema import EMA
from i2v.training.optim import optimizer_tensors, restore_optimizer
from i2v.training.settings import Training, refuse_changes


@dataclass
class State:
    """Trained tensors by name, optimizer, moving average; steps and seconds so far."""

    cfg: Training
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMA
    step: int = 0
    seconds: float = 0.0

    def save(self) -> None:
        """A checkpoint in `--out`; older ones but one are deleted."""
        tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in self.trained.items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.shadow.items()}
        tensors |= {f"optim.{k}": v for k, v in optimizer_tensors(self.optimizer, self.trained).items()}
        facts = {"seconds": self.seconds, "config": config.to_dict(self.cfg)}
        checkpoint.save(self.cfg.out, self.step, tensors, facts)

    def resume(self) -> Path | None:
        """Take everything over from the newest whole checkpoint in `--out`, if there is one; returns it.

        Log lines of later steps, which are run again, are dropped. Raises ConfigError where the checkpoint trained
        other tensors or with other settings.
        """
        out = self.cfg.out
        if (found := checkpoint.latest(out)) is not None:
            tensors, facts = checkpoint.load(found)
            if {k[6:] for k in tensors if k.startswith("model.")} != self.trained.keys():
                raise ConfigError(f"{found} trained other tensors than --train names now; take another --out")
            refuse_changes(self.cfg, facts["config"], found)
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(tensors[f"model.{name}"])
            self.ema.shadow = {k: tensors[f"ema.{k}"].to(v.device) for k, v in self.trained.items()}
            optimizer = {k[6:]: v for k, v in tensors.items() if k.startswith("optim.")}
            restore_optimizer(self.optimizer, self.trained, optimizer)
            self.step, self.seconds, self.ema.updates = facts["step"], facts["seconds"], facts["step"]
        path = out / "log.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        config.write_text(path, "".join(f"{line}\n" for line in kept))
        return found


class Silent:
    """Trained tensors that no gradient has reached yet; `check()` after each backward pass.

    What starts behind a zero (W_Q' behind W_O') gets its first gradient in the second step, so ten are waited for.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], steps: int = 10) -> None:
        self.tensors, self.left = dict(trained), steps

    def check(self) -> list[str]:
        """Names of the tensors that are still without a gradient, told once after the last of the steps."""
        if not self.left:
            return []
        self.left -= 1
        self.tensors = {k: p for k, p in self.tensors.items() if p.grad is None or not p.grad.any()}
        return [] if self.left else list(self.tensors)

"""All of a run that a checkpoint holds, and the way back: the same command goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from i2v import config
from i2v.config import ConfigError
from i2v.hashes import known_sha256
from i2v.training import checkpoint
from i2v.training.clips import IDENTITY, RunClips
from i2v.training.ema import EMA
from i2v.training.optim import optimizer_tensors, restore_optimizer
from i2v.training.settings import Training, allowed_changes, refuse_changes


@dataclass
class State:
    """Trained tensors by name, optimizer, gradient scaler, moving average; steps, samples and seconds so far.

    processes: how many train together. clips, bad: identity and quarantine of the user's clips, by `note_clips`.
    frozen: sha256 of the files that frozen parts came from, by `note_files`; None in checkpoints of older versions.
    """

    cfg: Training
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMA
    scaler: torch.amp.GradScaler
    processes: int = 1
    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    clips: dict[str, Any] = field(default_factory=dict)
    bad: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    frozen: dict[str, str] | None = None
    lock: IO[str] | None = None  # on `--out`, of the process that writes
    logged: int = -1  # the last step that the log tells of

    def save(self) -> None:
        """A checkpoint in `--out`; all but the newest `--keep-checkpoints` are deleted."""
        tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in self.trained.items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.shadow.items()}
        tensors |= {f"optim.{k}": v for k, v in optimizer_tensors(self.optimizer, self.trained).items()}
        facts = {"seconds": self.seconds, "processes": self.processes, "config": config.to_dict(self.cfg)}
        bad = {"quarantine": [entry for _, entry in sorted(self.bad.items())]}  # in one step, as `Dataset.quarantine`
        facts |= {"scaler": self.scaler.state_dict(), "clips": self.clips | bad}
        facts |= {"samples": self.samples, "frozen": self.frozen}
        checkpoint.save(self.cfg.out, self.step, tensors, facts, keep=self.cfg.keep_checkpoints)

    def resume(self, writes: bool = True) -> str:
        """Take everything over from the newest whole checkpoint in `--out`, if there is one; returns words for people.

        Log lines of later steps, which are run again, are dropped (by the process that `writes`). Raises ConfigError
        where the checkpoint trained other tensors or with other settings.
        """
        out, words = self.cfg.out, ""
        if writes:
            self.lock = checkpoint.hold(out)
        if (found := checkpoint.latest(out)) is not None:
            tensors, facts = checkpoint.load(found)
            if {k[6:] for k in tensors if k.startswith("model.")} != self.trained.keys():
                raise ConfigError(f"{found} trained other tensors than --train names now; take another --out")
            refuse_changes(self.cfg, facts["config"], found)
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(tensors[f"model.{name}"])
            self.ema.shadow = {k: tensors[f"ema.{k}"].to(v.device) for k, v in self.trained.items()}
            before = config.to_dict(Training()) | facts["config"]  # older runs lack settings
            if same_optimizer := before["optimizer"] == self.cfg.optimizer:
                optimizer = {k[6:]: v for k, v in tensors.items() if k.startswith("optim.")}
                restore_optimizer(self.optimizer, self.trained, optimizer)
            if self.scaler.is_enabled() and facts.get("scaler"):
                self.scaler.load_state_dict(facts["scaler"])
            self.step, self.seconds, self.ema.updates = facts["step"], facts["seconds"], facts["step"]
            self.samples = facts.get("samples", self.step * before["batch"])
            self.clips, self.frozen = facts.get("clips", {}), facts.get("frozen")
            words = f"going on from {found}"
            if not same_optimizer:
                words += f"\n{self.cfg.optimizer} begins anew: the run had {before['optimizer']} until here"
            if (count := facts.get("processes", 1)) != self.processes:
                words += (f"\nmade by {count} processes, now {self.processes} go on: the same samples, sums rounded "
                          "in another order")  # fmt: skip
        if writes:  # with no checkpoint the line of step 0 is written again too
            self.logged = checkpoint.cut_log(out / "log.jsonl", self.step if found is not None else -1)
        return words

    def note_files(self, files: Mapping[str, Path]) -> None:
        """Remember what the frozen parts are, by `Networks.frozen_files`. Raises ConfigError where a run that goes on
        had others: what was learnt so far was learnt over those."""
        before, self.frozen = self.frozen, {part: known_sha256(path) for part, path in files.items()}
        if before is None or before == self.frozen or "init" in allowed_changes(self.cfg):
            return
        other = sorted(part for part in before.keys() | files.keys() if before.get(part) != self.frozen.get(part))
        listed = "".join(f"\n  {part}: {files.get(part, 'from a file, now begun anew')}" for part in other)
        raise ConfigError(
            f"frozen weights are others than when this run in {self.cfg.out} began:{listed}\ntake another --out for a "
            "new run, or go on with --allow-change init"
        )

    def note_clips(self, clips: RunClips) -> None:
        """Remember which clips these are. Raises ConfigError where a run that goes on had others."""
        before = self.clips.get("identity", clips.identity)
        older = before and not before.startswith(IDENTITY)  # by their rows in the cache: not comparable
        if older and self.lock is not None:  # told once
            print("this run was begun by an older version: whether the clips are the same ones cannot be told")
        if before != clips.identity and not older and "data" not in allowed_changes(self.cfg):
            raise ConfigError(
                f"--data {self.cfg.data}: the clips or captions are others than when this run began; take another "
                "--out for a new run, or go on with --allow-change data"
            )
        self.clips, self.bad = {"identity": clips.identity}, clips.bad

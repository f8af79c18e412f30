"""Where the numbers of a run go: log.jsonl and pictures of it always; TensorBoard and wandb where asked for."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from i2v import config
from i2v.config import ConfigError
from i2v.training.plots import plot_log
from i2v.training.settings import Training
from i2v.training.validation import mean_loss

PACKAGES = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}


class Report:
    """`row` adds a line to the log, `draw` brings the pictures up to date. With `writes` False it does nothing: of
    several processes one reports.

    Raises ConfigError where a package that `--report` names is not installed.
    """

    def __init__(self, cfg: Training, writes: bool = True) -> None:
        self.out, self.writes = cfg.out, writes
        self.log = (cfg.out / "log.jsonl").open("a", encoding="utf-8") if writes else None
        modules = {name: _module(name) for name in cfg.report} if writes else {}
        board, wandb = modules.get("tensorboard"), modules.get("wandb")
        self.board = board.SummaryWriter(str(cfg.out / "tensorboard")) if board is not None else None
        self.wandb = None
        if wandb is not None:  # a run that goes on is the same run there
            identity = _run_id(cfg.out)
            self.wandb = wandb.init(
                project="i2v-adapter", name=cfg.out.name, id=identity, resume="allow", dir=str(cfg.out),
                config=config.to_dict(cfg),
            )  # fmt: skip

    def row(self, row: Mapping[str, Any]) -> None:
        """The numbers of one step; "step" is among them."""
        if self.log is None:
            return
        self.log.write(json.dumps(row) + "\n")
        self.log.flush()
        numbers = {name: value for name, value in row.items() if name != "step"}
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, row["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["step"])

    def compared(self, loss: float) -> str:
        """A validation loss beside that before the first step, in words."""
        told = f"validation loss {loss:.4f}"
        with (self.out / "log.jsonl").open(encoding="utf-8") as log:
            start: dict[str, float] = next((json.loads(line) for line in log), {})
        if not any(name.startswith("val_") for name in start):
            return told
        before = mean_loss(start)
        side = "below" if loss <= before else "ABOVE"
        return f"{told}, {abs(1 - loss / before):.1%} {side} the {before:.4f} before step 1"

    def draw(self) -> None:
        if self.log is not None:
            plot_log(self.out)

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for target in (self.log, self.board):
            if target is not None:
                target.close()
        if self.wandb is not None:
            self.wandb.finish()


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError for one of `--report` that is not installed: before the work, not after it."""
    for name in names:
        _module(name)


def _module(name: str) -> Any:
    module, package = PACKAGES[name]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"--report {name}: {package} is not installed; pip install {package}") from None


def _run_id(out: Path) -> str:
    """Of this folder's run, kept in it."""
    file = out / "wandb-id.txt"
    if not file.is_file():
        config.write_text(file, f"{out.name}-{time.time_ns():x}\n")
    return file.read_text(encoding="utf-8").strip()

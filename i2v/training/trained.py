"""What a run trains: the tensors that name patterns choose, as a table, and those that no gradient reaches."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from torch import nn

from i2v.config import ConfigError
from i2v.training.networks import Networks
from i2v.training.settings import Training


def trained_tensors(cfg: Training, networks: Networks) -> dict[str, nn.Parameter]:
    """The tensors that `--train` names; all others are frozen. Raises ConfigError for a pattern that matches nothing,
    and for a part of `--new` without a trained tensor, which would stay random."""
    named = networks.named_parameters()
    chosen = {} if cfg.lora else chosen_by(cfg.train, named)
    if idle := [part for part in cfg.new if not any(name.startswith(f"{part}.") for name in chosen)]:
        raise ConfigError(f"--new {idle[0]} begins a part anew of which --train names no tensor: it would stay as it "
                          f"begins, random; add --train '{idle[0]}.*', or leave out --new {idle[0]}")  # fmt: skip
    if cfg.lora:
        return networks.add_lora(cfg.train, cfg.lora, cfg.seed)
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    return chosen


def chosen_by(patterns: Sequence[str], named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The tensors whose names match a pattern. Raises ConfigError for a pattern that matches none."""
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            raise ConfigError(f"--train {pattern!r} matches no tensor; names are like {next(iter(named))}")
    return {k: p for k, p in named.items() if any(fnmatch.fnmatch(k, pattern) for pattern in patterns)}


def table(networks: Networks, trained: Mapping[str, nn.Parameter]) -> str:
    """Parameters of each part, then the trained tensors, those in one line whose names differ in numbers alone."""
    lines = [f"{part:14} {count['trained']:>13,} trained of {count['all']:>13,}"
             for part, count in networks.summary(trained).items()]  # fmt: skip
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        groups.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(parameter)
    rows = [(name, f"{len(some)} x", f"{sum(p.numel() for p in some):,}") for name, some in groups.items()]
    wide = max(len(name) for name, *_ in rows)
    return "\n".join([*lines, "trained tensors:", *(f"  {a.ljust(wide)}  {b:>6} {c:>12}" for a, b, c in rows)])


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

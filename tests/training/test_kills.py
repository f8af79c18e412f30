"""A run that is killed at twenty random moments, inside of saves too, ends with the bits of the unbroken one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_training import Toy, same, weights

from i2v import config
from i2v.training import checkpoint
from i2v.training.batches import Batches

KILLS, STEPS = 20, 40
RUN: dict[str, Any] = {"steps": STEPS, "log_every": 5, "clips_made": 0}


def dies_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    """The process kills itself at the `moment`-th of the events of a run: a batch drawn, a part of a checkpoint or of
    the log written, synced, renamed; half of a checkpoint's tensors stand on the disk at one of them."""
    seen = [0]

    def counted(function: Callable[..., Any], half: bool = False) -> Callable[..., Any]:
        def event(*arguments: Any, **named: Any) -> Any:
            seen[0] += 1
            if seen[0] == moment:
                if half:
                    function(*arguments, **named)
                    file = Path(arguments[1])
                    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return event

    patch.setattr(Batches, "draw", counted(Batches.draw))
    patch.setattr(checkpoint, "save_file", counted(checkpoint.save_file, half=True))
    for name in ("sync", "sync_folder"):
        patch.setattr(checkpoint, name, counted(getattr(checkpoint, name)))
    patch.setattr(os, "replace", counted(os.replace))
    patch.setattr(config, "write_text", counted(config.write_text))


def in_a_child(run: Callable[[], object], moment: int | None) -> int:
    """`run` in a process of its own, killed at a moment; its exit status as `os.waitpid` gives it."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if moment is not None:
                dies_at(moment, pytest.MonkeyPatch())
            run()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_killed_twenty_times(toy: Toy, tmp_path: Path) -> None:
    """With none, one or three threads that prepare batches, by turns."""
    toy.run(tmp_path / "unbroken", **RUN, save_every=STEPS)
    out = tmp_path / "killed"
    moments = np.random.default_rng(0).integers(1, 25, KILLS).tolist()
    for number, moment in enumerate(moments):
        status = in_a_child(lambda: toy.run(out, **RUN, save_every=1, workers=(0, 1, 3)[number % 3]), moment)  # noqa: B023
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"ended before moment {moment}"
    found = checkpoint.latest(out)
    assert found is not None and 2 < int(found.name[5:]) < STEPS
    toy.run(out, **RUN, save_every=1, workers=2)
    ends = [weights(folder / f"step-{STEPS:06d}") for folder in (tmp_path / "unbroken", out)]
    assert ends[0] and same(*ends) and same(weights(tmp_path / "unbroken" / "weights"), weights(out / "weights"))
    assert not list(out.glob(".step*")) and len(checkpoint.complete(out)) == 2

"""Several processes with gloo: together they learn what one learns, and their number may change on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_training
from toy_training import Toy, weights

from i2v.config import ConfigError
from i2v.device import Place, place
from i2v.training import checkpoint
from i2v.training.batches import Batches
from i2v.training.distributed import Processes, processes

RUN: dict[str, Any] = {"steps": 4, "decay": "constant", "batch": 4, "clips_made": 0, "ema": 0.0, "device": "cpu"}
# torchrun gives each process one thread; and Adam moves a weight whose gradient is rounding by a share of the rate
RUN |= {"threads": 1, "lr": 1e-3}


def together(toy: Toy, root: Path, out: Path, count: int, *more: str, code: int = 0, **changed: Any) -> str:
    """A run of `count` processes, as torchrun starts them; returns what was printed. more: of toy_training's flags.

    code: the exit code of torchrun: 1 where a process ends with another than 0.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [toy_training.__file__, *toy.flags(out, **{**RUN, **changed}), *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout


def test_two_processes_learn_what_one_learns(
    toy: Toy, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within 1e-6 after two steps; then one of them goes on alone, says so, and ends where one alone ends."""
    toy.run(tmp_path / "one", **RUN, micro_batch=1)
    said = together(toy, root, tmp_path / "two", 2, steps=2, micro_batch=1)
    assert said.count("trained tensors") == 1 and said.count("finished") == 1  # one of them speaks
    pair, alone = (weights(tmp_path / name / "step-000002") for name in ("two", "one"))
    assert pair.keys() == alone.keys() and len(pair) > 20
    assert max(float((pair[k] - alone[k]).abs().max()) for k in pair) < 1e-6
    rows = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()][:2]
            for name in ("two", "one")]  # fmt: skip
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], abs=1e-6)

    capsys.readouterr()
    toy.run(tmp_path / "two", **RUN, micro_batch=1, allow_change=("steps",))
    assert "made by 2 processes, now 1 go on" in capsys.readouterr().out
    pair, alone = (weights(tmp_path / name / "step-000004") for name in ("two", "one"))
    assert max(float((pair[k] - alone[k]).abs().max()) for k in pair) < 1e-5


def test_a_signal_that_reaches_one_process_saves(toy: Toy, root: Path, tmp_path: Path) -> None:
    """Sample 6 is drawn in the second step by the second process, which saves nothing itself."""
    said = together(toy, root, tmp_path, 2, "--stop-at-sample", "6", code=1, save_every=100)
    assert "stopped by a signal at step 2" in said
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000002"]


def test_processes_that_differ_do_not_train_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where files came to --data while the first one encoded, or --out lies on each machine's own disk."""

    def gathered(of_all: list[Any], mine: dict[str, Any]) -> None:
        of_all[:] = [mine, {**mine, "step": 7}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    Processes(0, 2).agree(clips="a")
    Processes(0, 1).agree(step=0)
    with pytest.raises(ConfigError, match=r"differ in step: \[0, 7\]; give all of them the same --out and --data"):
        Processes(0, 2).agree(step=0, clips="a")


def test_a_torch_without_its_distributed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds for Windows or Jetson may lack it: one process then, as without torchrun."""
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_torchelastic_launched")
    assert place() == Place()
    with processes("cpu") as alone:
        assert alone.count == 1


def test_a_run_compares_step_and_clips(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[dict[str, object]] = []
    monkeypatch.setattr(Processes, "agree", lambda run, **found: compared.append(found))
    toy.run(tmp_path, steps=2, decay="constant", save_every=2)
    toy.run(tmp_path, steps=3, decay="constant", allow_change=("steps",))
    assert compared == [{"step": 0, "clips": ""}, {"step": 2, "clips": ""}]


def test_every_sample_is_drawn_once(toy: Toy) -> None:
    """The processes' samples of a step are those of one process, none twice."""
    cfg = toy.config(batch=6)
    networks = toy.build(cfg)
    data = networks.encoded_world(cfg.cache, cfg.world, "train", cfg.clips)
    batches = Batches(cfg, data, networks)
    whole = next(batches.of_steps(3, 4))
    parts = [next(batches.of_steps(3, 4, rank, 3)) for rank in range(3)]
    for name in ("latents", "noise", "timesteps"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    with pytest.raises(ConfigError, match="--batch 6 does not split over 4 processes"):
        Processes(0, 4).share(6)

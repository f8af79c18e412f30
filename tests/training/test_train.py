"""Whole runs of train.py on a toy: stopped and resumed, finished, exported, and the numbers they give."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_training
from safetensors import safe_open
from safetensors.torch import save_file
from toy_training import PAUSED, Toy, same, stop_at, weights

import train
from i2v.config import ConfigError
from i2v.training import checkpoint
from i2v.training.batches import Batches
from i2v.training.networks import Conditions, Networks

# Made with torch 2.13.0 on a CPU, one thread; weights and draws come from numpy's Philox, not from torch.
LOSSES = [1.204252, 1.156233, 1.028263, 1.309631, 0.974761, 1.033366]


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def equals(out: Path, unbroken: Path) -> bool:
    """Exported weights and the last checkpoint (tensors, moving average, optimizer) to the bit."""
    newest = [checkpoint.latest(folder) for folder in (out, unbroken)]
    assert newest[0] and newest[1] and newest[0].name == newest[1].name == "step-000006"
    exported = same(weights(out / "weights"), weights(unbroken / "weights"))
    return exported and same(weights(newest[0]), weights(newest[1]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_exits_and_the_same_command_goes_on(
    toy: Toy,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # whatever this process was started with
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, 6, number)  # in the fourth step, which is finished first
        toy.run(tmp_path, save_every=100)
    assert toy.code == 128 + number and signal.getsignal(number) == handler
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000004"]
    assert not (tmp_path / "weights").exists() and "stopped by a signal at step 4" in capsys.readouterr().out
    toy.run(tmp_path, save_every=100)
    assert f"going on from {tmp_path / 'step-000004'}" in capsys.readouterr().out
    assert equals(tmp_path, unbroken)
    assert all([row[k] for row in log(tmp_path)] == [row[k] for row in log(unbroken)] for k in ("loss", "lr", "norm"))


def test_a_second_sigterm_does_not_end_what_saves(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler sends one to each process, and torchrun passes its own on."""
    stop_at(monkeypatch, 6)
    stop_at(monkeypatch, 6)
    toy.run(tmp_path, save_every=100)
    assert toy.code == 143 and [p.name for p in checkpoint.complete(tmp_path)] == ["step-000004"]


def test_sighup_stays_ignored_under_nohup(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(monkeypatch, 6, signal.SIGHUP)
        toy.run(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert toy.code == 0


def test_a_step_is_saved_before_its_validation(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which may run out of memory or of disk: the same command then goes on after it."""

    def full_disk(*given: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_videos", lambda *given: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            toy.run(tmp_path, save_every=4, validate_every=4, hold_out=0.0)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000004"]
    toy.run(tmp_path, save_every=4, validate_every=4, hold_out=0.0)
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6] and rows[4].keys() >= {"val_200", "nearer"}
    with monkeypatch.context() as patch:  # also where the run ends there, and the next command has nothing to train
        patch.setattr(train, "make_videos", lambda *given: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            toy.run(tmp_path / "2", steps=4, save_every=4, validate_every=4, hold_out=0.0)
    with monkeypatch.context() as patch:  # that fails again, and stops nothing
        patch.setattr(train, "make_videos", full_disk)
        toy.run(tmp_path / "2", steps=4, save_every=4, validate_every=4, hold_out=0.0)
    assert toy.code == 0 and "no validation of step 4: the disk is full" in capsys.readouterr().out
    assert log(tmp_path / "2")[-1]["step"] < 4
    toy.run(tmp_path / "2", steps=4, save_every=4, validate_every=4, hold_out=0.0)
    assert toy.code == 0 and log(tmp_path / "2")[-1].keys() >= {"val_200", "nearer"}


def test_another_process_that_trains_there_is_waited_for(
    toy: Toy, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ("import sys; from pathlib import Path; from i2v.training.checkpoint import hold; "
              "kept = hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()")  # fmt: skip
    command = [sys.executable, "-c", script, str(tmp_path)]
    flock, saved = fcntl.flock, list[bool]()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as other:
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == "held\n"

        def waited(file: Any, how: int) -> None:
            if not how & fcntl.LOCK_NB:  # the second try, which waits
                saved.append((tmp_path / "config.json").exists())
                other.stdin.close()  # type: ignore[union-attr]
            flock(file, how)

        monkeypatch.setattr(fcntl, "flock", waited)
        toy.run(tmp_path, steps=1)
    assert saved == [False] and toy.code == 0 and other.returncode == 0
    assert f"waiting for another process that trains into {tmp_path}" in capsys.readouterr().out
    toy.run(tmp_path, steps=1)
    assert len(saved) == 1 and "waiting" not in capsys.readouterr().out


def test_kill_9_while_a_checkpoint_is_written(toy: Toy, unbroken: Path, tmp_path: Path, root: Path) -> None:
    """The real thing, in a process of its own, between the checkpoint's last byte and its name."""
    command = [sys.executable, toy_training.__file__, "--pause-in-checkpoint", "4", *toy.flags(tmp_path)]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": paths}
    ) as child:
        assert child.stdout is not None
        seen = any(PAUSED in line for line in child.stdout)
        child.send_signal(signal.SIGKILL)
    assert seen and child.returncode == -signal.SIGKILL
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000002"]
    toy.run(tmp_path)
    assert equals(tmp_path, unbroken)


def test_half_a_line_of_the_log_is_dropped(toy: Toy, tmp_path: Path) -> None:
    """Left by a kill between two writes; the run goes on and no line is lost that a checkpoint knows."""
    toy.run(tmp_path, steps=4)
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text() + path.read_text()[:15])
    toy.run(tmp_path, allow_change=("steps",))
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    path.write_text(path.read_text()[:-10])
    toy.run(tmp_path)
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4, 5]


def test_resuming_needs_every_part_of_the_state(toy: Toy, unbroken: Path, tmp_path: Path) -> None:
    """A checkpoint whose optimizer or average is a little off gives other bits: the comparisons above can fail."""
    for kind in ("optim.exp_avg_sq", "ema.", "model."):
        out = tmp_path / kind
        tensors, facts = checkpoint.load(unbroken / "step-000004")
        spoilt = next(k for k in tensors if k.startswith(kind) and tensors[k].ndim)
        tensors[spoilt] = tensors[spoilt] * 1.5 + 1e-3
        checkpoint.save(out, 4, tensors, {k: v for k, v in facts.items() if k not in ("step", "bytes")})
        toy.run(out)
        assert not equals(out, unbroken)


def test_the_same_command_after_the_end_changes_nothing(toy: Toy, unbroken: Path, tmp_path: Path) -> None:
    def files() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    toy.run(tmp_path)
    first = files()
    toy.run(tmp_path)
    assert files() == first and "log.jsonl" in first and not [name for name in first if ".unfinished" in name]
    assert equals(tmp_path, unbroken)  # and two runs are the same run


def test_changed_settings_are_refused_unless_they_are_named(
    toy: Toy, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, facts = checkpoint.load(unbroken / "step-000006")
    checkpoint.save(tmp_path, 6, tensors, {"config": facts["config"], "seconds": 1.0})
    with pytest.raises(ConfigError) as refused:
        toy.run(tmp_path, lr=0.5, warmup=1, save_every=3)
    said = str(refused.value)
    assert "lr: 0.01 -> 0.5" in said and "warmup: 2 -> 1" in said and "--allow-change lr warmup" in said
    assert "seed" not in said and "save_every" not in said  # what changes no weight may change
    with pytest.raises(ConfigError, match="warmup: 2 -> 1"):
        toy.run(tmp_path, lr=0.5, warmup=1, allow_change=("lr",))
    with pytest.raises(ConfigError, match="--allow-change learning_rate: there is no such"):
        toy.run(tmp_path, allow_change=("learning-rate",))
    toy.run(tmp_path, lr=0.5, warmup=1, allow_change=("lr,warmup",))
    assert "going on from" in capsys.readouterr().out


@pytest.mark.parametrize("change", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_begins_anew(
    toy: Toy, tmp_path: Path, change: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    toy.run(tmp_path, optimizer=change[0], steps=3, save_every=3, decay="constant")
    toy.run(tmp_path, optimizer=change[1], steps=4, decay="constant", allow_change=("optimizer", "steps"))
    assert f"\n{change[1]} begins anew: the run had {change[0]} until here\n" in capsys.readouterr().out
    tensors = weights(tmp_path / "step-000004")
    assert {float(value) for name, value in tensors.items() if ".optim.step." in name} == {1.0}


def test_another_batch_goes_on_with_the_next_samples(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is seen twice or left out; where an older run is, its batch tells."""
    drawn: list[int] = []
    prepared = Batches.prepared

    def noted(self: Batches, first: int, count: int) -> Any:
        drawn.extend(range(first, first + count))
        return prepared(self, first, count)

    monkeypatch.setattr(Batches, "prepared", noted)
    settings: dict[str, Any] = {"save_every": 1, "decay": "constant"}
    toy.run(tmp_path, **settings, batch=6, steps=2)
    assert drawn == list(range(12))
    newest = tmp_path / "step-000002" / "manifest.json"
    facts = json.loads(newest.read_text())
    assert facts.pop("samples") == 12
    newest.write_text(json.dumps(facts))
    for batch, steps in ((2, 4), (3, 5), (1, 6)):
        toy.run(tmp_path, **settings, batch=batch, steps=steps, allow_change=("batch", "steps"))
    assert drawn == list(range(20))


def test_frozen_weights_are_those_that_a_run_began_with(toy: Toy, unbroken: Path, tmp_path: Path) -> None:
    """Of a part that is trained as a whole the checkpoint has all that matters; older ones do not know their files."""
    init = shutil.copytree(unbroken / "weights", tmp_path / "init")
    toy.run(tmp_path / "out", init=init, steps=2)
    for part, steps in (("i2v_adapter", 3), ("unet", 4)):
        with safe_open(init / f"{part}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) + 1 for key in file.keys()}  # noqa: SIM118
            about = file.metadata()
        save_file(tensors, init / f"{part}.safetensors", about)
        if part == "i2v_adapter":
            toy.run(tmp_path / "out", init=init, steps=steps, allow_change=("steps",))
    again: dict[str, Any] = {"init": init, "steps": 4}
    with pytest.raises(ConfigError, match=r"frozen weights are others .*\n  unet: .*unet.safetensors\ntake .* init$"):
        toy.run(tmp_path / "out", **again, allow_change=("steps",))
    toy.run(tmp_path / "out", **again, allow_change=("steps", "init"))
    toy.run(tmp_path / "out", **again)  # from now on with these
    (init / "merges.txt").write_text((init / "merges.txt").read_text().rpartition("\n")[0])
    with pytest.raises(ConfigError, match="\n  merges: "):
        toy.run(tmp_path / "out", **again)


def test_settings_that_an_older_run_did_not_have_are_their_defaults(toy: Toy, unbroken: Path, tmp_path: Path) -> None:
    tensors, facts = checkpoint.load(unbroken / "step-000006")
    older = {k: v for k, v in facts["config"].items() if k not in ("min_snr", "lora", "device")}
    checkpoint.save(tmp_path, 6, tensors, {"config": older, "seconds": 1.0})
    toy.run(tmp_path)
    with pytest.raises(ConfigError, match="min_snr: 0.0 -> 5.0"):
        toy.run(tmp_path, min_snr=5.0)


def test_a_tensor_without_a_gradient_is_told(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text's gradient is cut off; without that a run of as many steps says nothing."""
    toy.run(tmp_path / "1", train=("i2v_adapter.*", "text_encoder.*"), steps=11)
    assert "no gradient" not in capsys.readouterr().out
    condition = Networks.condition

    def cut_off(*arguments: Any) -> Conditions:
        told = condition(*arguments)
        return replace(told, context=told.context.detach())

    monkeypatch.setattr(Networks, "condition", cut_off)
    toy.run(tmp_path / "2", train=("i2v_adapter.*", "text_encoder.*"), steps=11)
    said = capsys.readouterr().out
    assert "no gradient has reached text_encoder." in said and "reached i2v_adapter" not in said


def test_another_choice_of_tensors_needs_another_folder(toy: Toy, unbroken: Path, tmp_path: Path) -> None:
    tensors, facts = checkpoint.load(unbroken / "step-000006")
    checkpoint.save(tmp_path, 6, tensors, {"config": facts["config"], "seconds": 1.0})
    for pattern in ("motion.*", "i2v_adapter.*to_q*"):
        with pytest.raises(ConfigError, match="trained other tensors.*--out"):
            toy.run(tmp_path, train=(pattern,))


def test_a_log_line_after_a_pause_is_a_mean(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the steps since the pause: here the last one alone."""
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        toy.run(tmp_path, log_every=3)
    toy.run(tmp_path, log_every=3)
    assert log(tmp_path)[-1]["loss"] == pytest.approx(LOSSES[-1], abs=1e-4)


def test_the_loss_curve(toy: Toy, unbroken: Path, tmp_path: Path) -> None:
    """Six steps equal stored numbers: a change of draws, weights, schedule, loss or optimizer shows here."""
    curve = [row["loss"] for row in log(unbroken)]
    assert curve == pytest.approx(LOSSES, abs=1e-4)
    for change in ({"lr": 0.009}, {"seed": 1}, {"clean_first": False}, {"weight_decay": 1.0}):
        out = tmp_path / next(iter(change))
        toy.run(out, **change)
        assert [row["loss"] for row in log(out)] != pytest.approx(LOSSES, abs=1e-4)


def test_a_loss_that_is_no_number_stops_the_run(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoints before it stay."""
    loss_of, seen = train.loss_of, []

    def spoilt(*arguments: Any) -> torch.Tensor:
        seen.append(0)
        return loss_of(*arguments) * (float("nan") if len(seen) > 4 else 1)

    monkeypatch.setattr(train, "loss_of", spoilt)
    with pytest.raises(FloatingPointError, match="nan at step 4.*--lr"):
        toy.run(tmp_path, save_every=1)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000004"


def test_a_gradient_that_is_no_number_is_not_saved(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of that step is one: it was computed before."""
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def spoilt(parameters: Any, most: float) -> torch.Tensor:
        seen.append(0)
        return clip(parameters, most) * (float("inf") if len(seen) > 4 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoilt)
    with pytest.raises(FloatingPointError, match="gradient is inf at step 4.*--lr"):
        toy.run(tmp_path, save_every=1)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000004"

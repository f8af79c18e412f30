"""Checkpoints: whatever moment the process dies at, the newest whole one is found and is right."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from toy_training import same

from i2v.training import checkpoint


class Killed(BaseException):
    """Nothing in the code under test may catch it."""


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((3, 2), float(value)), "optim.step": torch.tensor(float(value))}


def step_of(folder: Path) -> int:
    """The step that the newest checkpoint says and holds."""
    path = checkpoint.latest(folder)
    assert path is not None
    tensors, facts = checkpoint.load(path)
    assert same(tensors, state(facts["step"]))
    return facts["step"]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).half(),
        "turned": torch.arange(6.0).view(2, 3).T,
        "scalar": torch.tensor(3.0),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    facts = {"seconds": 0.1, "config": {"parts": ["a"], "seed": 2}}
    path = checkpoint.save(tmp_path, 7, tensors, facts)
    loaded, told = checkpoint.load(path)
    assert path == checkpoint.latest(tmp_path) == tmp_path / "step-000007"
    assert same(loaded, tensors) and {k: told[k] for k in facts} == facts and told["step"] == 7


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 999999, 1000000):
        checkpoint.save(tmp_path, step, state(step), {}, keep=3)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step-000010", "step-999999", "step-1000000"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-1000000", "step-999999"]
    assert step_of(tmp_path) == 1000000


def test_a_copy_of_one_is_left_alone(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1), {})
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000001-keep")
    for step in (2, 3):
        checkpoint.save(tmp_path, step, state(step), {}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001-keep", "step-000003"] and step_of(tmp_path) == 3


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


def cut_off(path: Path) -> None:
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "tensors.safetensors").unlink(),
        lambda path: path.rename(path.with_name(f".{path.name}.unfinished")),
        cut_off,
        lambda path: (path / "manifest.json").write_text('{"step": 2, "by'),
    ],
    ids=["no manifest", "no tensors", "not renamed", "cut off", "half a manifest"],
)
def test_an_unfinished_folder_is_passed_over(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    checkpoint.save(tmp_path, 1, state(1), {})
    newer = checkpoint.save(tmp_path, 2, state(2), {})
    assert step_of(tmp_path) == 2
    spoil(newer)
    assert step_of(tmp_path) == 1
    for step in (2, 3, 4):  # it is no obstacle to the next ones, and does not count among the kept
        checkpoint.save(tmp_path, step, state(step), {}, keep=3)
    assert [p.name for p in checkpoint.complete(tmp_path)] == [f"step-00000{k}" for k in (2, 3, 4)]
    assert step_of(tmp_path) == 4


def half_a_file(tensors: dict[str, torch.Tensor], file: Path) -> None:
    file.write_bytes(b"\x40")
    raise Killed


def killed(*_: object, **__: object) -> None:
    raise Killed


@pytest.mark.parametrize(
    ("owner", "name", "dies"),
    [
        (checkpoint, "save_file", killed),
        (checkpoint, "save_file", half_a_file),
        (Path, "write_text", killed),
        (os, "replace", killed),
    ],
    ids=["before the tensors", "in the tensors", "before the manifest", "before the name"],
)
@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
def test_dying_while_writing_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, dies: Callable[..., None], again: bool
) -> None:
    checkpoint.save(tmp_path, 1, state(1), {})
    checkpoint.save(tmp_path, 2, state(2), {})
    step = 2 if again else 3
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, dies)
        checkpoint.save(tmp_path, step, state(step), {})
    assert step_of(tmp_path) in ((1, 2) if again else (2,))
    checkpoint.save(tmp_path, 4, state(4), {})
    assert step_of(tmp_path) == 4
    assert not list(tmp_path.glob(".*"))  # nothing is left of it


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors and manifest are synced, then the folder is renamed, then the rename is synced."""
    events: list[str] = []
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    for name in ("sync", "sync_folder"):
        monkeypatch.setattr(checkpoint, name, lambda path: events.append(path.name))
    monkeypatch.setattr(os, "replace", replace)
    checkpoint.save(tmp_path, 1, state(1), {})
    assert events == ["tensors.safetensors", "manifest.json", "rename", tmp_path.name]


SAVES_FOR_EVER = """
import itertools, sys, torch
from pathlib import Path
from i2v.training import checkpoint
for step in itertools.count(1):
    tensors = {"model.w": torch.full((3, 2), float(step)), "optim.step": torch.tensor(float(step))}
    checkpoint.save(Path(sys.argv[1]), step, tensors, {"filler": "x" * 100_000})
    print(step, flush=True)
"""


def test_kill_9_at_any_moment(tmp_path: Path, root: Path) -> None:
    """A process that does nothing but save is killed: the last one it had reported is there, whole, or a newer one."""
    command = [sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        reported = [int(line) for line in child.stdout.read().split()]
    assert child.returncode == -signal.SIGKILL
    assert step_of(tmp_path) >= max(reported, default=1)
    assert len(checkpoint.complete(tmp_path)) <= 3
    step = step_of(tmp_path) + 1
    checkpoint.save(tmp_path, step, state(step), {})
    assert step_of(tmp_path) == step


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from i2v.training import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"a": torch.ones(10)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    checkpoint.save(folder, 2, {"a": torch.ones(10_000)}, {})
except OSError as error:
    print(error)
"""


def test_another_error_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match=r"step-000001 could not be written \(.*Permission denied.*\); mend that, then"):
        checkpoint.save(tmp_path, 1, state(1), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes")
def test_a_full_disk_is_said_and_leaves_the_one_before(tmp_path: Path, root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], cwd=root, capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step-000002 could not be written" in done.stdout and "make room" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"] and checkpoint.latest(tmp_path)

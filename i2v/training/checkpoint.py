"""Checkpoints that survive a kill at any moment: written aside, synced, renamed; the newest whole one is found again.

A checkpoint is a folder `step-000123/` with `tensors.safetensors` and, written last, `manifest.json`. A folder without
a manifest, or whose tensors do not have the size that the manifest names, is an unfinished write and is passed over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from i2v import config
from i2v.media.output_file import sync, sync_folder

try:
    import fcntl
except ImportError:  # Windows: two runs at once are not kept apart there
    fcntl = None  # type: ignore[assignment]

FULL = ("No space left", "not enough space", "quota exceeded", "File too large")  # in the systems' words

_held: WeakValueDictionary[Path, IO[str]] = WeakValueDictionary()


def hold(folder: Path) -> IO[str]:
    """Keeps other runs out of `folder` until the file that is returned is closed. One that is there is waited for: a
    scheduler may start a run again while the process that it stopped still saves."""
    folder.mkdir(parents=True, exist_ok=True)
    if (before := _held.pop(folder.resolve(), None)) is not None:  # by a run of this process that an error ended
        before.close()
    lock = _held[folder.resolve()] = (folder / "lock").open("w")
    if fcntl is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that trains into {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
    return lock


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int = 2) -> Path:
    """Write `folder/step-<step>`; then delete all but the newest `keep` checkpoints.

    facts: whatever json can hold (config, step, sample index); returned by `load` beside the tensors.
    Raises OSError where it cannot be written; the checkpoints before stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, aside = folder / f"step-{step:06d}", folder / f".step-{step:06d}.unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    file = aside / "tensors.safetensors"
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file)
    except SafetensorError as error:
        shutil.rmtree(aside, ignore_errors=True)
        advice = "make room there" if any(words in str(error) for words in FULL) else "mend that"
        raise OSError(f"{target} could not be written ({error}); {advice}, then the same command goes on from the "
                      "checkpoint before") from error  # fmt: skip
    sync(file)
    manifest = aside / "manifest.json"
    manifest.write_text(json.dumps({"step": step, "bytes": file.stat().st_size, **facts}, indent=1) + "\n")
    sync(manifest)
    if target.exists():  # written again: the old one is moved away, not deleted before the new one has its name
        os.replace(target, folder / f".step-{step:06d}.{os.getpid()}.old")
    os.replace(aside, target)
    sync_folder(folder)
    for old in [*complete(folder)[:-keep], *folder.glob(".step-*")]:  # and what killed writes have left
        shutil.rmtree(old)
    return target


def complete(folder: Path) -> list[Path]:
    """All whole checkpoints below `folder`, oldest first."""
    found = []
    for path in folder.glob("step-*") if folder.is_dir() else []:
        if not path.name.removeprefix("step-").isdecimal():  # a copy of one, under a name of the user's
            continue
        manifest, file = path / "manifest.json", path / "tensors.safetensors"
        try:
            whole = json.loads(manifest.read_text())["bytes"] == file.stat().st_size
        except (FileNotFoundError, json.JSONDecodeError):
            whole = False
        if whole:
            found.append(path)
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))  # not by name: steps pass a million


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = complete(folder)
    return found[-1] if found else None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of one checkpoint folder."""
    facts = json.loads((path / "manifest.json").read_text())
    with safe_open(path / "tensors.safetensors", "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, facts  # noqa: SIM118 - safe_open is no mapping


def cut_log(path: Path, step: int) -> int:
    """Keep the lines of a log (JSON with "step", one a line) up to `step`: later steps are run again.

    Half a line, which a killed run may leave, is dropped. Returns the last step that is told of, -1 for none.
    """
    kept, last = [], -1
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            told = json.loads(line)["step"]
        except json.JSONDecodeError:
            continue
        if told <= step:
            kept.append(line)
            last = told
    config.write_text(path, "".join(f"{line}\n" for line in kept))
    return last

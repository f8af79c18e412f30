"""Writing results safely: checked before the long work, whole or not at all, nothing overwritten unasked."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

FRAME_NAME = re.compile(r"frame_\d{4,}\.png")
FOLDER_SETTINGS = "settings.json"


class OutputExists(FileExistsError):
    """The output is already there and was not to be overwritten; the message names the flag."""


class OutputError(OSError):
    """The output cannot be written; the message says why and what to do."""


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raises `OutputExists` when something at `target` would be lost that may not be."""
    if target.is_dir():
        foreign = [p.name for p in target.iterdir() if not (FRAME_NAME.fullmatch(p.name) or p.name == FOLDER_SETTINGS)]
        if foreign:
            raise OutputExists(
                f"{target} is a folder with other things in it ({sorted(foreign)[0]}, ...); name a new folder, "
                "or a file with an ending such as .mp4"
            )
        if not any(target.iterdir()):
            return
    if os.path.lexists(target) and not overwrite:
        raise OutputExists(f"{target} already exists; name another file or give --overwrite (in Python overwrite=True)")


def check_place(target: Path) -> None:
    """Makes the folder of `target` where it is missing and tries a file there. Raises `OutputError` when that fails."""
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = _name_beside(target)
        try:
            _make(trial, folder=False)
        finally:
            _remove(trial, folder=False)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"{folder} is not a folder; name another place for the output") from error
    except OSError as error:
        raise OutputError(f"cannot write {target} ({error.strerror}); name another place for the output") from error


@contextlib.contextmanager
def whole_or_nothing(target: Path, folder: bool = False, named: Callable[[], Path] | None = None) -> Iterator[Path]:
    """A temporary name beside `target` to write to; put in its place when the block ends well.

    On any error, Ctrl-C included, the temporary file (or folder, with `folder`) is removed and what was at
    `target` before is still there. Errors of the disk come out as `OutputError`.
    named: asked when the block has ended well for the name to take in place of `target`, in the same folder.
    """
    temporary = _name_beside(target)
    try:
        _make(temporary, folder)
        yield temporary
        sync(temporary)
        target = target if named is None else named()
        if target.is_dir():
            _replace_folder(temporary, target)
        else:
            os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, (OutputError, OutputExists)):
            raise
        reason = error.strerror or str(error)
        raise OutputError(f"{target} could not be written ({reason}); nothing was left behind") from error
    finally:
        _remove(temporary, folder)


def write_whole(target: Path, data: bytes) -> None:
    """Writes a small file in one piece, under a temporary name first."""
    with whole_or_nothing(target) as temporary:
        temporary.write_bytes(data)


def _name_beside(target: Path) -> Path:
    """A name that nothing has. It is known before anything is made there, so that Ctrl-C at any moment finds it."""
    return target.parent / f".{target.stem}.{secrets.token_hex(4)}.part{target.suffix}"


def _make(path: Path, folder: bool) -> None:
    if folder:
        path.mkdir()
    else:
        path.open("xb").close()


def _remove(path: Path, folder: bool) -> None:
    if os.path.lexists(path):
        shutil.rmtree(path, ignore_errors=True) if folder else path.unlink()


def sync(path: Path) -> None:
    """Makes what the file, or a folder's files, hold survive a power cut."""
    for file in path.iterdir() if path.is_dir() else (path,):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive it, where folders can be opened (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace_folder(new: Path, target: Path) -> None:
    """Exchanges a folder: the old one is moved aside, and back again when the new one cannot take its place."""
    if not new.is_dir():
        raise OutputError(f"{target} is a folder; name a file in it")
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.rmdir(aside)
    os.replace(target, aside)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside)

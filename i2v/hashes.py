"""sha256 of files of weights, which every video records: remembered from run to run, since gigabytes take seconds."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from i2v.media.output_file import OutputError, write_whole
from weights_convert.detect import files_of

SMALL = 2**26  # bytes of a file that is hashed each time
YOUNG = 2e9  # nanoseconds in which some systems give two versions of a file one time


def sha256(path: Path, done: Callable[[int], object] = lambda count: None) -> str:
    """Of a file, or of the names and hashes of a folder's files of weights, those that are read; in hexadecimal.

    `done` is told the bytes of each piece.
    """
    if path.is_dir():
        return of_files(files_of(path), path, lambda inside: sha256(inside, done))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            done(len(block))
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """As `sha256`; of a large file it is read again only where its size, times or inode are others than they were.

    What is known lies in `memory_file()`; where that cannot be read or written, the file is hashed each time.
    """
    if path.is_dir():
        return of_files(files_of(path), path, known_sha256)
    path = path.resolve()
    before, began = _stamp(path), time.time_ns()
    if before[0] < SMALL:
        return sha256(path)
    known = _known()
    stamp, found = known.get(str(path), (None, ""))
    if stamp == before:
        return str(found)
    found = sha256(path)
    if max(before[1:3]) < began - YOUNG:
        _remember(_known() | {str(path): (before, found)})
    return found


def memory_file() -> Path:
    """~/.cache/i2v-adapter/sha256.json. Raises RuntimeError where nobody is at home."""
    return Path.home() / ".cache" / "i2v-adapter" / "sha256.json"


def of_files(inside_it: Iterable[Path], folder: Path, of_file: Callable[[Path], str] = sha256) -> str:
    """Of the names and hashes of some files in a folder."""
    digest = hashlib.sha256()
    for inside in inside_it:
        digest.update(f"{inside.relative_to(folder).as_posix()} {of_file(inside)}\n".encode())
    return digest.hexdigest()


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _known() -> dict[str, tuple[list[int], str]]:
    """By path: what the file was when it was read, and its hash."""
    try:
        rows = json.loads(memory_file().read_text(encoding="utf-8"))
        return {path: (stamp, found) for path, (stamp, found) in rows.items() if len(found) == 64}
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError):  # none yet, another's, damaged
        return {}


def _remember(known: dict[str, tuple[list[int], str]]) -> None:
    there = {path: row for path, row in known.items() if os.path.exists(path)}
    try:
        target = memory_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, json.dumps(there, indent=1).encode())
    except (OSError, RuntimeError, OutputError):
        pass  # a home that cannot be written to

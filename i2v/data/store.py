"""A folder of arrays of one shape that only grows: safe to kill at any moment, memory-mapped to read.

    about.json   what made the arrays, and their shapes
    rows.jsonl   one line for each entry: its key, its row in the arrays or why it has none
    NAME.bin     row after row

A line is written after the bytes of its row have reached the disk. What a killed writer left beyond the last whole line
is cut off by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from i2v.media.output_file import write_whole

try:
    import fcntl
except ImportError:  # Windows: two writers at once are not kept apart there
    fcntl = None  # type: ignore[assignment]


# key, what else its line says, its arrays; None for what has no row
Entry = tuple[str, Mapping[str, Any], Mapping[str, NDArray[Any]] | None]


class Store:
    """The store made from `facts` (JSON) under `folder`; other facts have another store beside it.

    entries: key -> line, as of the last `read` or `append`.
    """

    def __init__(self, folder: Path, kind: str, facts: Mapping[str, Any]) -> None:
        self.facts = json.loads(json.dumps(facts))
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / f"{kind}-{digest}"
        self.entries: dict[str, dict[str, Any]] = {}
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._rows = 0
        self.read()

    def read(self) -> int:
        """Takes in the whole lines on the disk whose rows are there; returns how many bytes of rows.jsonl they are."""
        self.entries, self._rows, whole = {}, 0, 0
        about, lines = self.folder / "about.json", self.folder / "rows.jsonl"
        if about.is_file():
            arrays = json.loads(about.read_text(encoding="utf-8"))["arrays"]
            self._shapes = {name: (dtype, tuple(shape)) for name, (dtype, shape) in arrays.items()}
        stored = min((self._file(name).stat().st_size // self._bytes(name) for name in self._shapes), default=0)
        for line in lines.read_bytes().splitlines(keepends=True) if lines.is_file() else ():
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:  # a power cut may leave bytes that were never written
                entry = None
            if entry is None or (entry["row"] is not None and entry["row"] >= stored):
                break
            whole += len(line)
            self.entries[entry["key"]] = entry
            self._rows += entry["row"] is not None
        return whole

    def arrays(self) -> dict[str, NDArray[Any]]:
        """name -> (rows, ...), read-only and memory-mapped; empty while there is no row."""
        if not self._rows:
            return {}
        return {
            name: np.memmap(self._file(name), dtype, mode="r", shape=(self._rows, *shape))
            for name, (dtype, shape) in self._shapes.items()
        }

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Inside it `append` may be called. A second writer waits here until the first one is through, where the system
        has locks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
                    except BlockingIOError:
                        print(f"waiting for another process that writes {self.folder}", flush=True)
                        fcntl.flock(lock, fcntl.LOCK_EX)
            whole = self.read()
            if not self._shapes:  # killed in its first append: rows of which nothing tells
                for stale in self.folder.glob("*.bin"):
                    stale.unlink()
            for name in self._shapes:
                with self._file(name).open("ab") as file:
                    file.truncate(self._rows * self._bytes(name))
            with (self.folder / "rows.jsonl").open("ab") as file:
                file.truncate(whole)
            yield

    def append(self, entries: Sequence[Entry]) -> None:
        """Adds entries, synced to the disk together. Raises ValueError for arrays of another shape than the first."""
        for name in next((arrays for _, _, arrays in entries if arrays is not None), {}):
            rows = [np.ascontiguousarray(arrays[name]) for _, _, arrays in entries if arrays is not None]
            if name not in self._shapes:
                self._shapes[name] = (rows[0].dtype.str, rows[0].shape)
            if any((row.dtype.str, row.shape) != self._shapes[name] for row in rows):
                raise ValueError(f"{self.folder}: {name} has rows of {self._shapes[name]}, got {rows[0].shape}")
            with self._file(name).open("ab") as file:
                file.writelines(row.tobytes() for row in rows)
                file.flush()
                os.fsync(file.fileno())
        about = self.folder / "about.json"
        if self._shapes and not about.is_file():
            write_whole(about, json.dumps({**self.facts, "arrays": self._shapes}, indent=1).encode())
        lines = []
        for key, says, arrays in entries:
            row = None if arrays is None else self._rows
            self._rows += arrays is not None
            self.entries[key] = {"key": key, "row": row, **says}
            lines.append(json.dumps(self.entries[key]) + "\n")
        with (self.folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _bytes(self, name: str) -> int:
        """Of one row."""
        dtype, shape = self._shapes[name]
        return int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))

"""`open_dataset`: what lies under `--data PATH` as clips that are read when they are asked for, bad ones set aside.

Which frames a sample shows is a function of (seed, sample number) and of the files alone: never of what was read
before, of the number of processes, or of which bad files are known already.
"""

from __future__ import annotations

import shlex
import stat
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from i2v import noise
from i2v.data.clips import Timing, read_frames, scan
from i2v.data.filters import FILTERS, frames_from, starts, thresholds
from i2v.data.folders import BadClip, DataError, Item, Listing, kind_inside, understand
from i2v.data.latents import cores

REMEMBERED = 2**27  # bytes of scans kept in memory: 10 kB for a short clip, 400 for one of ten minutes
TRIES, ROUNDS = 100, 300  # draws of a sample among bad files, at once and how often: all bad, the data is wrong
PAUSES = (1, 10, 60, 300, 600)  # seconds: a disk that is away for a while does not end a run

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Plan:
    """Where clips of one file can begin. times: (N,) seconds; starts: (S, 2) first frame and end of its shot."""

    times: NDArray[np.float64]
    starts: NDArray[np.int64]


@dataclass
class Dataset:
    """Clips of a listing, `timing.num_frames` frames of (height, width) pixels each.

    keep: names of the filters that are switched off. bad: what is set aside, by name of the item. stop: once it holds
    something, e.g. the signal that ends a run, `sample` neither waits nor reads.
    """

    listing: Listing
    timing: Timing
    height: int
    width: int
    seed: int = 0
    keep: tuple[str, ...] = ()
    bad: dict[str, dict[str, Any]] = field(default_factory=dict)
    stop: Sequence[int] = ()
    _plans: dict[int, Plan] = field(default_factory=dict, repr=False)
    _held: int = field(default=0, repr=False)  # bytes of these
    _scanning: list[Lock] = field(default_factory=lambda: [Lock() for _ in range(1024)], repr=False)

    def __len__(self) -> int:
        """Items listed, the bad ones among them."""
        return len(self.items)

    @property
    def items(self) -> list[Item]:
        return self.listing.items

    def only(self, items: list[Item], seed: int | None = None) -> Dataset:
        """Some of its items. What one of both sets aside the other knows. seed: another one, where it is given."""
        seed = self.seed if seed is None else seed
        return replace(self, listing=replace(self.listing, items=items), seed=seed, _plans={}, _held=0)

    @property
    def rules(self) -> str:
        """What decides, beside the file, whether it is used and which frames are shown."""
        rules = f"{self.timing.num_frames} frames, fps {self.timing.fps}, stride {self.timing.stride}, keep {self.keep}"
        return rules + (f", thresholds {edited}" if (edited := thresholds()) else "")

    @property
    def check(self) -> str:
        """The command that says why clips are bad, by the same rules."""
        timing, words = self.timing, ["python", "-m", "i2v.data", "check", str(self.listing.path)]
        words += ["--num-frames", str(timing.num_frames)] if timing.num_frames != self.listing.usual_frames else []
        words += ["--fps", f"{timing.fps:.12g}"] if timing.fps is not None else []
        words += ["--stride", str(timing.stride)] if timing.stride != 1 else []
        return shlex.join([*words, *(["--keep", *self.keep] if self.keep else [])])

    @property
    def quarantine(self) -> list[dict[str, Any]]:
        """The bad items found so far, as JSON; given to `open_dataset` again, none of them is opened a second time."""
        return [entry for _, entry in sorted(self.bad.items())]  # in one step: threads read clips meanwhile

    def plan(self, index: int) -> Plan:
        """Scans the file of an item, once. Raises `BadClip` and sets the item aside when it cannot be used."""
        if (known := self._known(index)) is not None:
            return known
        with self._scanning[index % len(self._scanning)]:  # several draws of one file come together: one scans it
            return self._known(index) or self._scanned(index)

    def _known(self, index: int) -> Plan | None:
        if (entry := self.bad.get(self.items[index].name)) is not None:
            raise BadClip(entry["reason"], entry["detail"])
        return self._plans.get(index)

    def _scanned(self, index: int) -> Plan:
        item = self.items[index]
        try:
            if self.timing.num_frames > 1 and item.kind == "picture" and kind_inside(item.path) != "video":
                raise BadClip("picture", f"a picture is no clip of {self.timing.num_frames} frames")
            seen = scan(item)
            made = Plan(seen.times, starts(seen, self.timing, self.keep))
        except BadClip as error:
            self.set_aside(index, error)
            raise
        size = made.times.nbytes + made.starts.nbytes
        if self._held + size < REMEMBERED:
            self._held += size
            self._plans[index] = made
        return made

    def set_aside(self, index: int, error: BadClip) -> None:
        """Never to be opened again, until the file or the rules change."""
        item = self.items[index]
        entry = {"file": item.name, "reason": error.reason, "detail": error.detail, "rules": self.rules}
        self.bad[item.name] = entry | {"version": version(item.path)}

    def frames(self, index: int, draw: int) -> NDArray[np.uint8]:
        """(F, height, width, 3) uint8 RGB: clip number `draw` of an item, its start drawn by (seed, name, draw).

        Raises `BadClip` and sets the item aside when it cannot be used.
        """
        known, plan, item = index in self._plans, self.plan(index), self.items[index]
        place = float(noise.uniform(self.seed, f"start of {item.name!a}", [draw], 0, ())[0])
        start, end = plan.starts[int(place * len(plan.starts))]
        try:
            return read_frames(item, frames_from(plan.times, start, end, self.timing), self.height, self.width)
        except BadClip as error:
            if known and self._plans.pop(index, None) is not None:  # the file may be another one than was scanned
                return self.frames(index, draw)
            self.set_aside(index, error)
            raise

    def sample(self, number: int) -> tuple[int, NDArray[np.uint8]]:
        """(item, its clip (F, height, width, 3) uint8 RGB) for sample `number` of a run; bad items are passed over.

        Where none can be used and files are missing it waits for the disk. Raises `DataError` when too many items in
        a row are bad, or once `stop` is set.
        """
        for pause in (*PAUSES, 0):
            missing = tried = 0
            for index in self._drawn(number):
                if self.stop:
                    raise DataError(f"{self.listing.path}: stopped before sample {number} was read")
                tried, item = tried + 1, self.items[index]
                known = item.name in self.bad
                try:
                    return index, self.frames(index, number)
                except BadClip as error:
                    last = f"{item.name}: {error}"
                    if error.reason == "missing" or not (known or version(item.path)):  # or it went while it was read
                        self.bad.pop(item.name, None)  # for now
                        missing += 1
            if not missing:
                break
            if pause:
                tqdm.write(
                    f"{self.listing.path}: {tried} clips tried, none can be used and {missing} are missing; "
                    f"trying again in {pause} s"
                )
            for _ in range(pause):
                if not self.stop:
                    time.sleep(1)
        raise DataError(
            f"{self.listing.path}: {tried} clips tried for sample {number}, none can be used (the last: {last}); "
            f"`{self.check}` says why"
        )

    def _drawn(self, number: int) -> Iterator[int]:
        """Items in the order in which a sample tries them. All are drawn: were the next good one in the list taken, one
        after many bad ones would be learnt from in place of all of them."""
        tried = set[int]()
        for step in range(ROUNDS):
            for place in noise.uniform(self.seed, "item", [number], step, (TRIES,), len(self))[0].tolist():
                if (index := int(place * len(self))) not in tried:
                    tried.add(index)
                    yield index
            if len(tried) == len(self):
                return

    def survey(self, show: bool = True) -> dict[str, Any]:
        """Scans every item that is not set aside yet; what was found, as JSON. show: a progress bar."""

        def usable(index: int) -> bool:
            try:
                self.plan(index)
            except BadClip:
                return False
            return True

        bar = tqdm(ahead(usable, range(len(self))), "clips", len(self), disable=not show, mininterval=0.5)
        kept = [k for k, fine in enumerate(bar) if fine]
        good = set(kept)
        dropped = [self.bad[item.name] for k, item in enumerate(self.items) if k not in good]
        return {
            "path": str(self.listing.path),
            "understood": self.listing.kind,
            "listed": len(self),
            "kept": len(kept),
            "without_caption": sum(not self.items[k].caption for k in kept),
            "dropped": dict(Counter(entry["reason"] for entry in dropped).most_common()),
            "ignored": self.listing.ignored,
            "clip": {"num_frames": self.timing.num_frames, "fps": self.timing.fps, "stride": self.timing.stride},
            "files": [{key: entry[key] for key in ("file", "reason", "detail")} for entry in dropped],
        }


def open_dataset(
    path: str | Path | Listing,
    num_frames: int,
    fps: float | None = None,
    stride: int = 1,
    size: int | tuple[int, int] = 256,
    *,
    seed: int = 0,
    keep: Collection[str] = (),
    quarantine: Iterable[Mapping[str, Any]] = (),
) -> Dataset:
    """The clips under `path`, see `folders.understand`; nothing is decoded yet.

    num_frames, fps, stride: as `Timing`. size: pixels, (height, width) or one number for both.
    seed: of the clips' random starts. keep: filters to switch off, of cut, static, letterbox.
    quarantine: `Dataset.quarantine` of an earlier run; entries whose file has changed, or that were found under other
    rules, are forgotten. What the listing itself shows to be bad is set aside at once, whatever the list says. Raises
    `DataError` for a path or settings that cannot be used.
    """
    if unknown := sorted(set(keep) - set(FILTERS)):
        raise DataError(f"there is no filter {unknown[0]!r} to switch off; they are {', '.join(FILTERS)}")
    height, width = (size, size) if isinstance(size, int) else size
    try:
        timing = Timing(num_frames, fps, stride)
    except ValueError as error:
        raise DataError(str(error)) from error
    listing = path if isinstance(path, Listing) else understand(path)
    if num_frames > 1 and all(item.kind == "picture" for item in listing.items):
        raise DataError(
            f"{listing.path}: holds {listing.kind}, and a clip has {num_frames} frames; give --num-frames 1"
        )
    data = Dataset(listing, timing, height, width, seed, tuple(sorted(set(keep))))
    paths = {item.name: item.path for item in listing.items}
    for entry in quarantine:
        name = entry["file"]
        # of these the file's version does not tell whether they last; pauses were once dropped in spite of `keep`
        if entry["reason"] in ("caption", "missing", *data.keep):
            continue
        if name in paths and entry["rules"] == data.rules and entry["version"] == version(paths[name]):
            data.bad[name] = dict(entry)
    for index, item in enumerate(listing.items):
        if item.fault is not None:
            data.set_aside(index, item.fault)
    return data


def version(path: Path) -> list[int]:
    """[bytes, time of the last change in ns] of a file; empty where there is no ordinary one. Another one is another
    file."""
    try:
        facts = path.stat()
    except (OSError, ValueError):  # a table may hold names that no file can have
        return []
    return [facts.st_size, facts.st_mtime_ns] if stat.S_ISREG(facts.st_mode) else []


def ahead(work: Callable[[A], B], inputs: Sequence[A]) -> Generator[B, None, None]:
    """`work` of each input in their order, done by a thread for each core ahead of time: decoding needs no lock."""
    threads = min(cores(), 16)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for one in inputs:
                waiting.append(pool.submit(work, one))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

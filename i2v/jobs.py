"""Videos to be made: from pictures, a folder or a file of jobs to checked jobs whose outputs never collide."""

from __future__ import annotations

import glob
import itertools
import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from i2v import load
from i2v.assemble import Plan
from i2v.config import ConfigError, flag, from_dict, to_dict
from i2v.control import looked_at
from i2v.device import Place
from i2v.diffusion.frame_similarity_prior import timesteps_from
from i2v.free_memory import is_out_of_memory
from i2v.media.picture_file import PICTURES
from i2v.replay import Recipe, described, recipe
from i2v.request import Request
from i2v.sources import CONTROLNET
from i2v.video import ENDINGS, SettingsError, Written, check_output, read_image, settings_beside

# what users can put right, or say so
MISTAKES = (ValueError, OSError, RuntimeError, MemoryError)
ALONE = Place()
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Line(Request):
    """What a line of a jobs file may hold: pictures, the video, and any setting of a `Request`."""

    image: tuple[str, ...] = flag((), "PATH, or several of PATH@FRAME")
    output: Path | None = flag(None, "the video")


@dataclass(frozen=True)
class Job:
    """One video: what it is called, its pictures by frame number, its settings, and its output where one is given.

    folder: where a video without a given output is put, under its picture's name.
    """

    name: str
    images: Mapping[int, Path]
    request: Request
    output: Path | None = None
    folder: Path = Path()


@dataclass(frozen=True)
class Ready:
    """A job found to be possible. request: with every number resolved; output: as `write_video` takes it; finished: it
    is there already; instead: names to take where another program has written to `output` by the end of the work."""

    job: Job
    request: Request
    output: Path
    finished: bool = False
    instead: Iterator[Path] = iter(())


def listed(images: Sequence[str], jobs: Path | None, request: Request, output: Path | None) -> tuple[list[Job], bool]:
    """The jobs, and whether they are of many videos: of a jobs file, a folder, a glob, or pictures without frames.

    `request` holds the settings of all jobs, which a line of the file, or as prompt a .txt beside a picture, overrides.
    Raises ConfigError for what cannot be read, unknown settings (with the nearest name), and outputs named twice.
    """
    framed = [text for text in images if _framed(text)[1]]
    of_each = [text for text in images if text and (_framed(text)[0].is_dir() or _is_glob(text))]
    if jobs is None and framed and of_each:
        raise ConfigError(
            f"--image {of_each[0]}: a folder or pattern gives a video of each of its pictures, PATH@FRAME one picture "
            "of a single video; name every picture by itself, each with its frame"
        )
    if jobs is None and (framed or len(images) < 2) and not of_each:
        return [one(images, request, output)], False
    return many(images, jobs, request, output), True


def one(images: Sequence[str], request: Request, output: Path | None, name: str = "", folder: Path = Path()) -> Job:
    """The job of one video from PATH or PATH@FRAME texts; without a frame it is the first.

    Raises ConfigError for two pictures of one frame.
    """
    known: dict[int, Path] = {}
    for text in images:
        path, frame = _framed(text)
        if int(frame or 0) in known:
            raise ConfigError(f"--image {text}: frame {int(frame or 0)} has {known[int(frame or 0)]} already; "
                              "PATH@FRAME gives it another")  # fmt: skip
        known[int(frame or 0)] = path
    return Job(name or " ".join(images), known, request, output, folder)


def by_seed(todo: Sequence[Job], count: int) -> list[Job]:
    """Every job with `count` seeds, from its own on, into a folder under its picture's name and seed.

    Raises ConfigError for a count below 2, for a job that gives one file for all of them, and for one of 2 or 3 frames.
    """
    if count < 2:
        raise ConfigError(f"--best-of {count}: expected 2 or more videos to choose from")
    out = []
    for job in todo:
        if job.output is not None and job.output.suffix.lower() in ENDINGS:
            raise ConfigError(f"--output {job.output}: --best-of {count} makes several videos; give a folder for them")
        if job.request.num_frames in (2, 3):
            frames = job.request.num_frames
            raise ConfigError(f"--num-frames {frames}: --best-of looks for faults over 4 frames at least")
        place = replace(job, output=None, folder=job.output or job.folder)
        seeds = range(job.request.seed, job.request.seed + count)
        out += [replace(place, name=f"{job.name}, seed {s}", request=replace(job.request, seed=s)) for s in seeds]
    return out


def many(images: Sequence[str], jobs: Path | None, request: Request, folder: Path | None) -> list[Job]:
    """A job for every line of the file, or for every picture of the folders and globs; see `listed`."""
    place = folder or Path()
    if place.suffix.lower() in ENDINGS:
        raise ConfigError(f"--output {place}: several videos are made; give a folder for them")
    made = list(_of_file(jobs, images, request, place) if jobs is not None else _of_pictures(images, request, place))
    writers: dict[Path, str] = {}
    for job in made:
        if job.output is not None:
            other = writers.setdefault(_target(job.output).resolve(), job.name)
            if other is not job.name:
                raise ConfigError(f"{other} and {job.name} both write {job.output}; give each its own output")
    return made


def _of_file(path: Path, images: Sequence[str], request: Request, folder: Path) -> Iterator[Job]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"--jobs {path} cannot be read: {reason}") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        where = f"{path} line {number}"
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"--jobs {where} is not valid json: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"--jobs {where} holds a {type(values).__name__}, expected an object of settings")
        line = from_dict(Line, {"image": list(images), **to_dict(request), **values}, f"--jobs {where}")
        if not line.image:
            raise ConfigError(f"--jobs {where} lacks image, the picture that its video begins with")
        own = Request(**{f.name: getattr(line, f.name) for f in fields(Request)})
        yield one(line.image, own, None if line.output is None else folder / line.output, where, folder)
    if not any(map(str.strip, lines)):
        raise ConfigError(f"--jobs {path} holds no job; give one json object per line")


def _of_pictures(images: Sequence[str], request: Request, folder: Path) -> Iterator[Job]:
    for text in images:
        found = [Path(text)]
        if Path(text).is_dir() or _is_glob(text):
            some = Path(text).iterdir() if Path(text).is_dir() else map(Path, glob.glob(text, recursive=True))
            found = sorted(p for p in some if p.suffix.lower() in PICTURES and not p.name.startswith("."))
        if not found:
            raise ConfigError(f"--image {text}: no pictures there; they end with {', '.join(sorted(PICTURES))}")
        for path in found:
            beside = path.with_suffix(".txt")
            own = {} if not beside.is_file() else {"prompt": _prompt(beside)}
            yield one([str(path)], from_dict(Request, {**to_dict(request), **own}, str(path)), None, folder=folder)


def _prompt(path: Path) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: expected a prompt as UTF-8 text") from None


def _framed(text: str) -> tuple[Path, str]:
    """PATH@FRAME -> both; the frame is "" where none is given. A file of the whole name is that file."""
    found = re.fullmatch(r"(.+)@(-?\d+)", text, re.S)
    return (Path(found[1]), found[2]) if found and not Path(text).exists() else (Path(text), "")


def _is_glob(text: str) -> bool:
    return bool(re.search(r"[*?\[]", text)) and not _framed(text)[0].exists()


def _target(output: Path) -> Path:
    """Where `write_video` will put it: frames go to a folder."""
    return output.with_suffix("") if output.suffix.lower() == ".png" else output


def without_unused(plan: Plan, todo: Sequence[Job], say: Callable[[str], object]) -> Plan:
    """The plan without the ControlNets that no job's control names, which would be read and held for nothing."""
    used = {CONTROLNET + text.partition("=")[0] for job in todo for text in job.request.control}
    unused = [name for name in plan.parts if name.startswith(CONTROLNET) and name not in used]
    if unused:
        types = " and ".join(name.removeprefix(CONTROLNET) for name in unused)
        say(f"not read: the ControlNet for {types}, which no --control names")
    return replace(plan, parts={name: part for name, part in plan.parts.items() if name not in unused})


class Checker:
    """Looks at jobs before any weight is read, and gives each a name of its own.

    Args:
        plan: of the model.
        overwrite: a video of other settings under a job's name is replaced.
        skip: a video that was made from the same pictures, weights and settings counts as finished.
        reserved: outputs that jobs are given, so that no other job takes them.
    """

    def __init__(self, plan: Plan, overwrite: bool = False, skip: bool = False, reserved: Collection[Job] = ()):
        self.plan, self.overwrite, self.skip = plan, overwrite, skip
        self.taken = {_target(job.output).resolve() for job in reserved if job.output is not None}
        self._read = lru_cache(maxsize=2)(read_image)  # many jobs begin with one picture
        self._recipes: dict[Path, Recipe | None] = {}

    @cached_property
    def weights(self) -> dict[str, dict[str, Any]]:
        """Every weight file is read for its sha256, which is done once and only where a video is there already."""
        return load.facts_of(self.plan)

    def check(self, job: Job) -> Ready:
        """Raises ValueError or OSError that says what is wrong with the job's pictures, settings or output."""
        plan = self.plan
        read = self._read if self.skip else read_image  # of a single job nothing is kept
        pictures = {frame: read(path) for frame, path in job.images.items()}  # named before they are counted
        images = job.request.known(job.images, plan.preset)
        known = job.request.known(pictures, plan.preset)
        motion, vae = plan.parts["motion"].config, plan.parts["vae"].config
        request = job.request.resolved(plan.preset, known[min(known)].shape[:2], motion.max_frames, vae.factor)
        timesteps = timesteps_from(plan.schedule, request.steps, float(request.t0 or 0))
        request.guided_steps(len(timesteps))
        types = [name.removeprefix(CONTROLNET) for name in plan.parts if name.startswith(CONTROLNET)]
        maps = looked_at(request, types, len(timesteps))

        @cache
        def now() -> dict[str, Any]:  # a large picture's hash takes a while
            made_of = {"request": to_dict(request), "pictures": described(images, known, request.loop)}
            return {**made_of, "controls": [one.facts() for one in maps], "weights": self.weights}

        def made(video: Path) -> bool:
            return self._made(video, now)

        def usable(video: Path) -> bool:
            free = self.overwrite or not (video.exists() or settings_beside(video).exists())
            return video.resolve() not in self.taken and (made(video) or free)

        instead: Iterator[Path] = iter(())
        if job.output is not None:
            target = job.output
        else:
            stem = f"{images[min(images)].stem}_{request.seed}"
            stems = itertools.chain([stem], (f"{stem}_{number}" for number in itertools.count(2)))
            names = (job.folder / f"{name}.mp4" for name in stems)
            target = next(filter(usable, names))
            self.taken.add(target.resolve())
            instead = (name for name in names if name.resolve() not in self.taken)
        if made(_target(target)):
            return Ready(job, request, _target(target), finished=True)
        check_output(target, self.overwrite, request.fps)
        return Ready(job, request, target, instead=instead)

    def forget(self) -> None:
        """Lets go of the pictures, which may be large, before the long work."""
        self._read.cache_clear()

    def _made(self, target: Path, now: Callable[[], Mapping[str, Any]]) -> bool:
        """Whether `target` is the video that the job of these settings would make."""
        if not self.skip or not target.exists():
            return False
        if target not in self._recipes:  # each job may look at the videos of all before it
            self._recipes[target] = None
            with suppress(SettingsError, ConfigError):
                self._recipes[target] = recipe(target)
        was = self._recipes[target]
        return was is not None and was.settings["preset"] == self.plan.preset.name and not was.changes(now())


def make_all(
    todo: Sequence[Job], checker: Checker, make: Callable[[Ready], Written], here: Place = ALONE
) -> Iterator[tuple[int, Job, str, Path | None]]:
    """Checks every job, then makes what is not there yet: the number of each job from 1 on, the job, what became of it,
    and its video if all is well.

    here: of several processes each checks all jobs, so that all agree on the names, and makes its own share.
    """
    bar = tqdm(todo, "looking at the jobs", delay=2, leave=False)
    checked = [tried(checker.check, job) for job in bar]
    checker.forget()
    for number, (job, ready) in enumerate(zip(todo, checked), 1):
        if (number - 1) % here.count != here.rank:
            continue
        if not isinstance(ready, Ready):
            yield number, job, ready, None
        elif ready.finished:
            yield number, job, f"{ready.output} is there already, made with these settings", ready.output
        else:
            began = time.monotonic()
            written = tried(make, ready)
            if isinstance(written, Written):
                note = f"; {written.note}" if written.note else ""
                told = f"{written.path} ({written.codec}{note}), {time.monotonic() - began:.1f} s"
                yield number, job, told, written.path
            else:
                yield number, job, written, None


def tried(step: Callable[[A], B], given: A) -> B | str:
    """What the step returns, or one of the `MISTAKES` in one line."""
    try:
        return step(given)
    except MISTAKES as error:
        return words(error)


def words(error: Exception) -> str:
    """One of the `MISTAKES` in one line; raises it again if it is a fault of the program."""
    if is_out_of_memory(error):
        return "out of memory; try --int8, a shorter --window, fewer frames or a smaller size"
    if isinstance(error, RuntimeError):
        raise error
    return " ".join(str(error).split())  # what this project raises for what users gave

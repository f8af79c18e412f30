"""Measure videos of any origin side by side; other evaluations have names of their own:

python -m eval table1, table2, table3 (the paper's), miniature, path, long, probe, faults, known-flow
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from eval.measured import measure
from eval.networks import NetworkFiles, open_networks
from eval.report import Report, write
from eval.scores import Switches
from eval.tables import count_of
from eval.video_set import least
from eval.videos import Video, described, found
from i2v import config
from i2v.config import ConfigError, flag
from i2v.picture import Fit


@dataclass(frozen=True)
class Comparison(NetworkFiles):
    """python -m eval VIDEOS [flags]: measure videos of any origin side by side. Other evaluations have names:
    table1, table2, table3 (the paper's), miniature, path, long, probe, faults, known-flow; each explains itself with
    --help."""

    videos: tuple[str, ...] = flag((), "videos, folders of a model's videos, or of several models'; NAME=FOLDER names "
                                   "a model. The flag itself may be left out")  # fmt: skip
    reference: tuple[Path, ...] = flag((), "the input pictures, or their folder; named as the videos")
    prompts: Path | None = flag(None, ".json of names and prompts, or .txt with a line per picture, by name")
    masks: Path | None = flag(None, "a folder: where each picture's one object is, white on black; then its motion is "
                              "compared with the one that the prompt asks for")  # fmt: skip
    fit: tuple[str, ...] = flag((), "MODEL=stretch or MODEL=pad: how a model's program fitted the pictures, where not "
                                "by cover, which crops the centre")  # fmt: skip
    frames: int | None = flag(None, "only the first so many of each video")
    interval: float | None = flag(None, "percent; not given: 95 where there are enough videos")
    evalcrafter: bool = flag(False, "CLIPTemp, FlowScore, WarpingError as EvalCrafter's code computes them")
    dover_seed: int = flag(0, "of DOVER's random fragments")
    shown: int = flag(12, "pictures on the page")
    workers: int = flag(1, "processes that share the work")
    out: Path = flag(Path("outputs/eval"), "folder for results.json, tables.md and page.html")


def run(cfg: Comparison) -> None:
    """Everything that the command does; what can be wrong is looked at before the long work."""
    if not cfg.videos:
        raise ConfigError("no videos: python -m eval FOLDER, or several folders, one per model; --help lists all flags")
    for name, low in (("workers", 1), ("shown", 0), ("frames", 2)):
        if getattr(cfg, name) is not None and getattr(cfg, name) < low:
            raise ConfigError(f"--{name} {getattr(cfg, name)}: expected {low} or more")
    models = found(cfg.videos)
    videos = described(models, cfg.reference, cfg.prompts, cfg.masks, fits_of(cfg.fit, list(models)))
    check_interval(cfg.interval, videos)
    files = NetworkFiles(cfg.raft, cfg.dover, cfg.aesthetic, cfg.clip, cfg.device)
    networks = open_networks(files)
    switches = Switches(cfg.evalcrafter, cfg.dover_seed)
    measured = measure(videos, files, networks, switches, cfg.frames, cfg.out, cfg.workers)
    size = measured[0].size
    about = f"{count_of(len(videos), 'video')} of {size[0]} frames."
    title = "Videos measured" + (" as by EvalCrafter's code" if cfg.evalcrafter else "")
    report = Report(title, about, cfg.out, config.to_dict(cfg), networks, cfg.interval, shown=cfg.shown)
    for table in write(report, measured):
        print(table.text())
    print(f"every value: {cfg.out / 'results.json'}; every clip: {cfg.out / 'page.html'}")


def fits_of(texts: Sequence[str], models: Sequence[str]) -> dict[str, Fit]:
    """MODEL=FIT by model; raises ConfigError for another model or fit."""
    out: dict[str, Fit] = {}
    for text in texts:
        model, _, how = text.rpartition("=")
        if model not in models or how not in get_args(Fit):
            raise ConfigError(f"--fit {text}: expected MODEL=FIT, with one of the models {', '.join(models)} and one "
                              f"of {', '.join(get_args(Fit))}")  # fmt: skip
        out[model] = how  # type: ignore[assignment]
    return out


def check_interval(percent: float | None, videos: Sequence[Video]) -> None:
    """Raises ConfigError where a model has too few pictures for the interval that is asked for."""
    if percent is None:
        return
    if not 50 <= percent < 100:
        raise ConfigError(f"--interval {percent:g}: expected a percentage from 50 to below 100")
    for model in dict.fromkeys(v.model for v in videos):
        count = len({v.scene for v in videos if v.model == model})
        if count < least(percent):
            raise ConfigError(f"--interval {percent:g}: needs videos of {least(percent)} pictures or more, {model} has "
                              f"{count}; give more videos, or leave --interval out for means alone")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Words before the first flag are videos."""
    argv = list(argv or [])
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    leading = ["--videos", *argv[:first]] if first else []
    stray = "videos come before all flags, or after --videos; values with spaces need quotes"
    run(config.from_command_line(Comparison, [*leading, *argv[first:]], "python -m eval", stray=stray))

"""The paper's tables with our pipeline: `python -m eval table1`, `table2`, `table3`.

The set is drawn by seed, every row of the table makes a video of every picture, and all are measured as by
`python -m eval`. What lies in `--out` is not made again: the same command goes on where it was stopped.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from eval import miniature, report
from eval.compare import check_interval
from eval.measured import Measured, measure, read
from eval.networks import NetworkFiles, open_networks
from eval.paper import OURS, TABLES, Row
from eval.picture_set import MJHQ_COUNT, Pair, chosen, of_world, write_list
from eval.scores import Switches
from eval.tables import count_of
from eval.video_set import check_same_length
from eval.videos import Video, described, found
from eval.workers import spread
from i2v import __version__, assemble, config, load
from i2v.assemble import ModelFiles
from i2v.config import ConfigError, flag
from i2v.device import pick_device, pick_dtype
from i2v.jobs import Checker, Job, Ready
from i2v.pipeline import I2VPipeline
from i2v.request import Request
from i2v.video import read_settings, write_video

TITLES = {
    "table1": "Table 1: against other methods",
    "table2": "Table 2: the Frame Similarity Prior",
    "table3": "Table 3: without the adapters (the paper's: SDXL)",
}
# what can be measured in the miniature's drawings of 64 pixels
IN_SMALL = ("motion_right", "similarity_psnr", "similarity_ssim", "flow_score (DIS)")
TOO_SMALL = "the miniature draws pictures of 64 pixels, which none of the paper's networks was made for"


@dataclass(frozen=True)
class Reproduction(ModelFiles, NetworkFiles):
    """Make a table of the paper again with this model, and print it beside the paper's figures."""

    pictures: Path | None = flag(None, "MJHQ-30K (the folder of meta_data.json), or a folder of pictures with prompts; "
                                 "with the miniature not needed")  # fmt: skip
    prompts: Path | None = flag(None, "of a folder: .json of names and prompts, or .txt with a line per picture")
    count: int | None = flag(None, "pictures; not given: 50 of MJHQ-30K and of the miniature's world, all of a folder")
    set_seed: int = flag(0, "which of the pictures")
    list_: Path | None = flag(None, "exactly the pictures of this pictures.json, as an earlier run wrote it")
    videos: tuple[str, ...] = flag((), "NAME=FOLDER: another method's videos of the same pictures, as a row more")
    seed: int = flag(0, "of the videos; each picture has its own, the same in every row")
    steps: int = flag(25, "denoising steps")
    guidance_scale: float | None = flag(None, "not given: the preset's")
    num_frames: int | None = flag(None, "not given: the preset's")
    height: int | None = flag(None, "pixels; not given: chosen from the picture's aspect; the paper's are 512 x 512")
    width: int | None = flag(None, "pixels")
    t0: float | None = flag(None, "of the rows that do not set it; not given: the preset's")
    p: float | None = flag(None, "of the rows that do not set it; not given: the preset's")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = flag("auto", "number format of the model")
    frames: int | None = flag(None, "measure only the first so many of each video")
    interval: float | None = flag(None, "percent; not given: 95 where there are enough pictures")
    dover_seed: int = flag(0, "of DOVER's random fragments")
    shown: int = flag(12, "pictures on the page")
    workers: int = flag(1, "processes that share the work")
    out: Path | None = flag(None, "folder; not given: outputs/table1 and so on")


def run(table: str, cfg: Reproduction) -> None:
    """Everything that the command does; what can be wrong is looked at before the long work."""
    out = cfg.out or Path("outputs") / table
    for name, low in (("workers", 1), ("shown", 0), ("count", 1), ("frames", 2)):
        if getattr(cfg, name) is not None and getattr(cfg, name) < low:
            raise ConfigError(f"--{name} {getattr(cfg, name)}: expected {low} or more")
    model = ModelFiles(**{f.name: getattr(cfg, f.name) for f in fields(ModelFiles)})
    plan = assemble.plan(model)
    plan.refuse()
    files = NetworkFiles(cfg.raft, cfg.dover, cfg.aesthetic, cfg.clip, cfg.device)
    small = plan.preset.name == "tiny"
    if small and files.given():
        raise ConfigError(f"--{', --'.join(files.given())}: {TOO_SMALL}; leave them out")
    networks = open_networks(files)
    pairs = picture_set(cfg, plan, out)
    rows = rows_of(table, plan.preset.name)
    jobs = {row.name: [job(row, pair, cfg.seed + i, cfg, out) for i, pair in enumerate(pairs)] for row in rows}
    others = of_others(cfg, pairs, cfg.num_frames or plan.preset.num_frames) if cfg.videos else []
    videos = [of(row, pair, one) for row in rows for pair, one in zip(pairs, jobs[row.name], strict=True)]
    prompts = {pair.name: pair.prompt for pair in pairs}
    videos += [replace(v, prompt=prompts.get(v.scene, v.prompt)) for v in others]
    check_interval(cfg.interval, videos)
    make([one for several in jobs.values() for one in several], plan, cfg)
    measured = measure(videos, files, networks, Switches(seed=cfg.dover_seed), cfg.frames, out, cfg.workers)
    if small:
        measured = in_small(measured)
    size = measured[0].size
    about = (f"{count_of(len(pairs), 'picture')} (set seed {cfg.set_seed}, listed in pictures.json), "
             f"{count_of(len(measured), 'video')} of {size[0]} frames, {size[2]} x {size[1]}, {cfg.steps} steps, "
             f"{plan.preset.about}.")  # fmt: skip
    paper = {row.name: row.values for row in TABLES[table]}
    done = report.Report(TITLES[table], about, out, {"table": table, **config.to_dict(cfg)}, networks, cfg.interval,
                         paper, cfg.shown, rows[-1].name if table == "table3" else "")  # fmt: skip
    print(f"{TITLES[table]}\n{about}\n")
    for one in report.write(done, measured):
        print(one.text())
    print(f"every value: {out / 'results.json'}; every clip: {out / 'page.html'} and {out / 'videos'}")


def of_others(cfg: Reproduction, pairs: Sequence[Pair], own: int) -> list[Video]:
    """Other methods' videos of the set's pictures; those of other pictures are left out, and told.

    Raises ConfigError where none is left, and ValueError for videos that cannot be read or have another length than
    ours, `own` frames, before any is made.
    """
    names = {pair.name for pair in pairs}
    everything = described(found(cfg.videos), [pair.file for pair in pairs], None)
    videos = [video for video in everything if video.scene in names]
    if not videos:
        raise ConfigError(f"--videos {' '.join(cfg.videos)}: none is of the set's pictures; name them as those")
    if len(videos) < len(everything):
        print(f"--videos: {count_of(len(everything) - len(videos), 'video')} of other pictures left out")
    lengths = {str(video.path): len(read(video, cfg.frames)) for video in videos}
    check_same_length({**lengths, "a video of this model": min(own, cfg.frames or own)})
    return videos


def picture_set(cfg: Reproduction, plan: assemble.Plan, out: Path) -> list[Pair]:
    """The set, and its list beside the results."""
    if cfg.pictures is not None:
        if not cfg.pictures.is_dir():
            raise ConfigError(f"--pictures {cfg.pictures}: there is no such folder")
        pairs = chosen(cfg.pictures, cfg.prompts, cfg.count, cfg.set_seed, cfg.list_)
        source = str(cfg.pictures)
    elif plan.preset.name == "tiny":
        if cfg.list_ is not None:
            raise ConfigError("--list: give the pictures' folder too, with --pictures")
        world = miniature.world_of(miniature.MiniatureEvaluation(weights=cfg.weights))
        frames = cfg.num_frames or plan.preset.num_frames
        pairs = of_world(world, cfg.count or MJHQ_COUNT, cfg.set_seed, frames, plan.preset.side, out)
        source = f"the miniature world, {world.name}"
    else:
        raise ConfigError("--pictures is missing: MJHQ-30K (huggingface.co/datasets/playgroundai/MJHQ-30K: "
                          "meta_data.json, mjhq30k_imgs.zip unpacked), or a folder of pictures, prompts")  # fmt: skip
    write_list(pairs, out / "pictures.json", {"from": source, "set_seed": cfg.set_seed})
    return pairs


def rows_of(table: str, preset: str) -> list[Row]:
    """The rows that our pipeline makes; of Table 1 the one of this preset."""
    if table == "table1":
        return [Row(OURS.get(preset, f"I2V-Adapter ({preset})"), (0.0, 0.0, 0.0, 0.0))]
    return list(TABLES[table])


def job(row: Row, pair: Pair, seed: int, cfg: Reproduction, out: Path) -> Job:
    """The video of a picture in a row, as frames without loss."""
    request = Request(prompt=pair.prompt, seed=seed, steps=cfg.steps, guidance_scale=cfg.guidance_scale,
                      num_frames=cfg.num_frames, height=cfg.height, width=cfg.width, t0=cfg.t0, p=cfg.p)  # fmt: skip
    request = replace(request, **row.settings)
    return Job(f"{row.name}, {pair.name}", {0: pair.file}, request, out / "videos" / row.name / f"{pair.name}.png")


def of(row: Row, pair: Pair, one: Job) -> Video:
    """The made video with its picture and prompt."""
    start = None if one.request.t0 is None or one.request.p is None else (one.request.t0, one.request.p)
    place = (one.output or Path()).with_suffix("")  # a folder of frames
    return Video(row.name, place, pair.name, pair.file, one.request.fit, pair.prompt, start, pair.mask)


def make(jobs: Sequence[Job], plan: assemble.Plan, cfg: Reproduction) -> None:
    """Every video that is not there yet with these pictures, weights and settings."""
    checker = Checker(plan, overwrite=True, skip=True, reserved=jobs)
    ready = [checker.check(one) for one in tqdm(jobs, desc="checking", unit="video", leave=False, disable=None)]
    bars = cfg.workers == 1 and sys.stderr.isatty()
    number = str(pick_dtype(cfg.dtype, pick_device(cfg.device), plan.parameters)).removeprefix("torch.")
    stays = [one.finished and made_so(one.output, number) for one in ready]
    todo = {one.output: (one, plan.files, cfg.device, cfg.dtype, bars) for one, done in zip(ready, stays) if not done}
    with tqdm(total=len(todo), desc="sampling", unit="video", disable=not todo) as bar:
        for _ in spread(_make, todo, cfg.workers):
            bar.update()
    pipeline.cache_clear()  # its memory is the networks' now


def made_so(video: Path, number: str) -> bool:
    """Whether a finished video was made in this number format by this version: a row holds no two kinds."""
    was = read_settings(video)
    return was["run"].get("dtype") == number and was["versions"].get("i2v-adapter") == __version__


def _make(ready: Ready, files: ModelFiles, device: str, dtype: str, progress: bool) -> None:
    result = pipeline(files, device, dtype).run(ready.job.images, ready.job.request, progress)
    write_video(ready.job.output or ready.output, result.frames, result.fps, result.settings, overwrite=True)


@functools.lru_cache(maxsize=1)
def pipeline(files: ModelFiles, device: str, dtype: str) -> I2VPipeline:
    """The loaded model, kept."""
    return load.build(assemble.plan(files), device, dtype)


def in_small(measured: Sequence[Measured]) -> list[Measured]:
    """What the miniature's clips can be measured in; the other columns are empty."""
    for m in measured:
        m.scores.values = {name: value for name, value in m.scores.values.items() if name in IN_SMALL}
        m.scores.reasons = dict.fromkeys(m.scores.reasons, TOO_SMALL)
    return list(measured)


def main(table: str, argv: list[str] | None = None) -> None:
    """The command of one table."""
    run(table, config.from_command_line(Reproduction, argv, f"python -m eval {table}"))

"""Picture and prompt -> video: `python sample.py --image cat.png --prompt "the cat moves left"`."""

from __future__ import annotations

import os
import signal
import sys

STOPPED = "sample.py: stopped; no half-written file is left"


def stop_at_once(*_: object) -> None:
    """Ctrl-C while torch is imported, which takes seconds and would end in Python's traceback."""
    os.write(2, f"\n{STOPPED}\n".encode())
    os._exit(130)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_at_once)

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from eval.best_of import ranking
from i2v import assemble, jobs, memory, presets, replay
from i2v.assemble import ModelFiles
from i2v.config import ConfigError, flag, from_command_line, from_dict
from i2v.device import own_device, place
from i2v.pipeline import I2VPipeline, Stream
from i2v.request import Request
from i2v.video import Written, write_video


@dataclass(frozen=True)
class SampleConfig(ModelFiles, Request):
    """Make a video from a picture and a prompt."""

    image: tuple[str, ...] = flag((), "the picture that the video begins with; PATH@FRAME: of another frame, -1 is the "
                                  "last; several or a folder: a video of each", "-i", "--first-frame-path",
                                  "--image-path", "--input", "--input-image", "--img",
                                  group="picture and video")  # fmt: skip
    jobs: Path | None = flag(None, "a video for each line of this file: json with image, prompt, output, ...")
    output: Path | None = flag(None, "the video: .mp4, .gif, .webp or a folder of .png; not given: <image>_<seed>.mp4; "
                               "of several videos their folder", "-o", "--out", "--output-path", "--save-path",
                               "--save-file")  # fmt: skip
    overwrite: bool = flag(False, "replace the output if it exists")
    release: bool = flag(False, "every setting as in the authors' script, but for those that you give")
    from_: Path | None = flag(None, "make this video again, from the settings inside it; other flags change them")
    check: bool = flag(False, "tell which weight files are found, missing, and fit together; make nothing")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps", group="the machine")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = flag("auto", "number format of the networks",
                                                                    "--precision")  # fmt: skip
    best_of: int = flag(1, "make the video with this many seeds, from --seed on, rank them and name their faults")
    memory: Literal["auto", "full", "lean", "low", "least"] = flag("auto", "how much is in memory at once: what fits, "
                                                                   "or one of the plans of docs/memory.md")  # fmt: skip
    dry_run: bool = flag(False, "tell peak memory and time by stage; make nothing")
    decode_chunk: int | None = flag(None, "frames that the VAE decodes at once; not given: the memory plan's",
                                    "--decode-chunk-size")  # fmt: skip
    decode_tile: int | None = flag(None, "pixels of the tiles that the VAE works in, 0: none; not given: the plan's")
    guidance_in_turn: bool = flag(False, "run the two halves of guidance one after the other: less memory")
    compile: bool = flag(False, "the UNet by torch.compile, for many videos of one size: its first step takes minutes")


def parse(argv: Sequence[str] | None) -> tuple[SampleConfig, replay.Recipe | None]:
    """The config, and the recipe of the video that `--from` names."""
    cfg = from_command_line(SampleConfig, argv, "sample.py")
    recipe = replay.recipe(cfg.from_) if cfg.from_ is not None else None
    base = recipe.flags() if recipe else {}
    if cfg.memory != "auto":  # the plan that is asked for decides, not the one that the video was made under
        base = {name: base[name] for name in base if name not in ("decode_chunk", "decode_tile", "guidance_in_turn")}
    from_dict(SampleConfig, base, f"--from {cfg.from_}")
    if cfg.release:
        base |= presets.released_settings()
    made = from_command_line(SampleConfig, argv, "sample.py", base) if base else cfg
    if recipe is not None and base.get("fit") == "released" != made.fit:  # its side means nothing to another fit
        made = from_command_line(SampleConfig, argv, "sample.py", {**base, **recipe.size()})
    return made, recipe


def run(argv: Sequence[str] | None = None) -> int:
    """Everything that can be wrong is looked at before the weights are read; returns the exit code."""
    cfg, recipe = parse(argv)
    files = ModelFiles(**{f.name: getattr(cfg, f.name) for f in fields(ModelFiles)})
    if cfg.check:
        plan = assemble.plan(files)
        print(plan.report())
        return 0 if plan.complete else 2
    if not cfg.image and cfg.jobs is None:
        if recipe is None:
            raise ConfigError("--image is missing: the picture that the video begins with")
        raise ConfigError(f"{cfg.from_} was made from {recipe.lost()}, which is not there; give it with --image")
    if cfg.decode_chunk is not None and cfg.decode_chunk < 1:
        raise ConfigError(f"--decode-chunk {cfg.decode_chunk}: expected at least 1 frame")
    request = Request(**{f.name: getattr(cfg, f.name) for f in fields(Request)})
    todo, several = jobs.listed(cfg.image, cfg.jobs, request, cfg.output)
    if cfg.best_of != 1:
        if place().count > 1:
            raise ConfigError("--best-of compares the videos of one process; start it once, without torchrun")
        todo, several = jobs.by_seed(todo, cfg.best_of), True
    if cfg.compile and cfg.int8:
        raise ConfigError("--compile and --int8: weights that are held as int8 are not compiled; leave one of them out")
    plan = assemble.plan(files)
    plan.refuse()
    checker = jobs.Checker(plan, cfg.overwrite, several, todo)

    plan = jobs.without_unused(plan, todo, print)
    model = memory.Fitting(plan, own_device(cfg.device, place()), cfg.dtype, cfg.memory, cfg.decode_chunk,
                           cfg.decode_tile, cfg.guidance_in_turn, print, cfg.compile)  # fmt: skip
    if cfg.dry_run and several:
        return tell_all(todo, checker, model)
    if cfg.dry_run:
        print(todo[0].name, model.report(checker.check(todo[0]).request), sep="\n")
        return 0

    def make(job: jobs.Ready) -> tuple[Stream, Written]:
        def work(pipe: I2VPipeline) -> tuple[Stream, Written]:
            video = pipe.stream(job.job.images, job.job.request, progress=True)
            return video, write_video(job.output, video.frames, video.fps, video.settings, overwrite=cfg.overwrite,
                                      instead=job.instead)  # fmt: skip

        return model.run(job.request, work)

    if several:
        return make_all(todo, checker, make, cfg.best_of)
    ready = checker.check(todo[0])
    full = ready.request
    print(f"{ready.job.name} -> {full.num_frames} frames of {full.width}x{full.height}, seed {full.seed}, "
          f"{plan.preset.name} on {model.device.type}")  # fmt: skip
    result, written = make(ready)
    print(f"{written.path} ({written.codec})" + (f"; {written.note}" if written.note else ""))
    near = ", ".join(
        f"frame {frame} " + ("is your picture" if psnr is None else f"{psnr:.1f} dB from your picture")
        for frame, psnr in result.drift["psnr"].items()
    )
    shift = result.drift["last_color_shift"]
    print(f"{near}; mean colour of the last frame {shift:.1f} delta E from the first (2 is just visible)")
    if recipe is not None:
        lines = recipe.differences(result.settings)
        print("made as recorded" if not lines else "not as recorded:\n  " + "\n  ".join(lines))
    return 0


def tell_all(todo: Sequence[jobs.Job], checker: jobs.Checker, model: memory.Fitting) -> int:
    """What `--dry-run` prints of several jobs. One that is impossible stops no other and is told again at the end."""
    failed = []
    for job in todo:
        ready = jobs.tried(checker.check, job)
        print(job.name, ready if isinstance(ready, str) else model.report(ready.request), sep="\n")
        failed += [f"  {job.name}: {ready}"] if isinstance(ready, str) else []
    return end(failed, len(todo))


def make_all(
    todo: Sequence[jobs.Job], checker: jobs.Checker, make: Callable[[jobs.Ready], tuple[Stream, Written]], best_of: int
) -> int:
    """One after the other, a line each; of every `best_of` a ranking. A failure stops no other job and is told again
    at the end."""
    failed, videos = [], list[Path]()
    for number, job, text, video in jobs.make_all(todo, checker, lambda job: make(job)[1], place()):
        print(f"[{number}/{len(todo)}] {job.name}: {text}")
        videos += [] if video is None else [video]
        failed += [f"  {job.name}: {text}"] if video is None else []
        if best_of > 1 and number % best_of == 0:
            if len(videos) > 1:
                print("\n".join(ranking(videos)))
            videos = []
    return end(failed, len(todo))


def end(failed: Sequence[str], count: int) -> int:
    """Tells of the jobs, of `count`, that failed, a line each; returns the exit code."""
    if failed:
        print(f"sample.py: error: {len(failed)} of {count} failed", *failed, sep="\n", file=sys.stderr)
    return 2 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a mistake that the user can put right, 130 for Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="sample.py: %(message)s")
    try:
        return run(argv)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    except jobs.MISTAKES as error:
        print(f"sample.py: error: {jobs.words(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())

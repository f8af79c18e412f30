"""Does the miniature obey, and do the paper's findings hold in it? `python -m eval miniature`.

The motion in every clip is measured from its pixels; no metric reads the caption or has learned anything. The model
stands between two bounds: frame 0 repeated, and the true clip through the VAE. What is made lies in `--out` and is not
made again: the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch

from eval import approximations, experiments, paper_tables, plug_and_play
from eval.answers import Answer, Bench, Job, Variant, answer, pipeline
from eval.experiments import STYLE_LORA, Evaluation, Needs, judged
from eval.held_out import held_out_set, level_of
from eval.page import Section, write_page
from eval.sheets import write_sheet
from eval.tables import write_docs
from i2v import __version__, config
from i2v.config import ConfigError, flag
from i2v.data.world import WORLDS, WorldConfig
from i2v.presets import find
from i2v.request import UnconditionalImage

SHEET_CLIPS = 20
# what it needs, and its part of the report
EXPERIMENTS: dict[str, tuple[Callable[[Evaluation], Needs], Callable[[Evaluation], list[Section]]]] = {
    "main": (experiments.main_needs, experiments.main_report),
    "3": (paper_tables.table_3_needs, paper_tables.table_3_report),
    "2": (paper_tables.table_2_needs, paper_tables.table_2_report),
    "steps": (paper_tables.steps_needs, paper_tables.steps_report),
    "faster": (approximations.faster_needs, approximations.faster_report),
    "style": (plug_and_play.style_needs, plug_and_play.style_report),
}


@dataclass(frozen=True)
class MiniatureEvaluation:
    """Measure a miniature on pictures that it never saw, and the paper's tables in small on it."""

    weights: Path | None = flag(None, "folder of the model's parts; not given: the shipped one")
    out: Path = flag(Path("outputs/miniature"), "folder for the clips, results.json, tables.md, page.html and sheets")
    table: tuple[str, ...] = flag(("main",), "main: the whole held-out set; 3, 2: the paper's; steps: fewer through "
                                  "t0; faster: what approximations lose; style: a style LoRA")  # fmt: skip
    scenes: int = flag(20, "unseen pictures, each under all captions; the set's other parts follow this number")
    pictures: Path | None = flag(None, "a folder of photographs, to be asked too")
    style_lora: Path = flag(STYLE_LORA, "LoRA of the style night, for --table style")
    world: str | None = flag(None, "level of the procedural world; not given: the one that the weights were trained on")
    steps: int = flag(25, "sampling steps")
    guidance_scale: float | None = flag(None, "guidance; not given: the preset's")
    unconditional_image: UnconditionalImage | None = flag(None, "picture of the unguided half; not given: the preset's")
    device: str = flag("cpu", "auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "number format of the networks")
    workers: int = flag(1, "processes that share the work")
    docs: Path | None = flag(None, "a Markdown file whose marked tables are replaced by the new ones")


def world_of(cfg: MiniatureEvaluation) -> WorldConfig:
    """The level that is given, or the one that the weights were trained on."""
    name = cfg.world if cfg.world is not None else level_of(cfg.weights)
    if not name:
        raise ConfigError(f"{cfg.weights} does not say on which level it was trained; give --world")
    if name not in WORLDS:
        raise ConfigError(f"--world {name}: expected one of {', '.join(WORLDS)}")
    return WORLDS[name]


def run(cfg: MiniatureEvaluation) -> None:
    """Everything that the command does."""
    unknown = [name for name in cfg.table if name not in EXPERIMENTS]
    if unknown or not cfg.table:
        raise ConfigError(f"--table {' '.join(unknown)}: expected one or more of {', '.join(EXPERIMENTS)}")
    for name, least in (("scenes", 2), ("workers", 1), ("steps", 2)):
        if getattr(cfg, name) < least:
            raise ConfigError(f"--{name} {getattr(cfg, name)}: expected {least} or more")
    if cfg.docs is not None and not cfg.docs.is_file():
        raise ConfigError(f"--docs {cfg.docs}: there is no such file")
    if "style" in cfg.table and not cfg.style_lora.is_file():
        raise ConfigError(f"--style-lora {cfg.style_lora}: there is no such file; train one with train.py --config "
                          "configs/tiny/style-lora.json")  # fmt: skip
    world, preset = world_of(cfg), find("tiny")
    bench = Bench(cfg.weights, cfg.device, cfg.dtype, preset.num_frames, world.motions, world.cameras)
    questions = held_out_set(world, cfg.scenes, preset.num_frames, preset.side, cfg.pictures)
    pipe = pipeline(bench)
    guidance = preset.guidance_scale if cfg.guidance_scale is None else cfg.guidance_scale
    full = Variant("sampled", cfg.steps, guidance, preset.t0, preset.p, unconditional_image=cfg.unconditional_image)
    plan = Evaluation(world, pipe, questions, full, {}, cfg.style_lora)
    jobs = {
        (q.scene, q.caption, variant): Job(q, variant)
        for name in cfg.table
        for group, variant in EXPERIMENTS[name][0](plan)
        for q in group
    }
    answers = answer(list(jobs.values()), bench, cfg.out, cfg.workers)
    done = Evaluation(world, pipe, questions, full, dict(zip(jobs, answers, strict=True)), cfg.style_lora)
    report(cfg, done, answers)


def report(cfg: MiniatureEvaluation, e: Evaluation, answers: list[Answer]) -> None:
    """Writes results.json, tables.md, page.html, the sheets, and the tables of a docs file."""
    sections = [section for name in cfg.table for section in EXPERIMENTS[name][1](e)]
    tables = [table for section in sections for table in section.tables]
    markdown = "\n".join(table.markdown() for table in tables)
    config.write_text(cfg.out / "results.json", json.dumps(facts(cfg, e, answers), indent=1) + "\n")
    config.write_text(cfg.out / "tables.md", markdown)
    title = f"The miniature on {e.world.name}"
    write_page(cfg.out / "page.html", title, about(e, answers), sections, e.pipe.preset.fps)
    folders = [cfg.out]
    if cfg.docs is not None and "main" in cfg.table:  # the docs' sheets are of the whole set
        folders.append(cfg.docs.parent / "media")
    for folder in folders:
        write_sheets(folder, of_the_set(e, answers))
    print(markdown)
    if cfg.docs is not None:
        left = write_docs(cfg.docs, tables)
        if left:
            print(f"{cfg.docs} has no place for the tables {', '.join(left)}")
    print(f"all of it, and every clip: {cfg.out / 'page.html'}")


def about(e: Evaluation, answers: list[Answer]) -> str:
    """One line on how the clips were made."""
    sampled = [a for a in answers if a.job.variant.kind == "sampled"]
    v = e.full
    return (f"{len(sampled)} sampled clips of {e.pipe.preset.num_frames} frames; {v.steps} steps, guidance "
            f"{v.guidance_scale:g}, t0 {v.t0:g}, p {v.p:g} where nothing else is said. Brackets are 95 % intervals: "
            "of means the bootstrap's over pictures, of shares Wilson's for as many clips as independent ones would "
            "tell as much (where all are alike, for as many as there are pictures).")  # fmt: skip


def facts(cfg: MiniatureEvaluation, e: Evaluation, answers: list[Answer]) -> dict[str, Any]:
    """All that the tables are made of, per clip."""
    return {
        "settings": config.to_dict(cfg),
        "world": e.world.name,
        "weights": {name: dict(part) for name, part in e.pipe.weights.items()},
        "versions": {
            "i2v-adapter": __version__, "torch": torch.__version__, "numpy": np.__version__, "opencv": cv2.__version__,
            "python": platform.python_version(),
        },
        "clips": [
            {
                "group": a.job.question.group, "scene": a.job.question.scene, "seed": a.job.question.seed,
                "caption": a.job.question.caption, "asked": [a.job.question.motion, a.job.question.camera],
                "variant": asdict(a.job.variant), "file": a.file.name, **judged(a),
            }
            for a in answers
        ],
    }  # fmt: skip


def of_the_set(e: Evaluation, answers: list[Answer]) -> list[Answer]:
    """The model's clips of the held-out set: the style table asks the same of pictures that are drawn otherwise."""
    scenes = {q.scene for q in e.questions}
    return [a for a in answers if a.job.variant == e.full and a.job.question.scene in scenes]


def write_sheets(folder: Path, answers: list[Answer]) -> None:
    """The model's first clips, unchosen, and those whose motion is not the asked one."""

    def right(a: Answer) -> bool:
        verdicts = judged(a)
        return verdicts.get("motion_right", True) and verdicts.get("camera_right", True)

    for name, chosen in (("clips", answers), ("failures", [a for a in answers if not right(a)])):
        some, file = chosen[:SHEET_CLIPS], folder / f"miniature_{name}.webp"
        file.unlink(missing_ok=True)  # an older run's failures are not this one's
        if some:
            colours = [(30, 30, 30) if right(a) else (190, 30, 30) for a in some]
            captions = [a.job.question.caption for a in some]
            write_sheet(file, [a.frames for a in some], captions, colours=colours)


def main(argv: list[str] | None = None) -> None:
    run(config.from_command_line(MiniatureEvaluation, argv, "python -m eval miniature"))

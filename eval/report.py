"""Measurements of videos -> a table for the terminal, results.json with every value, and one page that shows it all."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from eval.charts import scatter_chart
from eval.intervals import NARROW, paired_interval, share_interval
from eval.measured import Measured, picture_of, read
from eval.networks import Networks
from eval.page import Grid, Section, Shot, write_page
from eval.scores import PAPER, Scores, columns, shown
from eval.tables import NONE, Column, Table, cell, count_of
from eval.video_set import least, mean_and_interval
from i2v import __version__
from i2v.config import write_text
from i2v.picture import resize

SIDE = 256  # pixels of a clip on the page
WARPING_SCALE = "WarpingError is shown times 10,000: the scale of the paper's is not stated, this one is a guess."


@dataclass(frozen=True)
class Report:
    """What is written. percent: of the intervals, None: 95 where the set is large enough. paper: the paper's rows,
    which follow the row of the same name. shown: pictures on the page. reference: the row that others are compared with
    picture by picture; "": the first."""

    title: str
    about: str
    out: Path
    settings: Mapping[str, Any]
    networks: Networks
    percent: float | None = None
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    shown: int = 12
    reference: str = ""


def write(report: Report, measured: Sequence[Measured]) -> list[Table]:
    """Writes tables.md, results.json and page.html; returns the tables."""
    models = by_model(measured)
    paper, others = columns([m.scores for m in measured])
    notes = missing(measured, [*paper, *others]) + warnings(report, measured)
    rows, more = _rows(report, models, paper, True), _rows(report, models, others, False)
    head = ["", "videos"]
    notes += [WARPING_SCALE, *made_by(report.networks)]
    tables = [Table("paper", "The paper's metrics", [*head, *(c.head for c in paper)], rows, "\n\n".join(notes))]
    if others:
        tables.append(Table("others", "Other measures", [*head, *(c.head for c in others)], more,
                            "No figures of the paper stand beside these."))  # fmt: skip
    if pairs := paired(models, [*paper, *others], report.reference, report.percent or 95):
        tables.append(pairs)
    write_text(report.out / "tables.md", "\n".join(t.markdown() for t in tables))
    write_text(report.out / "results.json", json.dumps(facts(report, measured), indent=1) + "\n")
    words = ("Means over videos; brackets are bootstrap intervals over pictures, of shares Wilson's for as many videos "
             "as independent ones would tell as much.")  # fmt: skip
    charts = [chart for chart in (motion_against_error(models),) if chart]
    sections = [Section("Tables", words, tables, charts)]
    sections += grids(report, measured) + side_by_side(report, measured)
    sections.append(Section("Every video", tables=[every(measured, [*paper, *others])]))
    write_page(report.out / "page.html", report.title, report.about, sections)
    return tables


def by_model(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    out: dict[str, list[Measured]] = {}
    for m in measured:
        out.setdefault(m.video.model, []).append(m)
    return out


def mean_cell(found: Sequence[Measured], column: Column, percent: float | None) -> str:
    """`0.71 [0.65, 0.77]`, without an interval where the set is too small for it and none was asked for."""
    have = [m for m in found if column.name in m.scores.values]
    if not have:
        return NONE
    values = [shown(column.name, m.scores.values[column.name]) for m in have]
    groups = [m.video.scene for m in have]
    if len(set(groups)) < least(percent or 95):
        return f"{sum(values) / len(values):.{column.digits}f}"
    mean, interval = mean_and_interval(values, column.head, percent=percent or 95, groups=groups)
    if column.share:
        interval = share_interval(values, groups, percent or 95)
    return cell((mean, *interval), column.digits)


def _rows(report: Report, models: Mapping[str, Sequence[Measured]], shown_columns: Sequence[Column], with_paper: bool
          ) -> list[list[str]]:  # fmt: skip
    """A row per model, each followed by the paper's of the same name; at the end, the paper's others."""
    lines, left = [], dict(report.paper) if with_paper else {}
    for model, found in models.items():
        lines.append([model, str(len(found)), *(mean_cell(found, c, report.percent) for c in shown_columns)])
        if model in left:
            lines.append(_paper_row(model, left.pop(model), shown_columns))
    return lines + [_paper_row(name, values, shown_columns) for name, values in left.items()]


def _paper_row(name: str, values: Mapping[str, float], shown_columns: Sequence[Column]) -> list[str]:
    cells = [NONE if c.name not in values else f"{values[c.name]:.4f}" for c in shown_columns]
    return [f"{name} (the paper's)", "50", *cells]


def missing(measured: Sequence[Measured], shown_columns: Sequence[Column]) -> list[str]:
    """Why columns are empty, or lack some videos: a line for each reason."""
    columns_of: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for column in shown_columns:
        without = [m for m in measured if column.name in m.scores.reasons]
        for reason in dict.fromkeys(m.scores.reasons[column.name] for m in without):
            labels = tuple(m.label for m in without if m.scores.reasons[column.name] == reason)
            columns_of.setdefault((reason, labels), []).append(column.head)
    out = []
    for (reason, labels), heads in columns_of.items():
        all_of_them = len(labels) == len(measured)
        named = all_of_them and any(reason.lower().startswith(head.partition(" x ")[0].lower()) for head in heads)
        state = "empty" if all_of_them else f"without {count_of(len(labels), 'video')} ({first_of(labels)})"
        out.append(f"Empty: {reason}." if named else f"{', '.join(heads)}: {state}; {reason}.")
    return out


def made_by(networks: Networks) -> list[str]:
    """The networks that measured, by name and hash, and what is to be known of them."""
    named = [f"{networks.names[name]} (sha256 {networks.sha256[name][:12]})" for name in networks.names]
    out = [f"Networks: {', '.join(named)}."] if named else []
    if networks.clip is not None:
        out.append("Which CLIP the paper used is not known.")
    return out


def paired(models: Mapping[str, Sequence[Measured]], shown_columns: Sequence[Column], first: str = "",
           percent: float = 95) -> Table | None:  # fmt: skip
    """Every model minus the `first`, over the pictures that both have; None where no pair has enough of them."""
    first = first or next(iter(models))
    reference, lines = models[first], []
    columns = [c for c in shown_columns if any(c.name in m.scores.values for m in reference)]
    for model, found in models.items():
        if model == first:
            continue
        cells, counts = [], [0]
        for column in columns:
            ours, theirs = (_by_scene(some, column.name) for some in (found, reference))
            common = [scene for scene in ours if scene in theirs]
            counts.append(len(common))
            mine, other = ([side[scene] for scene in common] for side in (ours, theirs))
            enough = len(common) >= least(percent)
            alike = enough and column.share and mine == other  # nothing is drawn that differs, whatever the truth is
            if alike or not enough:
                cells.append(f"{0:+.{column.digits}f}" if alike else NONE)
                continue
            middle = (sum(mine) - sum(other)) / len(common)
            cells.append(cell((middle, *paired_interval(mine, other, percent=percent)), column.digits,
                              sign=True))  # fmt: skip
        if any(one != NONE for one in cells):
            lines.append([model, str(max(counts)), *cells])
    words = f"{percent:g} % bootstrap intervals over pictures, too narrow where there are few of them."
    head = ["", "pictures", *(c.head for c in columns)]
    return Table("paired", f"Minus {first}, picture by picture", head, lines, words) if lines else None


def _by_scene(found: Sequence[Measured], name: str) -> dict[str, float]:
    """The mean of each picture's videos, as it is shown."""
    values: dict[str, list[float]] = {}
    for m in found:
        if name in m.scores.values:
            values.setdefault(m.video.scene, []).append(shown(name, m.scores.values[name]))
    return {scene: sum(some) / len(some) for scene, some in values.items()}


def warnings(report: Report, measured: Sequence[Measured]) -> list[str]:
    """What makes rows hard to compare."""
    out = []
    scenes = {model: {m.video.scene for m in found} for model, found in by_model(measured).items()}
    every_scene = set().union(*scenes.values())
    if lacking := {model: len(every_scene - own) for model, own in scenes.items() if own != every_scene}:
        told = ", ".join(f"{model} lacks {count}" for model, count in lacking.items())
        out.append(f"Rows are means over different pictures: of {len(every_scene)}, {told}.")
    rates = sorted({m.fps for m in measured if m.fps is not None})
    if len(rates) > 1:
        out.append(f"Frames a second differ ({', '.join(f'{rate:g}' for rate in rates)}): FlowScore, WarpingError, "
                   "flicker and, with --evalcrafter, CLIPTemp count from frame to frame; bring all videos to one rate "
                   "before.")  # fmt: skip
    unknown = [m.label for m in measured if m.fps is None]
    if rates and unknown:
        out.append(f"Of {count_of(len(unknown), 'video')} ({first_of(unknown)}) the frames a second are not known, of "
                   f"the others they are {', '.join(f'{rate:g}' for rate in rates)}.")  # fmt: skip
    without = [m.label for m in measured if not m.video.prompt]
    if len(without) == len(measured) and report.networks.clip is not None:
        out.append("No video has a prompt, so there is no text alignment; give --prompts.")
    if without and len(without) < len(measured) and report.networks.clip is not None:
        out.append(f"Without a prompt: {count_of(len(without), 'video')} ({first_of(without)}); text alignment is that "
                   "of the others.")  # fmt: skip
    sizes = dict.fromkeys(f"{m.size[2]} x {m.size[1]}" for m in measured)
    if len(sizes) > 1:
        out.append(f"FlowScore counts pixels, and the videos are of different size: {', '.join(sizes)}.")
    lossy = [m for m in measured if not m.video.path.is_dir()]
    if lossy and len(lossy) < len(measured):
        out.append("Some videos went through a codec and some did not, which changes the values.")
    if any(m.video.reference is None for m in measured):
        none = [m.label for m in measured if m.video.reference is None]
        out.append(f"Without a reference picture: {count_of(len(none), 'video')} ({first_of(none)}); name pictures as "
                   "the videos and give --reference. Similarity and drift of these are against frame 0.")  # fmt: skip
    if changed := [m.label for m in measured if m.video.changed is not None]:
        out.append(f"Where {count_of(len(changed), 'video')} ({first_of(changed)}) had the picture from lies another "
                   "one now, which is not compared with.")  # fmt: skip
    for name in dict.fromkeys(name for m in measured for name in m.scores.details if name.startswith("warping_error")):
        of = [m for m in measured if 0 in m.scores.details.get(name, {}).get("kept", [])]
        if of:
            what = f"WarpingError{name.removeprefix('warping_error')}, {count_of(len(of), 'video')} of {len(measured)}"
            out.append(f"{what} ({first_of([m.label for m in of])}), has pairs of frames of which no pixel could be "
                       "compared: these count as 0, which says nothing.")  # fmt: skip
    small = [name for name, found in by_model(measured).items() if len({m.video.scene for m in found}) < least()]
    if small and report.percent is None:
        out.append(f"No intervals for {', '.join(small)}: 95 % need {least()} pictures or more.")
    if any(least(report.percent or 95) <= len(own) < 50 for own in scenes.values()):
        out.append(f"Intervals of means are too narrow where there are few pictures: {NARROW}.")
    return out


def first_of(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]}, ..."


def motion_against_error(models: Mapping[str, Sequence[Measured]]) -> str:
    """WarpingError over FlowScore of every video, by RAFT where every model has it, else by DIS."""
    for suffix in ("", " (DIS)"):
        x, y = "flow_score" + suffix, "warping_error" + suffix
        dots = {
            model: [(m.scores.values[x], shown(y, m.scores.values[y])) for m in found
                    if x in m.scores.values and y in m.scores.values]
            for model, found in models.items()
        }  # fmt: skip
        if dots and all(dots.values()):
            return scatter_chart("Motion against error", f"FlowScore{suffix}, pixels per frame",
                                 f"WarpingError{suffix} x 10,000", dots)  # fmt: skip
    return ""


def side_by_side(report: Report, measured: Sequence[Measured]) -> list[Section]:
    """The first pictures, each with all videos of it; those of another prompt stand in a row of their own."""
    scenes = list(dict.fromkeys(m.video.scene for m in measured))
    words = "" if len(scenes) <= report.shown else f"The first {report.shown} of {len(scenes)} pictures."
    rows: dict[str, list[Shot]] = {}
    if len(scenes) == len(measured) and all(m.video.reference is None for m in measured):
        alone = [shot(m, m.label) for m in measured[: report.shown]]
        return [Section("Clips", words, shots={"One of each picture": alone})] if alone else []
    for scene in scenes[: report.shown]:
        of_picture = [m for m in measured if m.video.scene == scene]
        first, *others = dict.fromkeys(m.video.prompt for m in of_picture if m.video.prompt) or [""]
        for prompt in (first, *others):
            found = [m for m in of_picture if (m.video.prompt or first) == prompt]  # many tell no prompt
            picture = picture_of(found[0].video, *found[0].size[1:])
            still = [] if picture is None else [Shot(_small(picture[None]), "the picture")]
            rows[f"{scene}: {prompt}" if prompt else scene] = still + [shot(m) for m in found]
    return [Section("Side by side", words, shots=rows)] if rows else []


def grids(report: Report, measured: Sequence[Measured]) -> list[Section]:
    """t0 x p, for pictures whose videos tell of more than one start (Frame Similarity Prior)."""
    out: list[Grid] = []
    for scene in dict.fromkeys(m.video.scene for m in measured):
        if len(out) == report.shown:
            break
        cells: dict[tuple[str, str], dict[str, Measured]] = {}  # the first of each model
        for m in measured:
            if m.video.scene == scene and m.video.start is not None:
                t0, p = m.video.start
                cells.setdefault((f"{t0:g}", f"{p:g}"), {}).setdefault(m.video.model, m)
        if len(cells) > 1:
            rows, heads = (sorted({key[i] for key in cells}, key=float, reverse=not i) for i in (0, 1))
            shots = {key: [shot(m) for m in of.values()] for key, of in cells.items()}
            out.append(Grid(scene, "t0, p", rows, heads, shots))
    return [Section("Frame Similarity Prior: t0 x p", grids=out)] if out else []


def shot(m: Measured, name: str = "") -> Shot:
    """A clip for the page under its model's name, with its motion."""
    moved = next((f"flow {m.scores.values[n]:.2f} ({by})" for n, by in (("flow_score", "RAFT"),
                 ("flow_score (DIS)", "DIS")) if n in m.scores.values), "")  # fmt: skip
    return Shot(_small(read(m.video, m.size[0])), f"{name or m.video.model}, {moved}", fps=m.fps)


def _small(frames: Any) -> Any:
    """At most SIDE pixels wide."""
    height, width = frames.shape[1:3]
    if width <= SIDE:
        return frames
    return np.stack([resize(f, max(round(height * SIDE / width), 1), SIDE) for f in frames])


def every(measured: Sequence[Measured], shown_columns: Sequence[Column]) -> Table:
    """A row per video."""

    def text(scores: Scores, column: Column) -> str:
        value = scores.values.get(column.name)
        return NONE if value is None else f"{shown(column.name, value):.{column.digits}f}"

    rows = [[m.label, *(text(m.scores, c) for c in shown_columns)] for m in measured]
    return Table("every", "Values", ["", *(c.head for c in shown_columns)], rows)


def facts(report: Report, measured: Sequence[Measured]) -> dict[str, Any]:
    """All that the tables are made of, per video; values are raw."""
    return {
        "settings": dict(report.settings),
        "networks": {name: {"name": report.networks.names[name], "sha256": report.networks.sha256[name]}
                     for name in report.networks.names},
        "versions": {
            "i2v-adapter": __version__, "torch": torch.__version__, "numpy": np.__version__, "opencv": cv2.__version__,
            "python": platform.python_version(),
        },
        "paper": {name: dict(values) for name, values in report.paper.items()},
        "units": {c.name: "raw" if c.name == "warping_error" else c.head for c in PAPER},
        "videos": [
            {
                "model": m.video.model, "file": str(m.video.path), "scene": m.video.scene, "prompt": m.video.prompt,
                "reference": None if m.video.reference is None else str(m.video.reference),
                "frames": m.size[0], "height": m.size[1], "width": m.size[2],
                "fps": m.fps, "values": m.scores.values, "reasons": m.scores.reasons, "details": m.scores.details,
            }
            for m in measured
        ],
    }  # fmt: skip

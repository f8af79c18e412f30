"""The paper's tables in small, on made-up measurements: right rows, right pairs, right signs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.answers import Answer, Job, Variant, write_clip
from eval.approximations import EXACT, faster_needs, faster_report
from eval.experiments import Evaluation, judged, main_needs, main_report
from eval.held_out import SCENES, Question, held_out_set
from eval.miniature import EXPERIMENTS
from eval.page import Section
from eval.paper_tables import (
    FEWER_STEPS,
    steps_needs,
    steps_report,
    table_2_needs,
    table_2_report,
    table_3_needs,
    table_3_report,
)
from eval.tables import Table
from i2v.data.world import LEVEL_1, LEVEL_2, WorldConfig
from i2v.load import load
from i2v.pipeline import I2VPipeline

FULL = Variant("sampled", 25, 2.5, 1.0, 0.5)
Measure = Callable[[Question, Variant], dict[str, Any]]


@pytest.fixture(scope="module")
def pipe(random_folder: Path) -> I2VPipeline:
    return load("tiny", folder=random_folder)


def evaluation(pipe: I2VPipeline, folder: Path, measure: Measure, needs: Callable, world: WorldConfig = LEVEL_1,
               scenes: int = 4) -> Evaluation:  # fmt: skip
    """Every needed clip as a still one of made-up measurements."""
    questions = held_out_set(world, scenes, 2, 32, None)
    plan = Evaluation(world, pipe, questions, FULL, {})
    write_clip(folder / "clip.png", np.zeros((2, 32, 32, 3), np.uint8))
    made = {
        (q.scene, q.caption, v): Answer(Job(q, v), folder / "clip.png", measure(q, v))
        for group, v in needs(plan)
        for q in group
    }
    return replace(plan, made=made)


def test_what_approximations_lose(pipe: I2VPipeline, tmp_path: Path) -> None:
    """The distance to the exact clip of the same question is of the clips' own pixels."""
    e = evaluation(pipe, tmp_path, lambda q, v: {"motion": q.motion, "flicker": v.deep_every + q.seed}, faster_needs)
    write_clip(tmp_path / "other.png", np.full((2, 32, 32, 3), 16, np.uint8))
    e = replace(e, made={at: a if at[2].deep_every < 5 else replace(a, file=tmp_path / "other.png")
                         for at, a in e.made.items()})  # fmt: skip
    sections = faster_report(e)
    near = column(table(sections, "faster"), "to the exact clip (dB)")
    assert near[EXACT].startswith("50.0") and near["--deep-every 2"].startswith("50.0")
    assert near["--deep-every 5"].startswith("24.0"), "20 log10(255 / 16)"
    assert column(table(sections, "faster-paired"), "flicker")["--deep-every 3"].startswith("+2.00 [+2.00, +2.00]")


def table(sections: list[Section], name: str) -> Table:
    return next(t for s in sections for t in s.tables if t.name == name)


def column(t: Table, head: str) -> dict[str, str]:
    return {row[0]: row[t.head.index(head)] for row in t.rows}


def test_main_has_bounds_matrices_and_failures(pipe: I2VPipeline, tmp_path: Path) -> None:
    def measure(q: Question, v: Variant) -> dict[str, Any]:
        motion = "moves right" if q.motion == "moves left" else q.motion  # never left
        return {"motion": motion, "camera": "" if "pans" in q.camera else q.camera, "similarity_psnr": 30.0 + q.seed}

    e = evaluation(pipe, tmp_path, measure, main_needs, LEVEL_2)
    sections = main_report(e)
    scenes = table(sections, "main-unseen-scenes")
    assert [row[0][:5] for row in scenes.rows] == ["model", "floor", "ceili"]
    assert column(scenes, "motion right")["model"].startswith("0.86 ["), "24 of 28"
    matrix = column(table(sections, "confusion-motion"), "as asked")
    assert matrix["left"] == "0 of 4" and matrix["grows"] == "4 of 4"
    textured = len({q.scene for q in e.of(SCENES) if q.textured})
    cameras = column(table(sections, "confusion-camera"), "as asked")
    assert textured and cameras["pans left"] == f"0 of {textured}" and cameras["rests"] == f"{textured} of {textured}"
    failures = next(s for s in sections if s.title == "Failures")
    everything = sections[-1]
    assert len(failures.shots["in order"]) == sum(s.right is False for c in everything.shots.values() for s in c)
    assert sum(len(c) for c in everything.shots.values()) == len(e.questions)


def test_a_photograph_has_no_motion_to_be_right(pipe: I2VPipeline, tmp_path: Path) -> None:
    e = evaluation(pipe, tmp_path, lambda q, v: {"camera": q.camera, "motion": q.motion}, main_needs, LEVEL_2)
    answer = e.answers([q for q in e.of(SCENES) if q.camera][:1], FULL)[0]
    photograph = replace(answer, job=Job(replace(answer.job.question, motion=""), FULL), values={"camera": ""})
    assert judged(photograph) == {"camera": "", "camera_right": False}
    assert "motion_right" not in judged(answer), "the camera moves"


def test_table_3_compares_with_the_paper(pipe: I2VPipeline, tmp_path: Path) -> None:
    def measure(q: Question, v: Variant) -> dict[str, Any]:
        flow = 0.5 + 0.3 * (v.ip_scale == 0) + 0.2 * (v.i2v_scale == 0)
        return {"motion": q.motion, "similarity_psnr": 20.0 + q.seed + 8 * v.i2v_scale, "flow": flow}

    sections = table_3_report(evaluation(pipe, tmp_path, measure, table_3_needs, scenes=6))
    paired = table(sections, "3-paired")
    assert column(paired, "similarity to frame 0 (dB)") == {
        "without Content-Adapter": "+0.0 [+0.0, +0.0]",
        "without I2V-Adapter": "-8.0 [-8.0, -8.0]",
        "without both": "-8.0 [-8.0, -8.0]",
    }
    assert list(column(paired, "flow has the paper's sign").values()) == ["yes", "no", "yes"]
    assert column(paired, "paper: FlowScore")["without both"] == "+0.85"
    assert all(len(clips) == 4 for clips in sections[0].shots.values())


def test_table_2_signs(pipe: I2VPipeline, tmp_path: Path) -> None:
    def measure(q: Question, v: Variant) -> dict[str, Any]:
        return {"motion": q.motion, "flow": (v.t0 or 0) - 0.1 * (v.p or 0) + 0.01 * q.seed}  # rises with t0, not with p

    sections = table_2_report(evaluation(pipe, tmp_path, measure, table_2_needs, scenes=12))
    by_t0 = table(sections, "2-t0-paired")
    assert column(by_t0, "flow has the paper's sign") == dict.fromkeys(("0.9", "0.8", "0.7", "0.6"), "yes")
    by_p = table(sections, "2-p-1-paired")
    assert set(column(by_p, "flow has the paper's sign").values()) == {"no"}
    assert column(by_p, "paper: FlowScore")["0.9"] == "+0.185"
    assert column(by_p, "paper at 1 - p") == {"1": "-", "0.9": "-0.113", "0.7": "-0.057", "0.3": "+0.102",
                                              "0.1": "+0.185"}  # fmt: skip
    assert list(column(by_p, "flow has its sign").values()) == ["-", *4 * ["yes"]]
    assert not [head for head in table(sections, "2-p-0.8-paired").head if "paper" in head], "it has no p at t0 = 0.8"
    assert "t0 0.8: 20" in table(sections, "2-t0").note
    assert len(sections[0].charts) == 2, "flow against t0 and p; nobody measured similarity"


def test_fewer_steps_are_counted(pipe: I2VPipeline, tmp_path: Path) -> None:
    def measure(q: Question, v: Variant) -> dict[str, Any]:
        return {"motion": q.motion, "similarity_psnr": 20.0 + v.steps + (v.t0 or 0)}

    e = evaluation(pipe, tmp_path, measure, steps_needs)
    assert len({q.scene for q in e.half}) == 2
    sections = steps_report(e)
    run = column(table(sections, "steps"), "steps run")
    assert list(run.values()) == ["25", "20", "20", "15", "15", "8", "8"] and len(run) == len(FEWER_STEPS)
    equal = column(table(sections, "steps-equal"), "similarity to frame 0 (dB)")
    assert [v.split()[0] for v in equal.values()] == ["+4.8", "+9.6", "+1.8"]


def test_the_docs_have_a_place_for_every_table(pipe: I2VPipeline, tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "miniature.md").read_text(encoding="utf-8")
    for needs, report in EXPERIMENTS.values():
        e = evaluation(pipe, tmp_path, lambda q, v: {"motion": q.motion, "camera": q.camera}, needs, LEVEL_2)
        for made in (t for section in report(e) for t in section.tables):
            assert f"<!-- table: {made.name} -->" in docs, f"docs/miniature.md has no place for {made.name}"

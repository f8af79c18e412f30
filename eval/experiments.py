"""The model on the whole held-out set: a table of each part beside its bounds, confusion matrices, every clip.

An experiment says which clips it needs and makes its section of the report out of them; the paper's tables are in
`eval/paper_tables.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers import CEILING, FLOOR, Answer, Variant
from eval.held_out import SCENES, Question
from eval.page import Section, Shot
from eval.tables import Sample, Table, confusion_table, summary_table
from i2v.data.world import WorldConfig
from i2v.pipeline import I2VPipeline

STYLE_LORA = Path("weights/tiny-lora/night.safetensors")
Needs = list[tuple[Sequence[Question], Variant]]
QUALITY = ("motion_right", "camera_right", "similarity_psnr", "static_psnr", "object_psnr", "identity",
           "background_psnr", "colour_drift", "flicker", "flow", "displacement", "truth_psnr")  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What all experiments share: the questions, the model's variant without changes, and the made clips."""

    world: WorldConfig
    pipe: I2VPipeline
    questions: Sequence[Question]
    full: Variant
    made: Mapping[tuple[str, str, Variant], Answer]  # by scene, caption and variant
    style_lora: Path = STYLE_LORA  # of the row in eval/plug_and_play.py

    def of(self, group: str, scenes: int | None = None) -> list[Question]:
        """The questions of one part of the held-out set, of its first `scenes` pictures."""
        questions = [q for q in self.questions if q.group == group]
        names = list(dict.fromkeys(q.scene for q in questions))[:scenes]
        return [q for q in questions if q.scene in names]

    @property
    def half(self) -> list[Question]:
        """Every second of the unseen scenes: the tables of many rows."""
        names = {q.scene for q in self.of(SCENES)}
        return self.of(SCENES, max((len(names) + 1) // 2, 2))

    def answers(self, questions: Sequence[Question], variant: Variant) -> list[Answer]:
        """The made clips."""
        return [self.made[q.scene, q.caption, variant] for q in questions]

    def samples(self, questions: Sequence[Question], variant: Variant) -> list[Sample]:
        """Their measurements, with whether the motion is the asked one."""
        return [Sample(q.scene, judged(a)) for q, a in zip(questions, self.answers(questions, variant), strict=True)]


def judged(answer: Answer) -> dict[str, Any]:
    """Measurements and verdicts. "motion_right": the camera is asked to rest. "camera_right": a texture shows it, and
    the object is asked to stay."""
    question, values = answer.job.question, dict(answer.values)
    if question.motion and not question.camera:
        values["motion_right"] = values["motion"] == question.motion
    if values.get("camera") is not None and question.textured and question.motion in ("", "stays still"):
        values["camera_right"] = values["camera"] == question.camera
    return values


# -- the whole held-out set ----------------------------------------------------------------------------------------


def main_needs(e: Evaluation) -> Needs:
    return [(e.questions, variant) for variant in (e.full, FLOOR, CEILING)]


def main_report(e: Evaluation) -> list[Section]:
    """A table of each part of the set beside its bounds, the confusion matrices, and every clip."""
    tables: list[Table] = []
    shots: dict[str, list[Shot]] = {}
    for group in dict.fromkeys(q.group for q in e.questions):
        questions = e.of(group)
        rows = {
            "model": e.samples(questions, e.full),
            "floor: frame 0 repeated": e.samples(questions, FLOOR),
            "ceiling: the truth through the VAE": e.samples(questions, CEILING),
        }
        name = "main-" + group.replace(" ", "-")
        tables.append(summary_table(name, group.capitalize(), rows, QUALITY))
        if group == SCENES:
            tables.append(summary_table("main-static", "Where the static part is lost", rows,
                                        ("static_psnr", "settled_psnr")))  # fmt: skip
        for scene in dict.fromkeys(q.scene for q in questions):
            clips = [shot(a) for a in e.answers([q for q in questions if q.scene == scene], e.full)]
            shots.setdefault(scene if len(clips) > 1 else group, []).extend(clips)
    matrices = confusions(e)
    failed = [clip for clips in shots.values() for clip in clips if clip.right is False]
    sections = [Section("The whole held-out set", tables=tables)]
    if matrices:
        sections.append(Section("Asked and measured", "Unseen scenes, one picture under all captions.", matrices))
    sections.append(Section("Failures", f"All {len(failed)} clips with another motion than the asked one.",
                            shots={"in order": failed} if failed else {}))  # fmt: skip
    return [*sections, Section("All clips of the model", "In order, unchosen; green: as asked.", shots=shots)]


def confusions(e: Evaluation) -> list[Table]:
    """Of objects, and of cameras where this world has them; unseen scenes."""
    answers = e.answers(e.of(SCENES), e.full)
    out = []
    asked = [(a.job.question.motion, a.values["motion"]) for a in answers if "motion_right" in judged(a)]
    if asked:
        ours, measured = zip(*asked, strict=True)
        out.append(confusion_table("confusion-motion", "Object", ours, measured, e.world.motions, short))
    turned = [(a.job.question.camera, a.values["camera"]) for a in answers if "camera_right" in judged(a)]
    if turned and len(e.world.cameras) > 1:
        ours, measured = zip(*turned, strict=True)
        out.append(confusion_table("confusion-camera", "Camera", ours, measured, e.world.cameras, short))
    return out


def short(name: str) -> str:
    """A class's name for a narrow column."""
    return name.removeprefix("the camera ").removeprefix("the picture ").removeprefix("moves ") or "rests"


def shot(answer: Answer, words: str | None = None) -> Shot:
    """A clip for the page, with what was measured in it."""
    values, question = judged(answer), answer.job.question
    verdicts = [values[k] for k in ("motion_right", "camera_right") if k in values]
    measured = [] if "motion_right" not in values else [values["motion"]]
    measured += [] if "camera_right" not in values else [f"camera {short(values['camera'])}"]
    return Shot(answer.frames, question.caption if words is None else words, all(verdicts) if verdicts else None,
                ", ".join(measured))  # fmt: skip

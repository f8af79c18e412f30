"""The style LoRA's rows: the same scenes in both styles, and a distance that sees the style and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eval.answers import CEILING, Answer, Job, Variant
from eval.experiments import Evaluation
from eval.held_out import unseen_scenes
from eval.miniature import of_the_set
from eval.plug_and_play import PLAIN_BEST, STYLED_BEST, look, rows, styled
from i2v.data.styles import STYLES
from i2v.data.world import WORLDS


def test_a_styled_question_differs_in_its_pixels_alone() -> None:
    question = unseen_scenes(WORLDS["level_1"], 1, 3, 64)[0]
    drawn = styled(question)
    assert drawn.caption == question.caption and drawn.seed == question.seed and drawn.scene != question.scene
    assert np.array_equal(drawn.truth, STYLES["night"](question.truth))


def test_the_distance_sees_the_style_not_the_motion() -> None:
    """Clips of one scene under other motions look alike; the style is many times farther."""
    plain, *others = [q.truth[-1:] for q in unseen_scenes(WORLDS["level_1"], 1, 4, 64)]
    moved = max(float(np.linalg.norm(look(plain) - look(other))) for other in others)
    restyled = float(np.linalg.norm(look(plain) - look(STYLES["night"](plain))))
    assert look(plain).shape == (6,) and restyled > 4 * moved, (restyled, moved)


def test_each_picture_stands_beside_its_own_ceiling() -> None:
    """All rows ask the same scenes under the same captions; the styled ceiling is that of the styled truth."""
    world = WORLDS["level_1"]
    asked = rows(Evaluation(world, None, unseen_scenes(world, 4, 3, 64), Variant("sampled"), {}))  # type: ignore[arg-type]
    captions = [[q.caption for q in questions] for questions, _ in asked.values()]
    assert all(row == captions[0] for row in captions)
    (plain, bound), (drawn, other) = asked[PLAIN_BEST], asked[STYLED_BEST]
    assert bound == other == CEILING
    assert all(np.array_equal(b.truth, STYLES["night"](a.truth)) for a, b in zip(plain, drawn, strict=True))


def test_the_sheets_show_the_held_out_set_alone() -> None:
    """Not its pictures at night, which the style table asks of the same model; nor other settings."""
    questions, full = unseen_scenes(WORLDS["level_1"], 2, 3, 64), Variant("sampled")
    e = Evaluation(WORLDS["level_1"], None, questions, full, {})  # type: ignore[arg-type]
    made = [Answer(Job(q, v), Path("-"), {}) for q in (*questions, *map(styled, questions)) for v in (full, CEILING)]
    assert [a.job.question for a in of_the_set(e, made)] == questions

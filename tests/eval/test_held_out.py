"""The held-out set: what is unseen in it, one picture under all captions, photographs."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from eval.held_out import BACKGROUNDS, PAIRS, PHOTOGRAPHS, SCENES, Question, held_out_set, photographs
from i2v.config import ConfigError
from i2v.data.world import LEVEL_1, LEVEL_2, LEVEL_3, draw_scene


def ask(world=LEVEL_2, scenes: int = 4, pictures: Path | None = None) -> list[Question]:
    return held_out_set(world, scenes, 3, 32, pictures)


def of(questions: list[Question], group: str) -> list[Question]:
    return [q for q in questions if q.group == group]


def test_one_picture_under_all_captions() -> None:
    questions = of(ask(), SCENES)
    scenes = {q.scene for q in questions}
    assert len(scenes) == 4
    for name in scenes:
        mine = [q for q in questions if q.scene == name]
        assert all(np.array_equal(q.picture, mine[0].picture) and q.seed == mine[0].seed for q in mine)
        assert {q.motion for q in mine if not q.camera} == set(LEVEL_2.motions)
        cameras = {q.camera for q in mine if q.camera}
        assert cameras == (set(LEVEL_2.cameras) - {""} if mine[0].textured else set())
        assert all(q.motion == "stays still" for q in mine if q.camera)
        assert len({q.caption for q in mine}) == len(mine)
    assert any(q.camera for q in questions)
    assert not any(q.camera or q.textured for q in ask(LEVEL_1, 10)), "without cameras there is no camera to be right"


def test_pairs_and_backgrounds_were_never_trained() -> None:
    pairs = of(ask(), PAIRS)
    kinds = [draw_scene(LEVEL_2, "held_out", q.seed).kind for q in pairs]
    assert len(pairs) == 8 and all((k, q.motion) in LEVEL_2.held_out for k, q in zip(kinds, pairs, strict=True))
    behind = {q.caption.split(" over ")[1].split(",")[0] for q in of(ask(scenes=10), BACKGROUNDS)}
    assert behind and behind <= {"fallen leaves", "a starry night"}
    assert not of(ask(LEVEL_3, 2), BACKGROUNDS), "the third level trains on every background"


def test_the_same_set_every_time() -> None:
    for a, b in zip(ask(), ask(), strict=True):
        assert (a.caption, a.seed, a.scene) == (b.caption, b.seed, b.scene) and np.array_equal(a.truth, b.truth)


def test_photographs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no pictures"):
        photographs(LEVEL_2, tmp_path, 32)
    cv2.imwrite(str(tmp_path / "b.png"), np.full((40, 80, 3), 90, np.uint8))
    cv2.imwrite(str(tmp_path / "a.jpg"), np.full((60, 50, 3), 30, np.uint8))
    (tmp_path / "prompts.txt").write_text("no picture")
    (tmp_path / "._b.png").write_bytes(b"macOS's note on b.png")
    asked = of(ask(pictures=tmp_path), PHOTOGRAPHS)
    assert [q.scene for q in asked] == ["a.jpg"] * 5 + ["b.png"] * 5
    assert {q.camera for q in asked} == set(LEVEL_2.cameras)
    assert all(q.truth.shape == (1, 32, 32, 3) and q.mask is None and not q.motion for q in asked)

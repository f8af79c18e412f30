"""Clips are made once, measured again when a metric changes, and never taken for others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from eval import answers
from eval.answers import CEILING, FLOOR, ROWS, Bench, Job, Variant, answer, key_of, read_clip, write_clip
from eval.held_out import unseen_scenes
from i2v.data.world import LEVEL_1

VARIANT = Variant(steps=2, guidance_scale=1.0, t0=1.0, p=0.5)


@pytest.fixture(scope="module")
def bench(random_folder: Path) -> Bench:
    return Bench(random_folder, "cpu", "float32", 3, LEVEL_1.motions, LEVEL_1.cameras)


def jobs() -> list[Job]:
    questions = unseen_scenes(LEVEL_1, 2, 3, 64)
    return [Job(q, v) for q in (questions[0], questions[7]) for v in (VARIANT, FLOOR, CEILING)]


def test_nothing_is_made_twice(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = answers._clip
    monkeypatch.setattr(answers, "_clip", lambda job, bench: made.append(job) or original(job, bench))
    first = answer(jobs()[:4], bench, tmp_path)
    assert len(made) == 4
    with open(tmp_path / ROWS, "a", encoding="utf-8") as file:
        file.write('\n{"key": "half a li')  # the run was killed here
    again = answer(jobs(), bench, tmp_path)
    assert len(made) == 6, "only the two that were new"
    assert [a.values for a in again[:4]] == [a.values for a in first]
    assert all(a.frames.shape == (3, 64, 64, 3) for a in again)
    assert np.array_equal(again[1].frames, np.repeat(jobs()[1].question.truth[:1], 3, axis=0))
    assert len({a.file for a in again}) == 6
    assert len(answer(jobs(), bench, tmp_path)) == 6 and len(made) == 6
    again[0].file.unlink()
    remade = answer(jobs(), bench, tmp_path)[0]
    assert len(made) == 7 and remade.file.exists()

    measured = len((tmp_path / ROWS).read_text().splitlines())
    monkeypatch.setattr(answers, "measures_hash", lambda bench: "other metrics")
    answer(jobs(), bench, tmp_path)
    assert len(made) == 7, "other metrics need no new clips"
    assert len((tmp_path / ROWS).read_text().splitlines()) == measured + 6
    assert json.loads((tmp_path / ROWS).read_text().splitlines()[-1])["measured_by"] == "other metrics"


def test_a_key_is_all_that_decides_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "pick_device", torch.device)  # of machines with other devices too
    job = jobs()[0]
    question, weights = job.question, {"unet": "a", "vae": "b"}

    def key(job: Job = job, weights: dict[str, str] = weights, **settings: object) -> str:
        bench = Bench(None, "cpu", "float32", 4, LEVEL_1.motions, LEVEL_1.cameras)
        return key_of(job, weights, replace(bench, **settings))

    others = [
        key(weights={**weights, "unet": "c"}),
        key(dtype="bfloat16"),
        key(frames=5),
        key(device="cuda"),
        *(key(replace(job, variant=replace(VARIANT, **{name: 0.25}))) for name in ("t0", "p", "i2v_scale", "ip_scale")),
        key(replace(job, variant=replace(VARIANT, deep_every=2))),
        key(replace(job, variant=replace(VARIANT, int8=True))),
        key(replace(job, variant=replace(VARIANT, guidance_end=0.5))),
        key(replace(job, variant=replace(VARIANT, unconditional_image="same"))),
        key(replace(job, question=replace(question, caption="another"))),
        key(replace(job, question=replace(question, seed=99))),
        key(replace(job, question=replace(question, truth=255 - question.truth))),
    ]
    assert key() == key() and len({key(), *others}) == len(others) + 1
    assert key(replace(job, question=replace(question, group="another"))) == key()
    before = key()
    monkeypatch.setattr(torch, "__version__", "0")
    assert key() != before


def test_measurements_of_other_versions_are_not_taken_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = answers.measures_hash(bench)
    monkeypatch.setattr(cv2, "__version__", "0")
    assert answers.measures_hash(bench) != before


def test_damaged_clips_are_named(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    write_clip(tmp_path / "a.png", clip)
    assert np.array_equal(read_clip(tmp_path / "a.png", 16), clip)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png holds no clip"):
        read_clip(tmp_path / "a.png", 16)


@pytest.mark.slow
def test_processes_give_the_same(bench: Bench, tmp_path: Path) -> None:
    alone, together = (answer(jobs(), bench, tmp_path / str(n), workers=n) for n in (1, 2))
    for a, b in zip(alone, together, strict=True):
        assert a.file.name == b.file.name
        assert np.abs(a.frames.astype(int) - b.frames).max() <= 1

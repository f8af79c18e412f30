"""Plug and play in small: a style LoRA of the image UNet under motion modules and adapters that know nothing of it.

Pictures are asked as they are and drawn in the style, without and with the LoRA. The I2V-Adapter is plug and play if
the style shows and motion and similarity stay what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from eval.answers import CEILING, Variant
from eval.experiments import Evaluation, Needs, shot
from eval.held_out import SCENES, Question
from eval.page import Section
from eval.tables import Sample, difference_table, summary_table
from i2v.data.styles import STYLES

STYLE = "night"
SHOWN_SCENES = 3
HEAD = ("motion_right", "similarity_psnr", "displacement", "style_plain", "style_own", "truth_psnr")
PLAIN, PLAIN_LORA = "plain picture", "plain picture, LoRA"
STYLED, STYLED_LORA = f"{STYLE} picture", f"{STYLE} picture, LoRA"
PLAIN_BEST, STYLED_BEST = (f"ceiling: the {style} truth through the VAE" for style in ("plain", STYLE))


def styled(question: Question) -> Question:
    """The same question of the same scene drawn in the style."""
    return replace(question, scene=f"{question.scene}, {STYLE}", truth=STYLES[STYLE](question.truth))


def rows(e: Evaluation) -> dict[str, tuple[list[Question], Variant]]:
    """What is asked in each row; the n-th questions are of the same scene, caption and seed."""
    drawn = [styled(q) for q in e.half]
    with_lora = replace(e.full, lora=str(e.style_lora))
    return {
        PLAIN: (e.half, e.full),
        STYLED: (drawn, e.full),
        STYLED_LORA: (drawn, with_lora),
        PLAIN_LORA: (e.half, with_lora),
        PLAIN_BEST: (e.half, CEILING),
        STYLED_BEST: (drawn, CEILING),
    }


def style_needs(e: Evaluation) -> Needs:
    return list(rows(e).values())


def style_report(e: Evaluation) -> list[Section]:
    """Does the style show, and do motion and similarity stay?"""
    samples = {name: _samples(e, *row) for name, row in rows(e).items()}
    note = (
        f'"to plain" and "to {STYLE}": distance of mean and deviation of L, a and b (CIE 1976) in the last quarter of '
        "the frames to those of the true clip as it is and in the style; a truth that is repeated has 0."
    )
    changed = {name: samples[name] for name in (STYLED, STYLED_LORA, PLAIN_LORA)}
    tables = [
        summary_table("style", "Plug and play: a style LoRA under the same I2V-Adapter", samples, HEAD, note),
        difference_table(
            "style-paired", f"Minus the {PLAIN} without LoRA, pair by pair", changed, samples[PLAIN], HEAD[:-1]
        ),
    ]
    shots = {
        q.caption: [
            shot(e.made[one[i].scene, one[i].caption, variant], name) for name, (one, variant) in rows(e).items()
        ]
        for i, q in enumerate(e.half)
        if q in e.of(SCENES, SHOWN_SCENES)
    }
    return [Section("Plug and play", f"{e.style_lora}: pictures of the world drawn at night.", tables, shots=shots)]


def _samples(e: Evaluation, questions: Sequence[Question], variant: Variant) -> list[Sample]:
    """Measurements with the distances to both styles; under the plain scene's name, so that rows can be paired."""
    out = []
    for plain, sample, answer in zip(e.half, e.samples(questions, variant), e.answers(questions, variant)):
        end = slice(-max(len(answer.frames) // 4, 1), None)
        looks = look(answer.frames[end])
        distances = {
            "style_plain": float(np.linalg.norm(looks - look(plain.truth[end]))),
            "style_own": float(np.linalg.norm(looks - look(STYLES[STYLE](plain.truth[end])))),
        }
        out.append(Sample(plain.scene, {**sample.values, **distances}))
    return out


def look(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(F, H, W, 3) uint8 RGB -> mean and standard deviation of L, a and b, 6 numbers."""
    lab = np.concatenate([cv2.cvtColor(f.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).reshape(-1, 3) for f in frames])
    return np.concatenate([lab.mean(0), lab.std(0)]).astype(np.float64)

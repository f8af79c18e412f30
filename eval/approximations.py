"""What approximations lose: fewer sums for a clip, beside the same clip made exactly.

A row's clips have the pictures, captions and noise of the exact ones. How near they are in the pixels says whether the
same video is made; whether another one is worse, the other measurements say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eval.answers import Variant
from eval.experiments import Evaluation, Needs, shot
from eval.held_out import SCENES, Question
from eval.page import Section
from eval.tables import Sample, difference_table, summary_table

EXACT = "exact"
ROWS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "bfloat16": {"dtype": "bfloat16"},
    "--int8": {"int8": True},
    "--deep-every 2": {"deep_every": 2},
    "--deep-every 3": {"deep_every": 3},
    "--deep-every 5": {"deep_every": 5},
    "--guidance-end 0.5": {"guidance_end": 0.5},
    "--guidance-start 0.2 --guidance-end 0.8": {"guidance_start": 0.2, "guidance_end": 0.8},
    "--deep-every 2 --guidance-end 0.5": {"deep_every": 2, "guidance_end": 0.5},
    "--t0 0.8": {"t0": 0.8},
    "--steps 12": {"steps": 12},
}
COLUMNS = ("exact_psnr", "motion_right", "similarity_psnr", "object_psnr", "identity", "flicker", "truth_psnr",
           "displacement")  # fmt: skip
NOTE = "50 dB is the most that is counted: no difference that can be seen."
SHOWN_SCENES = 2


def faster_needs(e: Evaluation) -> Needs:
    return [(e.half, _variant(e, name)) for name in ROWS]


def faster_report(e: Evaluation) -> list[Section]:
    """A table of all rows, their differences to the exact clips, and some clips of each."""
    rows = {name: samples(e, e.half, _variant(e, name)) for name in ROWS}
    others = {name: found for name, found in rows.items() if name != EXACT}
    tables = [
        summary_table("faster", "Approximations", rows, COLUMNS, NOTE),
        difference_table("faster-paired", "Minus the exact clips, pair by pair", others, rows[EXACT], COLUMNS[1:]),
    ]
    shots = {
        q.caption: [shot(e.made[q.scene, q.caption, _variant(e, name)], name) for name in ROWS]
        for q in e.of(SCENES, SHOWN_SCENES)
        if not q.camera
    }
    return [Section("Approximations", "Same pictures, captions and noise.", tables, shots=shots)]


def samples(e: Evaluation, questions: Sequence[Question], variant: Variant) -> list[Sample]:
    """Measurements of the clips, with their distance to the exact ones."""
    found = e.samples(questions, variant)
    exact = e.answers(questions, _variant(e, EXACT))
    for sample, one, other in zip(found, e.answers(questions, variant), exact, strict=True):
        error = np.square(one.frames.astype(np.float64) - other.frames).mean()
        sample.values["exact_psnr"] = min(float(10 * np.log10(255**2 / max(error, 1e-9))), 50.0)
    return found


def _variant(e: Evaluation, name: str) -> Variant:
    return replace(e.full, **ROWS[name])

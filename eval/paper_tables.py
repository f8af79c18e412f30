"""The paper's Tables 2 and 3 in small, and the fewer steps that it claims for a lowered t0.

Rows are paired: the n-th clip of every row has the same picture, caption and seed, and so the same noise. The paper's
FlowScore stands beside our flow, whose signs can be compared; its other metrics need networks that are not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from eval.answers import Variant
from eval.charts import line_chart
from eval.experiments import QUALITY, Evaluation, Needs, shot
from eval.held_out import SCENES
from eval.page import Section
from eval.paper import TABLE_2, TABLE_3
from eval.tables import (
    COLUMNS,
    NONE,
    Sample,
    Table,
    agreement,
    difference,
    difference_table,
    estimate,
    summary_table,
)
from i2v.diffusion.frame_similarity_prior import timesteps_from

SHOWN_SCENES = 3  # on the page, of rows that are compared clip by clip
# The paper's Table 3: strength of both adapters, FlowScore, WarpingError
ABLATIONS = {
    row.name if row.settings else "full": (
        row.settings.get("i2v_scale", 1.0), row.settings.get("ip_scale", 1.0), *row.numbers[2:]
    )
    for row in reversed(TABLE_3)
}  # fmt: skip
# The paper's Table 2: (t0, p) -> FlowScore
PAPER_FLOW = {(row.settings["t0"], row.settings["p"]): row.values["flow_score"] for row in TABLE_2}
T0S, PS, P_AT = (1.0, 0.9, 0.8, 0.7, 0.6), (1.0, 0.9, 0.7, 0.5, 0.3, 0.1), (1.0, 0.8)
# (t0, steps of the full schedule): each lowered t0 is followed by a full schedule of as many steps as it runs
FEWER_STEPS = ((1.0, 25), (0.8, 25), (1.0, 20), (0.6, 25), (1.0, 15), (0.8, 10), (1.0, 8))


# -- the paper's Table 3 ---------------------------------------------------------------------------------------------


def _ablation(e: Evaluation, name: str) -> Variant:
    i2v_scale, ip_scale, *_ = ABLATIONS[name]
    return replace(e.full, i2v_scale=i2v_scale, ip_scale=ip_scale)


def table_3_needs(e: Evaluation) -> Needs:
    return [(e.of(SCENES), _ablation(e, name)) for name in ABLATIONS]


def table_3_report(e: Evaluation) -> list[Section]:
    """The model without its I2V-Adapter, without its Content-Adapter and without both."""
    questions = e.of(SCENES)
    rows = {name: e.samples(questions, _ablation(e, name)) for name in ABLATIONS}
    absolute = summary_table("3", "Table 3 in small: what the adapters are for", rows, QUALITY)
    others = {name: samples for name, samples in rows.items() if name != "full"}
    paired = difference_table("3-paired", "Minus the full model, pair by pair", others, rows["full"], QUALITY,
                              "The paper's columns: its own difference to its full model (SDXL).")  # fmt: skip
    flow, warp = (ABLATIONS["full"][k] for k in (2, 3))
    extra = []
    for name, samples in others.items():
        theirs = ABLATIONS[name][2] - flow
        extra.append([f"{theirs:+.2f}", f"{ABLATIONS[name][3] - warp:+.1f}",
                      agreement(difference(samples, rows["full"], "flow"), theirs, pictures(samples))])  # fmt: skip
    paired = beside(paired, ["paper: FlowScore", "paper: WarpingError", "flow has the paper's sign"], extra)
    shots = {
        q.caption: [shot(e.made[q.scene, q.caption, _ablation(e, name)], name) for name in ABLATIONS]
        for q in e.of(SCENES, SHOWN_SCENES)
        if not q.camera
    }
    return [Section("Table 3 in small", "Same pictures, captions and noise.", [absolute, paired], shots=shots)]


# -- the paper's Table 2 ---------------------------------------------------------------------------------------------


def _prior_rows() -> list[tuple[float, float]]:
    return list(dict.fromkeys([*((t0, 1.0) for t0 in T0S), *((t0, p) for t0 in P_AT for p in PS)]))


def table_2_needs(e: Evaluation) -> Needs:
    return [(e.half, replace(e.full, t0=t0, p=p)) for t0, p in _prior_rows()]


def table_2_report(e: Evaluation) -> list[Section]:
    """The Frame Similarity Prior: where sampling starts (t0) and what its start keeps of the picture (p).

    The paper's prose gives p the opposite sense of Eq. (7), see `i2v.diffusion.frame_similarity_prior`; so p is
    compared with the paper's p and with its 1 - p.
    """
    rows = {(t0, p): e.samples(e.half, replace(e.full, t0=t0, p=p)) for t0, p in _prior_rows()}
    head = ("flow", "displacement", "motion_right", "similarity_psnr", "flicker")
    by_t0 = {f"{t0:g}": rows[t0, 1.0] for t0 in T0S}
    note = "Steps that are run of the full schedule: " + ", ".join(
        f"t0 {t0:g}: {steps_run(e, t0, e.full.steps)}" for t0 in T0S
    )
    tables = [
        summary_table("2-t0", "Table 2 in small: t0 at p = 1", by_t0, head, note + "."),
        _signs("2-t0-paired", "Minus t0 = 1, pair by pair", {t0: (t0, 1.0) for t0 in T0S[1:]}, rows, (1.0, 1.0)),
    ]
    for t0 in P_AT:
        by_p = {f"{p:g}": rows[t0, p] for p in PS}
        tables += [
            summary_table(f"2-p-{t0:g}", f"Table 2 in small: p at t0 = {t0:g}", by_p, head),
            _signs(f"2-p-{t0:g}-paired", "Minus p = 0.5, pair by pair",
                   {p: (t0, p) for p in PS if p != 0.5}, rows, (t0, 0.5), both_readings=True),
        ]  # fmt: skip
    tables = [replace(t, head=["t0" if "t0" in t.name else "p", *t.head[1:]]) for t in tables]
    charts = [
        chart(f"{COLUMNS[name].head} against t0 (p = 1)", "t0", name, {"": {t0: rows[t0, 1.0] for t0 in T0S}})
        for name in ("flow", "similarity_psnr")
    ] + [
        chart("flow against p", "p", "flow", {f"t0 = {t0:g}": {p: rows[t0, p] for p in PS} for t0 in P_AT}),
    ]
    shots = {
        f"{q.caption}: t0 with p = 1": [
            shot(e.made[q.scene, q.caption, replace(e.full, t0=t0, p=1.0)], f"t0 {t0:g}") for t0 in T0S
        ]
        for q in e.of(SCENES, 1)
        if not q.camera
    }
    return [Section("Table 2 in small: the Frame Similarity Prior", "Same pictures, captions and noise.", tables,
                    [c for c in charts if c], shots)]  # fmt: skip


def _signs(name: str, title: str, lines: Mapping[float, tuple[float, float]],
           rows: Mapping[tuple[float, float], Sequence[Sample]], reference: tuple[float, float],
           both_readings: bool = False) -> Table:  # fmt: skip
    """Differences to one row, beside the paper's difference of FlowScore where it has both rows."""
    columns = ("flow", "displacement", "motion_right", "similarity_psnr", "flicker")
    table = difference_table(name, title, {f"{k:g}": rows[at] for k, at in lines.items()}, rows[reference], columns)
    head = ["paper: FlowScore", "flow has the paper's sign"]
    readings = [lambda at: at]
    if both_readings:
        head += ["paper at 1 - p", "flow has its sign"]
        readings.append(lambda at: (at[0], round(1 - at[1], 1)))
    extra = []
    for at in lines.values():
        ours, cells = difference(rows[at], rows[reference], "flow"), []
        for read in readings:
            known = read(at) in PAPER_FLOW and reference in PAPER_FLOW
            paper = PAPER_FLOW[read(at)] - PAPER_FLOW[reference] if known else None
            cells += [NONE if paper is None else f"{paper:+.3f}", agreement(ours, paper, pictures(rows[at]))]
        extra.append(cells)
    told = [i for i in range(len(head)) if any(cells[i] != NONE for cells in extra)]  # the paper has p at t0 = 1 alone
    return beside(table, [head[i] for i in told], [[cells[i] for i in told] for cells in extra])


# -- fewer steps through t0 ------------------------------------------------------------------------------------------


def steps_needs(e: Evaluation) -> Needs:
    return [(e.half, replace(e.full, t0=t0, steps=steps)) for t0, steps in FEWER_STEPS]


def steps_report(e: Evaluation) -> list[Section]:
    """Whether a lowered t0 gives the full schedule's quality in fewer steps, and more than a shorter full schedule."""
    rows = {(t0, steps): e.samples(e.half, replace(e.full, t0=t0, steps=steps)) for t0, steps in FEWER_STEPS}
    named = {f"t0 {t0:g}, schedule of {steps}": samples for (t0, steps), samples in rows.items()}
    columns = ("motion_right", "similarity_psnr", "object_psnr", "identity", "flicker", "truth_psnr", "displacement")
    run = [[str(steps_run(e, t0, steps))] for t0, steps in FEWER_STEPS]
    first, *others = named
    absolute = summary_table("steps", "Steps saved by t0", named, columns)
    paired = difference_table("steps-paired", f"Minus {first}, pair by pair", {n: named[n] for n in others},
                              named[first], columns)  # fmt: skip
    lines: list[list[str]] = []
    for low in (at for at in FEWER_STEPS if at[0] < 1):
        short = (1.0, steps_run(e, *low))
        label = f"t0 {low[0]:g}, schedule of {low[1]} - t0 1, schedule of {short[1]}"
        one = difference_table("steps-equal", "A lowered t0 minus a full schedule of as many steps, pair by pair",
                               {label: rows[low]}, rows[short], columns)  # fmt: skip
        lines += one.rows
    equal = replace(one, rows=lines)
    return [Section("Fewer steps through t0", "Same pictures, captions and noise; p is the preset's.",
                    [beside(absolute, ["steps run"], run), beside(paired, ["steps run"], run[1:]), equal])]  # fmt: skip


def steps_run(e: Evaluation, t0: float, steps: int) -> int:
    """How many of the full schedule's steps are executed."""
    return len(timesteps_from(e.pipe.schedule, steps, t0))


# -- shared ----------------------------------------------------------------------------------------------------------


def pictures(samples: Sequence[Sample]) -> int:
    """How many pictures the clips are of."""
    return len({s.scene for s in samples})


def beside(table: Table, head: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """The table with more columns on its right."""
    rows = [[*row, *more] for row, more in zip(table.rows, cells, strict=True)]
    return replace(table, head=[*table.head, *head], rows=rows)


def chart(title: str, x_label: str, name: str, series: Mapping[str, Mapping[float, Sequence[Sample]]]) -> str:
    """A line per series of a measurement's mean with its interval; "" where no clip has it."""
    points = {}
    for label, line in series.items():
        found = {x: estimate(samples, COLUMNS[name]) for x, samples in line.items()}
        points[label] = [(x, *value) for x, value in found.items() if value is not None]
    drawn = {label: line for label, line in points.items() if line}
    return line_chart(title, x_label, COLUMNS[name].head, drawn) if drawn else ""

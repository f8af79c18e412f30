"""The log of a run as pictures: lines over the steps, drawn with OpenCV, beside the log."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from i2v.media.output_file import write_whole

Line = Sequence[tuple[float, float]]  # (step, value)
WIDTH, HEIGHT = 900, 500
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 70, 50  # margins around the plot
COLOURS = ((47, 109, 181), (209, 105, 14), (46, 139, 87), (160, 68, 156), (110, 110, 110), (190, 40, 60))  # RGB
INK, GRID = (40, 40, 40), (220, 220, 220)
SMOOTH = 20  # log lines that one point of the smoothed loss averages


def plot_log(folder: Path) -> list[Path]:
    """Draws `folder`/log.jsonl as loss.png, validation.png and gap.png; returns those for which it has numbers.

    validation.png shows each timestep's loss as a share of what it was before the first step: below 1 is learnt.
    """
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    def line(name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]

    names = sorted({name for row in rows for name in row}, key=lambda name: (len(name), name))
    losses = line("loss")
    means = [
        (losses[k][0], sum(v for _, v in losses[max(0, k - SMOOTH + 1) : k + 1]) / min(k + 1, SMOOTH))
        for k in range(len(losses))
    ]
    shares = {}
    for name in (name for name in names if name.startswith("val_")):
        values = line(name)
        if values and values[0][1] > 0:
            shares[f"t = {name[4:]}"] = [(step, value / values[0][1]) for step, value in values]
    gaps = {f"t = {name[4:]}": line(name) for name in names if name.startswith("gap_")}
    charts: dict[str, tuple[str, Mapping[str, Line], float | None]] = {
        "loss": ("training loss", {"log line": losses, f"mean of {SMOOTH}": means}, None),
        "validation": ("validation loss at fixed timesteps, as a share of that before training", shares, 1.0),
        "gap": ("how much worse the loss is under a wrong caption", gaps, 0.0),
    }
    written = []
    for name, (title, lines, level) in charts.items():
        if any(len(values) > 1 for values in lines.values()):
            path = folder / f"{name}.png"
            write_whole(path, cv2.imencode(".png", chart(title, lines, level)[..., ::-1])[1].tobytes())
            written.append(path)
    return written


def chart(title: str, lines: Mapping[str, Line], level: float | None = None) -> NDArray[np.uint8]:
    """(HEIGHT, WIDTH, 3) RGB: the lines over their steps, with a legend; `level` is marked by a line of its own."""
    points = [point for line in lines.values() for point in line]
    values = [value for _, value in points] + ([] if level is None else [level])
    xs, ys = ticks(min(x for x, _ in points), max(x for x, _ in points)), ticks(min(values), max(values))
    picture = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)

    def at(x: float, y: float) -> tuple[int, int]:
        right = (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + right), round(HEIGHT - BOTTOM - up)

    for x in xs:
        cv2.line(picture, at(x, ys[0]), at(x, ys[-1]), GRID, 1)
        _text(picture, f"{x:g}", (at(x, ys[0])[0], HEIGHT - BOTTOM + 22), middle=True)
    for y in ys:
        cv2.line(picture, at(xs[0], y), at(xs[-1], y), GRID, 1)
        _text(picture, f"{y:g}", (12, at(xs[0], y)[1] + 5))
    if level is not None:
        cv2.line(picture, at(xs[0], level), at(xs[-1], level), INK, 1, cv2.LINE_AA)
    _text(picture, title, (LEFT, 26), size=0.6)
    _text(picture, "step", ((LEFT + WIDTH - RIGHT) // 2, HEIGHT - 10), middle=True)
    left = LEFT
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        corners = np.array([at(x, y) for x, y in line], np.int32)
        cv2.polylines(picture, [corners], False, colour, 2, cv2.LINE_AA)
        cv2.line(picture, (left, 49), (left + 22, 49), colour, 3)
        _text(picture, name, (left + 28, 54))
        left += 50 + 9 * len(name)
    return picture


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, a few of them, from at or below `low` to at or above `high`."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    return [round(k * step, 10) for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _text(
    picture: NDArray[np.uint8], words: str, place: tuple[int, int], size: float = 0.45, middle: bool = False
) -> None:
    wide = cv2.getTextSize(words, cv2.FONT_HERSHEY_SIMPLEX, size, 1)[0][0]
    x = place[0] - wide // 2 if middle else place[0]
    cv2.putText(picture, words, (x, place[1]), cv2.FONT_HERSHEY_SIMPLEX, size, INK, 1, cv2.LINE_AA)

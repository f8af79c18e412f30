"""Line charts as inline SVG: values with their intervals, no script, readable on light and dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Point = tuple[float, float, float, float]  # x, mean, low, high
COLOURS = ("#2f6db5", "#d1690e", "#2e8b57", "#a0449c")
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 46  # margins around the plot


def line_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]]) -> str:
    """One `<svg>`: a line with error bars per series, a legend where there are several.

    Raises ValueError when there is no point.
    """
    points = [p for line in series.values() for p in line]
    if not points:
        raise ValueError(f"the chart {title!r} has no points")
    xs = ticks(min(p[0] for p in points), max(p[0] for p in points))
    ys = ticks(min(p[2] for p in points), max(p[3] for p in points))

    def at(x: float, y: float) -> tuple[float, float]:
        right = (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + right, 1), round(HEIGHT - BOTTOM - up, 1)

    out = [_text(WIDTH / 2, 16, title, "middle", 13)]
    for x in xs:
        left, low = at(x, ys[0])
        out += [_line((left, low), at(x, ys[-1]), "#8884"), _text(left, low + 15, f"{x:g}", "middle")]
    for y in ys:
        left, low = at(xs[0], y)
        out += [_line((left, low), at(xs[-1], y), "#8884"), _text(left - 6, low + 4, f"{y:g}", "end")]
    out.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(f'<g transform="rotate(-90 14 {middle})">{_text(14, middle, y_label, "middle")}</g>')
    for i, (name, line) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join("{},{}".format(*at(x, mean)) for x, mean, _, _ in sorted(line))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, mean, low, high in line:
            (cx, cy), foot, head = at(x, mean), at(x, low), at(x, high)
            out.append(_line(foot, head, colour))
            out.append(f'<circle cx="{cx}" cy="{cy}" r="3.5" fill="{colour}"><title>{mean:.3g} '
                       f'[{low:.3g}, {high:.3g}]</title></circle>')  # fmt: skip
        if len(series) > 1:
            out.append(_text(LEFT + 8 + 110 * i, TOP - 4, name, "start", 11, colour))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(out)}</svg>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, three to eight of them, from at or below `low` to at or above `high`."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _line(a: tuple[float, float], b: tuple[float, float], colour: str) -> str:
    return f'<line x1="{a[0]}" y1="{a[1]}" x2="{b[0]}" y2="{b[1]}" stroke="{colour}"/>'


def _text(x: float, y: float, words: str, anchor: str, size: int = 11, colour: str = "currentColor") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
        f"{html.escape(words)}</text>"
    )

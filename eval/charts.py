"""Charts as inline SVG: lines with intervals, clouds of points; no script, readable on light and dark pages."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Point = tuple[float, float, float, float]  # x, mean, low, high
COLOURS = ("#2f6db5", "#d1690e", "#2e8b57", "#a0449c", "#b8a000", "#c03a4e", "#5a5fd0", "#3a9ca0", "#8a6a3a", "#777777")
WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 46  # margins around the plot


def line_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[Point]]) -> str:
    """One `<svg>`: a line with error bars per series, a legend where there are several.

    Raises ValueError when there is no point.
    """
    points = [p for line in series.values() for p in line]
    if not points:
        raise ValueError(f"the chart {title!r} has no points")
    plot = _Plot([p[0] for p in points], [v for p in points for v in p[2:]])
    out = plot.frame(title, x_label, y_label)
    for i, (name, line) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join("{},{}".format(*plot.at(x, mean)) for x, mean, _, _ in sorted(line))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, mean, low, high in line:
            out.append(_line(plot.at(x, low), plot.at(x, high), colour))
            out.append(_dot(plot.at(x, mean), 3.5, colour, f"{mean:.3g} [{low:.3g}, {high:.3g}]"))
        if len(series) > 1:
            out.append(_text(LEFT + 8 + 110 * i, TOP - 4, name, "start", 11, colour))
    return _svg(out)


def scatter_chart(title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """One `<svg>`: a small dot per video, a large one at each series' mean with its name beside it.

    Raises ValueError when there is no point.
    """
    points = [p for dots in series.values() for p in dots]
    if not points:
        raise ValueError(f"the chart {title!r} has no points")
    plot = _Plot([p[0] for p in points], [p[1] for p in points])
    out = plot.frame(title, x_label, y_label)
    means = []
    for i, (name, dots) in enumerate((n, d) for n, d in series.items() if d):
        colour = COLOURS[i % len(COLOURS)]
        out += [_dot(plot.at(x, y), 2, colour, f"{name}: {x:.3g}, {y:.3g}", 0.45) for x, y in dots]
        x, y = (sum(p[axis] for p in dots) / len(dots) for axis in (0, 1))
        means.append((*plot.at(x, y), colour, name, f"{name}: mean {x:.3g}, {y:.3g}"))
    for left, low, colour, name, words in means:
        right = left > WIDTH * 0.7
        out.append(_dot((left, low), 5, colour, words))
        out.append(_text(left - 8 if right else left + 8, low + 4, name, "end" if right else "start", 11, colour))
    return _svg(out)


class _Plot:
    """Axes that hold the given values."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float]):
        self.xs, self.ys = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point's place in the picture."""
        right = (x - self.xs[0]) / (self.xs[-1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - self.ys[0]) / (self.ys[-1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + right, 1), round(HEIGHT - BOTTOM - up, 1)

    def frame(self, title: str, x_label: str, y_label: str) -> list[str]:
        """Title, grid, numbers and names of the axes."""
        out = [_text(WIDTH / 2, 16, title, "middle", 13)]
        for x in self.xs:
            left, low = self.at(x, self.ys[0])
            out += [_line((left, low), self.at(x, self.ys[-1]), "#8884"), _text(left, low + 15, f"{x:g}", "middle")]
        for y in self.ys:
            left, low = self.at(self.xs[0], y)
            out += [_line((left, low), self.at(self.xs[-1], y), "#8884"), _text(left - 6, low + 4, f"{y:g}", "end")]
        out.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label, "middle"))
        middle = (TOP + HEIGHT - BOTTOM) / 2
        out.append(f'<g transform="rotate(-90 14 {middle})">{_text(14, middle, y_label, "middle")}</g>')
        return out


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, three to eight of them, from at or below `low` to at or above `high`."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 10) for k in range(first, last + 1)]


def _svg(marks: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(marks)}</svg>'


def _dot(at: tuple[float, float], radius: float, colour: str, words: str, opacity: float = 1) -> str:
    shade = "" if opacity == 1 else f' fill-opacity="{opacity:g}"'
    return (f'<circle cx="{at[0]}" cy="{at[1]}" r="{radius:g}" fill="{colour}"{shade}>'
            f"<title>{html.escape(words)}</title></circle>")  # fmt: skip


def _line(a: tuple[float, float], b: tuple[float, float], colour: str) -> str:
    return f'<line x1="{a[0]}" y1="{a[1]}" x2="{b[0]}" y2="{b[1]}" stroke="{colour}"/>'


def _text(x: float, y: float, words: str, anchor: str, size: int = 11, colour: str = "currentColor") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{html.escape(words)}</text>'
    )

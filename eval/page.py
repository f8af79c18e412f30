"""One HTML file that shows an evaluation: tables, charts and the clips themselves, without network and script."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.tables import Table
from i2v.media.animation import webp_bytes
from i2v.media.output_file import write_whole

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: .6em 0; display: block; overflow-x: auto; font-size: 13px }
th, td { border: 1px solid #8886; padding: .25em .6em; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.clips { display: flex; flex-wrap: wrap; gap: 10px; margin: .4em 0 1.4em }
figure { margin: 0; font-size: 12px; line-height: 1.25; white-space: normal; text-align: left }
figure img { width: 100%; height: auto; border: 2px solid #8886; display: block; box-sizing: border-box }
figure img.small { image-rendering: pixelated }
figure.right img { border-color: #2e8b57 }
figure.wrong img { border-color: #d0342c }
figure.wrong b { color: #d0342c }
"""


@dataclass(frozen=True)
class Shot:
    """A clip on the page: uint8 (F, H, W, 3), words below it, and whether it does what was asked (None: not asked).

    fps: None is the page's.
    """

    frames: NDArray[np.uint8]
    words: str
    right: bool | None = None
    verdict: str = ""
    fps: float | None = None


@dataclass(frozen=True)
class Grid:
    """Clips in rows and columns, which have heads; a place may be empty, or hold several. corner: what the heads of
    both mean."""

    title: str
    corner: str
    rows: Sequence[str]
    columns: Sequence[str]
    shots: Mapping[tuple[str, str], Sequence[Shot]]


@dataclass(frozen=True)
class Section:
    """A heading, words (plain text), tables, charts (SVG), rows of clips by title, and grids of clips."""

    title: str
    words: str = ""
    tables: Sequence[Table] = ()
    charts: Sequence[str] = ()
    shots: Mapping[str, Sequence[Shot]] = field(default_factory=dict)
    grids: Sequence[Grid] = ()


def write_page(path: Path, title: str, words: str, sections: Sequence[Section], fps: int = 8) -> None:
    """Writes the page, whole or not at all. `words` and all titles are plain text. fps: of clips that do not
    say theirs."""
    body = "\n".join(_section(s, fps) for s in sections)
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1><p>{html.escape(words)}</p>\n{body}\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode("utf-8"))


def _section(section: Section, fps: int) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(section.words)}</p>"] if section.words else []
    parts += [_table(table) for table in section.tables]
    parts += [f"<div>{''.join(section.charts)}</div>"] if section.charts else []
    for title, shots in section.shots.items():
        parts += [f"<h3>{html.escape(title)}</h3>", '<div class="clips">', *(_shot(s, fps) for s in shots), "</div>"]
    parts += [_grid(grid, fps) for grid in section.grids]
    return "\n".join(parts)


def _shot(shot: Shot, fps: int) -> str:
    data = base64.b64encode(webp_bytes(shot.frames, Fraction(shot.fps or fps), None)).decode("ascii")
    kind = {True: ' class="right"', False: ' class="wrong"', None: ""}[shot.right]
    words = html.escape(shot.words) + (f"<br><b>{html.escape(shot.verdict)}</b>" if shot.verdict else "")
    alt = html.escape(shot.words, quote=True)
    width = shot.frames.shape[2]
    small = ' class="small"' if width < 128 else ""
    return (f'<figure{kind} style="width:{max(width, 128) + 4}px"><img{small} src="data:image/webp;base64,{data}" '
            f'alt="{alt}" loading="lazy">'
            f"<figcaption>{words}</figcaption></figure>")  # fmt: skip


def _grid(grid: Grid, fps: int) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in grid.columns)
    lines = [f"<h3>{html.escape(grid.title)}</h3>",
             f"<table><thead><tr><th>{html.escape(grid.corner)}</th>{head}</tr></thead><tbody>"]  # fmt: skip
    for row in grid.rows:
        shots = [grid.shots.get((row, column), ()) for column in grid.columns]
        cells = "".join(f"<td>{''.join(_shot(shot, fps) for shot in some)}</td>" for some in shots)
        lines.append(f"<tr><th>{html.escape(row)}</th>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _table(table: Table) -> str:
    head = "".join(f"<th>{_inline(c)}</th>" for c in table.head)
    lines = [f"<h3>{html.escape(table.title)}</h3>", f"<table><thead><tr>{head}</tr></thead><tbody>"]
    for row in table.rows:
        counts = [int(c) if c.isdigit() else 0 for c in row[1:-1]] if table.counts else []
        cells = [f"<td>{_inline(row[0])}</td>"]
        for i, text in enumerate(row[1:]):
            share = counts[i] / max(sum(counts), 1) if i < len(counts) else 0
            shade = f' style="background:rgba(47,109,181,{0.6 * share:.2f})"' if share else ""
            cells.append(f"<td{shade}>{_inline(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    notes = [f"<p>{_inline(words)}</p>" for words in table.note.split("\n\n") if words]
    return "\n".join([*lines, "</tbody></table>", *notes])


def _inline(text: str) -> str:
    """Markdown's code marks, and nothing else of it."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))

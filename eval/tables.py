"""Tables of an evaluation: means and shares with 95 % intervals, paired differences, confusion; Markdown and docs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.intervals import bootstrap_interval, paired_interval, share_interval
from eval.video_set import least
from i2v.config import ConfigError, write_text

NONE = "-"
END = "<!-- end of table -->"


@dataclass(frozen=True)
class Sample:
    """What one clip says in a table. scene: clips of one picture are not independent of each other.

    values: measurements by name, None where one has no meaning; "motion_right" and "camera_right" are bool.
    """

    scene: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A measurement as a table shows it."""

    name: str
    head: str
    digits: int = 2
    share: bool = False


COLUMNS = {
    column.name: column
    for column in (
        Column("motion_right", "motion right", 2, share=True),
        Column("camera_right", "camera right", 2, share=True),
        Column("similarity_psnr", "similarity to frame 0 (dB)", 1),
        Column("similarity_ssim", "similarity (SSIM)", 3),
        Column("static_psnr", "static part (dB)", 1),
        Column("settled_psnr", "static part against frame 1 (dB)", 1),
        Column("object_psnr", "object (dB)", 1),
        Column("identity", "object identity", 2),
        Column("background_psnr", "background (dB)", 1),
        Column("colour_drift", "colour drift (delta E)", 1),
        Column("flicker", "flicker", 2),
        Column("flow", "flow", 2),
        Column("displacement", "displacement", 2),
        Column("style_plain", "to plain", 1),
        Column("style_own", "to night", 1),
        Column("truth_psnr", "last frame against truth (dB)", 1),
        Column("exact_psnr", "to the exact clip (dB)", 1),
    )
}


@dataclass(frozen=True)
class Table:
    """Text in rows. name: of its block in a docs file. note: how to read it, Markdown. counts: it is a confusion."""

    name: str
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    counts: bool = False

    def markdown(self) -> str:
        """The table, its title in bold and its note, ending in a newline."""
        lines = [f"**{self.title}**", "", _line(self.head), "|" + "---|" * len(self.head), *map(_line, self.rows)]
        return "\n".join(lines + (["", self.note] if self.note else [])) + "\n"

    def text(self) -> str:
        """For a terminal: columns in line, the title above, the note below, ending in a newline."""
        rows = [self.head, *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.head))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join([self.title, *lines, *filter(None, self.note.split("\n\n"))]) + "\n"


def count_of(number: int, noun: str) -> str:
    """`1 video`, `2 videos`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def estimate(samples: Sequence[Sample], column: Column) -> tuple[float, float, float] | None:
    """Mean, low and high of the clips that have this measurement; None where fewer than two scenes have it.

    A share has Wilson's interval for as many clips as independent ones would tell as much; a mean the bootstrap's,
    over scenes.
    """
    have = [s for s in samples if s.values.get(column.name) is not None]
    if len({s.scene for s in have}) < 2:
        return None
    values, scenes = [float(s.values[column.name]) for s in have], [s.scene for s in have]
    interval = share_interval(values, scenes) if column.share else bootstrap_interval(values, groups=scenes)
    return sum(values) / len(values), *interval


def difference(samples: Sequence[Sample], reference: Sequence[Sample], name: str
               ) -> tuple[float, float, float] | None:  # fmt: skip
    """Mean, low and high of sample - reference over the pairs that both have a value; None below two scenes.

    The n-th of both is the same picture, caption and seed; ValueError where the scenes differ.
    """
    pairs = list(zip(samples, reference, strict=True))
    if any(a.scene != b.scene for a, b in pairs):
        raise ValueError("the clips to be compared are of different scenes")
    have = [(a, b) for a, b in pairs if a.values.get(name) is not None and b.values.get(name) is not None]
    if len({a.scene for a, _ in have}) < 2:
        return None
    ours, theirs = ([float(s.values[name]) for s in side] for side in zip(*have, strict=True))
    mean = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    return mean, *paired_interval(ours, theirs, groups=[a.scene for a, _ in have])


def cell(value: tuple[float, float, float] | None, digits: int, sign: bool = False) -> str:
    """`12.3 [11.9, 12.8]`; differences show their sign."""
    if value is None:
        return NONE
    plus = "+" if sign else ""
    middle, low, high = (f"{v + 0.0:{plus}.{digits}f}" for v in value)  # + 0.0: no -0
    return f"{middle} [{low}, {high}]"


def summary_table(name: str, title: str, rows: Mapping[str, Sequence[Sample]], columns: Sequence[str],
                  note: str = "") -> Table:  # fmt: skip
    """One line per name of `rows`, one column per measurement that any of them has."""
    chosen = [COLUMNS[c] for c in columns if any(s.values.get(c) is not None for r in rows.values() for s in r)]
    lines = [[label, str(len(s)), *(cell(estimate(s, c), c.digits) for c in chosen)] for label, s in rows.items()]
    return Table(name, title, ["", "clips", *(c.head for c in chosen)], lines, note)


def difference_table(name: str, title: str, rows: Mapping[str, Sequence[Sample]], reference: Sequence[Sample],
                     columns: Sequence[str], note: str = "") -> Table:  # fmt: skip
    """Each line minus the reference, pair by pair."""
    chosen = [COLUMNS[c] for c in columns if any(s.values.get(c) is not None for s in reference)]
    lines = [
        [label, *(cell(difference(s, reference, c.name), c.digits, sign=True) for c in chosen)]
        for label, s in rows.items()
    ]
    return Table(name, title, ["", *(c.head for c in chosen)], lines, note)


def agreement(value: tuple[float, float, float] | None, paper: float | None, pictures: int) -> str:
    """Whether a difference has the sign of the paper's: "yes" and "no" only where its interval excludes 0, and is of as
    many pictures as an interval needs."""
    if paper is None or value is None:
        return NONE
    if value[1] <= 0 <= value[2] or pictures < least():
        return "not resolved"
    return "yes" if (value[0] > 0) == (paper > 0) else "no"


def confusion(asked: Sequence[str], measured: Sequence[str], classes: Sequence[str]) -> list[list[int]]:
    """Counts; rows asked, columns measured. Raises ValueError for a word that is no class."""
    unknown = {*asked, *measured} - set(classes)
    if unknown:
        raise ValueError(f"{sorted(unknown)} are not among the classes {list(classes)}")
    pairs = list(zip(asked, measured, strict=True))
    return [[pairs.count((a, m)) for m in classes] for a in classes]


def confusion_table(name: str, title: str, asked: Sequence[str], measured: Sequence[str], classes: Sequence[str],
                    shown: Callable[[str], str] = str) -> Table:  # fmt: skip
    """The confusion with the share of each asked class that is right; `shown` shortens the classes' names."""
    rows = []
    for i, (label, counts) in enumerate(zip(classes, confusion(asked, measured, classes), strict=True)):
        right = f"{counts[i]} of {sum(counts)}" if sum(counts) else NONE
        rows.append([shown(label), *(str(c) if c else "" for c in counts), right])
    return Table(name, title, ["asked, measured:", *map(shown, classes), "as asked"], rows, counts=True)


def write_docs(file: Path, tables: Sequence[Table]) -> list[str]:
    """Replaces the blocks `<!-- table: NAME -->` ... `<!-- end of table -->` of a Markdown file by the tables.

    Returns the names that the file has no block for. Raises ConfigError where it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--docs {file} cannot be read as text ({error}); give an existing Markdown file") from error
    left = []
    for table in tables:
        start = f"<!-- table: {table.name} -->"
        before, found, after = text.partition(start)
        _, ends, rest = after.partition(END)
        if found and ends:
            text = f"{before}{start}\n{table.markdown()}{END}{rest}"
        else:
            left.append(table.name)
    write_text(file, text)
    return left

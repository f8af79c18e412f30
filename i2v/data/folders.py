"""What lies under `--data PATH`, understood by content: which clips and pictures there are and what their captions say.

A single clip; a folder of clips or pictures with a .txt of the same name beside each; a table (csv, tsv, jsonl) with a
column of files and one of captions; WebVid's csv. Nothing is decoded here: `clips.py` does that.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpg", ".mpeg", ".m2v", ".ts", ".mts", ".wmv"}
VIDEOS |= {".flv", ".3gp", ".ogv", ".vob", ".y4m"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".ppm"}
TABLES = (".csv", ".tsv", ".jsonl")
PATH_COLUMNS = ("file_name", "filename", "video", "video_path", "path", "filepath", "file", "image")
CAPTION_COLUMNS = ("text", "caption", "prompt", "name", "description")
WEBVID = "WebVid csv"
SURPLUS = "columns beyond the head"

Kind = Literal["video", "picture"]


class DataError(ValueError):
    """`--data` cannot be used; the message is one line: which path, what is wrong, what to do."""


class BadClip(ValueError):
    """One clip cannot be used. `reason`: a word to count by (docs/data.md lists them); `detail`: what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Item:
    """One clip or picture. name: its path under the folder that was given, with "/". caption: "" where there is none.

    fault: set where the listing itself shows that the item cannot be used.
    """

    path: Path
    name: str
    caption: str
    kind: Kind
    fault: BadClip | None = None


@dataclass(frozen=True)
class Listing:
    """What a path holds. kind: in words. ignored: what else lies there, counted."""

    path: Path
    kind: str
    items: list[Item]
    ignored: dict[str, int] = field(default_factory=dict)

    @property
    def usual_frames(self) -> int:
        """Frames of a clip where no number is given."""
        return 16 if any(item.kind == "video" for item in self.items) else 1


def understand(path: str | Path) -> Listing:
    """Lists the clips of a file, folder or table; items are in the order of their names or of the table.

    Raises `DataError` when there is nothing at `path`, nothing usable in it, or a table without a column of files.
    """
    path = Path(path)
    if path.is_dir():
        table = _table_in(path)
        return _from_folder(path) if table is None else _from_table(table)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; check the path (the current folder is {Path.cwd()})")
    if path.suffix.lower() in TABLES:
        return _from_table(path)
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{path}: neither a clip, a picture nor a table ({', '.join(TABLES)}); give one or a folder")
    return Listing(path, f"one {kind}", [_captioned(path, path.name, kind)])


def kind_of(path: Path) -> Kind | None:
    """By the name's ending, and where that says nothing by the first bytes; None for what is neither."""
    ending = path.suffix.lower()
    if ending in VIDEOS:
        return "video"
    if ending in PICTURES:
        return "picture"
    if ending in (".txt", ".json", *TABLES):
        return None
    return kind_inside(path)


def kind_inside(path: Path) -> Kind | None:
    """By the first bytes alone; None for other kinds and for what cannot be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return None
    if (
        (head[4:8] == b"ftyp" and head[8:11] not in (b"avi", b"hei", b"mif"))
        or head[:4] in (b"\x1aE\xdf\xa3", b"FLV\x01", b"GIF8")
        or head[8:12] == b"AVI "
    ):
        return "video"
    if head.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff")) or head[8:12] == b"WEBP":
        return "picture"
    return None


def _from_folder(folder: Path) -> Listing:
    """All clips and pictures below, hidden ones left out."""
    items, captions, others = [], set(), Counter[str]()
    for path in _files(folder):
        kind = kind_of(path)
        if kind is not None:
            items.append(_captioned(path, path.relative_to(folder).as_posix(), kind))
        elif path.suffix.lower() == ".txt":
            captions.add(path)
        else:
            others[path.suffix.lower() or "no ending"] += 1
    if not items:
        found = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items())) or "nothing else"
        raise DataError(f"{folder}: no clips or pictures in this folder ({found}); give clips, or a csv or jsonl table")
    lonely = len(captions - {caption for item in items for caption in _caption_files(item.path)})
    ignored = {"other files": others.total(), "captions without a clip": lonely}
    kinds = {item.kind for item in items}
    what = "pictures only" if kinds == {"picture"} else "clips" if kinds == {"video"} else "clips and pictures"
    return Listing(folder, f"folder of {what}", items, {k: n for k, n in ignored.items() if n})


def _files(folder: Path) -> list[Path]:
    """All files below, hidden ones left out, in the order of their names.

    A linked folder is walked too, but each folder once and none that `folder` itself lies in.
    """
    walked = {os.path.realpath(parent) for parent in folder.resolve().parents}
    found: list[Path] = []
    waiting = deque([folder])  # links come after all that lies below in its own right, which so keeps its name
    while waiting:
        for here, folders, names in os.walk(waiting.popleft()):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if (real := os.path.realpath(here)) in walked:
                folders.clear()
                continue
            walked.add(real)
            waiting += [Path(here, name) for name in folders if os.path.islink(os.path.join(here, name))]
            found += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _caption_files(path: Path) -> tuple[Path, Path]:
    """clip.txt or clip.mp4.txt."""
    return path.with_suffix(".txt"), path.with_name(path.name + ".txt")


def _captioned(path: Path, name: str, kind: Kind) -> Item:
    for file in _caption_files(path):
        try:
            return Item(path, name, _one_line(file.read_text(encoding="utf-8-sig")), kind)
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            return Item(path, name, "", kind, BadClip("caption", f"{file.name} cannot be read as UTF-8 ({error})"))
    return Item(path, name, "", kind)


def _one_line(text: str) -> str:
    """Spaces alone, and no half characters: a JSON text cut inside an emoji ends in one, which no file can hold."""
    return " ".join(text.encode(errors="ignore").decode().split())


def _table_in(folder: Path) -> Path | None:
    """metadata.csv or .jsonl, or the only table of the folder that has a column of files."""
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in TABLES and not p.name.startswith("."))
    named = [p for p in tables if p.stem == "metadata"]
    tables = [p for p in tables if named or any(_column(row) for _, row in islice(_rows(p), 1))]
    if len(named or tables) > 1:
        names = ", ".join(p.name for p in (named or tables)[:4])
        raise DataError(f"{folder}: holds several tables ({names}); give the one to use as the path")
    return next(iter(named or tables), None)


def _from_table(table: Path) -> Listing:
    items, seen, kind = [], 0, ""
    for line, row in _rows(table):
        seen += 1
        column = _column(row)
        webvid = column == "videoid"
        if column is None and seen == 1:
            raise DataError(
                f"{table}: no column of files; its columns are {', '.join(row) or 'none'}, expected one of "
                f"{', '.join(PATH_COLUMNS)}, or WebVid's videoid and page_dir"
            )
        kind = kind or (WEBVID if webvid else f"{table.suffix.lower()[1:]} table")
        where = f"{table.name}:{line}"
        value = row.get(column or "")
        if isinstance(more := row.get(SURPLUS), list) and any(text.strip() for text in more):
            fault = BadClip("bad_row", "has more columns than the head; put texts that hold a comma into quotes")
            items.append(Item(table, where, "", "video", fault))
            continue
        if not isinstance(value, (str, int)) or not str(value).strip():
            items.append(Item(table, where, "", "video", BadClip("bad_row", "names no file")))
            continue
        value = str(value).strip()
        if "://" in value:
            fault = BadClip("bad_row", f"{value[:80]} is an address; download it and name the file")
            items.append(Item(table, where, "", "video", fault))
            continue
        path = _webvid_file(table.parent, str(row.get("page_dir") or ""), value) if webvid else table.parent / value
        caption = next((text for c in CAPTION_COLUMNS if isinstance(text := row.get(c), str) and text.strip()), "")
        name = path.relative_to(table.parent).as_posix() if path.is_relative_to(table.parent) else str(path)
        items.append(Item(path, name, _one_line(caption), kind_of(path) or "video"))
    if not items:
        raise DataError(f"{table}: has no rows; expected one for each clip")
    return Listing(table, kind, items)


def _column(row: Mapping[str, object]) -> str | None:
    """The column that names the file."""
    if "videoid" in row and ("page_dir" in row or "contenturl" in row):
        return "videoid"
    return next((c for c in PATH_COLUMNS if c in row), None)


def _webvid_file(folder: Path, page_dir: str, video: str) -> Path:
    """Where downloaders put it: page_dir/videoid.mp4 or videoid.mp4, beside the table or in its folder videos."""
    name = f"{video}.mp4"
    places = [folder / page_dir / name, folder / "videos" / page_dir / name, folder / name, folder / "videos" / name]
    return next((place for place in places if os.path.exists(place)), places[0])  # no error for odd names


def _rows(table: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """(line number, columns) of each row. Raises `DataError` for what is no table."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".jsonl":
                yield from _json_rows(table, file)
                return
            head = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, restkey=SURPLUS, delimiter=max(",\t;", key=head.count), strict=True)
            try:
                for row in reader:
                    yield reader.line_num, {k.strip().lower(): v for k, v in row.items()}
            except csv.Error as error:
                raise DataError(
                    f"{table}: the quotes of the row at line {reader.line_num + 1} do not match ({error}); a text that "
                    "begins with a quote is put into quotes whole, those inside doubled"
                ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: cannot be read as a UTF-8 table ({error}); save it anew") from error


def _json_rows(table: Path, lines: Iterator[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{table}: line {number} is no JSON ({error.msg}); each line is one object") from error
        if not isinstance(row, dict):
            raise DataError(f'{table}: line {number} is no JSON object; each line is like {{"file_name": ...}}')
        yield number, {k.strip().lower(): v for k, v in row.items()}

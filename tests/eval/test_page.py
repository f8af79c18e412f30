"""The page: well formed, nothing fetched from elsewhere, clips that play, charts within their frame."""

from __future__ import annotations

import base64
import re
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from eval.charts import HEIGHT, WIDTH, line_chart, ticks
from eval.page import Section, Shot, write_page
from eval.tables import Table
from i2v.media.animation import webp_bytes
from i2v.video import read_video

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Every tag is closed; collects the attributes that fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"


def test_page_is_whole_and_alone(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), np.uint8)
    table = Table("t", "A <table>", ["", "a", "right"], [["x & y", "3", "`3` of 4"]], "A note.", counts=True)
    chart = line_chart("Flow", "t0", "flow", {"": [(0.6, 1, 0.5, 1.5), (1, 2, 1.5, 2.5)]})
    shots = {"first": [Shot(clip, 'a "red" ball', False, "moves left"), Shot(clip, "b", True), Shot(clip, "c", fps=25)]}
    path = tmp_path / "new" / "page.html"
    write_page(path, "Title & more", "Words.", [Section("S", "<b>", [table], [chart], shots)])
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert not checker.open and "script" not in checker.seen
    assert len(checker.fetched) == 3 and all(f.startswith("data:image/webp;base64,") for f in checker.fetched)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "A &lt;table&gt;" in text and "<code>3</code> of 4" in text and "&lt;b&gt;" in text
    assert text.count('class="wrong"') == 1 and text.count('class="right"') == 1
    clips = [base64.b64decode(text.split(",")[1]) for text in checker.fetched]
    (tmp_path / "clip.webp").write_bytes(clips[0])
    assert len(read_video(tmp_path / "clip.webp")) == 4
    assert clips[1] == webp_bytes(clip, Fraction(8), None) and clips[2] == webp_bytes(clip, Fraction(25), None)


def test_charts_stay_in_their_frame() -> None:
    line = [(0.1, -3.0, -7.0, 2.0), (1.0, 90.0, 80.0, 101.0)]
    svg = ElementTree.fromstring(line_chart("A & B", "p", "dB", {"one": line, "two": line[:1]}))
    marks = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")]
    assert len(marks) == 3 and all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in marks)
    assert marks[0][1] > marks[1][1], "larger values stand higher"
    assert [t.text for t in svg.iter("text")].count("one") == 1
    with pytest.raises(ValueError, match="no points"):
        line_chart("empty", "x", "y", {})


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.14, 0.84), (-3, 101), (5, 5), (0.6912, 0.6913), (1e4, 9e4)])
def test_ticks(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8
    assert np.ptp(np.diff(found)) < 1e-6

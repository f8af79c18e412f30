"""Tables: intervals where they belong, pairs that fit, blocks of a docs file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval.intervals import share_interval, wilson_interval
from eval.tables import (
    COLUMNS,
    NONE,
    Sample,
    Table,
    agreement,
    cell,
    confusion,
    confusion_table,
    difference,
    difference_table,
    estimate,
    summary_table,
    write_docs,
)
from i2v.config import ConfigError


def samples(shift: float = 0.0, missing: bool = False) -> list[Sample]:
    """Ten pictures of three clips each: pictures differ by 3 dB, clips by 0.1, and every third has no static part."""
    rng = np.random.default_rng(0)
    level = np.repeat(rng.normal(25, 3, 10), 3) + rng.normal(0, 0.1, 30) + shift
    right = np.arange(30) % 5 > 0
    return [
        Sample(f"picture {i // 3}", {"similarity_psnr": float(level[i]), "motion_right": bool(right[i]),
                                     "static_psnr": None if missing or i % 3 == 0 else 30.0 + i})
        for i in range(30)
    ]  # fmt: skip


def test_shares_have_wilson_means_the_bootstrap_over_pictures() -> None:
    share = estimate(samples(), COLUMNS["motion_right"])
    assert share == pytest.approx((0.8, *wilson_interval(24, 30))), "failures apart: clips are as good as independent"
    together = [Sample(s.scene, {"motion_right": s.scene not in ("picture 3", "picture 7")}) for s in samples()]
    few = estimate(together, COLUMNS["motion_right"])
    names = [s.scene for s in together]
    assert few == (0.8, *share_interval([float(s.values["motion_right"]) for s in together], names))
    assert few[1] < wilson_interval(24, 30)[0] - 0.1, "failures of whole pictures: ten outcomes, not thirty"
    mean = estimate(samples(), COLUMNS["similarity_psnr"])
    assert mean is not None and mean[1] < mean[0] < mean[2]
    alone = [Sample(f"{i}", s.values) for i, s in enumerate(samples())]
    independent = estimate(alone, COLUMNS["similarity_psnr"])
    assert independent is not None and mean[2] - mean[1] > 1.4 * (independent[2] - independent[1])
    assert estimate(samples(missing=True), COLUMNS["static_psnr"]) is None
    assert estimate(samples()[:3], COLUMNS["similarity_psnr"]) is None, "one picture has no interval"


def test_paired_differences() -> None:
    found = difference(samples(1.0), samples(), "similarity_psnr")
    assert found == pytest.approx((1, 1, 1))
    assert difference(samples(), samples(missing=True), "static_psnr") is None
    with pytest.raises(ValueError, match="different scenes"):
        difference(samples()[3:], samples()[:-3], "similarity_psnr")
    assert agreement((0.5, 0.1, 0.9), 2.0, 6) == "yes"
    assert agreement((0.5, 0.1, 0.9), -2.0, 6) == "no"
    assert agreement((0.5, -0.1, 0.9), 2.0, 6) == "not resolved"
    assert agreement((0.5, 0.1, 0.9), 2.0, 5) == "not resolved", "too few pictures for an interval"
    assert agreement((0.5, 0.1, 0.9), None, 6) == NONE


def test_markdown() -> None:
    rows = {"ours": samples(1.0), "floor": samples()}
    table = summary_table("main", "All", rows, ("motion_right", "similarity_psnr", "object_psnr"), "A note.")
    assert table.head == ["", "clips", "motion right", "similarity to frame 0 (dB)"], "nobody measured the object"
    text = table.markdown()
    assert text.startswith("**All**\n\n|  | clips |") and text.endswith("\n\nA note.\n")
    assert "| ours | 30 | 0.80 [0.63, 0.90] |" in text
    paired = difference_table("p", "Paired", {"ours": samples(1.0)}, samples(), ("similarity_psnr",))
    assert paired.rows == [["ours", "+1.0 [+1.0, +1.0]"]]
    assert cell((-0.0, -0.0, 0.0), 1, sign=True) == "+0.0 [+0.0, +0.0]"


def test_confusion() -> None:
    assert confusion(["a", "a", "b"], ["a", "b", "b"], ("a", "b", "c")) == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    table = confusion_table("c", "C", ["a", "a", "b"], ["a", "b", "b"], ("a", "b", "c"))
    assert table.rows == [["a", "1", "1", "", "1 of 2"], ["b", "", "1", "", "1 of 1"], ["c", "", "", "", NONE]]
    with pytest.raises(ValueError, match="not among the classes"):
        confusion(["d"], ["a"], ("a",))


def test_blocks_of_a_docs_file(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("# Page\n<!-- table: one -->\nold\n<!-- end of table -->\nwords\n<!-- table: two -->\nno end\n")
    one, two = Table("one", "New", ["a"], [["1"]]), Table("two", "Two", ["a"], [["2"]])
    assert write_docs(file, [one, two]) == ["two"]
    text = file.read_text()
    assert text == ("# Page\n<!-- table: one -->\n" + one.markdown() + "<!-- end of table -->\nwords\n"
                    "<!-- table: two -->\nno end\n")  # fmt: skip
    assert write_docs(file, [one]) == [] and file.read_text() == text
    with pytest.raises(ConfigError, match="cannot be read"):
        write_docs(tmp_path / "none.md", [one])

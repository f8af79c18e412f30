"""Contact sheets: right size, all frames, readable back from the file."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from eval.sheets import BAND, contact_sheet, write_sheet
from i2v.data.world import LEVEL_1, make_clip


def test_rows_columns_and_colours(tmp_path: Path) -> None:
    red = np.zeros((5, 16, 16, 3), np.uint8)
    red[..., 0] = np.arange(5)[:, None, None] * 60
    clips = [red, make_clip(LEVEL_1, "val", 0, num_frames=2).frames]
    sheet = contact_sheet(clips, ["one", "two"], columns=3, side=32)
    assert sheet.shape == (2 * (BAND + 34), 3 * 34, 3) and sheet.dtype == np.uint8
    assert [int(sheet[BAND + 10, 34 * k + 10, 0]) for k in range(3)] == [0, 120, 240], "first, middle and last frame"
    assert (sheet[BAND + 34 : 2 * BAND + 34] < 100).any(), "no caption is drawn"
    write_sheet(tmp_path / "new" / "sheet.png", clips, ["one", "two"], columns=3, side=32)
    written = cv2.imread(str(tmp_path / "new" / "sheet.png"))
    assert written is not None and np.array_equal(written[..., ::-1], sheet)
    write_sheet(tmp_path / "new" / "sheet.webp", clips, ["one", "two"], colours=[(0, 0, 0), (200, 0, 0)])
    small = cv2.imread(str(tmp_path / "new" / "sheet.webp"))
    assert small is not None and small.shape == (2 * (BAND + 130), 8 * 130, 3)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["sheet.png", "sheet.webp"]


def test_captions_must_match() -> None:
    with pytest.raises(ValueError, match="0 clips and 1 captions"):
        contact_sheet([], ["one"])

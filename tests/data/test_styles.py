"""Styles: same frames in, same frames out; the motion stays, the look does not."""

from __future__ import annotations

import numpy as np
import pytest

from i2v.data.styles import STYLES, styled_clip
from i2v.data.world import LEVEL_1, make_clip


@pytest.mark.parametrize("name", STYLES)
def test_a_style_changes_the_look_and_nothing_else(name: str) -> None:
    plain = make_clip(LEVEL_1, "val", 3, num_frames=4, size=64)
    kept = plain.frames.copy()
    styled = styled_clip(LEVEL_1, "val", 4, 64, name, 3)
    assert np.array_equal(plain.frames, kept)  # the input is not written to
    assert styled.frames.dtype == np.uint8 and styled.frames.shape == plain.frames.shape
    assert styled.caption == plain.caption
    assert np.abs(styled.frames.astype(int) - plain.frames).mean() > 25
    assert np.array_equal(styled.frames, STYLES[name](plain.frames))  # each frame by itself, again and again
    assert np.array_equal(styled.frames[2:3], STYLES[name](plain.frames[2:3]))


def test_no_style_is_the_world() -> None:
    assert np.array_equal(styled_clip(LEVEL_1, "val", 2, 32, "", 1).frames, make_clip(LEVEL_1, "val", 1, 2, 32).frames)

"""Means over a set of videos, and sets that are refused."""

from __future__ import annotations

import pytest

from eval.video_set import check_same_length, least, mean_and_interval


def test_mean_and_interval() -> None:
    mean, (low, high) = mean_and_interval([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "FlowScore")
    assert mean == pytest.approx(0.35) and 0.1 < low < mean < high < 0.6
    assert mean_and_interval([0.2] * 6, "FlowScore")[1] == pytest.approx((0.2, 0.2))


def test_a_set_too_small_for_an_interval() -> None:
    assert [least(percent) for percent in (90, 95, 99)] == [5, 6, 8]
    for percent in (80, 90, 95, 99):
        count = least(percent)
        assert 1 - 2 * 0.5**count >= percent / 100 > 1 - 2 * 0.5 ** (count - 1)
    with pytest.raises(ValueError, match="FlowScore: 5 videos, a 95 % interval needs at least 6; give more videos"):
        mean_and_interval([0.1] * 5, "FlowScore")
    with pytest.raises(ValueError, match="3 pictures, a 80 % interval needs at least 4; give more pictures"):
        mean_and_interval([0.1] * 6, "FlowScore", percent=80, groups=list("aabbcc"))
    with pytest.raises(ValueError, match="finite"):
        mean_and_interval([float("nan")] * 6, "FlowScore")


def test_videos_of_differing_length() -> None:
    check_same_length({"a.mp4": 16, "b.mp4": 16})
    check_same_length({})
    with pytest.raises(ValueError, match="most have 16 frames, c.mp4 has 14; cut all to 14 frames"):
        check_same_length({"a.mp4": 16, "b.mp4": 16, "c.mp4": 14})
    many = {"a": 16, "b": 16, "c": 16} | {str(n): 20 + n for n in range(5)}
    with pytest.raises(ValueError, match="0 has 20, 1 has 21, 2 has 22 and 2 more; cut all to 16"):
        check_same_length(many)

"""Clips are read frame by frame: what decodes counts, and what does not is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from i2v.media import clip_file
from i2v.video import VideoError, read_video, write_video

FRAMES = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip", FRAMES, 8).path


def test_a_part_of_a_clip(clip: Path) -> None:
    assert (read_video(clip) == FRAMES).all()
    assert (read_video(clip, start=3) == FRAMES[3:]).all()
    assert (read_video(clip, start=1, count=3, stride=4) == FRAMES[1::4]).all()
    assert (read_video(clip, stride=3) == FRAMES[::3]).all()


@pytest.mark.parametrize("part", [{"count": 11}, {"start": 10}, {"start": 2, "count": 4, "stride": 3}])
def test_too_short_a_clip(clip: Path, part: dict[str, int]) -> None:
    with pytest.raises(VideoError, match="frames wanted from .* are there"):
        read_video(clip, **part)


def test_parts_that_make_no_sense(clip: Path) -> None:
    for part in ({"start": -1}, {"count": 0}, {"stride": 0}):
        with pytest.raises(ValueError, match="start from 0"):
            read_video(clip, **part)


def test_too_much_for_the_memory(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_file, "MAX_BYTES", 5 * FRAMES[0].nbytes)
    with pytest.raises(VideoError, match="read a part"):
        read_video(clip)
    assert len(read_video(clip, count=5)) == 5


@pytest.mark.parametrize("data, words", [(b"", "is empty"), (b"hello", "no frame could be decoded")])
def test_files_that_are_no_videos(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "clip.mp4").write_bytes(data)
    with pytest.raises(VideoError, match=words):
        read_video(tmp_path / "clip.mp4")
    with pytest.raises(VideoError, match="no such file"):
        read_video(tmp_path / "missing.mp4")


def test_a_folder_s_frames_are_counted(tmp_path: Path) -> None:
    """Names without leading zeros, as many programs write them."""
    (tmp_path / "clip").mkdir()
    for number in range(12):
        cv2.imwrite(str(tmp_path / f"clip/frame{number}.png"), np.full((16, 16, 3), 20 * number, np.uint8))
    assert read_video(tmp_path / "clip")[:, 0, 0, 0].tolist() == [20 * number for number in range(12)]


def test_folders_that_are_no_clips(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="no pictures in this folder"):
        read_video(tmp_path / "empty")
    write_video(tmp_path / "other", FRAMES[:, :20], 8)
    (tmp_path / "other" / "frame_0000.png").rename(clip / "frame_0004.png")
    with pytest.raises(VideoError, match="frame 4 is 32x20, the first one 32x32"):
        read_video(clip)
    (clip / "frame_0000.png").write_bytes(b"x")
    with pytest.raises(VideoError, match="frame_0000.png: this is text"):
        read_video(clip)


@pytest.mark.parametrize("name, frames", [("tree.avi", 68), ("carphone_pristine.mp4", 120)])
def test_frame_counts_are_those_that_decode(
    name: str, frames: int, shared_media: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = shared_media(f"videos/{name}")
    with caplog.at_level(logging.WARNING):
        assert len(read_video(path)) == frames
    assert ("444 frames, 68 could be decoded" in caplog.text) == (name == "tree.avi")
    with pytest.raises(VideoError, match=f"{frames + 1} frames wanted from 0 on .stride 1., {frames} are there"):
        read_video(path, count=frames + 1)
    assert len(read_video(path, start=frames - 8, count=4, stride=2)) == 4

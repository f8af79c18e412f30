"""Cuts, still pictures, bars and clips that are too short: found where they are planted, and not where they are not."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from planted import moving, with_bars, write

from i2v.data import filters
from i2v.data.clips import Scan, Timing, scan
from i2v.data.filters import bars, cuts, frames_from, movement, shots, starts
from i2v.data.folders import BadClip, Item

CLIPS = 12


def scanned(folder: Path, frames: np.ndarray, fps: int = 8) -> Scan:
    return scan(Item(write(folder / "clip.mp4", frames, fps), "clip.mp4", "", "video"))


def dropped(seen: Scan, timing: Timing, keep: tuple[str, ...] = ()) -> str:
    """The reason, "" where the clip is kept."""
    try:
        starts(seen, timing, keep)
    except BadClip as error:
        return error.reason
    return ""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> list[Scan]:
    return [scanned(tmp_path_factory.mktemp("clean"), moving(k, 20)) for k in range(CLIPS)]


def test_clean_clips_are_kept(clean: list[Scan]) -> None:
    assert [dropped(seen, Timing(16)) for seen in clean] == [""] * CLIPS


def test_planted_cuts_are_found(tmp_path: Path) -> None:
    for k in range(CLIPS):
        at = 5 + k % 10
        seen = scanned(tmp_path, np.concatenate([moving(k)[:at], moving(k + 1)[at:]]))
        assert cuts(seen).tolist() == [at]
        assert dropped(seen, Timing(16)) == "cut" and dropped(seen, Timing(16), keep=("cut",)) == ""
        places = starts(seen, Timing(5))
        for start, end in places:  # a shorter clip fits beside the cut, never over it
            chosen = frames_from(seen.times, start, end, Timing(5))
            assert chosen[-1] < at or chosen[0] >= at
        assert {int(end) for _, end in places} == {at, 20} - ({20} if 20 - at < 5 else set())


def test_still_clips_are_found_under_noise(tmp_path: Path, clean: list[Scan]) -> None:
    noise = np.random.default_rng(0)
    for k in range(CLIPS):
        frames = np.repeat(moving(k)[:1], 20, 0)
        frames = np.clip(frames + noise.normal(0, k % 3 * 4, frames.shape), 0, 255).astype(np.uint8)
        seen = scanned(tmp_path, frames)
        assert dropped(seen, Timing(16)) == "static" and dropped(seen, Timing(16), keep=("static",)) == ""
    assert min(movement(seen.small) for seen in clean) > 1.5 * filters.STILL_LEVEL


@pytest.mark.parametrize("part", [0.0625, 0.125, 0.2])
@pytest.mark.parametrize("colour", [0, 255])
def test_bars_are_found(tmp_path: Path, part: float, colour: int) -> None:
    for turned in (False, True):
        frames = moving(2, side=96)
        frames = with_bars(frames.swapaxes(1, 2) if turned else frames, part, colour)
        seen = scanned(tmp_path, frames.swapaxes(1, 2) if turned else frames)
        rows, columns = bars(seen)
        share = (columns if turned else rows) / 96
        assert dropped(seen, Timing(16)) == "letterbox" and dropped(seen, Timing(16), keep=("letterbox",)) == ""
        assert (rows if turned else columns) == 0 and abs(share - 2 * part) < 0.05


def test_a_dark_sky_is_no_bar(shared_media: Callable[[str], Path]) -> None:
    """The Earth before black space: black rows above and below, but no straight edge."""
    seen = scan(Item(shared_media("videos/earth.mp4"), "earth.mp4", "", "video"))
    assert seen.high[0].max() < 8 and seen.high[-1].max() < 8
    assert bars(seen) == (0, 0) and dropped(seen, Timing(16, fps=1)) == ""


def test_real_cuts(shared_media: Callable[[str], Path]) -> None:
    """The shots of a real film; one film without a cut."""
    film = scan(Item(shared_media("videos/bikes.mp4"), "bikes.mp4", "", "video"))
    assert cuts(film).tolist() == [30, 137, 187, 242]
    assert dropped(film, Timing(16, fps=8)) == "" and dropped(film, Timing(16, fps=2)) == "cut"
    assert not len(cuts(scan(Item(shared_media("videos/carphone_pristine.mp4"), "c.mp4", "", "video"))))


def test_length_and_rate(clean: list[Scan]) -> None:
    """20 frames at 8 a second: 2.5 s."""
    seen = clean[0]
    assert dropped(seen, Timing(20)) == "" and dropped(seen, Timing(21)) == "too_short"
    assert dropped(seen, Timing(10, stride=2)) == "" and dropped(seen, Timing(11, stride=2)) == "too_short"
    assert dropped(seen, Timing(10, fps=4)) == "" and dropped(seen, Timing(12, fps=4)) == "too_short"
    assert dropped(seen, Timing(4, fps=8.5)) == "" and dropped(seen, Timing(4, fps=12)) == "slow"
    assert dropped(seen, Timing(4, fps=24, stride=3)) == ""
    assert len(starts(seen, Timing(16))) == 5


def test_a_pause_in_time_parts_a_clip_as_a_cut_does(clean: list[Scan]) -> None:
    seen = clean[0]
    late = seen.times + np.where(np.arange(20) < 12, 0.0, 3.0)
    held = Scan(late, seen.small, seen.low, seen.high, seen.height, seen.width)
    assert shots(held, Timing(8)) == [(0, 12), (12, 20)]
    assert dropped(held, Timing(16)) == "cut" and dropped(held, Timing(8)) == ""
    assert dropped(held, Timing(16), keep=("cut",)) == ""


def test_cuts_of_a_long_file_need_little_memory() -> None:
    small, side = np.random.default_rng(0).integers(0, 9, (2000, 32, 32, 3), np.uint8), np.zeros((96, 96, 3), np.uint8)
    tracemalloc.start()
    try:
        assert not len(cuts(Scan(np.arange(2000) / 30, small, side, side, 64, 64)))
        assert tracemalloc.get_traced_memory()[1] < small.nbytes / 4
    finally:
        tracemalloc.stop()


def test_a_mistaken_threshold_is_seen(tmp_path: Path, clean: list[Scan], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each filter decides: with its threshold moved, the clips above change sides."""
    monkeypatch.setattr(filters, "CUT_LEVEL", 200.0)
    assert not len(cuts(scanned(tmp_path, np.concatenate([moving(0)[:9], moving(1)[9:]]))))
    monkeypatch.setattr(filters, "STILL_LEVEL", 255.0)
    assert dropped(clean[0], Timing(16)) == "static"
    monkeypatch.setattr(filters, "BAR_ROWS", 40)
    assert bars(scanned(tmp_path, with_bars(moving(2)))) == (0, 0)

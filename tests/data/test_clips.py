"""Clips are read by time: which frames a clip shows follows their time stamps, and nothing read can hang."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from planted import at_times, moving, write

from i2v.data import clips
from i2v.data.clips import Timing, read_frames, scan
from i2v.data.dataset import open_dataset
from i2v.data.filters import frames_from
from i2v.data.folders import BadClip, Item


def greys(count: int, side: int = 64) -> np.ndarray:
    """Frame k is the grey 10 * k, so that a frame tells its number."""
    return np.broadcast_to(10 * np.arange(count, dtype=np.uint8)[:, None, None, None], (count, side, side, 3))


def item(path: Path) -> Item:
    return Item(path, path.name, "", "video")


def numbers(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in frames]


def test_time_stamps_are_those_of_the_file(tmp_path: Path) -> None:
    shown = [0, 40, 80, 200, 240, 500, 540, 1000, 1040]
    for name, shift in (("a.mp4", 0), ("a.mkv", 0), ("b.mov", 700)):
        path = at_times(tmp_path / name, greys(9), [t + shift for t in shown])
        seen = [(seconds, frame.mean()) for seconds, frame, _ in clips.decode(item(path))]
        times = np.array([seconds for seconds, _ in seen])
        assert np.allclose(times - times[0], np.array(shown) / 1000, atol=1e-3)
        assert [round(mean / 10) for _, mean in seen] == list(range(9))


def test_frames_are_chosen_by_time_not_by_index(tmp_path: Path) -> None:
    """25 frames a second for a while, then 10: every second at 5 frames a second is five frames in both halves."""
    shown = [0, 40, 80, 120, 160, 200, 240, 280, 320, 360, 400, 500, 600, 700, 800, 900, 1000]
    path = at_times(tmp_path / "a.mp4", greys(17), shown)
    times = scan(item(path)).times
    chosen = frames_from(times, 0, len(times), Timing(6, fps=5))
    assert [shown[k] for k in chosen] == [0, 200, 400, 600, 800, 1000]
    assert chosen.tolist() != list(range(0, 30, 5))  # what choosing by index and average rate would give
    assert numbers(read_frames(item(path), chosen, 64, 64)) == chosen.tolist()
    every_second = frames_from(times, 0, len(times), Timing(3, fps=5, stride=2))
    assert [shown[k] for k in every_second] == [0, 400, 800]


@pytest.mark.parametrize("name", ["a.mkv", "a.flv", "a.mp4"])
def test_a_header_that_knows_the_time_alone(tmp_path: Path, name: str) -> None:
    """Times the usual rate it gives more frames than a file of varying rate has; one that is cut off is still found."""
    shown = [40 * k + 120 * max(k - 20, 0) for k in range(30)]  # 25 a second, then a camera in the dark: 6
    path = at_times(tmp_path / name, moving(0, 30), shown)
    assert len(scan(item(path)).times) >= 29
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(BadClip, match="short_of_header|unreadable"):
        scan(item(path))


@pytest.mark.parametrize(
    "rate, fps, stride, steps", [(24, None, 1, 1), (24, None, 3, 3), (24, 8, 1, 3), (30, 15, 2, 4)]
)
def test_an_even_file_gives_an_even_clip(tmp_path: Path, rate: int, fps: float | None, stride: int, steps: int) -> None:
    path = write(tmp_path / "a.mp4", moving(0, 30), rate)
    timing, times = Timing(5, fps, stride), scan(item(path)).times
    for start in range(len(times) - 4 * steps):
        assert frames_from(times, start, len(times), timing).tolist() == [start + steps * k for k in range(5)]


def test_jittering_time_stamps_repeat_no_frame() -> None:
    """29.97 frames a second in whole milliseconds."""
    times = np.round(np.arange(100) * 1001 / 30000, 3)
    for start in range(60):
        assert frames_from(times, start, 100, Timing(20)).tolist() == list(range(start, start + 20))


def test_covered_and_cropped_in_the_middle(tmp_path: Path) -> None:
    frames = np.zeros((3, 64, 128, 3), np.uint8)
    frames[:, :, 32:96] = (200, 30, 60)  # the middle square
    out = read_frames(item(write(tmp_path / "a.mp4", frames)), np.array([0, 2]), 32, 32)
    assert out.shape == (2, 32, 32, 3) and out.dtype == np.uint8
    assert np.abs(out[:, 2:-2, 2:-2].astype(int) - (200, 30, 60)).max() < 8
    tall = read_frames(item(tmp_path / "a.mp4"), np.array([1]), 48, 24)
    assert tall.shape == (1, 48, 24, 3)


def test_a_sample_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    for k in range(3):
        write(tmp_path / f"{k}.mp4", moving(k, 30))

    def draw(numbers: list[int], seed: int = 0) -> list[tuple[int, np.ndarray]]:
        data = open_dataset(tmp_path, 4, size=(32, 48), seed=seed)
        return [data.sample(number) for number in numbers]

    first, again = draw([0, 1, 2, 3, 4, 5]), draw([5, 3, 1])
    assert first[0][1].shape == (4, 32, 48, 3) and first[0][1].dtype == np.uint8 and first[0][1].std() > 1
    for (index, pixels), (before, same) in zip(again, (first[5], first[3], first[1]), strict=True):
        assert index == before and np.array_equal(pixels, same)
    assert len({index for index, _ in draw(list(range(12)))}) == 3
    assert [index for index, _ in first] != [index for index, _ in draw(list(range(6)), seed=1)]
    data = open_dataset(tmp_path, 4, size=32)
    assert len({data.frames(0, k).tobytes() for k in range(12)}) > 4  # starts at random


def test_a_colon_in_a_name_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("take:1").mkdir()
    write(Path("take:1/a.mp4"), moving(0))
    assert open_dataset("take:1", 16).survey(show=False)["kept"] == 1


def test_nothing_but_ordinary_files_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    (tmp_path / "folder.mp4").mkdir()
    for name in ("pipe.mp4", "folder.mp4"):
        with pytest.raises(BadClip, match="not an ordinary file"):
            scan(item(tmp_path / name))


def test_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip longer than the budget ends there; one whose frame does not come, or is too large, is bad."""
    with pytest.raises(BadClip, match="too_large: frames of 144x16, a side more than 8 times as long"):
        scan(item(write(tmp_path / "strip.mp4", np.zeros((3, 16, 144, 3), np.uint8))))
    path = write(tmp_path / "a.mp4", moving(0, 30))
    monkeypatch.setattr(clips, "MAX_FRAMES", 12)
    assert len(scan(item(path)).times) == 12
    monkeypatch.setattr(clips, "MAX_DECODED", 7 * 64 * 64)
    assert len(scan(item(path)).times) == 7
    monkeypatch.setattr(clips, "MAX_STALL", -1.0)
    with pytest.raises(BadClip, match="timeout: frame 0 took more than"):
        scan(item(path))
    monkeypatch.setattr(clips, "MAX_PIXELS", 1000)
    with pytest.raises(BadClip, match="too_large"):
        scan(item(path))


@pytest.mark.parametrize("name, frames, rate", [("carphone_pristine.mp4", 120, 29.97), ("bikes.mp4", 250, 25)])
def test_real_videos(name: str, frames: int, rate: float, shared_media: Callable[[str], Path]) -> None:
    seen = scan(item(shared_media(f"videos/{name}")))
    assert len(seen.times) == frames and abs(1 / clips.interval(seen.times) - rate) < 0.01


def test_timings_that_make_no_sense() -> None:
    for part in ({"num_frames": 0}, {"num_frames": 4, "fps": -1.0}, {"num_frames": 4, "stride": 0}):
        with pytest.raises(ValueError, match="expected num_frames and stride from 1"):
            Timing(**part)

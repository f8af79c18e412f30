"""What `python -m eval path` and `long` measure: right on clips whose answer is known, wrong where they should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval import drawn_path, long_video
from eval.__main__ import main
from eval.drawn_path import PATHS, ROWS, STRAIGHT, Clip, distance, drawn
from i2v.data.world import LEVEL_1, WORLDS, draw_scene, make_clip


@pytest.mark.parametrize("path", PATHS)
def test_the_drawn_clip_lies_on_its_path_and_on_no_other(path: str) -> None:
    scene = replace(draw_scene(LEVEL_1, "val", 3), motion="stays still")
    frames, offsets, mask = drawn(scene, path, 16, 64)
    assert np.array_equal(frames[0], make_clip(LEVEL_1, "val", 3).frames[0]) and not offsets[0].any()
    assert distance(frames, mask, offsets) < 0.02
    assert distance(frames, mask, -offsets) > 0.1
    assert distance(np.repeat(frames[:1], 16, axis=0), mask, offsets) > 0.08


def test_an_object_that_is_gone_is_half_a_frame_away() -> None:
    scene = replace(draw_scene(LEVEL_1, "val", 3), motion="stays still")
    frames, offsets, mask = drawn(scene, STRAIGHT, 16, 64)
    bare = frames.copy()
    bare[1:] = np.median(frames[0, :, :4], axis=(0, 1)).astype(np.uint8)
    assert distance(bare, mask, offsets) > 0.4


def test_table_of_paths() -> None:
    clips = [
        Clip(scene, path, row, np.zeros(0, np.uint8), 0.1 * number, 30.0 - number)
        for scene in range(3) for path in ("arc", STRAIGHT) for number, row in enumerate(ROWS)
    ]  # fmt: skip
    lines = drawn_path.table(clips).splitlines()
    assert lines[2].split(" | ")[1:] == ["0.000 [0.000, 0.000]", "0.000 [0.000, 0.000]", "30.0 [30.0, 30.0]",
                                         "+1.0 [+1.0, +1.0] |"]  # fmt: skip
    assert "0.300 [0.300, 0.300]" in lines[5] and "-2.0 [-2.0, -2.0]" in lines[5]


def test_drift_of_a_clip_that_fades() -> None:
    """Nothing where nothing changes; a clip that grows dark drifts more in each quarter, and one that loses its object
    loses its identity."""
    clip = make_clip(LEVEL_1, "val", 3, 1)
    still = np.repeat(clip.frames, 33, axis=0)
    assert all(q["colour"] == 0 and q["identity"] > 0.99 for q in long_video.measured(still, clip.mask))
    dark = (still * np.linspace(1, 0.5, 33)[:, None, None, None]).astype(np.uint8)
    colours = [q["colour"] for q in long_video.measured(dark, clip.mask)]
    assert colours == sorted(colours) and colours[-1] > colours[0] + 10
    other = still.copy()
    other[20:] = make_clip(LEVEL_1, "val", 3, 1, kind="car" if clip.kind != "car" else "fish", colour="green").frames
    likeness = [q["identity"] for q in long_video.measured(other, clip.mask)]
    assert likeness[0] > 0.99 and likeness[-1] < 0.6


def test_motion_is_no_drift() -> None:
    """True clips in which an object moves, bounces or spins: their quarters are those of no model's faults."""
    for level, motion in (("level_1", "moves left"), ("level_3", "spins clockwise")):
        world = WORLDS[level]
        index = next(k for k in range(400) if draw_scene(world, "val", k).motion == motion)
        clip = make_clip(world, "val", index, 33, camera="")
        quarters = long_video.measured(clip.frames, clip.mask)
        assert max(q["colour"] for q in quarters) < 0.6 and min(q["identity"] for q in quarters) > 0.75, (
            level,
            quarters,
        )


def test_table_of_long_videos() -> None:
    rows = [
        {"scene": scene, "way": way, "quarter": quarter, "colour": bad * quarter, "identity": 1 - 0.1 * bad * quarter}
        for scene in range(3) for bad, way in enumerate(("shared", "alone")) for quarter in (1, 2, 3, 4)
    ]  # fmt: skip
    lines = long_video.table(rows).splitlines()
    assert "4.00 [4.00, 4.00]" in lines[3] and lines[4].endswith(" -4.00 [-4.00, -4.00] |")
    assert " -1.00 [-1.00, -1.00] |" in lines[4], "every quarter has its own"
    assert lines[7].endswith(" +0.40 [+0.40, +0.40] |")


def test_a_folder_without_a_controlnet_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["path", "--weights", str(tmp_path)]) == 2
    assert "configs/tiny/edges.json" in capsys.readouterr().err
    assert main(["long", "--scenes", "1"]) == 2 and "--scenes 1" in capsys.readouterr().err

"""The four faults on planted ones and on true clips, their ranking, and `sample.py --best-of`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

import sample
from eval.best_of import examine, ranked, ranking
from eval.damage import Video
from eval.fault_rates import CASES, FaultRates, main, moving
from i2v.data.world import LEVEL_1, LEVEL_3, make_clip
from i2v.jobs import by_seed, listed
from i2v.request import Request
from i2v.video import write_video


@pytest.fixture(scope="module")
def clip() -> Video:
    return make_clip(LEVEL_3, "val", 31, 8, motion="moves left", camera="", background="grass").frames


@pytest.mark.parametrize("case", list(CASES))
def test_planted_faults(case: str, clip: Video) -> None:
    change, wanted = CASES[case]
    faults = examine(change(clip)).faults
    assert wanted in faults if wanted else faults == []


def test_videos_of_another_shape(clip: Video) -> None:
    wide = np.stack([cv2.resize(frame, (96, 48)) for frame in clip])
    assert examine(wide).faults == [] and examine(wide[[0] * 8]).faults == ["static"]
    with pytest.raises(ValueError, match="F >= 4"):
        examine(clip[:3])


def test_a_seam_is_named_where_it_is(clip: Video) -> None:
    late = np.concatenate([clip[:5], np.roll(clip[5:], 4, axis=2)])
    found = examine(late)
    assert found.faults == ["seam"] and found.seam_after == 4
    assert found.told().startswith("seam after frame 4 (")
    assert examine(clip).told() == "no fault"


def test_the_best_is_farthest_from_every_fault(clip: Video) -> None:
    changes: dict[str, Callable[[Video], Video]] = {name: CASES[name][0] for name in CASES}
    videos = {name: changes[name](clip) for name in ("frame 0 repeated", "after frame 0, shifted", "true")}
    assert list(ranked(videos)) == ["true", "after frame 0, shifted", "frame 0 repeated"]


def test_a_ranking_of_files(clip: Video, tmp_path: Path) -> None:
    write_video(tmp_path / "a.png", clip[[0] * 8], 8)
    write_video(tmp_path / "b.png", clip, 8)
    lines = ranking([tmp_path / "a", tmp_path / "b"])
    assert lines[1] == f"1. {tmp_path}/b: no fault" and lines[2].startswith(f"2. {tmp_path}/a: static (moves 0.0 %")


def test_rates_are_of_moving_clips(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(c.motion != "stays still" for c in moving(LEVEL_1, FaultRates(clips=4, num_frames=4)))
    late = moving(LEVEL_1, FaultRates(first=1000, clips=1, num_frames=4))[0].frames
    assert not np.array_equal(late, moving(LEVEL_1, FaultRates(clips=1, num_frames=4))[0].frames)
    with pytest.raises(ValueError, match="at least 1 clip of 4 frames"):
        main(["--clips", "0"])
    with pytest.raises(ValueError, match="--first -1: expected 0 or more"):
        main(["--first", "-1"])


def test_jobs_by_seed() -> None:
    todo, _ = listed(["a.png"], None, Request(seed=5), Path("videos"))
    made = by_seed(todo, 3)
    assert [job.request.seed for job in made] == [5, 6, 7] and {job.folder for job in made} == {Path("videos")}
    assert all(job.output is None for job in made) and made[1].name == "a.png, seed 6"
    with pytest.raises(ValueError, match="--output a.mp4: --best-of 2 makes several videos; give a folder"):
        by_seed(listed(["a.png"], None, Request(), Path("a.mp4"))[0], 2)
    with pytest.raises(ValueError, match="--num-frames 3: --best-of looks for faults over 4 frames at least"):
        by_seed(listed(["a.png"], None, Request(num_frames=3), None)[0], 2)
    with pytest.raises(ValueError, match="--best-of 0: expected 2 or more"):
        by_seed(todo, 0)


def test_best_of(random_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "ball.png"
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    flags = f"--image {picture} --weights {random_folder} --num-frames 4 --steps 1 --output {tmp_path}/out --best-of 2"
    assert sample.main(flags.split()) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("memory: ")]
    assert [p.name for p in sorted((tmp_path / "out").glob("*.mp4"))] == ["ball_0.mp4", "ball_1.mp4"]
    assert told[2].startswith("best of 2") and told[3].startswith("1. ") and told[4].startswith("2. ")
    assert sample.main(flags.split()) == 0
    assert "is there already" in capsys.readouterr().out, "and is ranked again"
    assert sample.main([*flags.split()[:-4], "--output", f"{tmp_path}/one.mp4", "--best-of", "2"]) == 2
    assert "give a folder for them" in capsys.readouterr().err

"""What sets of real files hold: stray pictures, files called alike, pictures that changed, unknown frame rates."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from eval import report, scores
from eval.measured import Measured, frame_rate, measure
from eval.metrics.all import measure_clip
from eval.metrics.flow_score import FlowScore
from eval.miniature import write_sheets
from eval.networks import NetworkFiles, Networks
from eval.page import Grid
from eval.probe_ceiling import ProbeCeiling, moving_cameras
from eval.scores import PAPER, Scores, Switches, score
from eval.tables import Column
from eval.videos import Video, described, found
from i2v.config import ConfigError, to_dict
from i2v.data.world import WORLDS
from i2v.replay import described as facts_of
from i2v.request import Request
from i2v.video import read_image, write_video

EMPTY = Networks(None, None, None, {}, {})


def texture(seed: int, side: int = 48) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 255, (side // 4, side // 4, 3), np.uint8)
    return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)


def ours(path: Path, picture: Path, frames: int = 4) -> Path:
    """A video as sample.py would leave it."""
    pixels = read_image(picture)
    settings: dict[str, Any] = {"preset": "tiny", "run": {}, "versions": {}, "weights": {}}
    settings["request"] = to_dict(Request(t0=1.0, p=0.5, fps=12, prompt="a cat"))
    settings["pictures"] = facts_of({0: picture}, {0: pixels}, loop=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.stack([np.roll(pixels, k, 1) for k in range(frames)]), 12, settings)
    return path


def test_two_pictures_of_one_name_are_two_pictures(tmp_path: Path) -> None:
    for number, folder in enumerate(("x", "y")):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "input.png"), texture(number))
        ours(tmp_path / "made" / f"{folder}.mp4", tmp_path / folder / "input.png")
        ours(tmp_path / "other" / f"{folder}_1.webp", tmp_path / folder / "input.png")
    videos = described(found([str(tmp_path / "made"), str(tmp_path / "other")]), [], None)
    assert [v.scene for v in videos] == ["input", "input (2)", "input", "input (2)"]
    assert [v.reference for v in videos] == [tmp_path / folder / "input.png" for folder in ("x", "y")] * 2


def test_a_picture_that_was_changed_is_not_compared_with(tmp_path: Path) -> None:
    picture = tmp_path / "input.png"
    cv2.imwrite(str(picture), texture(0))
    ours(tmp_path / "made" / "a.mp4", picture)
    (before,) = described(found([str(tmp_path / "made")]), [], None)
    assert before.reference == picture and before.changed is None
    cv2.imwrite(str(picture), texture(1))
    (video,) = described(found([str(tmp_path / "made")]), [], None)
    assert video.reference is None and video.changed == picture and video.scene == "input"
    told = report.Report("", "", tmp_path, {}, EMPTY)
    (line,) = [w for w in report.warnings(told, [Measured(video, (4, 48, 48), Scores())]) if "another" in w]
    assert "made/a.mp4" in line
    (given,) = described(found([str(tmp_path / "made")]), [picture], None)
    assert given.reference == picture, "what the user names is taken"


def test_a_stray_picture_makes_no_folder_of_frames(tmp_path: Path) -> None:
    clip = np.stack([texture(k) for k in range(3)])
    for name in ("ours/a.mp4", "svd/b.mp4", "frames/c.png", "frames/d.png"):
        write_video(tmp_path / "videos" / name, clip, 8)
    for place in ("videos/grid.png", "videos/frames/contact.png"):
        cv2.imwrite(str(tmp_path / place), clip[0])
    assert {model: len(some) for model, some in found([str(tmp_path / "videos")]).items()} == {
        "frames": 2, "ours": 1, "svd": 1,
    }  # fmt: skip
    assert [p.name for p in found([str(tmp_path / "videos" / "frames")])["frames"]] == ["c", "d"]


def test_videos_beside_folders_of_models_are_refused(tmp_path: Path) -> None:
    """Which of both are meant cannot be told; NAME= says that it is the folder's own."""
    for name in ("grid.gif", "svd/cat.gif", "ours/cat.gif", "@eaDir/cat.gif"):
        write_video(tmp_path / name, np.stack([texture(0)] * 3), 8)
    with pytest.raises(ConfigError, match=r"holds videos \(grid.gif\) and folders of videos \(ours, svd\); give each"):
        found([str(tmp_path)])
    assert [p.name for p in found([f"x={tmp_path}"])["x"]] == ["grid.gif"]
    (tmp_path / "grid.gif").unlink()
    assert list(found([str(tmp_path)])) == ["ours", "svd"]


@pytest.mark.parametrize("inner", ["@eaDir/t.jpg", ".thumbs/t.jpg", "depth/frame_0000.png"])
def test_folders_inside_a_folder_of_frames(tmp_path: Path, inner: str) -> None:
    """Thumbnails of a file server, or depth maps beside the frames: it stays the video that it was."""
    for k in range(3):
        write_video(tmp_path / "m" / f"v{k}.png", np.stack([texture(j) for j in range(3)]), 8)
    other = tmp_path / "m" / "v1" / inner
    other.parent.mkdir()
    cv2.imwrite(str(other), texture(0))
    assert [p.name for p in found([str(tmp_path / "m")])["m"]] == ["v0", "v1", "v2"]
    assert [p.name for p in found([str(tmp_path / "m" / "v1")])["m"]] == ["v1"]


def test_a_video_of_one_frame_is_refused_by_name(tmp_path: Path) -> None:
    write_video(tmp_path / "a.webp", texture(0)[None], 8)
    with pytest.raises(ConfigError, match=r"a\.webp: one frame is no video"):
        measure([Video("m", tmp_path / "a.webp", "a")], NetworkFiles(device="cpu"), EMPTY, Switches(), None, tmp_path)


def test_the_same_folder_twice_counts_once(tmp_path: Path) -> None:
    for k in range(2):
        write_video(tmp_path / "ours" / f"{k}.mp4", np.stack([texture(k)] * 3), 8)
    assert len(found([str(tmp_path / "ours"), str(tmp_path / "ours"), str(tmp_path / "ours" / "0.mp4")])["ours"]) == 2


def test_frame_rates(tmp_path: Path) -> None:
    """Our folders, GIF and WebP tell them in their settings; of others' it is told that they are not known."""
    cv2.imwrite(str(tmp_path / "a.png"), texture(0))
    for name in ("f.png", "g.gif", "w.webp", "m.mp4"):
        ours(tmp_path / name, tmp_path / "a.png")
    assert [frame_rate(tmp_path / name) for name in ("f", "g.gif", "w.webp", "m.mp4")] == [12.0] * 4
    write_video(tmp_path / "other.gif", np.stack([texture(0)] * 3), 8)
    assert frame_rate(tmp_path / "other.gif") is None
    some = [Measured(Video("m", tmp_path / n, n), (4, 48, 48), Scores(), frame_rate(tmp_path / n))
            for n in ("m.mp4", "other.gif")]  # fmt: skip
    lines = " ".join(report.warnings(report.Report("", "", tmp_path, {}, EMPTY), some))
    assert "Of 1 video (m/other.gif) the frames a second are not known, of the others they are 12." in lines


def test_grids_keep_models_apart_and_read_what_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of one start has no grid, so nothing of it is read."""
    videos = [
        Video(model, tmp_path / "v.webp", scene, start=start)
        for scene in ("cat", "dog")
        for model in ("ours", "theirs")
        for start in ((1.0, 0.5), (0.8, 0.5))
    ]
    videos += [replace(video, scene="still", start=(1.0, 0.5)) for video in videos]  # fmt: skip
    seen: list[Video] = []
    monkeypatch.setattr(report, "read", lambda video, _: seen.append(video) or np.stack([texture(0)] * 3))
    several = [Measured(video, (3, 48, 48), Scores(), 24.0) for video in videos]

    def grids(shown: int) -> list[Grid]:
        return [grid for s in report.grids(report.Report("", "", tmp_path, {}, EMPTY, shown=shown), several)
                for grid in s.grids]  # fmt: skip

    assert grids(0) == [] and not seen
    cat, dog = grids(12)
    assert len(seen) == 8 and "still" not in {video.scene for video in seen}
    assert [s.words.partition(",")[0] for s in cat.shots["0.8", "0.5"]] == ["ours", "theirs"]
    assert {s.fps for shots in dog.shots.values() for s in shots} == {24.0}


def shares(right: list[list[float]], model: str = "m") -> list[Measured]:
    return [Measured(Video(model, Path(f"{model}/{s}_{k}.mp4"), str(s)), (4, 48, 48), Scores({"motion_right": value}))
            for s, values in enumerate(right) for k, value in enumerate(values)]  # fmt: skip


def test_intervals_of_shares_and_other_percents() -> None:
    """Videos of one picture fail together: nine pictures of ten are no 36 videos of 40. A wider percent is wider."""
    column = Column("motion_right", "motion right", digits=2, share=True)
    some = shares([[1.0] * 4] * 9 + [[0.0] * 4])

    def bounds(percent: float | None) -> tuple[float, float]:
        low, high = report.mean_cell(some, column, percent).split("[")[1][:-1].split(", ")
        return float(low), float(high)

    assert bounds(None) == bounds(95) and bounds(95)[0] < 0.65 and bounds(95)[1] < 1
    assert bounds(99)[0] < bounds(95)[0] < bounds(90)[0] and bounds(99)[1] >= bounds(95)[1] >= bounds(90)[1]
    assert report.mean_cell(shares([[1.0] * 4] * 10), column, 99).split("[")[1] != "1.00, 1.00]"


def test_paired_differences_have_the_percent_that_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    models = {
        model: [Measured(Video(model, Path(f"{model}/{k}.mp4"), str(k)), (4, 48, 48), Scores({"clip_temp": float(v)}))
                for k, v in enumerate(rng.normal(0.9, 0.02, 12))]
        for model in ("a", "b")
    }  # fmt: skip

    def width(percent: float) -> float:
        table = report.paired(models, PAPER, percent=percent)
        assert table is not None and table.note.startswith(f"{percent:g} %")
        low, high = table.rows[0][2].split("[")[1][:-1].split(", ")
        return float(high) - float(low)

    assert width(99) > width(95) > width(80)


def test_a_paired_share_without_a_difference_has_no_interval() -> None:
    """All draws of it are alike, whatever the truth is."""
    column = Column("motion_right", "motion right", digits=2, share=True)
    same = {model: shares([[1.0], [0.0], *[[1.0]] * 8], model) for model in ("a", "b")}
    other = {"a": same["a"], "b": shares([[1.0]] * 10, "b")}
    apart = {"a": same["a"], "b": [replace(m, video=replace(m.video, scene=f"another {k}"))
                                   for k, m in enumerate(same["b"])]}  # fmt: skip
    assert report.paired(apart, [column]) is None, "nothing was compared"
    assert report.paired(same, [column]).rows[0][2] == "+0.00"  # type: ignore[union-attr]
    assert "[" in report.paired(other, [column]).rows[0][2]  # type: ignore[union-attr]


def test_a_mask_of_which_nothing_is_left_ends_nothing() -> None:
    frames = np.stack([texture(0, 256)] * 4)
    mask = np.zeros((256, 256), np.uint8)
    mask[100:102, 100:102] = 1
    found = score(frames, frames[0], "a cat moves left", mask, EMPTY)
    assert "no pixel left" in found.reasons["motion_right"] and found.values["flow_score (DIS)"] == pytest.approx(0)


def test_what_is_no_number_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its video is named, and the mean is of the others."""
    frames = np.stack([texture(0)] * 4)
    several = []
    for name in ("a", "b"):
        found = score(frames, None, "", None, EMPTY)
        several.append(Measured(Video("m", tmp_path / f"{name}.mp4", name), (4, 48, 48), found))
        monkeypatch.setattr(scores, "flow_score", lambda *_, **__: FlowScore(float("nan"), np.zeros(3), "DIS", False))
    assert "flow_score (DIS)" in several[0].scores.values and "flow_score (DIS)" not in several[1].scores.values
    lines = report.missing(several, [Column("flow_score (DIS)", "FlowScore (DIS)")])
    assert lines == ["FlowScore (DIS): without 1 video (m/b.mp4); what came out is no finite number (nan)."]


def test_a_plain_object_that_stays_is_itself() -> None:
    ground = texture(3, 64)
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 1
    ground[mask > 0] = (200, 30, 30)
    still = np.stack([ground] * 8)
    assert measure_clip(still, ground, mask)["identity"] == pytest.approx(1, abs=0.01)
    other = still.copy()
    other[4:, 20:40, 20:40] = (30, 30, 200)
    assert measure_clip(other, ground, mask)["identity"] < 0.6


def test_no_camera_is_looked_for_where_none_moves() -> None:
    assert moving_cameras(WORLDS["level_2"], ProbeCeiling(split="held_out", clips=4)) == []
    assert len(moving_cameras(WORLDS["level_2"], ProbeCeiling(split="val", clips=4))) == 2


def test_older_failures_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "miniature_failures.webp").write_bytes(b"of another run")
    write_sheets(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_a_recorded_hash_is_of_the_pixels(tmp_path: Path) -> None:
    """The same picture in another file format is the same picture."""
    cv2.imwrite(str(tmp_path / "a.png"), texture(0))
    sha256 = hashlib.sha256(read_image(tmp_path / "a.png").tobytes()).hexdigest()
    assert facts_of({0: tmp_path / "a.png"}, {0: read_image(tmp_path / "a.png")}, False)[0]["sha256"] == sha256

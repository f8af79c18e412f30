"""A thousand clips with planted faults: all found, all counted, never tried twice; and what `check` prints of it."""

from __future__ import annotations

import errno
import json
import shlex
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from planted import moving, samples, webvid_csv, write

from i2v.data import dataset
from i2v.data.__main__ import main, run
from i2v.data.clips import Timing
from i2v.data.dataset import ahead, open_dataset
from i2v.data.folders import BadClip, DataError, Item, Listing


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    return samples(tmp_path_factory.mktemp("planted"))


def folder_of(planted: dict[str, list[Path]]) -> Path:
    return planted[""][0].parent


def test_every_planted_fault_is_found_for_its_reason(planted: dict[str, list[Path]]) -> None:
    data = open_dataset(folder_of(planted), 16)
    facts = data.survey(show=False)
    wanted = {path.name: reason for reason, paths in planted.items() if reason for path in paths}
    assert {entry["file"]: entry["reason"] for entry in facts["files"]} == wanted
    assert facts["kept"] == len(planted[""]) and facts["listed"] == facts["kept"] + len(wanted)
    assert sum(facts["dropped"].values()) == len(wanted) and facts["without_caption"] == facts["kept"]


@pytest.mark.parametrize("rows", [60, 1000])
def test_webvid_with_planted_faults(tmp_path: Path, rows: int) -> None:
    table, planted = webvid_csv(tmp_path, rows)
    began = time.process_time()
    facts = open_dataset(table, 16).survey(show=False)
    assert facts["understood"] == "WebVid csv" and facts["listed"] == rows
    assert {**facts["dropped"], "": facts["kept"]} == planted and len(planted) == 11
    assert len(facts["files"]) == rows - facts["kept"] and facts["without_caption"] == 0
    assert time.process_time() - began < 60


def test_a_name_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """OpenCV crashes at one."""
    write(tmp_path / "a.mp4", moving(0)).rename(tmp_path / "caf\udce9.mp4")
    write(tmp_path / "café.mp4", moving(0))
    assert run(["check", str(tmp_path)]) == 0
    assert "caf\\udce9.mp4: its name is not UTF-8; rename it" in capsys.readouterr().out


def test_the_lying_header_of_a_real_file(shared_media) -> None:
    facts = open_dataset(shared_media("videos/tree.avi"), 16).survey(show=False)
    (entry,) = facts["files"]
    assert (entry["reason"], entry["detail"]) == ("short_of_header", "the header promises 444 frames, 68 decode")


def test_a_bad_file_is_opened_once(planted: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a second time in this run, nor in one that is given its quarantine list."""
    opened: list[str] = []
    scan = dataset.scan
    monkeypatch.setattr(dataset, "scan", lambda item: opened.append(item.name) or scan(item))
    data = open_dataset(folder_of(planted), 16, size=32)
    drawn = [data.sample(k)[0] for k in range(40)]
    assert len(opened) == len(set(opened)) and data.quarantine
    assert all(data.items[k].path in planted[""] for k in drawn)
    stored = json.loads(json.dumps(data.quarantine))
    opened.clear()
    again = open_dataset(folder_of(planted), 16, size=32, quarantine=stored)
    assert [again.sample(k)[0] for k in range(40)] == drawn  # known bad files change no draw
    assert not set(opened) & {entry["file"] for entry in stored} and again.quarantine == data.quarantine


def test_the_list_is_forgotten_when_the_file_or_the_rules_change(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"")
    data = open_dataset(tmp_path, 16)
    data.survey(show=False)
    assert [entry["reason"] for entry in data.quarantine] == ["empty"]
    write(path, moving(0))
    assert open_dataset(tmp_path, 16, quarantine=data.quarantine).survey(show=False)["kept"] == 1
    write(path, moving(0)[:9])
    data = open_dataset(tmp_path, 16)
    data.survey(show=False)
    assert [entry["reason"] for entry in data.quarantine] == ["too_short"]
    assert open_dataset(tmp_path, 8, quarantine=data.quarantine).survey(show=False)["kept"] == 1


def test_a_file_that_is_damaged_after_its_scan(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(0))
    data = open_dataset(tmp_path, 16, size=32)
    assert data.frames(0, 0).shape == (16, 32, 32, 3)
    path.write_bytes(b"")
    with pytest.raises(BadClip, match="empty"):
        data.frames(0, 1)
    assert [entry["reason"] for entry in data.quarantine] == ["empty"]


def test_a_file_that_is_replaced_by_another_good_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(0, 40))
    data = open_dataset(tmp_path, 16, size=32)
    before = {data.frames(0, draw).tobytes() for draw in range(6)}
    write(path, moving(1, 18))
    after = {data.frames(0, draw).tobytes() for draw in range(6)}
    assert not data.quarantine and not before & after


def test_scans_are_kept_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        write(tmp_path / f"{number}.mp4", moving(number))
    data = open_dataset(tmp_path, 16, size=32)
    one = data.plan(0)
    monkeypatch.setattr(dataset, "REMEMBERED", 3 * (one.times.nbytes + one.starts.nbytes) + 1)
    drawn = [data.frames(k, 0).tobytes() for k in range(6)]
    assert len(data._plans) == 3 and drawn == [data.frames(k, 0).tobytes() for k in range(6)]


def test_nothing_but_bad_files_ends_with_a_message(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"2 clips tried for sample 3, none can be used .*i2v.data check"):
        open_dataset(tmp_path, 16).sample(3)


def test_one_good_clip_among_many_bad_ones_is_found(tmp_path: Path) -> None:
    """By whatever sample: a hundred draws may all be bad."""
    for number in range(150):
        (tmp_path / f"{number:03}.mp4").write_bytes(b"<html>")
    write(tmp_path / "good.mp4", moving(0))
    data = open_dataset(tmp_path, 16, size=32)
    assert {data.items[data.sample(k)[0]].name for k in range(40)} == {"good.mp4"}


@pytest.mark.parametrize("sign", ["no folder", errno.ENOTCONN, errno.ESTALE, errno.EIO])
def test_a_disk_that_is_away_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str | int) -> None:
    """It is waited for, and nothing is set aside for good; whatever it is known by, and with bad files on it too."""
    folder, away, slept, stat = tmp_path / "clips", tmp_path / "away", list[float](), Path.stat
    for number in range(5):
        write(folder / f"{number}.mp4", moving(number))
    (folder / "page.mp4").write_text("<html>")
    data = open_dataset(folder, 16, size=32)
    data.survey(show=False)
    before = [data.sample(k)[0] for k in range(6)]

    def unreachable(path: Path, **options: Any) -> Any:
        if path.parent == folder:
            raise OSError(sign, "away")
        return stat(path, **options)

    def leave() -> None:
        folder.rename(away) if isinstance(sign, str) else monkeypatch.setattr(Path, "stat", unreachable)

    def back(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) == 11:
            away.rename(folder) if isinstance(sign, str) else monkeypatch.setattr(Path, "stat", stat)

    leave()
    monkeypatch.setattr(dataset.time, "sleep", back)
    assert [data.sample(k)[0] for k in range(6)] == before and sum(slept) == 1 + 10
    assert [entry["file"] for entry in data.quarantine] == ["page.mp4"]
    leave()
    slept.clear()
    monkeypatch.setattr(dataset.time, "sleep", slept.append)
    with pytest.raises(DataError, match=r"6 clips tried "):
        data.sample(0)
    assert sum(slept) == sum(dataset.PAUSES)


def test_a_disk_that_goes_while_a_clip_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", moving(0))
    data = open_dataset(tmp_path, 16, size=32)

    def scan(item: Item) -> Any:
        path.rename(tmp_path / "away")
        raise BadClip("unreadable", "cannot be opened as a video")

    monkeypatch.setattr(dataset, "scan", scan)
    monkeypatch.setattr(dataset, "PAUSES", ())
    with pytest.raises(DataError):
        data.sample(0)
    assert not data.quarantine


@pytest.mark.parametrize("listed, there", [(1000, 20), (100_000, 5000)])
def test_a_table_of_which_a_part_was_downloaded(monkeypatch: pytest.MonkeyPatch, listed: int, there: int) -> None:
    """The first rows, as where a download was stopped: each is drawn as often as the others."""

    def frames(data: dataset.Dataset, index: int, draw: int) -> Any:
        if index >= there:
            raise BadClip("missing", "no such file")

    monkeypatch.setattr(dataset.Dataset, "frames", frames)
    items = [Item(Path(f"{k}.mp4"), f"{k}.mp4", "", "video") for k in range(listed)]
    data = dataset.Dataset(Listing(Path("a.csv"), "csv table", items), Timing(16), 32, 32)
    drawn = Counter(data.sample(k)[0] * 20 // there for k in range(600))
    assert len(drawn) == 20 and max(drawn.values()) < 60


def test_draws_of_one_file_share_its_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that want it at once wait for the first of them."""
    write(tmp_path / "a.mp4", moving(0))
    scanned: list[str] = []
    scan = dataset.scan

    def slowly(item: Item) -> Any:
        scanned.append(item.name)
        time.sleep(0.05)
        return scan(item)

    monkeypatch.setattr(dataset, "scan", slowly)
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(open_dataset(tmp_path, 16).plan, [0] * 4))
    assert scanned == ["a.mp4"] and all(plan is plans[0] for plan in plans)


def test_unknown_filter() -> None:
    with pytest.raises(DataError, match="no filter 'cuts'"):
        open_dataset(".", 16, keep=["cuts"])


def test_pictures_alone_are_clips_of_one_frame(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(DataError, match="holds .*and a clip has 16 frames; give --num-frames 1"):
        open_dataset(tmp_path, 16)
    assert len(open_dataset(tmp_path, 1)) == 1


def test_a_run_that_is_stopped_reads_no_more(tmp_path: Path) -> None:
    """Threads that read ahead look at the signal before every clip: tries among bad files would outlast it."""
    write(tmp_path / "a.mp4", moving(0))
    data = open_dataset(tmp_path, 16, size=32)
    assert data.sample(0)[0] == 0
    data.stop = (15,)
    with pytest.raises(DataError, match="stopped before sample 1"):
        data.sample(1)


def test_ahead_keeps_the_order_and_stops_early() -> None:
    done: list[int] = []
    results = ahead(lambda k: done.append(k) or k * k, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()
    assert len(done) < 200
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda k: 1 / k, [1, 0]))


def test_check_says_what_it_found(planted: dict[str, list[Path]], capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(folder_of(planted))
    assert run(["check", folder]) == 0
    text = capsys.readouterr().out
    assert "folder of clips and pictures, 20 listed" in text and "16 frames, their own frames" in text
    assert "not_a_video          3" in text and "page.mp4: is a web page" in text
    assert run(["check", folder, "--json", "--num-frames", "8", "--fps", "4", "--keep", "static", "letterbox"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["clip"] == {"num_frames": 8, "fps": 4.0, "stride": 1}
    assert not {"static", "letterbox"} & set(facts["dropped"]) and facts["dropped"]["empty"] == 1


@pytest.mark.parametrize(
    "settings, flags",
    [
        ({}, ""),
        ({"stride": 3}, " --stride 3"),
        ({"num_frames": 8, "fps": 23.976, "keep": ["static", "cut"]}, " --num-frames 8 --fps 23.976 --keep cut static"),
    ],
)
def test_the_advice_is_a_command_under_the_same_rules(
    planted: dict[str, list[Path]], capsys: pytest.CaptureFixture[str], settings: dict[str, Any], flags: str
) -> None:
    data = open_dataset(folder_of(planted), **{"num_frames": 16, **settings})
    assert data.check == f"python -m i2v.data check {folder_of(planted)}{flags}"
    run([*shlex.split(data.check)[3:], "--json"])
    assert json.loads(capsys.readouterr().out) == data.survey(show=False)


def test_check_fails_where_nothing_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(8):
        (tmp_path / f"{k}.mp4").write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["check", "check", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "kept           0" in out and "4.mp4: the file has no bytes" in out and "and 3 more" in out

"""Settings come back from inside each file, or from the .json beside it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from i2v.media import animation, mp4
from i2v.media.text_inside import text_inside
from i2v.video import SettingsError, read_settings, settings_beside, write_video

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
SETTINGS = {
    "request": {"prompt": 'a "fox" <&> ü 狐 🦊\n\t]]>', "seed": 2**53, "t0": 1.0, "none": None},
    "long": "x" * 1000,
    "half": "\udc80",
}
NAMES = ["clip.mp4", "clip.gif", "clip.webp", "clip.png"]


@pytest.fixture(params=["with PyAV", "without PyAV"])
def encoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "with PyAV":
        pytest.importorskip("av")
    else:
        monkeypatch.setattr(mp4, "pyav", lambda: None)
        monkeypatch.setattr(animation, "pyav", lambda: None)


@pytest.mark.parametrize("name", NAMES)
def test_inside_and_beside(tmp_path: Path, name: str, encoder: None) -> None:
    path = write_video(tmp_path / name, FRAMES, 8, SETTINGS).path
    beside = settings_beside(path)
    assert read_settings(path) == read_settings(beside) == SETTINGS
    moved = tmp_path / ("moved" + path.suffix)
    shutil.copytree(path, moved) if path.is_dir() else shutil.copy(path, moved)
    if path.is_dir():  # every frame tells where it comes from
        (moved / "settings.json").unlink()
        moved = moved / "frame_0002.png"
    assert read_settings(moved) == SETTINGS
    beside.write_text(json.dumps({"from": "beside"}))
    if path.is_file():
        assert read_settings(path) == SETTINGS  # inside goes first


@pytest.mark.parametrize("name", NAMES)
def test_without_settings(tmp_path: Path, name: str, encoder: None) -> None:
    path = write_video(tmp_path / name, FRAMES, 8).path
    with pytest.raises(SettingsError, match="holds no settings"):
        read_settings(path)
    settings_beside(path).write_text(json.dumps({"from": "beside"}))
    assert read_settings(path) == {"from": "beside"}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_off_anywhere_gives_settings_or_none(tmp_path: Path, name: str, encoder: None) -> None:
    path = write_video(tmp_path / name, FRAMES[:1], 8, {"a": 1}).path
    data = (path / "frame_0000.png" if path.is_dir() else path).read_bytes()
    whole = text_inside(data)
    assert whole is not None and json.loads(whole) == {"a": 1}
    for end in range(0, len(data), 7):
        assert text_inside(data[:end]) in (None, "", whole) or whole.startswith(text_inside(data[:end]) or "")


def test_other_programs_see_the_text(tmp_path: Path) -> None:
    for name in NAMES[1:]:
        write_video(tmp_path / name, FRAMES, 8, {"a": "ü"})
    with Image.open(tmp_path / "clip.gif") as picture:
        assert json.loads(picture.info["comment"]) == {"a": "ü"}
    with Image.open(tmp_path / "clip.webp") as picture:
        assert b"dc:description" in picture.info["xmp"] and "ü".encode() in picture.info["xmp"]
    with Image.open(tmp_path / "clip" / "frame_0000.png") as picture:
        picture.load()
        assert json.loads(picture.text["Comment"]) == {"a": "ü"}


def test_what_holds_no_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        read_settings(tmp_path / "missing.mp4")
    Image.fromarray(FRAMES[0]).save(tmp_path / "x.gif", comment=b"made with love")
    with pytest.raises(SettingsError, match="neither inside nor in x.gif.json"):
        read_settings(tmp_path / "x.gif")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(SettingsError, match="x.json: holds no settings"):
        read_settings(tmp_path / "x.json")


def test_settings_are_read_where_pyav_is_not_installed(tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = write_video(tmp_path / "clip.mp4", FRAMES, 8, SETTINGS).path
    settings_beside(path).unlink()
    code = f"import sys; sys.modules['av'] = None\nfrom i2v.video import *\nprint(len(read_settings({str(path)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"

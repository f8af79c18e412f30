"""Clips come back from every format: all frames, their colours, the time they last; nothing half-written stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from i2v import video
from i2v.media import animation, mp4, output_file
from i2v.video import OutputError, OutputExists, check_output, read_settings, read_video, write_video

Y, X = np.mgrid[0:48, 0:64]
GRADIENT = np.stack([X * 4, Y * 5, 255 - X * 2 - Y], -1).clip(0, 255).astype(np.uint8)
# equal frames follow one another: animation encoders like to join them
FRAMES = np.stack([GRADIENT, GRADIENT, GRADIENT, np.roll(GRADIENT, 9, 1), np.roll(GRADIENT, 9, 1), GRADIENT[::-1]])
SETTINGS = {"prompt": 'ü <b> & "c"\n', "seed": 7, "scale": 1.5}
# mean error in levels of 255
BOUNDS = {"clip.mp4": 3.5, "clip.gif": 6.0, "clip.webp": 2.5, "clip.png": 0.0, "clip": 0.0}


@pytest.fixture(params=["with PyAV", "without PyAV"])
def encoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of encoding: PyAV installed or not."""
    if request.param == "with PyAV":
        pytest.importorskip("av")
    else:
        monkeypatch.setattr(mp4, "pyav", lambda: None)
        monkeypatch.setattr(animation, "pyav", lambda: None)
    return str(request.param)


@pytest.mark.parametrize("name", BOUNDS)
def test_round_trip(tmp_path: Path, name: str, encoder: str) -> None:
    written = write_video(tmp_path / name, FRAMES, 8, SETTINGS)
    back = read_video(written.path)
    assert back.shape == FRAMES.shape and written.frames == len(FRAMES)
    error = np.abs(back.astype(int) - FRAMES).mean()
    coarse = name == "clip.gif" and encoder == "without PyAV"
    assert error <= (20 if coarse else BOUNDS[name])
    assert np.abs(back.astype(int) - FRAMES[::-1]).mean() > 20 + error  # and not any frames would do
    assert written.codec == {"clip.mp4": "H.264", "clip.gif": "GIF", "clip.webp": "WebP"}.get(name, "PNG") or (
        encoder == "without PyAV" and written.codec == "VP9"
    )
    assert ("pip install av" in written.note) == (encoder == "without PyAV" and name in ("clip.mp4", "clip.gif"))


@pytest.mark.parametrize("name", ["t0_0.8.png", "12:30.mp4", "IMG.0001.webp"])
def test_names_with_dots_and_colons(tmp_path: Path, name: str, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = write_video(name, FRAMES, 8, SETTINGS)
    assert written.path == Path(name.removesuffix(".png")) == check_output(name, overwrite=True)
    assert read_video(written.path).shape == FRAMES.shape and read_settings(written.path) == SETTINGS
    with pytest.raises(OutputExists):
        write_video(name, FRAMES, 8, SETTINGS)
    write_video(name, FRAMES[:2], 8, SETTINGS, overwrite=True)
    assert len(read_video(written.path)) == 2


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp", "clip.png"])
def test_one_frame_and_odd_sides(tmp_path: Path, name: str, encoder: str) -> None:
    odd = FRAMES[:1, :47, :63]
    written = write_video(tmp_path / name, odd, 8)
    back = read_video(written.path)
    assert back.shape == ((1, 48, 64, 3) if name == "clip.mp4" else odd.shape)
    assert ("63x47 extended to 64x48" in written.note) == (name == "clip.mp4")
    assert np.abs(back[:, :47, :63].astype(int) - odd).mean() <= 20


@pytest.mark.parametrize("fps", [3, 8, 12.5, 30000 / 1001])
@pytest.mark.parametrize("name", ["clip.gif", "clip.webp"])
def test_animations_last_as_long_as_they_should(tmp_path: Path, name: str, fps: float, encoder: str) -> None:
    write_video(tmp_path / name, FRAMES, fps)
    with Image.open(tmp_path / name) as picture:
        assert picture.n_frames == len(FRAMES) and picture.info["loop"] == 0
        lengths = []
        for index in range(picture.n_frames):
            picture.seek(index)
            picture.load()
            lengths.append(picture.info["duration"])
    unit = 10 if name == "clip.gif" else 1
    assert abs(sum(lengths) - 1000 * len(FRAMES) / fps) <= unit
    assert max(lengths) - min(lengths) <= unit


def test_durations_never_stray() -> None:
    for fps in (Fraction(8), Fraction(30000, 1001), Fraction(7)):
        lengths = animation.durations(1000, fps, 100)
        sums = np.cumsum(lengths)
        assert np.abs(sums - 100 * np.arange(1, 1001) / float(fps)).max() <= 0.5 + 1e-9


def test_mp4_is_what_browsers_want(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    write_video(tmp_path / "clip.mp4", FRAMES, 8, SETTINGS)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, stream.frames, stream.average_rate) == ("h264", "yuv420p", 6, 8)
        assert (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range) == (1, 1, 1, 1)
        assert json.loads(container.metadata["comment"]) == SETTINGS
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it is loaded whole


def test_mp4_keeps_colours(tmp_path: Path) -> None:
    """Flat patches come back within a few levels; the matrix of standard definition would be off by more than 20."""
    av = pytest.importorskip("av")
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (128, 64, 32), (200, 180, 160), (0, 0, 0)]
    patches = np.zeros((2, 32, 32 * len(colours), 3), np.uint8)
    for index, colour in enumerate(colours):
        patches[:, :, 32 * index : 32 * index + 32] = colour
    write_video(tmp_path / "clip.mp4", patches, 8)
    middle = read_video(tmp_path / "clip.mp4")[1, 16, 16::32].astype(int)
    assert np.abs(middle - colours).max() <= 4
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frame = next(container.decode(video=0))
        wrong = frame.reformat(format="rgb24", src_colorspace=av.video.reformatter.Colorspace.ITU601).to_ndarray()
    assert np.abs(wrong[16, 16::32].astype(int) - colours).max() > 20


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    for name in BOUNDS:
        written = write_video(tmp_path / name, FRAMES[:1], 8) if name != "clip" else None
        before = written.path.read_bytes() if written and written.path.is_file() else None
        for attempt in (lambda: check_output(tmp_path / name), lambda: write_video(tmp_path / name, FRAMES, 8)):
            with pytest.raises(OutputExists, match="already exists.*--overwrite"):
                attempt()
        assert before is None or (tmp_path / name).read_bytes() == before
        assert len(read_video(write_video(tmp_path / name, FRAMES, 8, overwrite=True).path)) == len(FRAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "clip.gif", "clip.mp4", "clip.webp"]


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("when", ["before the work", "during the work"])
def test_another_name_where_one_was_taken_meanwhile(tmp_path: Path, name: str, when: str) -> None:
    ours, theirs, free = (tmp_path / name.replace("clip", stem) for stem in ("clip", "clip_2", "clip_3"))
    at_last = free.with_suffix("") if free.suffix == ".png" else free

    def take() -> None:
        write_video(ours, FRAMES[:1], 8, {"whose": "theirs"})
        place = check_output(theirs)
        (place.with_name(place.name + ".json") if place.suffix else place).write_text("{}")  # its settings, or a file

    def work() -> Iterator[np.ndarray]:
        if when == "during the work":
            take()
        yield from FRAMES

    if when == "before the work":
        take()
    written = write_video(ours, work(), 8, {"whose": "ours"}, instead=[theirs, free])
    assert written.path == at_last and len(read_video(at_last)) == len(FRAMES)
    assert read_settings(at_last) == {"whose": "ours"} and read_settings(check_output(ours, True)) == {
        "whose": "theirs"
    }
    if at_last.suffix:
        assert json.loads(at_last.with_name(at_last.name + ".json").read_text()) == {"whose": "ours"}
    assert not list(tmp_path.glob(".*")), "nothing is left of the temporary names"
    with pytest.raises(OutputExists, match=f"{check_output(ours, True).name} already exists"):
        write_video(ours, iter(FRAMES), 8, instead=[free])


def test_settings_of_an_older_clip_do_not_stay(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", FRAMES, 8, SETTINGS)
    with pytest.raises(OutputExists):
        write_video(tmp_path / "clip.mp4", FRAMES, 8)
    write_video(tmp_path / "clip.mp4", FRAMES, 8, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    (tmp_path / "other.mp4.json").write_text("somebody's notes")
    with pytest.raises(OutputExists, match="other.mp4.json"):
        write_video(tmp_path / "other.mp4", FRAMES, 8, SETTINGS)


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "wedding.png").write_bytes(b"dear")
    for name in ("photos", "photos.png"):
        with pytest.raises(OutputExists, match="other things in it .wedding.png"):
            write_video(tmp_path / name, FRAMES, 8, overwrite=True)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises((OutputExists, OutputError)):
        write_video(tmp_path / "folder.mp4", FRAMES, 8, overwrite=True)
    assert (tmp_path / "photos" / "wedding.png").read_bytes() == b"dear"
    (tmp_path / "empty").mkdir()
    assert len(read_video(write_video(tmp_path / "empty", FRAMES, 8).path)) == len(FRAMES)


def test_places_that_cannot_be_written_are_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown ending '.avi'; use .mp4, .gif, .webp, .png"):
        check_output(tmp_path / "clip.avi")
    for nameless in (".", "", "/", str(tmp_path / ".gif"), ".mp4"):
        with pytest.raises(ValueError, match=r"there is no name; name a file, such as .*clip\.mp4"):
            check_output(nameless)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="is not a folder"):
        check_output(tmp_path / "file" / "clip.mp4")
    with pytest.raises(OutputError, match="name another place"):
        check_output("/proc/clip.mp4")
    with pytest.raises(OutputError, match="name too long"):
        check_output(tmp_path / ("x" * 250 + ".mp4"))
    assert check_output(tmp_path / "new" / "folder" / "clip.mp4").parent.is_dir()
    assert check_output(tmp_path / "frames.png") == tmp_path / "frames"


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            check_output(tmp_path / "clip.mp4")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ValueError("odd")])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_video(tmp_path / name, FRAMES[:2], 8, {"take": 1}).path
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    def fail(path: Path, frames: np.ndarray, fps: Fraction, text: str | None) -> tuple[str, str]:
        (path / "frame_0000.png" if path.is_dir() else path).write_bytes(b"half a")
        raise error

    monkeypatch.setattr(video, "_write", fail)
    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_video(tmp_path / name, FRAMES, 8, {"take": 2}, overwrite=True)
    if expected is OutputError:
        assert f"{target} could not be written (No space left on device)" in str(caught.value)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before


LIMITED = """
import resource, sys
import numpy as np
from i2v.media import animation, mp4
from i2v.video import OutputError, write_video
if sys.argv[2] == "without":
    mp4.pyav = animation.pyav = lambda: None
frames = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
for name in ("clip.mp4", "clip.gif", "clip.webp", "clip.png"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    try:
        write_video(f"{sys.argv[1]}/{name}", frames, 8, {"a": 1})
    except OutputError as error:
        print(name, error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes")
@pytest.mark.parametrize("pyav", ["with", "without"])
def test_a_disk_that_fills_up_is_said_and_leaves_nothing(tmp_path: Path, pyav: str) -> None:
    """A limit on file sizes stops real writes in the middle, those of the codecs' own code too."""
    if pyav == "with":
        pytest.importorskip("av")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), pyav], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["clip.mp4", "clip.gif", "clip.webp", "clip.png"]
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import sys
import numpy as np
from i2v.video import write_video
frames = np.random.default_rng(0).integers(0, 256, (400, 128, 128, 3), dtype=np.uint8)
print("start", flush=True)
write_video(sys.argv[1], frames, 8, {"a": 1})
"""


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av")
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "clip.mp4")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline() == b"start\n"
        while not any(tmp_path.glob("*.part.mp4")) and process.poll() is None:
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [False, True])
def test_ctrl_c_at_the_moment_of_making_leaves_nothing(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file or folder is there, and nothing that follows is reached."""
    made = output_file._make

    def make_and_stop(path: Path, folder: bool) -> None:
        made(path, folder)
        assert path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(output_file, "_make", make_and_stop)
    with pytest.raises(KeyboardInterrupt), output_file.whole_or_nothing(tmp_path / "clip.mp4", folder):
        pass
    with pytest.raises(KeyboardInterrupt):
        output_file.check_place(tmp_path / "clip.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frames, fps, words",
    [
        (FRAMES.astype(np.float32), 8, "float32"),
        (FRAMES[0], 8, r"\(48, 64, 3\); expected a uint8 array"),
        (FRAMES[:0], 8, "nothing to write"),
        ([1], 8, "list"),
        (FRAMES, 0, "fps is 0"),
        (FRAMES, float("nan"), "fps is nan"),
        (FRAMES, 60, "a GIF shows at most 50"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, frames: np.ndarray, fps: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_video(tmp_path / "clip.gif", frames, fps)
    with pytest.raises(ValueError, match="cannot be stored as JSON"):
        write_video(tmp_path / "clip.gif", FRAMES, 8, {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_lost_frame_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp4, "count_frames", lambda path: 5)
    with pytest.raises(OutputError, match="5 of 6 frames were written"):
        write_video(tmp_path / "clip.mp4", FRAMES, 8)
    assert list(tmp_path.iterdir()) == []


def test_files_are_readable_for_others(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        path = write_video(tmp_path / "clip.webp", FRAMES, 8, SETTINGS).path
        folder = write_video(tmp_path / "clip", FRAMES, 8).path
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o644 and folder.stat().st_mode & 0o777 == 0o755


def test_a_real_clip_survives(tmp_path: Path, shared_media: Callable[[str], Path]) -> None:
    pytest.importorskip("av")
    clip = read_video(shared_media("videos/earth.mp4"), count=16, stride=8)
    write_video(tmp_path / "clip.mp4", clip, 8)
    back = read_video(tmp_path / "clip.mp4")
    assert back.shape == clip.shape and cv2.PSNR(back.reshape(-1, 480, 3), clip.reshape(-1, 480, 3)) > 32


def test_an_encoder_that_is_missing_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV with an FFmpeg that has no x264 writes VP9 and says so; where OpenCV has no VP9 either, nothing is begun."""
    av = pytest.importorskip("av")
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    assert check_output(tmp_path / "x.mp4") == tmp_path / "x.mp4" and not list(tmp_path.iterdir())
    written = write_video(tmp_path / "x.mp4", FRAMES, 8)
    assert written.codec == "VP9" and "PyAV was built without x264" in written.note
    broken = SimpleNamespace(VideoWriter=lambda *given: SimpleNamespace(isOpened=lambda: False), __version__="5")
    broken.VideoWriter.fourcc = lambda *given: 0  # type: ignore[attr-defined]
    monkeypatch.setattr(mp4, "cv2", broken)
    with pytest.raises(OutputError, match="cannot encode VP9: pip install av"):
        check_output(tmp_path / "y.mp4")
    assert check_output(tmp_path / "y.webp") == tmp_path / "y.webp"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.mp4"]

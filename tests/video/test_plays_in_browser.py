"""What is written plays in a real browser: headless Chromium opens it in real time and reports what it saw."""

from __future__ import annotations

import base64
import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from i2v.media import animation, mp4
from i2v.video import write_video

pytestmark = pytest.mark.slow
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip
TELL = "const tell = (found) => fetch('/saw', {method: 'POST', body: JSON.stringify(found)});"
PLAYER = """<!doctype html><video id=v src="FILE" muted></video><script>TELL
const v = document.getElementById("v");
const now = (state) => tell({state, width: v.videoWidth, height: v.videoHeight, duration: v.duration,
  time: v.currentTime, shown: v.getVideoPlaybackQuality().totalVideoFrames});
v.onerror = () => now("error " + v.error.message);
v.onended = () => now("ended");
v.play().catch((e) => now("refused " + e));
</script>"""
IMAGE = """<!doctype html><script>TELL
(async () => {
  const image = new Image();
  image.src = "FILE";
  await image.decode();
  const found = {state: "shown", width: image.naturalWidth, height: image.naturalHeight, time: 0};
  const bytes = Uint8Array.from(atob("BASE64"), (c) => c.charCodeAt(0));
  const decoder = new ImageDecoder({data: bytes, type: "TYPE"});
  await decoder.tracks.ready;
  await decoder.completed;
  const track = decoder.tracks.selectedTrack;
  found.frames = track.frameCount;
  found.loops = String(track.repetitionCount);
  for (let i = 0; i < found.frames; i++) found.time += (await decoder.decode({frameIndex: i})).image.duration / 1e6;
  tell(found);
})().catch((e) => tell({state: "error " + e}));
</script>"""


class Answers(SimpleHTTPRequestHandler):
    """Serves a folder and puts what a page posts into a queue."""

    def __init__(self, *args: object, saw: queue.Queue, **options: object) -> None:
        self.saw = saw
        super().__init__(*args, **options)  # type: ignore[arg-type]

    def do_POST(self) -> None:
        self.saw.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def saw(tmp_path: Path) -> Iterator[Callable[[str], dict]]:
    """`saw("page.html")`: what that page, opened in Chromium, reports within half a minute."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    answers: queue.Queue = queue.Queue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Answers, directory=str(tmp_path), saw=answers))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    processes = []

    def open_page(name: str) -> dict:
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", url]
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return answers.get(timeout=30)

    yield open_page
    for process in processes:
        process.terminate()
        process.wait(timeout=30)
    server.shutdown()


@pytest.fixture
def frames() -> np.ndarray:
    y, x = np.mgrid[0:64, 0:64]
    picture = np.stack([x * 4, y * 4, 255 - x * 4], -1).astype(np.uint8)
    return np.stack([picture, picture, *(np.roll(picture, 8 * k, 1) for k in range(1, 7))])


@pytest.mark.parametrize("pyav", [True, False])
def test_mp4_plays_to_its_end(
    saw: Callable[[str], dict], frames: np.ndarray, tmp_path: Path, pyav: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pyav:
        pytest.importorskip("av")
    else:
        monkeypatch.setattr(mp4, "pyav", lambda: None)
    written = write_video(tmp_path / "clip.mp4", frames, 8, {"prompt": "x"})
    assert written.codec == ("H.264" if pyav else "VP9")
    (tmp_path / "page.html").write_text(PLAYER.replace("TELL", TELL).replace("FILE", "clip.mp4"))
    seen = saw("page.html")
    assert (seen["state"], seen["width"], seen["height"]) == ("ended", 64, 64), seen
    assert abs(seen["duration"] - 1) < 0.01 and seen["time"] == seen["duration"] and seen["shown"] >= 7, seen


@pytest.mark.parametrize("pyav", [True, False])
@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animations_show_every_frame(
    saw: Callable[[str], dict],
    frames: np.ndarray,
    tmp_path: Path,
    kind: str,
    pyav: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if pyav:
        pytest.importorskip("av")
    else:
        monkeypatch.setattr(animation, "pyav", lambda: None)
    path = write_video(tmp_path / f"clip.{kind}", frames, 8, {"prompt": "x"}).path
    page = IMAGE.replace("TELL", TELL).replace("FILE", path.name).replace("TYPE", f"image/{kind}")
    (tmp_path / "page.html").write_text(page.replace("BASE64", base64.b64encode(path.read_bytes()).decode()))
    seen = saw("page.html")
    assert (seen["state"], seen["width"], seen["height"]) == ("shown", 64, 64), seen
    assert seen["frames"] == len(frames) and abs(seen["time"] - 1) < 0.011 and seen["loops"] == "Infinity"


def test_a_file_that_does_not_play_is_noticed(saw: Callable[[str], dict], frames: np.ndarray, tmp_path: Path) -> None:
    """The check itself: MPEG-4 part 2, which OpenCV's "mp4v" makes, plays in no browser."""
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 8, (64, 64))
    for frame in frames:
        writer.write(frame)
    writer.release()
    (tmp_path / "page.html").write_text(PLAYER.replace("TELL", TELL).replace("FILE", "clip.mp4"))
    assert saw("page.html")["state"].startswith(("error", "refused"))

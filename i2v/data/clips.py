"""Decoding clips by time: when each frame is shown counts, not its number and not what the header promises.

Nothing goes on for ever: only ordinary files are opened, and one is decoded up to a budget of frames and pixels.
"""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from i2v.data.folders import BadClip, Item, kind_inside
from i2v.media.picture_file import MAX_PIXELS, PictureError, read_image
from i2v.media.picture_header import BrokenPicture, read_header
from i2v.media.quiet import quiet_opencv
from i2v.picture import fit

MAX_FRAMES = 18_000  # of one file, 10 minutes at 30 frames per second; what comes later is not used
MAX_DECODED = 8_000_000_000  # pixels of one file: 34,000 frames of 640x360, 960 of 4K
MAX_STALL = 60.0  # seconds for one frame; a busy machine is slow in all frames, a broken disk or file in one
SHOWN = 0.9  # of the frames that the header promises must decode
COUNTED = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"AVI ")  # of mp4, mov, avi: their headers count the frames
WIDEST = 8  # times the shorter side; scaled to cover a clip, a longer strip would be thousands of pixels long
SMALL, LARGE = 32, 96  # sides of the reduced frames that the filters look at

Decoded = tuple[float, NDArray[np.uint8], tuple[float, float]]


@dataclass(frozen=True)
class Timing:
    """Which frames make a clip: `num_frames` of them, `stride` / `fps` seconds apart (fps None: the file's own)."""

    num_frames: int
    fps: float | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.stride < 1 or (self.fps is not None and not 0 < self.fps <= 1000):
            raise ValueError(
                f"num_frames={self.num_frames}, fps={self.fps}, stride={self.stride}: expected num_frames and stride "
                "from 1, fps above 0 or none for the clips' own"
            )

    def step(self, times: NDArray[np.float64]) -> float:
        """Seconds between two frames of a clip from a file whose frames are shown at `times`."""
        return self.stride / self.fps if self.fps is not None else self.stride * interval(times)


@dataclass(frozen=True)
class Scan:
    """What one decoding of a whole file shows, N frames.

    times: (N,) seconds from the first frame on, rising
    small: (N, 32, 32, 3) uint8, each frame averaged down; aspect ratio ignored
    low, high: (96, 96, 3) uint8, darkest and brightest value over time
    height, width: of the file's frames
    """

    times: NDArray[np.float64]
    small: NDArray[np.uint8]
    low: NDArray[np.uint8]
    high: NDArray[np.uint8]
    height: int
    width: int


def interval(times: NDArray[np.float64]) -> float:
    """Seconds from a frame to the next, the median; 0 for a single frame."""
    return float(np.median(np.diff(times))) if len(times) > 1 else 0.0


def scan(item: Item) -> Scan:
    """Decodes the file once. Raises `BadClip` for one that is missing, damaged, or not what its name says."""
    times: list[float] = []
    small: list[NDArray[np.uint8]] = []
    low = high = first = None
    promised = lasting = 0.0
    for seconds, frame, says in decode(item):
        promised, lasting = says
        first = frame.shape if first is None else first
        if max(first[:2]) > WIDEST * min(first[:2]):
            raise BadClip(
                "too_large", f"frames of {_size(first)}, a side more than {WIDEST} times as long as the other"
            )
        if frame.shape != first:
            raise BadClip("unreadable", f"frame {len(times)} is {_size(frame.shape)}, the first one {_size(first)}")
        large = _reduced(frame, LARGE)
        low = large if low is None else np.minimum(low, large)
        high = large if high is None else np.maximum(high, large)
        times.append(seconds)
        small.append(_reduced(large, SMALL))
    if first is None or low is None or high is None:
        raise BadClip("unreadable", "no frame can be decoded; the file is damaged or cut off")
    lasts = times[-1] - times[0] + interval(np.asarray(times))
    if len(times) < SHOWN * promised and lasts < SHOWN * lasting:  # others give time x rate
        raise BadClip("short_of_header", f"the header promises {promised:.0f} frames, {len(times)} decode")
    if len(times) < promised:  # cut off near its end: the last frame may be half a frame
        times, small = times[:-1] or times, small[:-1] or small
    shown = np.asarray(times, np.float64)
    return Scan(shown - shown[0], np.stack(small), low, high, first[0], first[1])


def _reduced(frame: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def read_frames(item: Item, indices: NDArray[np.int64], height: int, width: int) -> NDArray[np.uint8]:
    """The frames with these rising numbers, covering (height, width), middle kept: (F, height, width, 3) uint8 RGB.

    Raises `BadClip` when the file has changed since it was scanned.
    """
    wanted, found = iter(indices.tolist()), list[NDArray[np.uint8]]()
    following = next(wanted)
    for number, (_, frame, _) in enumerate(decode(item, indices)):
        if following == number:
            picture = fit(frame, height, width)
        while following == number:  # a frame may be wanted twice
            found.append(picture)
            following = next(wanted, -1)
        if following < 0:
            return np.stack(found)
    raise BadClip("unreadable", f"frame {following} could be decoded before and cannot be now")


def decode(item: Item, only: NDArray[np.int64] | None = None) -> Iterator[Decoded]:
    """(seconds, frame (H, W, 3) RGB, (frames, seconds) that the header promises), within the budgets.

    The seconds are infinite where the header counts the frames, and is measured by them alone.
    only: numbers of the frames that are looked at; the others come as they may, sooner. Raises `BadClip`.
    """
    head = _head(item)
    kind = kind_inside(item.path) if item.kind == "picture" else item.kind
    if kind != "video" or head.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"BM")):
        yield from _picture(item)
        return
    if head[:1] == b"<":
        raise BadClip("not_a_video", "is a web page (was an error page saved instead of the file?)")
    if b"\0" not in head and not head.startswith(b"YUV4MPEG"):
        raise BadClip("not_a_video", "is text")
    try:
        with quiet_opencv():
            counted = head[4:8] in COUNTED or head[8:12] in COUNTED
            yield from _video(item, None if only is None else set(only.tolist()), counted)
    except cv2.error as error:
        raise BadClip("unreadable", f"OpenCV cannot decode it ({error.err})") from error


def _head(item: Item) -> bytes:
    if item.fault is not None:
        raise item.fault
    path = item.path
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # OpenCV would crash
        raise BadClip("unreadable", "its name is not UTF-8; rename it") from error
    try:
        if not path.is_file():
            raise BadClip("missing", "no such file" if not path.exists() else "is not an ordinary file")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):  # its disk or server, not the file
            raise BadClip("missing", f"cannot be reached ({error.strerror})") from error
        raise BadClip("unreadable", f"cannot be read ({error.strerror}); touch it once it can") from error
    if not head:
        raise BadClip("empty", "the file has no bytes")
    if not any(head):
        raise BadClip("unreadable", "begins with 512 zero bytes; the download was not finished")
    return head.lstrip()


def _picture(item: Item) -> Iterator[Decoded]:
    if item.kind == "video":
        try:
            header = read_header(item.path.read_bytes())
        except (BrokenPicture, OSError):
            header = None
        raise BadClip("not_a_video", f"is a {header.kind if header else 'damaged'} picture under the name of a video")
    try:
        yield 0.0, read_image(item.path), (1.0, 0.0)
    except PictureError as error:
        raise BadClip("unreadable", str(error).removeprefix(f"{item.path}: ")) from error


def _video(item: Item, only: set[int] | None, counted: bool) -> Iterator[Decoded]:
    limit = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 30_000, cv2.CAP_PROP_READ_TIMEOUT_MSEC, 30_000]
    limit += [cv2.CAP_PROP_N_THREADS, 1]  # many files are decoded at once instead
    capture = cv2.VideoCapture(os.path.abspath(item.path), cv2.CAP_FFMPEG, limit)  # "10:30.mp4" is no protocol
    try:
        if not capture.isOpened():
            raise BadClip("unreadable", "cannot be opened as a video; it is cut off, damaged or of an unknown kind")
        pixels = capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
        if pixels > MAX_PIXELS:
            raise BadClip("too_large", f"frames of {pixels / 1e6:.0f} million pixels")
        promised, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
        most = int(min(MAX_FRAMES, MAX_DECODED // max(pixels, 1)))
        promised = min(promised, most)
        lasting = math.inf if counted or not 0 < fps <= 1000 else promised / fps
        began, last = time.monotonic(), -1.0
        frame = np.zeros((1, 1, 3), np.uint8)
        for number in range(most):
            if not capture.grab():
                return
            if time.monotonic() - began > MAX_STALL:
                raise BadClip("timeout", f"frame {number} took more than {MAX_STALL:.0f} s")
            seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if not seconds > last:  # formats without time stamps
                seconds = last + 1 / (fps if 0 < fps <= 1000 else 25.0) if number else 0.0
            last = seconds
            if only is None or number in only:
                done, decoded = capture.retrieve()
                if not done:
                    return
                frame = np.ascontiguousarray(_rgb(decoded))
            yield seconds, frame, (promised, lasting)
            began = time.monotonic()
    finally:
        capture.release()


def _rgb(frame: NDArray[Any]) -> NDArray[np.uint8]:
    return np.asarray(np.repeat(frame[..., None], 3, axis=2) if frame.ndim == 2 else frame[..., 2::-1], np.uint8)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
